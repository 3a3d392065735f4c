"""Which layers are quantized, by each producer's own patterns; several schemes in one checkpoint; KV-cache scales."""

import checkpoint_writer as w
import pytest
import test_checkpoints_schemes as s
import torch

import moe_ops
from moe_ops import QuantizedExperts, QuantizedLinear
from moe_ops.checkpoints import find_reader
from moe_ops.checkpoints.kv import kv_scales
from moe_ops.storage import QuantizedModule

pytestmark = pytest.mark.swap
BASE = w.QWEN  # one layer, per-expert names


def formats(model):
    return {n: m.format for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def load(tmp_path, settings, make, base=BASE, **more):
    tensors, values = w.quantized(w.float_tensors(base), make)
    model = moe_ops.load_quantized(w.write(tmp_path, base, {**tensors, **more}, settings))
    w.assert_values(model, values)
    return model


def by_module(choose):
    def make(module):
        return choose(module)

    make.by_module = True
    return make


def without(part, make):
    return by_module(lambda module: None if part in module else make)


MX4 = s.MX4
CT, MODELOPT = s.COMPRESSED_TENSORS, s.MODELOPT
CT_MX4, FINE, MX8 = CT["MXFP4A16"][1], s.FINE_GRAINED["fp32"][1], MODELOPT["MXFP8"][1]
ATTENTION = "model.layers.0.self_attn"
PROJECTIONS = [f"{p}_proj" for p in "qkvo"]
SKIPS = {
    "ct_regex": ({**s.preset("MXFP4A16"), "ignore": ["lm_head", "re:.*self_attn.*"]}, CT_MX4),
    "ct_exact": ({**s.preset("MXFP4A16"), "ignore": ["lm_head", *(f"{ATTENTION}.{p}" for p in PROJECTIONS)]}, CT_MX4),
    "ct_targets": (None, CT_MX4),
    "quark_glob": (s.quark(s.spec("fp4"), None, exclude=["lm_head", "*self_attn*"]), MX4),
    "quark_suffix": (s.quark(s.spec("fp4"), None, exclude=["lm_head", *PROJECTIONS[:3], "self_attn.o_proj"]), MX4),
    "hf_prefix": ({**s.FINE, "modules_to_not_convert": ["lm_head", ATTENTION]}, FINE),
    "hf_regex": ({**s.FINE, "modules_to_not_convert": ["lm_head", "model.layers.*.self_attn"]}, FINE),
    "hf_suffix": ({**s.FINE, "modules_to_not_convert": ["lm_head", *PROJECTIONS]}, FINE),
    "modelopt_glob": (s.modelopt("MXFP8", ignore=["lm_head", "*self_attn*"]), MX8),
    "modelopt_module": (s.modelopt("MXFP8", ignore=["lm_head", ATTENTION]), MX8),
}  # fmt: skip
targets = s.preset("MXFP4A16")
targets["config_groups"]["group_0"]["targets"] = [r"re:.*mlp.experts.\d+.(gate|up|down)_proj$"]
SKIPS["ct_targets"] = (targets, SKIPS["ct_targets"][1])


@pytest.mark.parametrize("rule", SKIPS)
def test_attention_left_in_float(rule, tmp_path):
    settings, make = SKIPS[rule]
    model = load(tmp_path, settings, without("self_attn", make))
    assert set(formats(model)) == {"model.layers.0.mlp.experts"}


NEAR = {
    "hf": ({**s.FINE, "modules_to_not_convert": ["model.layers.0.self", "layers.0.self_attn.q", "attn"]}, "q_proj"),
    "modelopt": (s.modelopt("MXFP8", ignore=["model.layers.0.self", "self_attn"]), "q_proj"),
    "quark": (s.quark(s.spec("fp4"), None, exclude=["attn", "proj", "model.layers.0.self_attn"]), "q_proj"),
    "ct": ({**s.preset("MXFP4A16"), "ignore": ["re:self_attn", "q_proj", "model.layers.0.self_attn"]}, "q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("producer", NEAR)
def test_patterns_that_nearly_match_do_not(producer):
    """A pattern for "proj" is not one for "q_proj": each producer's borders of names."""
    settings, leaf = NEAR[producer]
    reader = find_reader({"quantization_config": settings}, lambda name: None)
    name = f"model.layers.0.self_attn.{leaf}"
    assert reader.scheme((name, name), "linear") is not None


def two_groups():
    """Experts in one format, attention in another: config groups with targets of three kinds."""
    settings = s.preset("MXFP4A16")
    attention = s.preset("FP8_DYNAMIC")["config_groups"]["group_0"]
    settings["config_groups"]["group_0"]["targets"] = ["Linear"]
    settings["config_groups"]["group_1"] = {**attention, "targets": ["re:.*self_attn.[qkv]_proj"]}
    settings["config_groups"]["group_2"] = {**s.preset("MXFP8")["config_groups"]["group_0"],
                                            "targets": ["model.layers.0.self_attn.q_proj"]}  # fmt: skip
    return settings


def quark_layers():
    fp8 = {"weight": s.spec("fp8_e4m3", "per_channel"), "input_tensors": s.spec("fp8_e4m3", "per_channel", True)}
    mx8 = {"weight": s.spec("fp8_e4m3"), "input_tensors": s.spec("fp8_e4m3", dynamic=True)}
    return s.quark(s.spec("fp4"), None, layer_quant_config={"*q_proj": mx8, "*.self_attn.[kv]_proj": fp8})


def modelopt_layers():
    layers = {f"model.layers.0.mlp.experts.{e}.{p}_proj": {"quant_algo": "NVFP4", "group_size": 16}
              for e in range(4) for p in ("gate", "up", "down")}  # fmt: skip
    layers |= {f"model.layers.0.self_attn.{p}_proj": {"quant_algo": "MXFP8"} for p in "qk"}
    return s.modelopt("MIXED_PRECISION", quantized_layers=layers)


MIXED = {
    "ct": (two_groups(), {"q_proj": CT["MXFP8"][1], "k_proj": CT["FP8_DYNAMIC"][1], "v_proj": CT["FP8_DYNAMIC"][1],
                          "o_proj": CT["MXFP4A16"][1], "experts": CT["MXFP4A16"][1]},
           {"q_proj": "mxfp8", "k_proj": "fp8", "v_proj": "fp8", "o_proj": "mxfp4", "experts": "mxfp4"}),
    "quark": (quark_layers(), {"q_proj": s.QUARK["mxfp8"][1], "k_proj": s.QUARK["ptpc_fp8"][1],
                               "v_proj": s.QUARK["ptpc_fp8"][1], "o_proj": MX4, "experts": MX4},
              {"q_proj": "mxfp8", "k_proj": "fp8", "v_proj": "fp8", "o_proj": "mxfp4", "experts": "mxfp4"}),
    "modelopt": (modelopt_layers(), {"q_proj": MODELOPT["MXFP8"][1], "k_proj": MODELOPT["MXFP8"][1],
                                     "experts": MODELOPT["NVFP4"][1]},
                 {"q_proj": "mxfp8", "k_proj": "mxfp8", "experts": "nvfp4"}),
}  # fmt: skip


@pytest.mark.parametrize("producer", MIXED)
def test_mixed_precision(producer, tmp_path):
    settings, schemes, want = MIXED[producer]
    make = by_module(lambda m: schemes.get("experts" if ".experts." in m else m.rpartition(".")[2]))
    got = formats(load(tmp_path, settings, make))
    assert got == {"model.layers.0.mlp.experts" if k == "experts" else f"{ATTENTION}.{k}": f for k, f in want.items()}


def test_experts_that_stay_float(tmp_path):
    """One layer's experts are excluded: unfused, in bf16, between quantized ones, with rows that alternate."""
    tensors, values = w.quantized(w.unfused(w.float_tensors(w.GPT_OSS)), without("layers.1.mlp", MX4))
    settings = s.quark(s.spec("fp4"), None, exclude=["lm_head", "*router", "*layers.1.mlp*"])
    model = moe_ops.load_quantized(w.write(tmp_path, w.GPT_OSS, tensors, settings))
    w.assert_values(model, values)
    given = w.float_tensors(w.GPT_OSS)
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(model.get_parameter(key), given[key])


def test_a_head_that_is_quantized_is_dequantized(tmp_path):
    tensors, values = w.quantized(w.float_tensors(BASE), MX4, lambda k: w.is_linear(k) or k == "lm_head.weight")
    settings = s.quark(s.spec("fp4"), None, exclude=[])
    model = moe_ops.load_quantized(w.write(tmp_path, BASE, tensors, settings))
    head = values.pop("lm_head")
    assert type(model.lm_head) is torch.nn.Linear and torch.equal(model.lm_head.weight.float(), head)
    w.assert_values(model, values)
    row = next(r for r in moe_ops.summary(model).rows if r.name == "lm_head")
    assert row.note == "stored as mxfp4, dequantized"


def test_experts_in_two_formats_are_refused(tmp_path):
    settings = s.quark(s.spec("fp4"), None, layer_quant_config={"*experts.2.up_proj": s.quark(s.spec("fp8_e4m3"), None)
                       ["global_quant_config"]})  # fmt: skip
    make = by_module(lambda m: s.QUARK["mxfp8"][1] if m.endswith("experts.2.up_proj") else MX4)
    with pytest.raises(ValueError, match=r"several ways .*experts.0.gate_proj: mxfp4, .*experts.2.up_proj: mxfp8/bf16"):
        load(tmp_path, settings, make)


def test_projections_in_two_formats_are_refused(tmp_path):
    settings = s.quark(s.spec("fp4"), None, exclude=["lm_head", "*down_proj"])
    with pytest.raises(ValueError, match="gate_up_proj is mxfp4, down_proj float; experts have one format"):
        load(tmp_path, settings, without("down_proj", MX4))


def test_uncalibrated_experts_get_the_largest_scale(tmp_path):
    tensors, _ = w.quantized(w.float_tensors(BASE), MODELOPT["NVFP4"][1])
    scales = {k: t.item() for k, t in tensors.items() if "experts" in k and k.endswith("down_proj.input_scale")}
    lost = "model.layers.0.mlp.experts.2.down_proj.input_scale"
    del tensors[lost]
    path = w.write(tmp_path, BASE, tensors, MODELOPT["NVFP4"][0])
    with pytest.warns(UserWarning, match=r"down_proj: experts \[2\] have no input_scale"):
        model = moe_ops.load_quantized(path)
    largest = max(v for k, v in scales.items() if k != lost)
    experts = next(m for m in model.modules() if isinstance(m, QuantizedExperts))
    assert experts.part("down_proj", "input_scale")[2].item() == largest


KV_NAMES = {
    "quark": ("k_proj.output_scale", "v_proj.output_scale"), "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
    "ct": ("k_scale", "v_scale"), "engine": ("attn.k_scale", "attn.v_scale"),
}  # fmt: skip


@pytest.mark.parametrize("names", KV_NAMES)
def test_kv_scales_by_every_name(names, tmp_path):
    k, v = (f"{ATTENTION}.{n}" for n in KV_NAMES[names])
    scales = {k: torch.tensor(0.5), v: torch.tensor([0.25])}
    model = load(tmp_path, s.quark(s.spec("fp4"), None), MX4, **scales)
    assert kv_scales(model) == {ATTENTION: (0.5, 0.25)}


@pytest.mark.parametrize("name", ["k_scale", "v_scale", "kv_scale"])
def test_one_kv_scale_holds_for_both(name, tmp_path):
    model = load(tmp_path, s.quark(s.spec("fp4"), None), MX4, **{f"{ATTENTION}.{name}": torch.tensor(0.5)})
    assert kv_scales(model) == {ATTENTION: (0.5, 0.5)}


@pytest.mark.parametrize("key, value, message", [
    ("k_scale", 0.0, "above 0"), ("k_scale", -1.0, "above 0"), ("v_scale", float("nan"), "above 0"),
    ("k_proj.output_scale", float("inf"), "above 0"),
])  # fmt: skip
def test_kv_scales_that_cannot_be(key, value, message, tmp_path):
    with pytest.raises(ValueError, match=f"{ATTENTION}.{key} must be one finite number {message}"):
        load(tmp_path, s.quark(s.spec("fp4"), None), MX4, **{f"{ATTENTION}.{key}": torch.tensor(value)})


def test_kv_scales_of_no_module(tmp_path):
    with pytest.raises(ValueError, match="no such attention module"):
        load(tmp_path, s.quark(s.spec("fp4"), None), MX4, **{"model.layers.7.self_attn.k_scale": torch.tensor(1.0)})


def test_scales_of_fp8_attention_are_named(tmp_path):
    with pytest.warns(UserWarning, match="q_scale"):
        load(tmp_path, s.quark(s.spec("fp4"), None), MX4, **{f"{ATTENTION}.q_scale": torch.tensor(1.0)})


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())


def plain_checkpoint(tmp_path, model):
    tensors, values = w.quantized(model.state_dict(), MX4)
    return w.write(tmp_path, BASE, tensors, s.quark(s.spec("fp4"), None)), values


def test_a_model_in_plain_pytorch(tmp_path):
    """No transformers in it: names are what they are."""
    path, values = plain_checkpoint(tmp_path, torch.nn.ModuleDict({"mlp": Mlp(), "norm": torch.nn.LayerNorm(64)}))
    model = torch.nn.ModuleDict({"mlp": Mlp(), "norm": torch.nn.LayerNorm(64)})
    w.assert_values(moe_ops.load_quantized(path, model=model), values)
    x = torch.randn(3, 64)
    want = (x @ values["mlp.up_proj"].T).relu() @ values["mlp.down_proj"].T
    torch.testing.assert_close(model["mlp"](x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_experts_that_no_rule_reads_are_not_expanded(tmp_path):
    """A list of experts: in float they would take four times the memory, in silence. Its Linears stay quantized."""
    model = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([Mlp(), Mlp()])})
    path, values = plain_checkpoint(tmp_path, model)
    w.assert_values(moe_ops.load_quantized(path, model=model), values)
    linears = [model.get_submodule(f"experts.{e}.{name}") for e in range(2) for name in ("up_proj", "down_proj")]
    assert all(isinstance(m, QuantizedLinear) and m.format == "mxfp4" for m in linears)


def test_tied_embeddings(tmp_path):
    tensors, values = w.quantized(w.float_tensors(BASE), MX4)
    del tensors["lm_head.weight"]
    path = w.write(tmp_path, BASE, tensors, s.quark(s.spec("fp4"), None), tie_word_embeddings=True)
    model = moe_ops.load_quantized(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
    w.assert_values(model, values)


def test_biases_of_linears(tmp_path):
    """GPT-OSS: attention with biases, in bf16, beside quantized weights."""
    tensors, _ = w.quantized(w.unfused(w.float_tensors(w.GPT_OSS)), MX4)
    model = moe_ops.load_quantized(w.write(tmp_path, w.GPT_OSS, tensors, s.quark(s.spec("fp4"), None)))
    for name, m in model.named_modules():
        if isinstance(m, QuantizedLinear):
            assert torch.equal(m.bias, tensors[f"{name}.bias"])

"""LoRA on quantized Linears, what quantized modules refuse of PEFT, and adapters that do not fit."""

import copy
import subprocess
import sys

import lora_cases as cases
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

import moe_ops
from moe_ops.formats import FORMATS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*", "ignore:.*Could not find a config file.*"
)
LINEARS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": None}


def linears(fmt="fp8/bf16", **overrides):
    return moe_ops.quantize_(tiny.build("qwen3_moe", **overrides), {"linear": fmt})


@pytest.mark.parametrize("fmt", [name for name in cases.WEIGHT_ONLY if FORMATS[name].quantized])
def test_linears(fmt, tmp_path):
    model = linears(fmt, hidden_size=128)
    floats = cases.same_in_float(model)
    mine = cases.adapted(model, **LINEARS)
    theirs = cases.carried_over(mine, floats, tmp_path)
    assert type(theirs.get_base_model().model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    cases.assert_same_step(mine, theirs, tiny.inputs(model))


@pytest.mark.parametrize("fmt", ["fp8", "int8", "mxfp4"])
@pytest.mark.parametrize("cast", [True, False])
def test_factors_start_as_on_a_float_model(fmt, cast):
    """PEFT gives its matrices the type of the weight: not that of its codes."""
    model = tiny.build("qwen3_moe").bfloat16()
    started = []
    for base in (moe_ops.quantize_(copy.deepcopy(model), fmt), model):
        torch.manual_seed(0)
        config = cases.config(base, target_modules=["q_proj"])
        made = peft.get_peft_model(base, config, autocast_adapter_dtype=cast)
        started.append({name: p for name, p in made.named_parameters() if "lora_" in name})
    assert set(started[0]) == set(started[1])
    for name, p in started[1].items():
        assert started[0][name].dtype == p.dtype and torch.equal(started[0][name], p), name


def test_all_linear():
    """PEFT's short form: every Linear, which here means the quantized ones too."""
    model = moe_ops.quantize_(tiny.build("qwen3_moe"), "fp8/bf16")
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    layers = [m for m in made.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == 8 and all(isinstance(m.get_base_layer(), moe_ops.QuantizedLinear) for m in layers)


def test_import_needs_no_peft():
    """Ours are registered in either order, and nothing of PEFT is imported for it."""
    code = """
import sys
{first}
{second}
import moe_ops.peft
assert "moe_ops.peft.layers" not in sys.modules
from peft.tuners.lora.model import LoraModel
import torch, peft
m = torch.nn.Sequential(moe_ops.QuantizedLinear.from_float(torch.nn.Linear(32, 32)))
print(type(peft.get_peft_model(m, peft.LoraConfig(target_modules=["0"])).base_model.model[0]).__module__)
"""
    ours, theirs = "import moe_ops; assert 'peft' not in sys.modules", "import peft"
    for first, second in ((ours, theirs), (theirs, "import moe_ops")):
        command = [sys.executable, "-W", "ignore", "-c", code.format(first=first, second=second)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip() == "moe_ops.peft.layers", done.stderr


def test_a_peft_that_is_too_old(monkeypatch):
    """Its layers are left to themselves: Linears are trained as before, with PEFT's own."""
    model = torch.nn.Sequential(moe_ops.QuantizedLinear.from_float(torch.nn.Linear(32, 32)))
    create = peft.tuners.lora.LoraModel._create_new_module
    monkeypatch.setattr(peft.tuners.lora.LoraModel, "_create_new_module", staticmethod(create._moe_ops_wrapped))
    monkeypatch.setattr(moe_ops.peft.metadata, "version", lambda name: "0.20.1.dev0")
    with pytest.warns(UserWarning, match=r"PEFT 0.20.1.dev0 is older than 0.21: LoRA on quantized experts"):
        moe_ops.peft._register()
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert type(made.base_model.model[0]) is peft.tuners.lora.Linear


# ---- what is refused

READS = {
    "use_dora": {"use_dora": True},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "init_lora_weights='orthogonal'": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("where", ["a quantized Linear", "quantized experts"])
@pytest.mark.parametrize("what", READS)
def test_what_would_read_codes(what, where):
    model = moe_ops.quantize_(tiny.build("qwen3_moe"), "fp8")
    targets = LINEARS if "Linear" in where else {}
    with pytest.raises(ValueError, match=rf"{what}.*the weight of {where} is codes"):
        peft.get_peft_model(model, cases.config(model, **targets, **READS[what]))
    made = cases.adapted(moe_ops.quantize_(tiny.build("qwen3_moe"), "fp8"), **targets)
    with pytest.raises(ValueError, match=rf"{what}.*the weight of {where} is codes"):
        made.add_adapter("other", cases.config(made, **targets, **READS[what]))


def test_experts_as_a_module():
    model = cases.quantized("qwen3_moe")
    text = r"target_parameters=\['model.layers.0.mlp.experts.gate_up_proj', 'model.layers.0.mlp.experts.down_proj'\]"
    with pytest.raises(ValueError, match=text):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["experts"]))


def test_parameters_that_are_no_projection():
    model = cases.quantized("gpt_oss")
    for name in ("gate_up_proj_scale", "down_proj_bias"):
        with pytest.raises(ValueError, match=f"{name} of .* takes no adapter: gate_up_proj and down_proj do"):
            peft.get_peft_model(copy.deepcopy(model), cases.config(model, target_parameters=[f"experts.{name}"]))
    with pytest.raises(ValueError, match="a quantized Linear is adapted by target_modules"):
        peft.get_peft_model(linears(), cases.config(model, target_parameters=["q_proj.weight"]))


OTHERS = {  # PEFT's methods, and what they need to be told
    "IA3Config": {"feedforward_modules": []}, "LoHaConfig": {}, "VeraConfig": {}, "OFTConfig": {}, "MissConfig": {},
}  # fmt: skip


@pytest.mark.parametrize("fmt", ["fp8/bf16", "int8"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_run_and_are_not_merged(kind, fmt):
    """They add to an int8 weight without an error, as if its codes were the numbers."""
    model = moe_ops.quantize_(tiny.build("qwen3_moe"), {"linear": fmt})
    steps = []
    for base in (model, cases.same_in_float(model)):
        torch.manual_seed(0)
        made = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["q_proj"], **OTHERS[kind]))
        generator = torch.Generator().manual_seed(1)
        for _, p in sorted((name, p) for name, p in made.named_parameters() if p.requires_grad):
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
        steps.append(cases.gradients(made, tiny.inputs(base)))
        if base is model:
            before = cases.raw(made)
            with pytest.raises(ValueError, match=f"q_proj: .* cannot be merged, its weight is stored in '{fmt}'"):
                made.merge_adapter()
            with pytest.raises(ValueError, match="cannot be merged"):
                made.merge_and_unload()
            assert all(torch.equal(t, before[key]) for key, t in cases.raw(made).items())
    (out, grads), (want, true) = steps
    assert tiny.relative_error(out, want) < 1e-5
    assert all(tiny.relative_error(grads[name], grad) < 1e-4 for name, grad in true.items())
    assert type(made.unload()) is type(model)


@pytest.mark.parametrize("kind", ["HRAConfig", "PeanutConfig", "OSFConfig"])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_methods_that_take_the_weight(kind, targets):
    model = moe_ops.quantize_(tiny.build("qwen3_moe"), {"linear": "int8"})
    before = cases.raw(model)
    with pytest.raises(ValueError, match=r"_proj is quantized, and PEFT's [A-Z]* works on the numbers of a weight"):
        peft.get_peft_model(model, getattr(peft, kind)(target_modules=targets))
    after = cases.raw(model)
    assert set(before) == set(after) and all(torch.equal(t, before[key]) for key, t in after.items())


def test_bias_of_an_adapter_cannot_be_merged():
    model = moe_ops.quantize_(tiny.build("gpt_oss"), {"linear": "fp8"})
    made = cases.adapted(model, lora_bias=True, **LINEARS)
    before = cases.raw(made)
    with pytest.raises(ValueError, match="lora_bias=True cannot be merged"):
        made.merge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in cases.raw(made).items())


def test_batches_of_mixed_adapters():
    model = cases.quantized("qwen3_moe")
    made = cases.adapted(model).eval()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        tiny.run(made, **tiny.inputs(model), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("kind", ["rank", "experts", "hidden size"])
def test_adapters_of_another_shape(kind, tmp_path):
    made = cases.adapted(cases.quantized("qwen3_moe"))
    made.save_pretrained(tmp_path)
    base = cases.quantized("qwen3_moe", **{"hidden size": {"hidden_size": 32}}.get(kind, {}))
    if kind == "rank":
        config = (tmp_path / "adapter_config.json").read_text()
        (tmp_path / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 2'))
    if kind == "experts":
        file = tmp_path / "adapter_model.safetensors"
        halves = {key: t[: t.shape[0] // 2] if "lora_A" in key else t for key, t in load_file(file).items()}
        save_file({key: t.clone() for key, t in halves.items()}, file)
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.model.layers.0.mlp.experts"):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("family, options, text", [
    ("switch_transformers", {}, "the float experts have no (up|down)_proj"),
    ("qwen3_moe", {"lora_dropout": 0.1}, r"PEFT knows no lora_dropout on float experts \(default\)"),
])
def test_adapters_that_float_experts_cannot_have(family, options, text):
    made = cases.adapted(cases.quantized(family), **options)
    before = cases.raw(made)
    with pytest.raises(ValueError, match=f"has an adapter: {text}; merge or unload it first"):
        moe_ops.dequantize_(made)
    assert all(torch.equal(t, before[key]) for key, t in cases.raw(made).items())
    assert not any(isinstance(m, moe_ops.QuantizedExperts) for m in moe_ops.dequantize_(made.unload()).modules())

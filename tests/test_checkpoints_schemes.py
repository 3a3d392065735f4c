"""Every scheme of every producer, in its layout: what is loaded is worth what the stored bytes are, bit for bit."""

import copy

import checkpoint_writer as w
import pytest
import torch

import moe_ops
from moe_ops import FORMATS, QuantizedExperts
from moe_ops.storage import QuantizedModule

PRESET_SCHEMES = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
pytestmark = pytest.mark.swap
BF16 = torch.bfloat16
ROW, TENSOR, TILE, G32, G16 = (1, 0), (0, 0), (128, 128), (1, 32), (1, 16)

# --- compressed-tensors -------------------------------------------------------------------------------------------


def preset(name, **weights):
    """quantization_config as the library writes it, for one of its presets."""
    scheme = {k: v.model_dump(mode="json") for k, v in PRESET_SCHEMES[name].items() if hasattr(v, "model_dump")}
    scheme["weights"] |= weights
    kind = scheme["weights"]
    stored = {("int", 4): "pack-quantized", ("int", 8): "int-quantized", ("float", 6): "mxfp6-pack-quantized"}
    form = stored.get((kind["type"], kind["num_bits"]), "float-quantized")
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, **scheme, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$"], "quantization_status": "compressed"}  # fmt: skip


def e4m3_scales(g, *shape):
    codes = w.ints(g, 1, 127, *shape)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), w.FP8[codes]


def ct_global(static, power_of_two=True):
    def extra(g):
        big = 2.0 ** w.ints(g, 5, 9, 1).float() if power_of_two else torch.rand(1, generator=g) * 100 + 300
        parts = {"weight_global_scale": big}
        if static:
            parts["input_global_scale"] = 2.0 ** w.ints(g, 5, 9, 1).float()
        return parts, 1.0 / float(big.double())

    return extra


PACKED = ("weight_packed", "weight_scale")


def with_shape(make):
    """pack-quantized keeps the shape of the float matrix beside the words."""

    def more(g, n, k):
        parts, value = make(g, n, k)
        return {**parts, "weight_shape": torch.tensor([n, k])}, value

    return more


def number(dtype=torch.float32):
    return lambda g, *shape: w.number(g, *shape, dtype=dtype)


INT4 = with_shape(w.scheme(w.int4_words, number(BF16), G32, PACKED))
COMPRESSED_TENSORS = {
    "FP8": (preset("FP8"), w.scheme(w.fp8, number(), TENSOR, shape=(1,), extra=w.input_scale(shape=(1,))),
            "fp8_tensor"),
    "FP8_DYNAMIC": (preset("FP8_DYNAMIC"), w.scheme(w.fp8, number(BF16), ROW), "fp8"),
    "FP8_BLOCK": (preset("FP8_BLOCK"), w.scheme(w.fp8, number(), TILE), "fp8_block"),
    "INT8": (preset("INT8"), w.scheme(w.int8, number(), ROW), "int8/int8"),
    "NVFP4": (preset("NVFP4"), w.scheme(w.fp4, e4m3_scales, G16, PACKED, extra=ct_global(True)), "nvfp4"),
    "NVFP4A16": (preset("NVFP4A16"), w.scheme(w.fp4, e4m3_scales, G16, PACKED, extra=ct_global(False)), "nvfp4/bf16"),
    "MXFP4": (preset("MXFP4"), w.scheme(w.fp4, w.e8m0, G32, PACKED), "mxfp4/mxfp4"),
    "MXFP4A16": (preset("MXFP4A16"), w.scheme(w.fp4, w.e8m0, G32, PACKED), "mxfp4"),
    "MXFP4XFP8": (preset("MXFP4XFP8"), w.scheme(w.fp4, w.e8m0, G32, PACKED), "mxfp4/fp8_block"),
    "MXFP6A16": (preset("MXFP6A16"), w.scheme(w.fp6("e2m3"), w.e8m0, G32, PACKED), "mxfp6_e2m3"),
    "MXFP6A8": (preset("MXFP6A8"), w.scheme(w.fp6("e2m3"), w.e8m0, G32, PACKED), "mxfp6_e2m3/mxfp8"),
    "MXFP8": (preset("MXFP8"), w.scheme(w.fp8, w.e8m0, G32), "mxfp8"),
    "MXFP8A16": (preset("MXFP8A16"), w.scheme(w.fp8, w.e8m0, G32), "mxfp8/bf16"),
    "W4A16": (preset("W4A16", group_size=32), INT4, "int4_g32"),
    "W4AFP8": (preset("W4AFP8", group_size=32), INT4, "int4_g32/fp8"),
    "W8A16": (preset("W8A16", strategy="channel", group_size=None), w.scheme(w.int8_words, number(), ROW, PACKED),
              "int8"),
}  # fmt: skip

# --- AMD Quark ------------------------------------------------------------------------------------------------------


def spec(dtype, qscheme="per_group", dynamic=False, **more):
    group = {"group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even"}
    return {"dtype": dtype, "qscheme": qscheme, "is_dynamic": dynamic, "ch_axis": -1, "symmetric": None,
            "mx_element_dtype": None, "is_scale_quant": False, "group_size": None,
            **(group if qscheme == "per_group" else {}), **more}  # fmt: skip


def quark(weight, inputs, **more):
    layer = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None}
    return {"quant_method": "quark", "version": "0.13", "global_quant_config": layer, "layer_quant_config": {},
            "layer_type_quant_config": {}, "exclude": ["lm_head", "*.mlp.router", "*.mlp.gate"],
            "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
            **more}  # fmt: skip


MX4, STATIC_IN = w.scheme(w.fp4, w.e8m0, G32), w.input_scale(BF16)
STATIC, DYNAMIC = spec("fp8_e4m3", "per_tensor", symmetric=True), spec("fp8_e4m3", "per_tensor", True, symmetric=True)
QUARK = {
    "mxfp4": (quark(spec("fp4"), spec("fp4", dynamic=True)), MX4, "mxfp4/mxfp4"),
    "mxfp4_weight_only": (quark(spec("fp4"), None), MX4, "mxfp4"),
    "mxfp4_fp8": (quark(spec("fp4"), STATIC), w.scheme(w.fp4, w.e8m0, G32, extra=STATIC_IN), "mxfp4/fp8_tensor"),
    "mxfp4_fp8_dynamic": (quark(spec("fp4"), DYNAMIC), MX4, "mxfp4/fp8_tensor"),
    "mxfp4_mxfp8": (quark(spec("fp4"), spec("fp8_e4m3", dynamic=True)), MX4, "mxfp4/mxfp8"),
    "mxfp4_mxfp6": (quark(spec("fp4"), spec("fp6_e3m2", dynamic=True)), MX4, "mxfp4/mxfp6_e3m2"),
    "mxfp6_e2m3": (quark(spec("fp6_e2m3"), spec("fp6_e2m3", dynamic=True)),
                   w.scheme(w.fp6("e2m3"), w.e8m0, G32), "mxfp6_e2m3/mxfp6_e2m3"),
    "mxfp6_e3m2": (quark(spec("fp6_e3m2"), spec("fp6_e3m2", dynamic=True)),
                   w.scheme(w.fp6("e3m2"), w.e8m0, G32), "mxfp6_e3m2/mxfp6_e3m2"),
    "mxfp6_fp8": (quark(spec("fp6_e3m2"), STATIC), w.scheme(w.fp6("e3m2"), w.e8m0, G32, extra=STATIC_IN),
                  "mxfp6_e3m2/fp8_tensor"),
    "mxfp8": (quark(spec("fp8_e4m3"), spec("fp8_e4m3", dynamic=True)), w.scheme(w.fp8, w.e8m0, G32), "mxfp8"),
    "ptpc_fp8": (quark(spec("fp8_e4m3", "per_channel"), spec("fp8_e4m3", "per_channel", True)),
                 w.scheme(w.fp8, number(BF16), ROW, shape="rows"), "fp8"),
    "fp8": (quark(spec("fp8_e4m3", "per_tensor"), STATIC),
            w.scheme(w.fp8, number(BF16), TENSOR, shape=(), extra=STATIC_IN), "fp8_tensor"),
}  # fmt: skip

# --- Hugging Face fine-grained fp8, ModelOpt ------------------------------------------------------------------------

INV = ("weight", "weight_scale_inv")
FINE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}  # fmt: skip
E8M0 = torch.float8_e8m0fnu


def exponents(dtype):
    return lambda g, *shape: w.e8m0(g, *shape, dtype=dtype)


FINE_GRAINED = {
    "fp32": (FINE, w.scheme(w.fp8, number(), TILE, INV), "fp8_block"),
    "ue8m0_bytes": ({**FINE, "scale_fmt": "ue8m0"}, w.scheme(w.fp8, w.e8m0, TILE, INV), "fp8_block"),
    "ue8m0": ({**FINE, "scale_fmt": "ue8m0"}, w.scheme(w.fp8, exponents(E8M0), TILE, INV), "fp8_block"),
    "ue8m0_fp32": ({**FINE, "scale_fmt": "ue8m0"}, w.scheme(w.fp8, exponents(torch.float32), TILE, INV), "fp8_block"),
    "static": ({**FINE, "activation_scheme": "static"},
               w.scheme(w.fp8, number(), TILE, INV, extra=w.input_scale(name="activation_scale")),
               "fp8_block/fp8_tensor"),
    "mxfp8": ({"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head", "mlp.gate"]},
              w.scheme(w.fp8, w.e8m0, G32, INV), "mxfp8"),
}  # fmt: skip


def modelopt(algorithm, **more):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "producer": {"name": "modelopt"},
            "ignore": ["lm_head", "model.layers.*.mlp.gate"], **more}  # fmt: skip


def modelopt_global(g):
    factor = w.number(g)[0]
    return {"weight_scale_2": factor, "input_scale": w.number(g)[0]}, float(factor.double())


MODELOPT = {
    "FP8": (modelopt("FP8"), w.scheme(w.fp8, number(), TENSOR, shape=(), extra=w.input_scale()), "fp8_tensor"),
    "FP8_PC_PT": (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), w.scheme(w.fp8, number(), ROW, shape="rows"), "fp8"),
    "NVFP4": (modelopt("NVFP4", group_size=16), w.scheme(w.fp4, e4m3_scales, G16, extra=modelopt_global), "nvfp4"),
    "MXFP8": (modelopt("MXFP8"), w.scheme(w.fp8, w.e8m0, G32), "mxfp8"),
}  # fmt: skip

CASES = {
    f"{producer}-{name}": case
    for producer, cases in (("ct", COMPRESSED_TENSORS), ("quark", QUARK), ("hf", FINE_GRAINED), ("modelopt", MODELOPT))
    for name, case in cases.items()
}


def formats(model):
    return {m.format for m in model.modules() if isinstance(m, QuantizedModule)}


@pytest.mark.parametrize("case", CASES)
def test_scheme(case, tmp_path):
    settings, make, fmt = CASES[case]
    base = w.QWEN_WIDE if "block" in fmt else w.QWEN
    tensors, values = w.quantized(w.float_tensors(base), make)
    model = moe_ops.load_quantized(w.write(tmp_path, base, tensors, settings))
    w.assert_values(model, values)
    assert formats(model) == {fmt}
    check_static(model, tensors)
    ids = torch.arange(8)[None]
    assert torch.isfinite(model(ids).logits).all()
    if FORMATS[fmt].activation is None:  # weights only: the same model in float, in fp32
        model = model.to(torch.float32)
        want = moe_ops.dequantize_(copy.deepcopy(model))(ids).logits
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def check_static(model, tensors):
    """Static scales are there where the file has them: of gate and up the larger, of reciprocals the reciprocal."""
    experts = "model.layers.0.mlp.experts"
    stored = {k: 1 / t.float() if "global" in k else t.float() for k, t in tensors.items()
              if k.startswith(experts) and k.endswith(("input_scale", "input_global_scale", "activation_scale"))
              }  # fmt: skip
    module = model.get_submodule(experts)
    for name, projections in (("gate_up_proj", (".gate_proj.", ".up_proj.")), ("down_proj", (".down_proj.",))):
        got = module.part(name, "input_scale")
        if not stored:
            assert got is None
            continue
        for e, scale in enumerate(got.tolist()):
            mine = [t.item() for k, t in stored.items() if any(f"{experts}.{e}{p}" in k for p in projections)]
            assert scale == pytest.approx(max(mine), rel=1e-7) and len(mine) == len(projections)


@pytest.mark.parametrize("case", ["quark-mxfp4", "quark-mxfp4_fp8", "quark-mxfp6_e3m2", "quark-ptpc_fp8", "quark-fp8",
                                  "ct-NVFP4", "modelopt-FP8"])  # fmt: skip
def test_experts_unfused_with_rows_that_alternate(case, tmp_path):
    """GPT-OSS by producers that store one Linear for gate and up of each expert, as interleaved as they found it."""
    settings, make, _ = CASES[case]
    settings = {**settings, **({"ignore": ["lm_head", "re:.*router"]} if "ignore" in settings else {})}
    tensors, values = w.quantized(w.unfused(w.float_tensors(w.GPT_OSS)), make)
    model = moe_ops.load_quantized(w.write(tmp_path, w.GPT_OSS, tensors, settings))
    w.assert_values(model, values)
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.experts"
        module = model.get_submodule(name)
        bias = torch.stack([tensors[f"{name}.{e}.gate_up_proj.bias"] for e in range(4)])
        assert torch.equal(module.gate_up_proj_bias, torch.cat([bias[:, 0::2], bias[:, 1::2]], 1))
        scales = module.part("gate_up_proj", "input_scale")
        if scales is not None and "modelopt" in case:
            assert scales.tolist() == [tensors[f"{name}.{e}.gate_up_proj.input_scale"].item() for e in range(4)]


def test_fused_names_under_quark(tmp_path):
    """Older releases keep OpenAI's names: the same bytes under both give the same model."""
    tensors, values = w.quantized(w.unfused(w.float_tensors(w.GPT_OSS)), QUARK["mxfp4_fp8"][1])
    fused = {k: t for k, t in tensors.items() if ".experts." not in k}
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.experts"
        for proj in ("gate_up_proj", "down_proj"):
            stack = {part: torch.stack([tensors[f"{name}.{e}.{proj}.{part}"] for e in range(4)])
                     for part in ("weight", "weight_scale", "bias", "input_scale")}  # fmt: skip
            fused |= {f"{name}.{proj}_blocks": stack["weight"].unflatten(-1, (-1, 16)), f"{name}.{proj}_bias":
                      stack["bias"], f"{name}.{proj}_scales": stack["weight_scale"],
                      f"{name}.{proj}_input_scale": stack["input_scale"]}  # fmt: skip
    model = moe_ops.load_quantized(w.write(tmp_path, w.GPT_OSS, fused, QUARK["mxfp4_fp8"][0]))
    w.assert_values(model, values)
    first = model.get_submodule("model.layers.0.mlp.experts")
    want = [tensors[f"model.layers.0.mlp.experts.{e}.down_proj.input_scale"].float().item() for e in range(4)]
    assert first.part("down_proj", "input_scale").tolist() == want


def test_reciprocal_that_is_no_power_of_two(tmp_path):
    """compressed-tensors divides by its global scale; one fp32 multiplier stands for it, to the last bit but one."""
    make = w.scheme(w.fp4, e4m3_scales, G16, PACKED, extra=ct_global(False, power_of_two=False))
    tensors, values = w.quantized(w.float_tensors(w.QWEN), make)
    model = moe_ops.load_quantized(w.write(tmp_path, w.QWEN, tensors, preset("NVFP4A16")))
    w.assert_values(model, values, atol=2**-22)


def test_fp4_experts_beside_fp8(tmp_path):
    """DeepSeek-V4: experts in fp4, two codes in an int8, every other layer in 128 x 128 fp8."""

    def make(module):
        if ".experts." not in module:
            return w.scheme(w.fp8, exponents(E8M0), TILE, INV)
        return w.scheme(lambda *a: (lambda q, v: (q.view(torch.int8), v))(*w.fp4(*a)), exponents(E8M0), G32, INV)

    make.by_module = True
    tensors, values = w.quantized(w.float_tensors(w.QWEN_WIDE), make)
    model = moe_ops.load_quantized(w.write(tmp_path, w.QWEN_WIDE, tensors, {**FINE, "expert_dtype": "fp4"}))
    w.assert_values(model, values)
    assert formats(model) == {"mxfp4/fp8_block", "fp8_block"}


def test_settings_in_the_side_file(tmp_path):
    """Older ModelOpt exports: nothing in config.json."""
    tensors, values = w.quantized(w.float_tensors(w.QWEN), MODELOPT["NVFP4"][1])
    side = {"producer": {"name": "modelopt", "version": "0.20"},
            "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
                             "exclude_modules": ["lm_head", "*mlp.gate"]}}  # fmt: skip
    path = w.write(tmp_path, w.QWEN, tensors, None, files={"hf_quant_config.json": side})
    w.assert_values(moe_ops.load_quantized(path), values)


def test_every_projection_stays_in_its_shard(tmp_path):
    """Scales of gate and up that differ by far: one shared scale, or a swap, would show in every value."""

    def make(module):
        size = 1e3 if module.endswith("gate_proj") else 1.0
        return w.scheme(w.fp8, lambda g, *s: (lambda a, b: (a * size, (a * size).double()))(*w.number(g, *s)), TENSOR,
                        shape=(), extra=w.input_scale())  # fmt: skip

    make.by_module = True
    tensors, values = w.quantized(w.float_tensors(w.QWEN), make)
    model = moe_ops.load_quantized(w.write(tmp_path, w.QWEN, tensors, MODELOPT["FP8"][0]))
    w.assert_values(model, values)
    scale = next(m for m in model.modules() if isinstance(m, QuantizedExperts)).part("gate_up_proj", "scale")
    assert (scale[:, 0] > 20 * scale[:, 1]).all()


def stacked(tensors, transposed):
    """Experts of a GPT-OSS checkpoint, one by one, as stacks: `experts.gate_up_proj`, `..._weight_scale`, ..."""
    out = {k: t for k, t in tensors.items() if ".experts." not in k}
    for layer in (0, 1):
        for proj in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts"
            parts = {k.rpartition(".")[2] for k in tensors if k.startswith(f"{name}.0.{proj}.")}
            for part in parts:
                stack = torch.stack([tensors[f"{name}.{e}.{proj}.{part}"] for e in range(4)])
                turned = stack.ndim == 3 and transposed
                ending = "" if part == "weight" else f"_{part}"
                out[f"{name}.{proj}{ending}"] = (stack.mT if turned else stack).contiguous()
    return out


def one_number(tensors, name):
    return {k: t.amax() if k.endswith(name) and "experts" in k else t for k, t in tensors.items()}


def test_stacks_lie_as_the_float_model_has_them(tmp_path):
    """ModelOpt's export of transposed stacks: codes (E, K/2, N), scales (E, K/16, N), one global scale for all."""

    def constant(g):
        return {"weight_scale_2": torch.tensor(0.37), "input_scale": w.number(g)[0]}, float(torch.tensor(0.37).double())

    make = w.scheme(w.fp4, e4m3_scales, G16, extra=constant)
    tensors, values = w.quantized(w.unfused(w.float_tensors(w.GPT_OSS)), make)
    fused = one_number(stacked(tensors, transposed=True), "_weight_scale_2")
    settings = modelopt("NVFP4", group_size=16, ignore=["lm_head", "*router"])
    model = moe_ops.load_quantized(w.write(tmp_path, w.GPT_OSS, fused, settings))
    w.assert_values(model, values)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    want = [tensors[f"model.layers.1.mlp.experts.{e}.down_proj.input_scale"].item() for e in range(4)]
    assert experts.part("down_proj", "input_scale").tolist() == want


def test_stacks_with_tiles(tmp_path):
    """What transformers calls fp8 experts in memory: gate tiles, then up tiles, each with a partial one at its end."""
    tensors, values = w.quantized(w.float_tensors(w.QWEN_WIDE), FINE_GRAINED["fp32"][1])
    name = "model.layers.0.mlp.experts"
    fused = {k: t for k, t in tensors.items() if ".experts." not in k}
    for ending, part in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
        rows = [torch.cat([tensors[f"{name}.{e}.{p}.{part}"].view(torch.uint8) for p in ("gate_proj", "up_proj")])
                for e in range(2)]  # fmt: skip
        dtype = tensors[f"{name}.0.down_proj.{part}"].dtype
        fused[f"{name}.gate_up_proj{ending}"] = torch.stack(rows).view(dtype)
        down = [tensors[f"{name}.{e}.down_proj.{part}"].view(torch.uint8) for e in range(2)]
        fused[f"{name}.down_proj{ending}"] = torch.stack(down).view(dtype)
    w.assert_values(moe_ops.load_quantized(w.write(tmp_path, w.QWEN_WIDE, fused, FINE)), values)


def test_heads_and_routers_need_no_rule(tmp_path):
    """DeepSeek's own config lists no exclusions: its head and its routers are float in the file."""
    tensors, values = w.quantized(w.float_tensors(w.QWEN_WIDE), FINE_GRAINED["fp32"][1])
    settings = {k: v for k, v in FINE.items() if k != "modules_to_not_convert"}
    w.assert_values(moe_ops.load_quantized(w.write(tmp_path, w.QWEN_WIDE, tensors, settings)), values)


def test_on_a_device(device, tmp_path):
    settings, make, _ = QUARK["mxfp4_fp8"]
    tensors, values = w.quantized(w.float_tensors(w.QWEN), make)
    path = w.write(tmp_path, w.QWEN, tensors, settings)
    model = moe_ops.load_quantized(path, device=device)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device}
    ids = torch.arange(8)[None]
    want = moe_ops.load_quantized(path)(ids).logits
    got = model(ids.to(device)).logits.cpu()
    assert (got - want).norm() < 0.05 * want.norm()
    w.assert_values(model.cpu(), values)

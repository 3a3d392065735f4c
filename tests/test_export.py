"""Exports are read by compressed-tensors' own decompressors, and by our reader, as what the model holds."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import INSTALLED, build
from torch import nn

import moe_ops
from moe_ops.experts import QuantizedExperts
from moe_ops.export import export, export_compressed_tensors
from moe_ops.export_words import spell
from moe_ops.formats import FORMATS, Codec, Format
from moe_ops.storage import QuantizedModule

BaseCompressor = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
infer_module_format = pytest.importorskip("compressed_tensors.compressors.format").infer_module_format
QuantizationConfig = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig
pytestmark = [pytest.mark.swap, pytest.mark.filterwarnings("ignore:.*global scales of their own")]
SPELLED = [name for name, f in FORMATS.items() if spell(f)]
SIZE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
FAMILIES = [n for n in ("qwen3_moe", "gpt_oss", "mixtral", "granitemoe", "qwen2_moe", "olmoe", "deepseek_v2", "llama4",
                         "step3p7") if n in INSTALLED]


def quantized(name="qwen3_moe", format="fp8", **options):
    return moe_ops.quantize_(build(name, **SIZE).to(torch.bfloat16), format, **options)


def exported(model, folder):
    export_compressed_tensors(model, folder, max_shard_size="200KB")
    tensors = {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
    return tensors, json.loads((folder / "config.json").read_text())["quantization_config"]


def matrices(model, up_names=("gate_proj", "up_proj")):
    """{name of a Linear in memory: its dequantized matrix}, experts one by one."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, QuantizedExperts):
            up, down = m.dequantize()
            for e in range(m.spec.num_experts):
                for s, shard in enumerate(up[e].unflatten(0, (m.spec.shards, -1))):
                    found[f"{name}.{e}.{up_names[s]}"] = shard
                found[f"{name}.{e}.down_proj"] = down[e]
        elif isinstance(m, QuantizedModule):
            found[name] = m.dequantize()
    return found


def scheme_of(config, name):
    """The group that compressed-tensors would pick: exact names and patterns before classes."""
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    assert not any(re.match(i[3:], name) if i.startswith("re:") else i == name for i in config["ignore"])
    exact = [g for g in groups for t in g.targets if t == name or (t.startswith("re:") and re.match(t[3:], name))]
    return exact[0] if exact else next(g for g in groups if "Linear" in g.targets)


def decompressed(tensors, config, name):
    scheme = scheme_of(config, name)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    mine = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
    assert scheme.format == infer_module_format(nn.Linear, scheme)
    return compressor.decompress(mine, scheme)["weight"]


@pytest.mark.parametrize("format", SPELLED)
def test_their_decompressor_reads_the_weights(format, tmp_path):
    model = quantized(format=format)
    tensors, config = exported(model, tmp_path / "out")
    want = matrices(model)
    assert len(want) == 2 * (4 + 3 * 4)
    for name, w in want.items():
        got = decompressed(tensors, config, name)
        rounding = {"rtol": 2**-8, "atol": 0} if got.dtype != torch.float32 else {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close(got.float(), w, **rounding)
        bits = FORMATS[format].weight.element
        if bits.exponent_bits and bits.bits < 8 and not FORMATS[format].weight.global_scale:
            assert torch.equal(got.float(), w)  # MX in bf16 loses nothing


@pytest.mark.parametrize("format", ["fp8", "mxfp4", "int4_g32", "nvfp4/bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_our_reader_reads_every_family(name, format, tmp_path):
    """Stacked, transposed, interleaved, with biases: the same codes come back."""
    try:
        model = quantized(name, format)
    except (ValueError, TypeError):  # this family's sizes have other names
        model = moe_ops.quantize_(build(name).to(torch.bfloat16), format)
    exported(model, tmp_path / "out")
    got = moe_ops.load_quantized(tmp_path / "out")
    left, right = model.state_dict(), got.state_dict()
    assert left.keys() == right.keys()
    for key, t in left.items():
        if key.endswith("global_scale"):
            torch.testing.assert_close(right[key], t, rtol=2e-7, atol=0)  # the reciprocal of a reciprocal
        else:
            assert t.dtype == right[key].dtype and torch.equal(t.view(torch.uint8), right[key].view(torch.uint8)), key


def test_names_are_those_of_the_family(tmp_path):
    tensors, config = exported(quantized("mixtral", "mxfp4"), tmp_path / "mixtral")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in tensors
    assert sorted(config["ignore"]) == ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    if "gpt_oss" in INSTALLED:
        tensors, _ = exported(quantized("gpt_oss", "mxfp4"), tmp_path / "oss")
        assert tensors["model.layers.0.mlp.experts.2.up_proj.bias"].shape == (128,)
        assert tensors["model.layers.0.mlp.experts.2.gate_proj.weight_packed"].dtype == torch.uint8


def test_mixed_formats(tmp_path):
    model = quantized("qwen3_moe", {"experts": "mxfp4", "linear": "fp8", "re:.*layers.1.mlp.*": "int4_g32"},
                      ignore="*.layers.0.self_attn.o_proj")  # fmt: skip
    tensors, config = exported(model, tmp_path / "out")
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert "model.layers.0.self_attn.o_proj" in config["ignore"]
    assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    for name, w in matrices(model).items():
        torch.testing.assert_close(decompressed(tensors, config, name).float(), w, rtol=2**-8, atol=0)
    formats = [{n: m.format for n, m in each.named_modules() if isinstance(m, QuantizedModule)}
               for each in (moe_ops.load_quantized(tmp_path / "out"), model)]  # fmt: skip
    assert formats[0] == formats[1]


def test_float_experts_stay_as_the_family_has_them(tmp_path):
    model = quantized("qwen3_moe", {"linear": "fp8"})
    tensors, config = exported(model, tmp_path / "out")
    w = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.up_proj.weight"], w[2, w.shape[1] // 2 :])
    assert "model.layers.1.mlp.experts.2.up_proj" in config["ignore"]


@pytest.mark.parametrize("format", ["fp8_tensor", "nvfp4"])
def test_static_scales_of_activations_and_of_the_cache(format, tmp_path):
    model = quantized("qwen3_moe", format)
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, QuantizedModule):
            for weight in m.weight_names():
                shape = (m.spec.num_experts,) if isinstance(m, QuantizedExperts) else ()
                scale = nn.Parameter(torch.rand(shape, generator=g) + 0.01, requires_grad=False)
                m._parameters[f"{weight}_input_scale"] = scale
    model.moe_ops_kv_scales = {f"model.layers.{i}.self_attn": (0.5, 0.25 * (i + 1)) for i in range(2)}
    tensors, config = exported(model, tmp_path / "out")
    args = config["config_groups"]["group_0"]["input_activations"]
    assert args["dynamic"] == {"fp8_tensor": False, "nvfp4": "local"}[format]
    assert config["kv_cache_scheme"]["num_bits"] == 8 and tensors["model.layers.1.self_attn.v_scale"].item() == 0.5
    want = model.model.layers[0].mlp.experts.down_proj_input_scale[3].item()
    key = {"fp8_tensor": "input_scale", "nvfp4": "input_global_scale"}[format]
    got = tensors[f"model.layers.0.mlp.experts.3.down_proj.{key}"].item()
    assert got == pytest.approx(want if key == "input_scale" else 1 / want, rel=1e-6)
    again = moe_ops.load_quantized(tmp_path / "out")
    assert again.moe_ops_kv_scales == model.moe_ops_kv_scales
    for a, b in zip(model.modules(), again.modules(), strict=True):
        if isinstance(a, QuantizedModule):
            for weight in a.weight_names():
                one, other = (m.part(weight, "input_scale") for m in (a, b))
                torch.testing.assert_close(one, other, rtol=2e-7, atol=0)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"no words for mxfp6_e3m2\. It has for .*mxfp4, .*; .* also for nvfp4$"):
        export_compressed_tensors(quantized(format="mxfp6_e3m2"), tmp_path / "out")
    with pytest.raises(ValueError, match="no words for nvfp4 without static input scales"):
        export_compressed_tensors(quantized(format="nvfp4"), tmp_path / "out")
    with pytest.raises(ValueError, match="no transformers model with quantized modules"):
        export_compressed_tensors(build("qwen3_moe"), tmp_path / "out")
    with pytest.raises(ValueError, match="no transformers model"):
        export_compressed_tensors(moe_ops.QuantizedLinear.from_float(nn.Linear(32, 32)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        export_compressed_tensors(quantized(), tmp_path / "full")
    build("qwen3_moe").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="was not written by moe_ops"):
        export(tmp_path / "float", tmp_path / "out")


@pytest.mark.skipif("dbrx" not in INSTALLED, reason="not in this transformers")
def test_experts_without_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="readers know no names for single ones"):
        export_compressed_tensors(moe_ops.quantize_(build("dbrx"), "fp8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_follow_from_what_a_codec_is():
    """A format of the same parts under a name of its own, and one that the layout has no block for."""
    w = FORMATS["fp8_block"].weight
    mine = Codec(name="mine", element=w.element, block=(128, 128), scale_rule=w.scale_rule)
    assert spell(Format("mine", mine)).weights["block_structure"] == [128, 128]
    assert spell(FORMATS["fp8_block@64"]) is None and spell(FORMATS["mxfp4@16"]) is None
    assert spell(FORMATS["int4_g32/fp8"]) is None and spell(FORMATS["int8/fp8"]) is None


def test_a_folder_of_ours(tmp_path):
    model = quantized(format="mxfp4")
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")
    export(tmp_path / "ours", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    got, want = moe_ops.load_quantized(tmp_path / "out"), type(model).from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(3, 11)[None]
    assert torch.equal(got(ids).logits, want(ids).logits)

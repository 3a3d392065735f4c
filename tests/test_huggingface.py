"""from_pretrained(quantization_config=MoeOpsConfig(...)), save_pretrained and back, for every family and format.

The oracle of loading is the other way to the same model: load it in float, then `quantize_` it. The oracle of saving is
the model that was saved.
"""

import copy
import json
from pathlib import Path

import pytest
import saved
import tiny_models as tiny
import torch
import transformers
from saved import assert_same, load, save

import moe_ops
from moe_ops import FORMATS, MoeOpsConfig, QuantizedExperts, QuantizedLinear
from moe_ops.huggingface import quantizer

pytestmark = pytest.mark.swap
# One for each way that a checkpoint stores experts: a matrix for each, all in one, transposed and interleaved with
# biases, no gate, a norm after each.
LAYOUTS = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "muse_spark", "aria"]
INFO = ("missing_keys", "unexpected_keys", "mismatched_keys")


def save_routed(name, path, dtype=torch.bfloat16):
    """The family's model in a folder; returns its class, or skips where that does not carry the flags yet."""
    if name not in tiny.INSTALLED:
        pytest.skip("not in this transformers")
    model = tiny.build(name).to(dtype)
    if not tiny.routed_experts(model):
        pytest.skip("not decorated in this transformers")
    model.save_pretrained(path)
    return type(model)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ROUTED)
def test_every_family_loads_quantized(name, tmp_path):
    """Bit for bit what quantize_ makes of the float model; saved and loaded it is still the same."""
    cls = save_routed(name, tmp_path / "float")
    want = moe_ops.quantize_(load(cls, tmp_path / "float"), "fp8")
    got, info = load(cls, tmp_path / "float", "fp8", output_loading_info=True)
    assert not any(info[key] for key in INFO)
    assert_same(got, want)
    assert moe_ops.summary(got) == moe_ops.summary(want)
    got.save_pretrained(tmp_path / "codes")
    again, info = load(cls, tmp_path / "codes", output_loading_info=True)
    assert not any(info[key] for key in INFO)
    assert again.hf_quantizer.pre_quantized
    assert_same(again, want)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in LAYOUTS if n in tiny.ROUTED])
def test_outputs_are_those_of_the_quantized_model(name, tmp_path):
    cls = save_routed(name, tmp_path, torch.float32)
    want = tiny.run(moe_ops.quantize_(load(cls, tmp_path, dtype=torch.float32), "int8"))
    got = load(cls, tmp_path, "int8", dtype=torch.float32)
    assert torch.equal(tiny.run(got), want)
    floats = load(cls, tmp_path, dtype=torch.float32)
    assert tiny.relative_error(want, tiny.run(floats)) < 0.1
    moe_ops.dequantize_(got)
    assert tiny.relative_error(tiny.run(got), want) < 1e-4  # weights only: the same numbers in float


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_format_survives_the_disk(name, format, tmp_path):
    """Streamed, made by quantize_, and read back: the same codes. Both ways to get there write the same bytes."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128} if name == "qwen3_moe" else {"hidden_size": 128}
    cls = save(name, tmp_path / "float", **sizes, **({} if name == "qwen3_moe" else {"intermediate_size": 128}))
    want = moe_ops.quantize_(load(cls, tmp_path / "float"), format)
    assert_same(load(cls, tmp_path / "float", format), want)
    want.save_pretrained(tmp_path / "codes")
    again = load(cls, tmp_path / "codes")
    assert_same(again, want)
    formats = [type(m.quantization) and m.format for m in again.modules() if isinstance(m, QuantizedExperts)]
    assert formats == [format] * len(formats) and formats
    again.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("codes", "again"))
    assert first == second


def test_config_of_a_saved_model(tmp_path):
    """It names every module and its format: reading it needs no rules."""
    cls = save("qwen3_moe", tmp_path / "float")
    rules = {"experts": "mxfp4", "linear": "fp8", "re:.*layers.1.self_attn": None, "model.layers.0.mlp.experts": "int8"}
    config = MoeOpsConfig(rules, ignore="*.k_proj", backend="reference")
    model = cls.from_pretrained(tmp_path / "float", dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "codes")
    said = json.loads((tmp_path / "codes" / "config.json").read_text())["quantization_config"]
    want = {n: m.format for n, m in model.named_modules() if isinstance(m, QuantizedExperts | QuantizedLinear)}
    assert said["modules"] == want
    assert want == {
        "model.layers.0.mlp.experts": "int8", "model.layers.1.mlp.experts": "mxfp4",
        **{f"model.layers.0.self_attn.{p}_proj": "fp8" for p in "qvo"},
    }  # fmt: skip
    assert (said["quant_method"], said["version"], said["backend"]) == ("moe_ops", 1, "reference")
    again = load(cls, tmp_path / "codes")
    assert again.config.quantization_config.to_dict() == said
    assert [m.backend for m in again.modules() if isinstance(m, QuantizedExperts)] == ["reference"] * 2
    assert_same(again, model)


def test_every_pair_of_arguments_is_checked():
    for bad in (
        {"format": "fp7"}, {"format": "mxfp4", "backend": "x"}, {"format": {"re:(": "fp8"}}, {"modules": {"a": "x"}},
        {"formt": "fp8"}, {"version": 2}, {"format": None}, {"quant_method": "other"},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            MoeOpsConfig(**bad)
    config = MoeOpsConfig({"experts": FORMATS["mxfp4"], "linear": None}, ignore=("a", "re:b.*"), strict=False)
    said = json.loads(config.to_json_string())
    assert MoeOpsConfig.from_dict(said).to_dict() == config.to_dict() == said
    assert said["format"] == {"experts": "mxfp4", "linear": None} and said["ignore"] == ["a", "re:b.*"]


def test_rules_are_refused_before_anything_is_read(tmp_path):
    cls = save("qwen3_moe", tmp_path)
    for config, message in (
        (MoeOpsConfig("fp8", ignore="model.layer.*"), "match no module"),
        (MoeOpsConfig("int4_g128"), "does not fit format"),
    ):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path, quantization_config=config)
    model = cls.from_pretrained(tmp_path, quantization_config=MoeOpsConfig("int4_g128", strict=False))
    left = [r for r in moe_ops.summary(model).rows if r.kind == "experts"]
    assert left and all(r.format is None and "not a multiple" in r.note for r in left)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_shards(name, tmp_path):
    """Float and quantized checkpoints in many files, whose order says nothing."""
    model = tiny.build(name).to(torch.bfloat16)
    cls = type(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "float", max_shard_size="20KB")
    files = sorted((tmp_path / "float").glob("*.safetensors"))
    assert len(files) > 4
    index = tmp_path / "float" / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    names = {f.name: f"model-{len(files) - i:05d}-of-{len(files):05d}.safetensors.x" for i, f in enumerate(files)}
    for f in files:  # the last first
        f.rename(f.with_name(names[f.name]))
    for f in (tmp_path / "float").glob("*.x"):
        f.rename(f.with_suffix(""))
    said["weight_map"] = {key: names[f].removesuffix(".x") for key, f in reversed(said["weight_map"].items())}
    index.write_text(json.dumps(said))
    want = load(cls, tmp_path / "one", "mxfp4")
    got = load(cls, tmp_path / "float", "mxfp4")
    assert_same(got, want)
    got.save_pretrained(tmp_path / "codes", max_shard_size="20KB")
    assert len(list((tmp_path / "codes").glob("*.safetensors"))) > 2
    assert_same(load(cls, tmp_path / "codes"), want)


def test_a_model_in_another_order_of_classes(tmp_path):
    """The base model from a checkpoint of the whole, and the other way round."""
    cls = save("qwen3_moe", tmp_path / "float")
    model = load(cls, tmp_path / "float", "fp8")
    model.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert type(base) is not cls
    assert_same(base, model.model)
    model.model.save_pretrained(tmp_path / "base")
    said = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert all(name.startswith("layers.") for name in said["modules"])
    assert_same(load(cls, tmp_path / "base").model, model.model)
    streamed = transformers.AutoModel.from_pretrained(
        tmp_path / "float", dtype=torch.bfloat16, quantization_config=MoeOpsConfig("fp8")
    )
    assert_same(streamed, model.model)


@torch.no_grad()
def test_dtypes_and_places(tmp_path):
    cls = save("qwen3_moe", tmp_path / "float", torch.float32)
    for dtype in ("auto", torch.float16, "bfloat16", None):
        more = {} if dtype is None else {"dtype": dtype}
        got = cls.from_pretrained(tmp_path / "float", quantization_config=MoeOpsConfig("fp8"), **more)
        want = moe_ops.quantize_(cls.from_pretrained(tmp_path / "float", **more), "fp8")
        assert_same(got, want)
        pairs = zip(got.modules(), want.modules(), strict=True)
        assert all(a.float_dtype == b.float_dtype for a, b in pairs if isinstance(b, QuantizedExperts))
        got.save_pretrained(tmp_path / "codes")
        assert_same(cls.from_pretrained(tmp_path / "codes", dtype="auto"), got)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        got = load(cls, tmp_path / "float", "fp8", device_map=device_map)
        assert_same(got, load(cls, tmp_path / "float", "fp8"))
    quantizer = type(got.hf_quantizer)(MoeOpsConfig(dtype="bfloat16"), pre_quantized=True)
    assert quantizer.update_dtype(torch.float8_e4m3fn) == torch.bfloat16  # of a model whose first parameter is codes
    with pytest.raises(ValueError, match="ops compute in"):
        load(cls, tmp_path / "float", "fp8", dtype=torch.float64)
    offloaded = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"cannot be offloaded.* disk"):
        load(cls, tmp_path / "float", "fp8", device_map=offloaded, offload_folder=str(tmp_path / "off"))


@torch.no_grad()
def test_modules_that_stay_in_fp32(tmp_path, monkeypatch):
    """What a model keeps in fp32 is quantized from there, as after loading it in float."""
    cls = save("qwen3_moe", tmp_path, torch.float32)
    monkeypatch.setattr(cls, "_keep_in_fp32_modules_strict", ["v_proj", "layers.1.mlp.experts"])
    want = moe_ops.quantize_(load(cls, tmp_path), "mxfp8")
    assert want.model.layers[1].mlp.experts.float_dtype == torch.float32
    got = load(cls, tmp_path, "mxfp8")
    assert_same(got, want)
    assert got.model.layers[0].self_attn.v_proj.float_dtype == torch.float32
    assert got.model.layers[0].self_attn.q_proj.float_dtype == torch.bfloat16


@torch.no_grad()
def test_tied_weights(tmp_path, monkeypatch):
    cls = save("qwen3_moe", tmp_path / "float", tie_word_embeddings=True)
    got = load(cls, tmp_path / "float", "fp8")
    assert got.lm_head.weight is got.model.embed_tokens.weight
    got.save_pretrained(tmp_path / "codes")
    assert_same(load(cls, tmp_path / "codes"), got)
    # Two Linears that share a weight would need to share scales: they stay in float, with a reason.
    ties = {"model.layers.1.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight"}
    monkeypatch.setattr(cls, "_tied_weights_keys", {**(cls._tied_weights_keys or {}), **ties})
    saved.change(tmp_path / "float", lambda found: found.pop(next(iter(ties))))
    tied = load(cls, tmp_path / "float", "fp8")
    first, second = (layer.self_attn.q_proj for layer in tied.model.layers)
    assert first.weight is second.weight and first.weight.dtype == torch.bfloat16
    notes = {r.name: r.note for r in moe_ops.summary(tied).rows}
    assert notes["model.layers.1.self_attn.q_proj"].startswith("tied to")


@torch.no_grad()
def test_a_state_dict_instead_of_files(tmp_path):
    model = tiny.build("qwen3_moe").to(torch.bfloat16)
    cls = save("qwen3_moe", tmp_path)
    (found,) = saved.tensors(tmp_path).values()
    got = cls.from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=found, dtype=torch.bfloat16,
        quantization_config=MoeOpsConfig("mxfp8"),
    )  # fmt: skip
    assert_same(got, load(cls, tmp_path, "mxfp8"))
    del found["model.layers.0.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*has 4 of .* 3 of"):
        cls.from_pretrained(
            None, config=model.config, state_dict=found, dtype=torch.bfloat16,
            quantization_config=MoeOpsConfig("mxfp8"),
        )  # fmt: skip


@torch.no_grad()
def test_quantize_says_so_and_dequantize_takes_it_back(tmp_path):
    """What Trainer, PEFT, generate and save_pretrained look for."""
    cls = save("qwen3_moe", tmp_path / "float")
    model = load(cls, tmp_path / "float")
    before, keys = model.config.to_dict(), set(vars(model))
    moe_ops.quantize_(model, {"experts": "mxfp4"})
    quantizer = model.hf_quantizer
    assert model.is_quantized and model.quantization_method == "moe_ops" and model.config._is_quantized
    assert (quantizer.is_trainable, quantizer.is_qat_trainable, quantizer.is_compileable) == (True, True, True)
    assert quantizer.is_serializable()
    assert set(quantizer.quantization_config.modules.values()) == {"mxfp4"}
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(model)  # it trains what is float
    clone = copy.deepcopy(model)
    assert_same(clone, model)
    moe_ops.dequantize_(model)
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    assert set(vars(model)) == keys and model.config.to_dict() == before
    model.save_pretrained(tmp_path / "back")  # in the checkpoint's own layout again
    keys = [{key for part in saved.tensors(tmp_path / d).values() for key in part} for d in ("float", "back")]
    assert keys[0] == keys[1]
    clone.save_pretrained(tmp_path / "codes")
    assert_same(load(cls, tmp_path / "codes"), clone)
    streamed = load(cls, tmp_path / "float", "fp8")
    assert streamed.dequantize(torch.float32) is streamed and streamed.dtype == torch.float32
    assert not getattr(streamed, "is_quantized", False)
    streamed.save_pretrained(tmp_path / "float8")
    assert_same(load(cls, tmp_path / "float8", dtype=torch.float32), streamed)


def test_a_config_may_be_used_twice(tmp_path):
    """What it is given is left as it was; models do not share what they say of themselves."""
    config = MoeOpsConfig("fp8")
    before, models = config.to_dict(), []
    for name, layers in (("qwen3_moe", 2), ("qwen3_moe", 1)):
        cls = save(name, tmp_path / str(layers), num_hidden_layers=layers)
        models.append(cls.from_pretrained(tmp_path / str(layers), quantization_config=config))
    assert config.to_dict() == before
    assert [len(m.config.quantization_config.modules) for m in models] == [10, 5]


def test_a_module_quantized_by_itself_is_saved_as_quantized(tmp_path):
    cls = save("qwen3_moe", tmp_path / "float")
    model = load(cls, tmp_path / "float")
    moe_ops.quantize_(model.model.layers[0], "fp8")
    model.save_pretrained(tmp_path / "codes")
    assert_same(load(cls, tmp_path / "codes"), model)


def test_static_input_scales_survive(tmp_path):
    cls = save("qwen3_moe", tmp_path / "float")
    model = load(cls, tmp_path / "float", "fp8_tensor")
    experts, linear = model.model.layers[1].mlp.experts, model.model.layers[0].self_attn.q_proj
    experts._parameters["down_proj_input_scale"] = torch.nn.Parameter(torch.rand(4), requires_grad=False)
    linear._parameters["weight_input_scale"] = torch.nn.Parameter(torch.tensor(0.25), requires_grad=False)
    model.save_pretrained(tmp_path / "codes")
    again = load(cls, tmp_path / "codes")
    assert_same(again, model)
    assert torch.equal(tiny.run(again), tiny.run(model))


def test_generate_and_compile(tmp_path):
    cls = save("qwen3_moe", tmp_path, torch.float32)
    model = load(cls, tmp_path, "mxfp8", dtype=torch.float32)
    ids = tiny.inputs(model)["input_ids"]
    want = moe_ops.quantize_(load(cls, tmp_path, dtype=torch.float32), "mxfp8").generate(ids, max_new_tokens=4)
    assert torch.equal(model.generate(ids, max_new_tokens=4), want)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(tiny.run(compiled, **tiny.inputs(model)), tiny.run(model), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("folder", sorted((Path(__file__).parent / "data" / "saved").iterdir()), ids=lambda p: p.name)
def test_a_checkpoint_of_every_version(folder, tmp_path):
    """Written by 5.17 and 5.23 to the same bytes (saved.py says how): each reads them, and writes them again."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(set(said["modules"].values())) > 2
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == said
    (kept,) = saved.tensors(tmp_path).values()
    codes = {key for key in kept if key.removesuffix(".weight").endswith("_proj")}
    assert codes and all(kept[key].shape[-1] == 1 for key in codes if kept[key].element_size() == 1)
    want = torch.tensor(json.loads((folder / "expected.json").read_text()))
    torch.testing.assert_close(tiny.run(model)[0, :, :8].float(), want, rtol=0.05, atol=0.02)


@torch.no_grad()
def test_experts_that_do_not_hold_their_weights(tmp_path, monkeypatch):
    """What cannot be streamed, for its weights are spread over modules below it, is quantized after it was loaded."""
    cls = save("qwen3_moe", tmp_path)
    want = load(cls, tmp_path, "mxfp4")
    monkeypatch.setattr(quantizer, "_owns_its_weights", lambda target: target.spec is None)
    got = load(cls, tmp_path, "mxfp4")
    assert_same(got, want)
    got.save_pretrained(tmp_path / "codes")
    assert_same(load(cls, tmp_path / "codes"), want)

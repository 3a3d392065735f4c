"""Checkpoints that cannot be loaded: an error that names the tensor, never a model with other numbers in it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import saved
import tiny_models as tiny
import torch
from saved import assert_same, load, save

import moe_ops
from moe_ops import MoeOpsConfig
from moe_ops.huggingface import reload_

pytestmark = pytest.mark.swap
TESTS = Path(__file__).parent


@pytest.fixture
def floats(tmp_path):
    """A checkpoint with a matrix for each expert."""
    return save("qwen3_moe", tmp_path), tmp_path


@pytest.fixture
def fused(tmp_path):
    """One with all experts in one tensor, transposed, with biases."""
    return save("gpt_oss", tmp_path), tmp_path


@pytest.fixture
def codes(tmp_path):
    cls = save("qwen3_moe", tmp_path / "float")
    load(cls, tmp_path / "float", "fp8").save_pretrained(tmp_path / "codes")
    return cls, tmp_path / "codes"


def refused(cls, path, message, format="mxfp8", kind=ValueError):
    with pytest.raises(kind, match=message):
        load(cls, path, format)


EXPERT = "model.layers.1.mlp.experts.2.{}_proj.weight"


@pytest.mark.parametrize("lost", [
    [EXPERT.format("up")], [EXPERT.format("down")], [EXPERT.format("gate"), EXPERT.format("up")],
    ["model.layers.0.self_attn.q_proj.weight"],
])  # fmt: skip
def test_missing_weights(floats, lost):
    cls, path = floats
    saved.change(path, lambda found: [found.pop(key) for key in lost])
    for key in lost:
        refused(cls, path, re.escape(key))
    if "experts" in lost[0]:  # experts that stay in float are not made up either
        refused(cls, path, re.escape(lost[0]), {"linear": "fp8"})


KEPT = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"]  # never quantized


@pytest.mark.parametrize("key", KEPT)
def test_what_stays_in_float_is_not_made_up(floats, key):
    """transformers would fill it with random numbers, and report that in a table."""
    cls, path = floats
    saved.change(path, lambda found: found.pop(key))
    refused(cls, path, rf"{re.escape(key)}: the checkpoint lacks it")


@pytest.mark.parametrize("key", KEPT)
def test_codes_where_floats_belong(floats, key):
    cls, path = floats
    saved.change(path, lambda found: found.update({key: found[key].to(torch.float8_e4m3fn)}))
    refused(cls, path, rf"{re.escape(key)} is F8_E4M3: codes of another tool")


@pytest.mark.parametrize("part", ["input_scale", "zero_point"])
def test_parts_that_the_format_does_not_have(codes, part):
    cls, path = codes
    key = f"model.layers.0.mlp.experts.down_proj_{part}"
    saved.change(path, lambda found: found.update({key: torch.ones(4)}))
    with pytest.raises(ValueError, match=rf"{re.escape(key)}: nothing in the model takes it"):
        cls.from_pretrained(path)


@pytest.mark.parametrize("kind", ["gate", "up", "down"])
def test_all_of_one_projection_is_missing(floats, kind):
    cls, path = floats
    name = "gate_up_proj" if kind != "down" else "down_proj"

    def drop(found):
        for e in range(4):
            del found[f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight"]

    saved.change(path, drop)
    refused(cls, path, rf"layers\.1\.mlp\.experts\.{name}")


@pytest.mark.parametrize("lost", ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"])
def test_missing_fused_weights(fused, lost):
    cls, path = fused
    saved.change(path, lambda found: found.pop(f"model.layers.0.mlp.experts.{lost}"))
    refused(cls, path, rf"model\.layers\.0\.mlp\.experts\.{lost}: the checkpoint lacks it")


def test_an_expert_too_many(floats):
    cls, path = floats

    def add(found):
        for kind in ("gate", "up", "down"):
            found[f"model.layers.1.mlp.experts.4.{kind}_proj.weight"] = found[EXPERT.format(kind)].clone()

    saved.change(path, add)
    refused(cls, path, r"experts\.4\.gate_proj\.weight: no such expert")


@pytest.mark.parametrize("key", [
    EXPERT.format("gate"), EXPERT.format("down"), "model.layers.0.self_attn.o_proj.weight", "model.norm.weight",
])  # fmt: skip
def test_wrong_shapes(floats, key):
    cls, path = floats
    saved.change(path, lambda found: found.update({key: found[key][:-1].clone()}))
    where = r"expert 2.* must be \(.*\), got" if "experts" in key else re.escape(key) + " must be"
    refused(cls, path, where if key != "model.norm.weight" else ".", kind=(ValueError, RuntimeError))


def test_wrong_shapes_of_fused_weights(fused):
    cls, path = fused
    key = "model.layers.1.mlp.experts.gate_up_proj"
    original = saved.tensors(path)["model.safetensors"][key]
    for wrong in (original[:-1], original.transpose(1, 2), original[..., :-2]):
        saved.change(path, lambda found, wrong=wrong: found.update({key: wrong.clone()}))
        refused(cls, path, re.escape(key) + " must be")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(floats, value):
    cls, path = floats
    whole = saved.tensors(path)["model.safetensors"]
    for key, message in (
        (EXPERT.format("up"), r"layers\.1\.mlp\.experts\.gate_up_proj \(expert 2, up\) has non-finite"),
        ("model.layers.0.self_attn.v_proj.weight", r"layers\.0\.self_attn\.v_proj\.weight has non-finite"),
    ):
        bad = whole[key].clone()
        bad[3, 5] = value
        saved.change(path, lambda found, key=key, bad=bad: found.update({key: bad}))
        refused(cls, path, message)
        saved.change(path, lambda found, key=key: found.update({key: whole[key]}))
    load(cls, path, "mxfp8")


def test_non_finite_fused_weights(fused):
    cls, path = fused
    key = "model.layers.1.mlp.experts.down_proj"

    def spoil(found):
        found[key][3, 0, 0] = float("nan")

    saved.change(path, spoil)
    refused(cls, path, re.escape(key) + r" \(expert 3\) has non-finite")


def test_codes_of_another_tool(floats):
    """A checkpoint with codes, whose config.json does not say so."""
    cls, path = floats
    key = EXPERT.format("down")
    saved.change(path, lambda found: found.update({key: found[key].to(torch.float8_e4m3fn)}))
    refused(cls, path, re.escape(key) + " is F8_E4M3")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_files(floats, codes, kept):
    for (cls, path), format in ((floats, "mxfp8"), (codes, None)):
        file = Path(path) / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * kept)])
        lost = r", \S+ and \d+ more tensors are cut off" if kept >= 0.1 else ""
        refused(cls, path, rf"model\.safetensors cannot be read{lost}", format)


def test_fuzzed_headers(codes):
    """One byte of the header is another one: refused, or the byte did not matter."""
    cls, path = codes
    want, file = load(cls, path), path / "model.safetensors"
    data, pick = file.read_bytes(), random.Random(0)
    length, loaded = int.from_bytes(data[:8], "little"), 0
    for _ in range(30):
        changed, at = bytearray(data), pick.randrange(8 + length)
        changed[at] ^= 1 << pick.randrange(8)
        file.write_bytes(changed)
        try:
            got = load(cls, path)
        except Exception as e:
            assert not isinstance(e, AssertionError | KeyboardInterrupt)
            continue
        loaded += 1
        assert_same(got, want)
    assert loaded < 6


@pytest.mark.parametrize("key", [
    "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj_scale",
    "model.layers.0.self_attn.q_proj.weight_scale", "model.layers.1.input_layernorm.weight", "lm_head.weight",
])  # fmt: skip
def test_missing_parts_of_a_quantized_checkpoint(codes, key):
    cls, path = codes
    saved.change(path, lambda found: found.pop(key))
    refused(cls, path, re.escape(key) + ": the checkpoint lacks it", None)


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def test_tied_weights_that_are_both_missing(tmp_path):
    cls = save("qwen3_moe", tmp_path / "float", tie_word_embeddings=True)
    load(cls, tmp_path / "float", "fp8").save_pretrained(tmp_path / "codes")
    load(cls, tmp_path / "codes")
    saved.change(tmp_path / "codes", lambda found: [found.pop(k) for k in EMBEDDINGS if k in found])
    refused(cls, tmp_path / "codes", "lacks it, and what is tied to it", None)


def test_wrong_parts_of_a_quantized_checkpoint(codes):
    cls, path = codes
    whole = saved.tensors(path)["model.safetensors"]
    experts, linear = "model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"
    norm, gate = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.gate.weight"
    for key, wrong in (
        (experts, whole[experts].float()), (experts, whole[experts][:-1]), (experts, whole[experts].squeeze(-1)),
        (experts, whole[experts].view(torch.int8)), (f"{experts}_scale", whole[f"{experts}_scale"].bfloat16()),
        (f"{experts}_scale", whole[f"{experts}_scale"][:, :-1]), (linear, whole[linear][:, :-1]),
        (f"{linear}_scale", whole[f"{linear}_scale"].mT),
        *((key, whole[key].to(dtype)) for key in (norm, gate) for dtype in (torch.float8_e4m3fn, torch.int32)),
    ):  # fmt: skip
        saved.change(path, lambda found, key=key, wrong=wrong: found.update({key: wrong}))
        refused(cls, path, re.escape(key) + " must be", None)
        saved.change(path, lambda found, key=key: found.update({key: whole[key]}))
    load(cls, path)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(version=2), "version 2 of the moe_ops layout, this moe_ops reads up to 1"),
    (lambda c: c.update(version="1"), "version '1'"),
    (lambda c: c["modules"].update({"model.layers.0.mlp.experts": "fp7"}), "unknown format 'fp7'"),
    (lambda c: c["modules"].update({"model.layers.0.mlp.experts": "mxfp4"}), "down_proj must be U8"),
    (lambda c: c["modules"].update({"model.layers.7.mlp.experts": "fp8"}), r"layers\.7\.mlp\.experts .* no such mod"),
    (lambda c: c["modules"].update({"lm_head": "fp8"}), "lm_head"),
    (lambda c: c["modules"].update({"model.layers.0": "fp8"}), r"layers\.0 is stored in fp8, and cannot be built so"),
    (lambda c: c["modules"].pop("model.layers.0.mlp.experts"), r"layers\.0\.mlp\.experts\.\w+ must be"),
    (lambda c: c.update(modules={}), "of no module"),
    (lambda c: c.update(rotation="hadamard"), "rotation"),
    (lambda c: c.update(modules=["lm_head"]), r"modules maps names of modules and parameters, got \['lm_head'\]"),
    (lambda c: c.update(input_scales={"a": 3}), "input_scales maps parameters to shapes, a to 3"),
    (lambda c: c.update(kv_scales={"a": [1.0, 0.0]}), r"finite and positive, those of a are \(1.0, 0.0"),
    (lambda c: c.update(kv_scales={"a": 1.0}), "KV scales are two numbers, those of a are 1.0"),
    (lambda c: c.update(kv_scales={"model.layers.7": [1.0, 1.0]}), r"layers\.7 with KV scales, .* no such module"),
])  # fmt: skip
def test_a_config_that_says_something_else(codes, change, message):
    cls, path = codes
    saved.change_config(path, change)
    refused(cls, path, message, None)


def test_without_moe_ops_transformers_refuses(tmp_path):
    """It only warns of a quant_method that it does not know, and would cast codes to weights."""
    paths = {}
    for name, format in (
        ("qwen3_moe", "fp8"), ("qwen3_moe", "int8"), ("qwen3_moe", "mxfp4"), ("gpt_oss", "bf16"), ("nemotron_h", "fp8"),
        ("mixtral", "mxfp8"), ("qwen3_moe", "linear"),
    ):  # fmt: skip
        cls = save(name, tmp_path / f"{name}_float")
        path = tmp_path / f"{name}_{format}"
        load(cls, tmp_path / f"{name}_float", {"linear": "fp8"} if format == "linear" else format).save_pretrained(path)
        paths[str(path)] = None
    paths[str(tmp_path / "qwen3_moe_float")] = "loaded"
    done = subprocess.run([sys.executable, TESTS / "plain_load.py", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path, outcome in json.loads(done.stdout.splitlines()[-1]).items():
        assert outcome == "loaded" if paths[path] else outcome.startswith(("RuntimeError", "ValueError")), path


def die_while_saving(model, path, shards):
    """In a process of its own, killed when it has written so many shards."""
    import transformers.modeling_utils as library

    write = library.safe_save_file
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    written = []

    def write_or_die(*args, **kwargs):
        write(*args, **kwargs)
        written.append(args)
        if len(written) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    library.safe_save_file = write_or_die
    model.save_pretrained(path, max_shard_size="20KB")
    os._exit(1)


def test_killed_while_saving(tmp_path):
    """What is there does not load; saving again does."""
    model = moe_ops.quantize_(tiny.build("qwen3_moe").to(torch.bfloat16), "fp8")
    assert die_while_saving(model, tmp_path, shards=3) == signal.SIGKILL
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    with pytest.raises((OSError, ValueError)):
        load(type(model), tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same(load(type(model), tmp_path), model)


@torch.no_grad()
@pytest.mark.parametrize("format", ["fp8", "nvfp4", "int4_g32", "bf16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "aria", "nemotron_h"])
def test_reload_keeps_the_storage(name, format, tmp_path):
    """Float weights and our own, into a model that has others: the result is that of loading it anew."""
    if not tiny.routed_experts(tiny.build(name)):
        pytest.skip("not decorated in this transformers")
    cls = save(name, tmp_path / "a")
    other = tiny.build(name).to(torch.bfloat16)
    for i, p in enumerate(other.parameters()):
        p.copy_((p.float() * 1.25 + 0.01 * (i % 3)).to(p.dtype))
    other.save_pretrained(tmp_path / "b", max_shard_size="50KB")
    first, want = (load_anyhow(cls, tmp_path / d, format) for d in "ab")
    want.save_pretrained(tmp_path / "codes")
    there = {key: t.data_ptr() for key, t in first.state_dict().items()}
    other = want.state_dict()
    changed = [not torch.equal(saved.raw(t), saved.raw(other[key])) for key, t in first.state_dict().items()]
    assert sum(changed) > len(changed) / 2
    for source in ("b", "a", "codes"):
        assert reload_(first, tmp_path / source) is first
        assert_same(first, want if source != "a" else load_anyhow(cls, tmp_path / "a", format))
        assert {key: t.data_ptr() for key, t in first.state_dict().items()} == there


def load_anyhow(cls, path, format):
    config = MoeOpsConfig(format, strict=False)
    return cls.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)


@torch.no_grad()
def test_reload_refuses_before_it_changes_anything(floats, tmp_path):
    cls, path = floats
    model = load(cls, path, "fp8")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    moe_ops.quantize_(load(cls, path), "int8").save_pretrained(tmp_path / "int8")
    moe_ops.quantize_(load(cls, path), {"experts": "fp8"}).save_pretrained(tmp_path / "some")
    (tmp_path / "nothing").mkdir()
    save("qwen3_moe", tmp_path / "other", hidden_size=128)
    save("qwen3_moe", tmp_path / "lost")
    saved.change(tmp_path / "lost", lambda found: found.pop("model.norm.weight"))
    for folder, message in (
        ("int8", "is fp8 in the model and int8 in the checkpoint"), ("some", "and not quantized in the checkpoint"),
        ("nothing", "neither model.safetensors"), ("other", "must be"), ("lost", r"model\.norm\.weight.* lacks it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            reload_(model, tmp_path / folder)
        assert all(torch.equal(saved.raw(t), saved.raw(before[key])) for key, t in model.state_dict().items())
    with pytest.raises(ValueError, match="not quantized"):
        reload_(load(cls, path), path)

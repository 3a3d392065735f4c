"""Quantizing as weights are read: what comes out, in which order it may come, and how much memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import saved
import tiny_models as tiny
import torch
import transformers
from safetensors.torch import save_file

import moe_ops
from moe_ops import FORMATS, QuantizedExperts, QuantizedLinear
from moe_ops.quantize import skeleton_
from moe_ops.streaming import Stream, dummy_, streams

TESTS = Path(__file__).parent
E, WIDTH, H = 2, 128, 128
LAYOUTS = {
    "canonical": {}, "transposed": {"transposed": True}, "interleaved": {"interleaved": True},
    "transposed and interleaved, with biases": {"transposed": True, "interleaved": True, "bias": True},
    "no gate": {"gated": False, "activation": "relu2"},
}  # fmt: skip


def experts(format, layout, seed=0):
    """Float weights as a model holds them, and the quantized module of them."""
    kwargs = dict(LAYOUTS[layout])
    bias, rows = kwargs.pop("bias", False), (2 if kwargs.get("gated", True) else 1) * WIDTH
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(E, rows, H, generator=generator).bfloat16()
    down = torch.randn(E, H, WIDTH, generator=generator).bfloat16()
    if kwargs.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    if bias:
        kwargs |= {"gate_up_bias": torch.randn(E, rows), "down_bias": torch.randn(E, H)}
    return (up, down), QuantizedExperts.from_float(up, down, format, **kwargs)


def assert_same_state(got, want):
    for key, t in want.state_dict().items():
        assert torch.equal(saved.raw(got.state_dict()[key]), saved.raw(t)), key


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_four_steps_for_every_format_and_layout(format, layout):
    """In the worst order, over another model's weights; what is there is written, nothing is made anew."""
    weights, want = experts(format, layout)
    _, module = experts(format, layout, seed=1)
    for key in [key for key in want._parameters if key.endswith("_bias")]:
        module._parameters[key].copy_(want._parameters[key])
    there = {key: t.data_ptr() for key, t in module.state_dict().items()}
    stream = Stream(module, "m")
    for name, w in zip(module.weight_names(), weights, strict=True):
        assert stream.dtype(name) == torch.bfloat16 and tuple(module.float_shape(name)) == tuple(w.shape)
        stream.allocate(name, "cpu")
        for e in reversed(range(E)):
            with pytest.raises(ValueError, match="lacks the weights of experts 0"):
                stream.finish()
            stream.take(name, e, w[e])
    stream.finish()
    assert_same_state(module, want)
    assert {key: t.data_ptr() for key, t in module.state_dict().items()} == there
    stream = Stream(module, "m")
    stream.open()
    assert not any(key.endswith(("_scale", "_point")) for key in module.state_dict())
    for name, w in zip(module.weight_names(), weights, strict=True):
        placeholder = module.get_parameter(name)
        assert placeholder.is_meta and (placeholder.shape, placeholder.dtype) == (w.shape, w.dtype)
        stream.take_whole(name, w.float())  # fp32 in the file: rounded to the model's type first
    stream.finish()
    assert_same_state(module, want)


@torch.no_grad()
@pytest.mark.parametrize("format", [f for f in FORMATS if f != "bf16"])
def test_four_steps_of_a_linear(format):
    linear = torch.nn.Linear(H, 3 * 16).half()
    want = QuantizedLinear.from_float(linear, format)
    module = QuantizedLinear.from_float(torch.nn.Linear(H, 3 * 16).half().to("meta"), format)
    stream = Stream(module, "m")
    with pytest.raises(ValueError, match=r"m\.weight: the checkpoint lacks the weights"):
        stream.finish()
    stream.take_whole("weight", linear.weight)
    stream.finish()
    module._parameters["bias"] = linear.bias
    assert_same_state(module, want)


@torch.no_grad()
def test_shards_may_come_by_themselves():
    (up, down), want = experts("mxfp4", "canonical")
    _, module = experts("mxfp4", "canonical", seed=1)
    stream = Stream(module)
    for shard in (1, 0):
        for e in range(E):
            stream.write("gate_up_proj", e, shard, up[e].unflatten(0, (2, -1))[shard])
    stream.take_whole("down_proj", down)
    stream.finish()
    assert_same_state(module, want)


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w[:-1], r"gate_up_proj \(expert 1, up\) must be \(128, 128\), got \(127, 128\)"),
    (lambda w: w.to(torch.float8_e4m3fn), "codes of another tool"), (lambda w: w.to(torch.int32), "is torch.int32"),
    (lambda w: w.index_fill(0, torch.tensor(3), float("inf")), r"\(expert 1, up\) has non-finite"),
])  # fmt: skip
def test_what_is_no_such_weight_is_not_written(spoil, message):
    (up, _), want = experts("fp8", "canonical")
    _, module = experts("fp8", "canonical")
    with pytest.raises(ValueError, match=message):
        Stream(module, "m").write("gate_up_proj", 1, 1, spoil(up[1, WIDTH:]))
    assert_same_state(module, want)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_dummy_weights(format):
    """A model on meta, without a file: as quantize_ would make it of random weights, and it runs."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    real = moe_ops.quantize_(tiny.build("qwen3_moe", **sizes), format)
    model = tiny.build("qwen3_moe", **sizes)
    for name, m in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            m.to("meta")
    skeleton_(model, format)
    shapes = {key: (t.shape, t.dtype) for key, t in real.state_dict().items()}
    assert {key: (t.shape, t.dtype) for key, t in model.state_dict().items()} == shapes
    for name, m in streams(model):
        if name.rpartition(".")[2] != "experts":
            m.load_state_dict(real.get_submodule(name).state_dict(), assign=True)
    dummy_(model, "cpu")
    assert not any(t.is_meta for t in model.state_dict().values())
    first = model.state_dict()
    assert {key: (t.shape, t.dtype) for key, t in first.items()} == shapes
    assert tiny.run(model).isfinite().all()
    up, _ = model.model.layers[0].mlp.experts.dequantize()
    assert 0.015 < up.std() < 0.025


@pytest.mark.swap
def test_placeholders_keep_their_type(tmp_path, monkeypatch):
    """5.17 casts what it reads to the type of the parameter that it finds: codes there would make every weight zero."""
    seen, write = [], Stream.write

    def note(self, weight, expert, shard, matrix):
        seen.append(matrix.dtype)
        write(self, weight, expert, shard, matrix)

    monkeypatch.setattr(Stream, "write", note)
    cls = saved.save("qwen3_moe", tmp_path)
    model = saved.load(cls, tmp_path, "int8")
    assert len(seen) == 2 * 4 * 3 + 2 * 4 and set(seen) == {torch.bfloat16}
    assert (model.model.layers[0].mlp.experts.gate_up_proj != 0).float().mean() > 0.9


# Memory. A layer's experts are L bytes in bf16, one expert's matrix is a hundredth of that.
HIDDEN, WIDE, EXPERTS, LAYERS = 512, 1024, 32, 2
MATRIX, LAYER = HIDDEN * WIDE, 3 * EXPERTS * HIDDEN * WIDE
SLACK = 6e6


def config(layers, experts):
    return transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDE, num_experts=experts, num_experts_per_tok=2,
        num_hidden_layers=layers, vocab_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        intermediate_size=WIDE, architectures=["Qwen3MoeForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip


def write_model(path, layers, experts, fused):
    """A checkpoint with a file for each layer, of which no more than one is held."""
    path.mkdir(parents=True)
    config(layers, experts).save_pretrained(path)
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in transformers.Qwen3MoeForCausalLM(config(layers, experts)).state_dict().items()}
    weights: dict[str, str] = {}
    for layer in range(-1, layers):
        mine = [k for k in shapes if (f".layers.{layer}." in k if layer >= 0 else ".layers." not in k)]
        part = {k: torch.randn(shapes[k]).bfloat16() * 0.02 for k in mine}
        for key in [k for k in part if ".experts." in k and not fused]:
            stem, _, kind = key.rpartition(".")
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for e, one in enumerate(part.pop(key)):
                part |= {f"{stem}.{e}.{p}.weight": t.clone() for p, t in zip(parts, one.chunk(len(parts)), strict=True)}
        file = f"model-{layer + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def measure(path, format, device="cpu"):
    # Large blocks go back to the system when they are freed, so that what is held can be seen from outside.
    root = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, TESTS / "peak_memory.py", path, format, device], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["per expert", "fused"])
def checkpoint(request, tmp_path_factory):
    path, fused = tmp_path_factory.mktemp("checkpoint"), request.param == "fused"
    write_model(path / "small", 1, 2, fused)
    write_model(path / "big", LAYERS, EXPERTS, fused)
    yield path, fused
    for file in path.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.swap
def test_peak_memory(checkpoint):
    """No more than the quantized model, and one expert's matrix: in bf16, and in fp32 while it is quantized.

    Of fused checkpoints one stored tensor may be in memory; as a file is mapped it is not counted here.
    """
    path, fused = checkpoint
    got = measure(path, "fp8")
    assert got["quantized"] and 0.5 < got["stored"] / (2 * LAYERS * LAYER) < 0.6
    limit = got["stored"] + 32 * MATRIX + SLACK + (2 * 2 * EXPERTS * MATRIX if fused else 0)
    assert got["stored"] < got["peak"] < limit
    if not fused:
        assert got["peak"] < 2 * LAYERS * LAYER  # less than the float model has
        floats = measure(path, "none")  # and the measurement sees what transformers' own merge takes
        assert floats["peak"] > floats["stored"] + 32 * MATRIX + SLACK


@pytest.mark.gpu
@pytest.mark.swap
def test_peak_memory_of_the_gpu(checkpoint):
    path, fused = checkpoint
    for format in ("fp8", "mxfp4"):
        got = measure(path, format, "cuda")
        limit = got["stored"] + 64 * MATRIX + SLACK + (2 * 2 * EXPERTS * MATRIX if fused else 0)
        assert got["stored"] < got["peak"] < limit, (format, got)

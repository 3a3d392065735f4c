"""examples/add_a_format.py: a format that the package has never heard of runs through all of it."""

import importlib.util
from functools import cache
from itertools import product
from pathlib import Path

import oracle
import pairwise
import pytest
import torch
from oracle import Layer, assert_as_good, inputs

import moe_ops
from moe_ops.formats import FORMATS

SCRIPT = Path(__file__).parents[1] / "examples" / "add_a_format.py"
GATES = {
    "halves": {},
    "interleaved": {"activation": "swiglu_oai", "interleaved": True},
    "plain": {"activation": "relu2", "gated": False},
}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CASES = {"name": ["e3m4", "e3m4/e3m4", "e3m4/fp8", "int8/e3m4"], "bias": [False, True], "gate": list(GATES)}


@cache
def example():
    spec = importlib.util.spec_from_file_location("add_a_format", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What is registered here is gone afterwards."""
    for key, value in vars(FORMATS).items():
        monkeypatch.setattr(FORMATS, key, dict(value))


def register():
    if "e3m4" not in FORMATS:  # tests of kernels run in another process, without the fixture
        FORMATS.register(example().FORMAT, as_activation=example().GROUP64)


def test_what_it_prints(capsys):
    example().main()
    lines = capsys.readouterr().out.splitlines()
    stored = {name: (int(size.replace(",", "")), float(error)) for name, size, error in map(str.split, lines[1:])}
    weights = 8 * (512 * 512 + 512 * 256)
    assert stored["e3m4"][0] == weights + weights // 64
    # 4 bits of mantissa for 3: half the error, in weights; rounded activations add their own.
    assert 0.4 < stored["e3m4"][1] / stored["mxfp8/bf16"][1] < 0.6 < stored["e3m4/e3m4"][1] / stored["e3m4"][1] < 2
    with pytest.raises(ValueError, match="registered already"):
        example().main()


def check(case, backend, device, dtype):
    register()
    layer = Layer(case["name"], 3, 72, 136, bias=case["bias"], dtype=dtype, **GATES[case["gate"]])  # partial blocks
    x, ids, weights = inputs(5, 72, 2, 3, dtype)
    moved = (t.to(device) for t in (x, ids, weights))
    got = torch.ops.moe_ops.experts(*moved, *layer.tensors(device), **layer.options(), backend=backend)
    truth, plain = (oracle.experts(layer, x, ids, weights, work) for work in (torch.float64, dtype))
    assert_as_good(got, truth, plain)


@pytest.mark.parametrize(
    "case", [dict(zip(CASES, c)) for c in product(*CASES.values())], ids=lambda c: "-".join(map(str, c.values()))
)
def test_reference(case):
    check(case, "reference", "cpu", torch.float32)


@pytest.mark.kernels
@pytest.mark.parametrize("case", pairwise.cover(CASES), ids=lambda c: "-".join(map(str, c.values())))
def test_kernels(case):
    check(case, "triton", DEVICE, DTYPE)


def test_modules():
    """Quantized, saved, loaded, moved, differentiated, and back."""
    register()
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(4, 64, 96, generator=g) / 10, torch.randn(4, 96, 32, generator=g) / 6
    experts = moe_ops.QuantizedExperts.from_float(up, down, "e3m4")
    other = moe_ops.QuantizedExperts.from_float(up * 0, down * 0, "e3m4")
    other.load_state_dict(experts.state_dict())
    for got, want in zip(other.bfloat16().dequantize(), (up, down)):
        assert (got - want).abs().max() < want.abs().max() / 31
    x, ids, weights = inputs(5, 96, 2, 4)
    x.requires_grad_()
    experts(x, ids, weights).square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()
    linear = moe_ops.QuantizedLinear.from_float(torch.nn.Linear(96, 64), "e3m4/e3m4")
    assert linear.weight.dtype == torch.uint8 and linear(x).isfinite().all()

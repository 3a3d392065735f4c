"""Codecs that nobody lists: kernels compute what the reference does, or say that they do not."""

import pytest
import torch
from torch import nn

import moe_ops
import moe_ops.ops
from moe_ops.backends.base import Problem
from moe_ops.formats import FORMATS, Codec, Format, minifloat, quantize_weight, scales
from moe_ops.formats.fp8 import E4M3

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OPS = torch.ops.moe_ops


def codec(name, block, element=E4M3, scale_dtype=torch.float8_e8m0fnu, rule=scales.rceil, **options):
    return Codec(name=name, element=element, block=block, scale_dtype=scale_dtype, scale_rule=rule, **options)


TILE, GROUP = codec("odd_tile", (128, 128)), codec("odd_group", (1, 128))
SIX = codec("odd_six", (1, 256), minifloat("e2m3_again", exponent_bits=2, mantissa_bits=3))


def even(amax, element):
    """Not the rule of that name."""
    return torch.ones_like(amax)


REFUSED = {
    "exponents as floats": codec("odd_0", (1, 128), scale_dtype=torch.float32),
    "rounded scales": codec("odd_1", (1, 128), scale_dtype=torch.bfloat16, rule=scales.amax_over_max),
    "another rule": codec("odd_2", (1, 32), scale_dtype=torch.float32, rule=even),
    "zero scales": codec("odd_3", (1, 32), scale_dtype=torch.float8_e4m3fn, rule=scales.ratio),
    "e5m2 scales": codec("odd_4", (1, 32), scale_dtype=torch.float8_e5m2, rule=scales.ratio, global_scale=True),
    "groups of 48": codec("odd_5", (1, 48)),
}


def registered(fmt, as_activation=None):
    if fmt.name not in FORMATS:
        FORMATS.register(fmt, as_activation=as_activation)
    return FORMATS[fmt.name]


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["block", "block/bf16", "six", "six/group"])
def test_exponents_of_long_groups(kind):
    """Their scales multiply the product of a step, not the weights."""
    codecs = {"block": (TILE, GROUP), "block/bf16": (TILE, None), "six": (SIX, None), "six/group": (SIX, GROUP)}
    weight, act = codecs[kind]
    fmt = registered(Format(f"odd_{kind.replace('/', '_')}", weight, act))
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    q = quantize_weight(weight, torch.randn(3, 256, 512, generator=g) * 0.01, 2)
    x, offsets = torch.randn(20, 512, generator=g).to(dtype), torch.tensor([0, 3, 7, 20], dtype=torch.int32)
    call = {"format": fmt.name, "activation": "silu"}
    got = OPS.grouped_mm(*(t.to(DEVICE) for t in (x, q.qdata, offsets, q.scale)), **call, backend="triton").cpu()
    want = OPS.grouped_mm(x, q.qdata, offsets, q.scale, **call, backend="reference")
    assert (got.float() - want.float()).norm() <= (0.01 if CUDA else 1e-5) * want.float().norm()


@pytest.mark.parametrize("what", REFUSED)
def test_what_kernels_do_not_compute_is_refused(what, monkeypatch):
    from moe_ops.backends import triton

    made = REFUSED[what]
    registered(Format(made.name, made), as_activation=made)
    problem = Problem("quantize", "cuda", 90, torch.bfloat16, made.name)
    assert isinstance(triton.supports(problem), str)


def test_codes_of_another_codec_do_not_load():
    """Of the same size and type: they would be read as other numbers."""
    linear = nn.Linear(64, 64)
    one, other = (moe_ops.QuantizedLinear.from_float(linear, name) for name in ("mxfp6_e2m3", "mxfp6_e3m2"))
    again = moe_ops.QuantizedLinear.from_float(linear, "mxfp6_e2m3/fp8")
    with pytest.raises(RuntimeError, match="codes of mxfp6_e2m3, this module stores mxfp6_e3m2"):
        other.load_state_dict(one.state_dict())
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.weight, one.weight)


def test_blocks_of_rows_are_no_activations():
    with pytest.raises(ValueError, match="blocks of 128 rows"):
        OPS.quantize(torch.randn(4, 256), None, "e4m3_128x128")

"""Whatever is registered: bounds of the round trip that follow from the codec, shards, static scales, the registry.

Known answers are in test_format_vectors.py, other people's formats in test_format_oracles.py and test_format_mx.py.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from foreign import as_bytes, every_bf16, generator
from torch._subclasses import FakeTensorMode

from moe_ops.formats import FORMATS, Codec, Format, UnknownFormat, dequantize_weight, minifloat, quantize_weight
from moe_ops.formats.base import Formats
from moe_ops.formats.fp8 import E4M3, MATRIX, ROW, TILE
from moe_ops.formats.minifloat import encode_minifloat, minifloat_values
from moe_ops.formats.packing import pack
from moe_ops.formats.scales import amax_over_max, even

CODECS = {c.name: c for f in FORMATS.values() for c in (f.weight, f.activation) if c is not None and c.block}
SHAPES = [(1, 1), (3, 200), (130, 260), (128, 128), (5, 7), (2, 1024)]
FP32 = 2.0**-22  # what the rounding of a quotient and of a product or two amounts to


def takes(codec, n, k):
    if codec.check(n, k):
        pytest.skip(codec.check(n, k))


# ---- elements


def test_e4m3_saturates_and_keeps_nan_and_the_sign_of_zero():
    big = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e30, float("inf")])
    assert as_bytes(E4M3.encode(big)).tolist() == [0x7E] * 6
    assert as_bytes(E4M3.encode(-big)).tolist() == [0xFE] * 6
    assert as_bytes(E4M3.encode(torch.tensor([0.0, -0.0, 1e-9, -1e-9]))).tolist() == [0, 0x80, 0, 0x80]
    assert E4M3.decode(E4M3.encode(torch.tensor([float("nan")]))).isnan().all()


def test_e4m3_is_the_generic_encoder():
    x = every_bf16()
    assert torch.equal(as_bytes(E4M3.encode(x)), encode_minifloat(x, 4, 3, 7, 448.0))


@pytest.mark.parametrize("exponent_bits,mantissa_bits", [(e, m) for e in range(1, 7) for m in range(1, 7) if e + m < 8])
def test_any_minifloat(exponent_bits, mantissa_bits):
    """Every value is its own code; what lies between two goes to the nearer, and from the middle to the even code."""
    element = minifloat("any", exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    values = element.decode(codes)
    assert torch.equal(element.encode(values), codes) and values.max() == element.max
    low, high = values[: len(codes) // 2].double().unfold(0, 2, 1).unbind(-1)
    assert (high > low).all()
    middle, lower = ((low + high) / 2).float(), codes[: len(low)]
    assert torch.equal(element.encode(middle), lower + lower % 2)
    assert torch.equal(element.encode(middle.nextafter(low.float())), lower)
    assert torch.equal(element.encode(middle.nextafter(high.float())), lower + 1)
    beyond = torch.tensor([element.max * 1.5, math.inf, math.nan])
    assert element.encode(beyond).tolist() == [lower[-1] + 1] * 2 + [0]
    assert torch.equal(element.encode(-beyond[:2]), element.encode(beyond[:2]) + len(codes) // 2)


def test_tables_are_real_and_on_the_cpu():
    """Neither a fake tensor mode nor a default device gets into the table that decoding keeps."""
    element = minifloat("unused elsewhere", exponent_bits=2, mantissa_bits=4)
    with FakeTensorMode(), torch.device("meta"):
        assert element.decode(torch.zeros(3, dtype=torch.uint8, device="cpu")).shape == (3,)
    with torch.device("meta"):
        assert minifloat_values(2, 4, 1).device.type == "cpu"
    assert element.decode(torch.tensor([1], dtype=torch.uint8)).tolist() == [2.0**-4]


# ---- codecs


def spread(codec, q, n, k):
    """Scale of every element in float64, by index, the global scale included."""
    scale = q.scale.double()
    if codec.block == (0, 0):
        scale = scale[..., None, None].expand(*scale.shape, n, k)
    else:
        rows = torch.arange(n) // codec.block[0] if codec.block[0] else torch.zeros(n, dtype=torch.long)
        columns = torch.arange(k) // codec.block[1] if codec.block[1] else torch.zeros(k, dtype=torch.long)
        scale = scale[..., rows, :][..., columns]
    return scale if q.global_scale is None else scale * q.global_scale.double()[..., None, None]


def half_step(y, element):
    """Half the distance between the neighbours of |y|: half an ulp of a minifloat, 1/2 for integers."""
    if not element.exponent_bits:
        return torch.full_like(y, 0.5)
    exponent = y.abs().clamp(min=2.0**-60).log2().floor().clamp(min=1 - element.bias)
    return 2.0 ** (exponent - element.mantissa_bits - 1)


def reach(codec, q, n, k):
    """Largest |x| that the rule lets into a block of each scale: what a scale that was rounded down leaves outside too.

    `even` takes the scale of amax as soon as amax rounds to 2 in the element's mantissa. Other rules give amax / max,
    rounded up (e8m0) or to the nearest that the scale's dtype holds.
    """
    element, scale = codec.element, spread(codec, replace(q, global_scale=None), n, k)
    if codec.scale_rule is even:
        return scale * 2.0 ** math.floor(math.log2(element.max)) * (2 - 2.0 ** -(element.mantissa_bits + 1))
    if codec.scale_dtype == torch.float8_e8m0fnu:
        return scale * element.max
    info = torch.finfo(codec.scale_dtype)
    ulp = info.eps * 2.0 ** scale.clamp(min=info.tiny).log2().floor()
    largest = element.max * (scale + ulp / 2)
    return largest if q.global_scale is None else largest * q.global_scale.double()[..., None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_round_trip(name, shape, dtype):
    """The nearest code of x / scale; the largest one for what the scale leaves outside."""
    codec, (n, k) = CODECS[name], shape
    takes(codec, n, k)
    x = (torch.randn(2, n, k, generator=torch.Generator().manual_seed(n)) * 5).to(dtype)
    x[0, 0, : k // 2] *= 2.0**-9  # a block that is small beside the others: subnormal scales of scales
    q = codec.quantize(x)
    assert q.qdata.dtype == codec.element.storage and q.scale.dtype == codec.scale_dtype
    assert q.qdata.shape == (2, n, codec.stored(k)) and codec.columns(codec.stored(k)) == k
    assert (q.global_scale is not None) == codec.global_scale
    x64, scale = x.double(), spread(codec, q, n, k)
    assert (x64.abs() <= reach(codec, q, n, k) * (1 + FP32)).all()

    every = codec.element.decode(torch.arange(2**codec.element.bits, dtype=torch.uint8).view(codec.element.storage))
    low, high = every[every.isfinite()].aminmax()
    y = torch.where(scale == 0, 0.0, x64 / scale)
    inside = y.clamp(max(low, -codec.element.max), max=high)  # int8 has a -128, which is not written
    error = (codec.dequantize(q).double() - x64).abs()
    allowed = half_step(inside, codec.element) + (y - inside).abs()
    allowed = torch.where(scale == 0, x64.abs(), allowed * scale)
    assert (error <= allowed + x64.abs() * FP32).all()
    assert torch.equal(codec.dequantize(q, torch.bfloat16), codec.dequantize(q).bfloat16())


@pytest.mark.parametrize("name", CODECS)
def test_values_of_the_codec_are_kept(name):
    """Quantizing what was dequantized, with its scales, gives the same codes: nothing drifts."""
    codec = CODECS[name]
    q = codec.quantize(torch.randn(2, 130, 256, generator=generator()))
    again = codec.quantize(codec.dequantize(q), q.scale, q.global_scale)
    assert torch.equal(codec.decode(again.qdata), codec.decode(q.qdata))


@pytest.mark.parametrize("flush", [False, True], ids=["", "flush_denormal"])
@pytest.mark.parametrize("name", CODECS)
def test_zero_blocks(name, flush):
    codec = CODECS[name]
    x = torch.randn(256, 256, generator=generator())
    x[:128, :128] = 0
    torch.set_flush_denormal(flush)
    try:
        for t in (x, x * 0, x * -0.0):
            q = codec.quantize(t)
            assert q.scale.float().isfinite().all() and codec.dequantize(q).isfinite().all()
            assert (codec.dequantize(q)[:128, :128] == 0).all()
            assert codec.global_scale or flush or (q.scale.float() > 0).all()
        empty = codec.quantize(x[:0])
        assert codec.dequantize(empty).shape == (0, 256)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", CODECS)
def test_tiny_and_huge(name):
    """The ends of fp32's range make neither NaN nor infinities, and nothing outgrows half a binade."""
    codec = CODECS[name]
    x = torch.randn(4, 256, generator=generator()).clamp(-4, 4)
    for exponent in (-149, -140, -130, -126, -100, 100, 124):
        t = (x.double() * 2.0**exponent).float()
        got = codec.dequantize(codec.quantize(t))
        assert got.isfinite().all() and got.abs().max() <= t.abs().max() * 1.5 + 2.0**-126


@pytest.mark.parametrize("name", CODECS)
def test_nan_and_infinity_are_not_hidden(name):
    """In the element or its whole block, never a finite number in their place; other blocks are untouched."""
    codec = CODECS[name]
    x = torch.randn(256, 256, generator=generator())
    clean = codec.dequantize(codec.quantize(x))
    for value in (float("nan"), float("inf"), -float("inf")):
        x[3, 5] = value
        got = codec.dequantize(codec.quantize(x))
        assert not got[3, 5].isfinite()
        untouched = (got == clean)[128:, 128:]
        assert untouched.all() or codec.block == (0, 0) or codec.global_scale


@pytest.mark.parametrize("name", CODECS)
def test_static_scale_is_used_as_it_is(name):
    codec = CODECS[name]
    x = torch.randn(20, 256, generator=generator())
    dynamic = codec.quantize(x)
    again = codec.quantize(x, dynamic.scale, dynamic.global_scale)
    assert torch.equal(dynamic.qdata.view(torch.uint8), again.qdata.view(torch.uint8))
    half = (dynamic.scale.float() / 2).to(codec.scale_dtype)
    halved = codec.quantize(x, half, dynamic.global_scale)  # amax is now beyond the largest element: saturates
    assert torch.equal(halved.scale.float(), half.float())
    least = 8.0 if codec.element.name == "int4" else codec.element.max
    got, bound = codec.dequantize(halved).double(), least * spread(codec, halved, 20, 256)
    assert (got.abs() <= bound * (1 + FP32)).all() and (got.abs() >= bound * 0.9).any()
    fp32 = codec.quantize(x, dynamic.scale.float(), dynamic.global_scale)  # as another dtype may come from a checkpoint
    assert torch.equal(fp32.qdata.view(torch.uint8), dynamic.qdata.view(torch.uint8))


@pytest.mark.parametrize("name", CODECS)
def test_any_leading_dims(name):
    codec = CODECS[name]
    x = torch.randn(2, 3, 20, 256, generator=generator())
    whole = codec.quantize(x)
    values = codec.dequantize(whole)
    for i, j in product(range(2), range(3)):
        one = codec.quantize(x[i, j])
        assert torch.equal(one.scale.float(), whole.scale[i, j].float())
        assert torch.equal(as_bytes(one.qdata), as_bytes(whole.qdata[i, j]))
        assert torch.equal(codec.dequantize(one), values[i, j])


@pytest.mark.parametrize("rows", [64, 40, 130, 128])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", list(dict.fromkeys(f.weight.name for f in FORMATS.values())))
def test_shards_are_quantized_apart(name, shards, rows):
    """No block straddles gate and up, nor does a global scale: they are what they would be alone."""
    codec, k = FORMATS.codec(name), 256
    w = torch.randn(3, shards * rows, k, generator=generator())
    w[1] *= 100
    w[2, -rows:] /= 100
    q = quantize_weight(codec, w, shards)
    assert q.qdata.shape == (3, shards * rows, codec.stored(k))
    assert q.global_scale is None or q.global_scale.shape == (3, shards)
    dq = dequantize_weight(q, shards)
    for e, s in product(range(3), range(shards)):
        part = slice(s * rows, (s + 1) * rows)
        one = codec.quantize(w[e, part])
        assert torch.equal(dq[e, part], codec.dequantize(one))
        if one.scale is not None:
            mine = q.scale[e].unflatten(0, (shards, -1))[s].reshape(one.scale.shape)
            assert torch.equal(mine.float(), one.scale.float())


def test_packed_groups_fill_k():
    element = minifloat("6bit", exponent_bits=3, mantissa_bits=2)
    for block, good, bad in (((1, 32), 64, 40), ((1, 0), 40, 36), ((1, 10), 40, 50)):
        codec = Codec(name="6bit", element=element, block=block, scale_rule=amax_over_max)
        assert codec.check(3, good) is None and "not a multiple" in codec.check(3, bad)
        x = torch.randn(3, good, generator=generator())
        assert (codec.dequantize(codec.quantize(x)) - x).abs().max() < 0.5
    assert all(codec.check(3, 7) is None for codec in CODECS.values() if codec.element.bits == 8)
    with pytest.raises(ValueError, match="5 bits are not packed"):
        pack(torch.zeros(8, dtype=torch.uint8), 5)


# ---- registry

WEIGHT_ONLY = {"int4_g128", "int4_g32"}
OCP = [
    "mxfp4", "mxfp4/mxfp4", "mxfp4/mxfp6_e3m2", "mxfp4/mxfp6_e2m3", "mxfp4/fp8",
    "mxfp6_e3m2", "mxfp6_e3m2/mxfp6_e3m2", "mxfp6_e3m2/fp8",
    "mxfp6_e2m3", "mxfp6_e2m3/mxfp6_e2m3", "mxfp6_e2m3/fp8",
]  # fmt: skip


def test_listed_names():
    assert list(FORMATS)[:1] == ["bf16"] and {"fp8", "fp8_tensor", "fp8_block", "fp8/bf16"} <= set(FORMATS)
    assert {"int8", "int8/int8", "nvfp4", "nvfp4/bf16", "mxfp8", "mxfp4/mxfp8", *WEIGHT_ONLY} <= set(FORMATS)
    assert len(FORMATS) == len(list(FORMATS)) == len(set(FORMATS))
    assert all(FORMATS[name].name == name for name in FORMATS)
    assert not FORMATS["bf16"].quantized and all(FORMATS[name].quantized for name in FORMATS if name != "bf16")


def test_the_eleven_ocp_combinations():
    assert len(OCP) == 11 and set(OCP) <= set(FORMATS)
    for name in OCP:
        weight, _, activation = name.partition("/")
        fmt = FORMATS[name]
        assert fmt.weight is FORMATS[weight].weight and fmt.weight.block == (1, 32)
        want = {"": None, "fp8": FORMATS["fp8"].activation}.get(activation, FORMATS.get(activation, fmt).weight)
        assert fmt.activation is want


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize("activation", FORMATS)
def test_pairs(weight, activation):
    """Every two bare names make a pair, but for two kinds of reasons, which are given."""
    if "/" in weight or "/" in activation:
        assert f"{weight}/{activation}" not in FORMATS
        return
    name, right = f"{weight}/{activation}", FORMATS[activation]
    reason = "is for weights only" if activation in WEIGHT_ONLY else "stay in float"
    if activation in WEIGHT_ONLY or (weight == "bf16" and right.quantized):
        with pytest.raises(UnknownFormat, match=reason) as raised:
            FORMATS[name]
        assert repr(name) in str(raised.value) and name not in FORMATS
        return
    pair = FORMATS[name]
    assert (pair.name, pair.weight) == (name, FORMATS[weight].weight)
    assert pair.activation == (right.activation or (right.weight if right.quantized else None))
    assert FORMATS.resolve(pair) == FORMATS.resolve(name) == pair


UNKNOWN = [
    "fp9",
    "",
    "fp8/",
    "/fp8",
    "fp8/fp9",
    "fp9/fp8",
    "fp8/bf16/bf16",
    "fp8/fp8/bf16",
    "fp8/mxfp4/fp8",
    "FP8",
    8,
    None,
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_list_the_known_ones(name):
    assert name not in FORMATS and FORMATS.get(name) is None
    for error in (ValueError, KeyError):
        with pytest.raises(error) as raised:
            FORMATS[name]
        assert all(known in str(raised.value) for known in FORMATS) and repr(name) in str(raised.value)


def test_register():
    formats = Formats()
    formats.register(Format("a", ROW, ROW))
    formats.register(Format("b", TILE), as_activation=MATRIX)
    assert list(formats) == ["a", "b"]
    assert formats["a/b"].activation is MATRIX and formats["b/a"] == Format("b/a", TILE, ROW)
    formats.list_pair("b/a")
    assert list(formats) == ["a", "b", "b/a"] and formats.codec(MATRIX.name) is MATRIX
    with pytest.raises(ValueError, match="registered already"):
        formats.register(Format("a", TILE))
    with pytest.raises(ValueError, match="another codec"):
        formats.register(Format("c", Codec(name=ROW.name, element=E4M3, block=(2, 0), scale_rule=amax_over_max)))
    with pytest.raises(ValueError, match="unknown codec"):
        formats.codec("e9m9")
    assert "c" not in formats, "a refused format is not listed"

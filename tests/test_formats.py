"""Elements, codecs and the registry: known answers to the bit, other people's definitions, bounds of the round trip."""

import hashlib
import json
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from moe_ops.formats import FORMATS, Codec, Format, UnknownFormat, dequantize_weight, quantize_weight
from moe_ops.formats.base import Formats
from moe_ops.formats.fp8 import E4M3, MATRIX, ROW, TILE
from moe_ops.formats.minifloat import decode_minifloat, encode_minifloat
from moe_ops.formats.scales import amax_over_max

VECTORS = json.loads((Path(__file__).parent / "data" / "format_vectors.json").read_text())
# name -> exponent bits, mantissa bits, bias, largest, ml_dtypes' definition
MINIFLOATS = {
    "e2m1": (2, 1, 1, 6.0, ml_dtypes.float4_e2m1fn),
    "e2m3": (2, 3, 1, 7.5, ml_dtypes.float6_e2m3fn),
    "e3m2": (3, 2, 3, 28.0, ml_dtypes.float6_e3m2fn),
    "e4m3fn": (4, 3, 7, 448.0, ml_dtypes.float8_e4m3fn),
    "e5m2": (5, 2, 15, 57344.0, ml_dtypes.float8_e5m2),
}
CODECS = {c.name: c for f in FORMATS.values() for c in (f.weight, f.activation) if c is not None and c.block}
SHAPES = [(1, 1), (3, 200), (130, 260), (128, 128), (5, 7)]


def codes_of(t):
    return t.view(torch.uint8).tolist()


def every_bf16():
    """All finite bf16 values as fp32: every exponent, ties of every element included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[x.isfinite()]


# ---- elements


@pytest.mark.parametrize("name", MINIFLOATS)
def test_minifloat_vectors(name):
    e, m, bias, largest, _ = MINIFLOATS[name]
    v = VECTORS[f"elem_{name}"]
    codes = encode_minifloat(torch.tensor(v["x"]), e, m, bias, largest)
    assert codes.tolist() == v["code"]
    values = decode_minifloat(codes, e, m, bias)
    assert values.tolist() == v["value"]
    assert torch.equal(values.signbit(), torch.tensor(v["value"]).signbit())  # -0 too


@pytest.mark.parametrize("name", MINIFLOATS)
def test_minifloat_is_ml_dtypes(name):
    e, m, bias, largest, theirs = MINIFLOATS[name]
    random = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * largest / 3
    x = torch.cat([every_bf16(), random, random / largest, torch.tensor([largest, -largest, 0.0, -0.0])])
    want = torch.from_numpy(x.clamp(-largest, largest).numpy().astype(theirs).view(np.uint8))
    assert torch.equal(encode_minifloat(x, e, m, bias, largest), want)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3fn"])
def test_minifloat_decodes_every_code(name):
    e, m, bias, _, _ = MINIFLOATS[name]
    want = VECTORS["decode"][name]
    got = decode_minifloat(torch.arange(len(want), dtype=torch.uint8), e, m, bias)
    finite = [i for i, value in enumerate(want) if value is not None]
    assert [got[i].item() for i in finite] == [want[i] for i in finite]


def test_e4m3_vectors():
    v = VECTORS["elem_e4m3fn"]
    codes = E4M3.encode(torch.tensor(v["x"]))
    assert codes_of(codes) == v["code"]
    assert E4M3.decode(codes).tolist() == v["value"]


def test_e4m3_decodes_every_code():
    got = E4M3.decode(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    want = torch.tensor([float("nan") if x is None else x for x in VECTORS["decode"]["e4m3fn"]])
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 2
    assert torch.equal(got[~got.isnan()].view(torch.int32), want[~want.isnan()].view(torch.int32))


def test_e4m3_saturates_and_keeps_nan_and_the_sign_of_zero():
    big = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e30, float("inf")])
    assert codes_of(E4M3.encode(big)) == [0x7E] * 6
    assert codes_of(E4M3.encode(-big)) == [0xFE] * 6
    assert codes_of(E4M3.encode(torch.tensor([0.0, -0.0, 1e-9, -1e-9]))) == [0, 0x80, 0, 0x80]
    assert E4M3.decode(E4M3.encode(torch.tensor([float("nan")]))).isnan().all()


def test_e4m3_is_the_generic_encoder():
    x = every_bf16()
    assert torch.equal(E4M3.encode(x).view(torch.uint8), encode_minifloat(x, 4, 3, 7, 448.0))


# ---- codecs: known answers


def test_fp8_per_tensor():
    v, w = VECTORS["fp8"]["per_tensor"], torch.tensor(VECTORS["fp8"]["w"])
    q = MATRIX.quantize(w)
    assert q.scale.shape == () and q.scale.item() == v["scale"]
    assert codes_of(q.qdata) == v["codes"] and MATRIX.dequantize(q).tolist() == v["dequant"]


def test_fp8_per_channel():
    v, w = VECTORS["fp8"]["per_channel"], torch.tensor(VECTORS["fp8"]["w"])
    q = ROW.quantize(w)
    assert q.scale.tolist() == [[s or 1.0] for s in v["scale"]]  # a row of zeros: scale 1
    assert codes_of(q.qdata) == v["codes"] and ROW.dequantize(q).tolist() == v["dequant"]


def test_fp8_small_blocks():
    v = VECTORS["fp8_block_4x4"]
    codec = Codec(name="4x4", element=E4M3, block=(4, 4), scale_rule=amax_over_max)
    q = codec.quantize(torch.tensor(v["w"]))
    assert q.scale.tolist() == v["scale"] and codes_of(q.qdata) == v["codes"]
    assert codec.dequantize(q).tolist() == v["dequant"]


def test_fp8_blocks_of_128():
    v = VECTORS["fp8_block_128"]
    i, j = torch.arange(160)[:, None], torch.arange(320)[None, :]
    w = ((i * 37 + j * 101) % 257 - 128).float() * 2.0 ** (-(i // 64) - (j // 96) - 4).float()
    w[128:, 256:] = 0
    assert w[1, :4].tolist() == v["w_row1_first4"]
    q = TILE.quantize(w)
    assert q.scale.tolist() == v["scale"]
    codes = q.qdata.view(torch.uint8)
    assert codes[0].tolist() == v["row0_codes"] and codes[159].tolist() == v["row159_codes"]
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == v["codes_sha256"]


# ---- codecs: other people's


def test_torchao_agrees():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    for codec, block in ((ROW, [1, 300]), (MATRIX, [40, 300])):
        scale = primitives._choose_scale_float8(x, block)
        codes = primitives._quantize_affine_float8(x, scale)
        q = codec.quantize(x)
        assert torch.equal(q.scale.view(scale.shape), scale)
        assert torch.equal(q.qdata.view(torch.uint8), codes.view(torch.uint8))


def test_compressed_tensors_agrees():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    for codec, strategy in ((ROW, "channel"), (MATRIX, "tensor")):
        args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
        low, high = (x.amin(1, True), x.amax(1, True)) if strategy == "channel" else (x.min(), x.max())
        scale, zero = calculate_qparams(low, high, args)
        q = codec.quantize(x)
        assert torch.equal(q.scale.flatten(), scale.flatten())
        codes = quantize(x, scale, zero, args, dtype=torch.float8_e4m3fn)
        assert torch.equal(q.qdata.view(torch.uint8), codes.view(torch.uint8))


# ---- codecs: whatever is registered


def spread(codec, scale, n, k):
    """Scale of every element, by index."""
    scale = scale.float()
    if codec.block == (0, 0):
        return scale.expand(n, k) if scale.ndim == 0 else scale[..., None, None].expand(*scale.shape, n, k)
    rows = torch.arange(n) // codec.block[0] if codec.block[0] else torch.zeros(n, dtype=torch.long)
    columns = torch.arange(k) // codec.block[1] if codec.block[1] else torch.zeros(k, dtype=torch.long)
    return scale[..., rows, :][..., columns]


def half_step(y, element):
    """Half the distance between neighbours of |y| in a minifloat: half an ulp."""
    exponent = y.double().abs().clamp(min=2.0**-60).log2().floor().clamp(min=1 - element.bias)
    return 2.0 ** (exponent - element.mantissa_bits - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_round_trip(name, shape, dtype):
    codec, (n, k) = CODECS[name], shape
    if codec.check(n, k):
        pytest.skip(codec.check(n, k))
    x = (torch.randn(2, n, k, generator=torch.Generator().manual_seed(n)) * 5).to(dtype)
    q = codec.quantize(x)
    assert q.qdata.dtype == codec.element.storage and q.scale.dtype == codec.scale_dtype
    scale = spread(codec, q.scale, n, k).double()
    y = x.double() / scale
    assert (y.abs() <= codec.element.max * (1 + 2**-22)).all()
    rounding = x.double().abs() * 2**-22  # of the fp32 quotient and product
    error = (codec.dequantize(q).double() - x.double()).abs()
    assert (error <= half_step(y, codec.element) * scale + rounding).all()
    assert torch.equal(codec.dequantize(q, torch.bfloat16), codec.dequantize(q).bfloat16())


@pytest.mark.parametrize("name", CODECS)
def test_zero_blocks(name):
    codec = CODECS[name]
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    x[:128, :128] = 0
    for t in (x, x * 0):
        q = codec.quantize(t)
        assert (spread(codec, q.scale, 256, 256) > 0).all() and q.scale.float().isfinite().all()
        assert (codec.dequantize(q)[:128, :128] == 0).all()
    empty = codec.quantize(x[:0])
    assert codec.dequantize(empty).shape == (0, 256)


@pytest.mark.parametrize("name", CODECS)
def test_nan_and_infinity_are_not_hidden(name):
    """In the element or its whole block, never a finite number in their place; other blocks are untouched."""
    codec = CODECS[name]
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    clean = codec.dequantize(codec.quantize(x))
    for value in (float("nan"), float("inf")):
        x[3, 5] = value
        got = codec.dequantize(codec.quantize(x))
        assert not got[3, 5].isfinite()
        untouched = (got == clean)[128:, 128:]
        assert untouched.all() or codec.block == (0, 0)


@pytest.mark.parametrize("name", CODECS)
def test_static_scale_is_used_as_it_is(name):
    codec = CODECS[name]
    x = torch.randn(20, 160, generator=torch.Generator().manual_seed(0))
    dynamic = codec.quantize(x)
    again = codec.quantize(x, dynamic.scale)
    assert torch.equal(dynamic.qdata.view(torch.uint8), again.qdata.view(torch.uint8))
    halved = codec.quantize(x, dynamic.scale / 2)  # amax is now beyond the largest element: saturates
    bound = codec.element.max * spread(codec, halved.scale, 20, 160) * (1 + 2**-22)
    assert (codec.dequantize(halved).abs() <= bound).all() and torch.equal(halved.scale, dynamic.scale / 2)


@pytest.mark.parametrize("name", CODECS)
def test_any_leading_dims(name):
    codec = CODECS[name]
    x = torch.randn(2, 3, 20, 160, generator=torch.Generator().manual_seed(0))
    whole = codec.quantize(x)
    for i, j in product(range(2), range(3)):
        one = codec.quantize(x[i, j])
        assert torch.equal(one.scale, whole.scale[i, j])
        assert torch.equal(one.qdata.view(torch.uint8), whole.qdata[i, j].view(torch.uint8))


@pytest.mark.parametrize("rows", [64, 40, 130, 128])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_shards_are_quantized_apart(name, shards, rows):
    """No block straddles gate and up: they are what they would be alone."""
    codec, k = FORMATS[name].weight, 160
    w = torch.randn(3, shards * rows, k, generator=torch.Generator().manual_seed(0))
    w[1] *= 100
    q = quantize_weight(codec, w, shards)
    assert q.qdata.shape[:2] == w.shape[:2]
    dq = dequantize_weight(q, shards)
    for e, s in product(range(3), range(shards)):
        part = slice(s * rows, (s + 1) * rows)
        one = codec.quantize(w[e, part])
        assert torch.equal(dq[e, part], codec.dequantize(one))
        if one.scale is not None:
            assert torch.equal(q.scale[e].unflatten(0, (shards, -1))[s].reshape(one.scale.shape), one.scale)


# ---- registry


def test_listed_names():
    assert list(FORMATS)[:1] == ["bf16"] and {"fp8", "fp8_tensor", "fp8_block", "fp8/bf16"} <= set(FORMATS)
    assert len(FORMATS) == len(list(FORMATS)) == len(set(FORMATS))
    assert all(FORMATS[name].name == name for name in FORMATS)
    assert not FORMATS["bf16"].quantized and FORMATS["fp8"].quantized


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize("activation", FORMATS)
def test_pairs(weight, activation):
    if "/" in weight or "/" in activation:
        assert "fp8/bf16/bf16" not in FORMATS
        return
    name, right = f"{weight}/{activation}", FORMATS[activation]
    if not FORMATS[weight].quantized and right.activation is not None:
        with pytest.raises(UnknownFormat, match="stay in float"):
            FORMATS[name]
        return
    pair = FORMATS[name]
    assert (pair.name, pair.weight) == (name, FORMATS[weight].weight)
    assert pair.activation == right.activation or right.activation is None  # as_activation: only in pairs
    assert pair.activation is None or activation != "bf16"


@pytest.mark.parametrize("name", ["fp9", "", "fp8/", "/fp8", "fp8/fp9", "fp9/fp8", "fp8/bf16/bf16", "FP8", 8, None])
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


def test_packed_groups_must_fill_k():
    four_bits = Codec(name="4bit", element=type(E4M3)(**{**vars(E4M3), "name": "x", "bits": 4}), block=(1, 32))
    assert four_bits.check(3, 64) is None and "not a multiple" in four_bits.check(3, 40)
    assert all(codec.check(3, 7) is None for codec in CODECS.values() if codec.element.bits == 8)

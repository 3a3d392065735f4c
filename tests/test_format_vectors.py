"""Known answers to the bit (tests/data/format_vectors.json): elements, packing, scale rules, blocks of every codec.

The vectors come from an encoder in exact rational arithmetic. Its scale modes `ceil` and `even1` are rules that no
format of this library uses; their keys are skipped by name, so that they show.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_ops.formats import FORMATS, Codec, QuantizedTensor, minifloat
from moe_ops.formats.fp8 import E4M3, MATRIX, ROW, TILE
from moe_ops.formats.integer import INT4, INT8, INT8_ROW
from moe_ops.formats.minifloat import decode_minifloat, encode_minifloat
from moe_ops.formats.mx import E2M1, E2M3, E3M2
from moe_ops.formats.packing import pack, unpack
from moe_ops.formats.scales import amax_over_max, even, floor, rceil

VECTORS = json.loads((Path(__file__).parent / "data" / "format_vectors.json").read_text())
E5M2 = minifloat("e5m2", exponent_bits=5, mantissa_bits=2, largest=57344.0)  # its top exponent is NaN and infinities
ELEMENTS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3fn": E4M3, "e5m2": E5M2}
NVFP4 = FORMATS["nvfp4"].weight
RULES = {"floor": floor, "even": even, "rceil": rceil}
NO_RULE = {"ceil": "torchao only", "even1": "compressed-tensors' mxfp8 only"}  # loading what they wrote needs no rule


def rule_of(mode):
    if mode in NO_RULE:
        pytest.skip(f"no format has the scale rule {mode!r} ({NO_RULE[mode]})")
    return RULES[mode]


def bytes_of(t):
    return t.view(torch.uint8).tolist()


def same_floats(got, want):
    """Equal, -0 and 0 told apart, None for NaN and strings for infinities."""
    want = torch.tensor([float("nan") if x is None else float(x) for x in want])
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        got[~got.isnan()].view(torch.int32), want[~want.isnan()].view(torch.int32)
    )


# ---- elements


@pytest.mark.parametrize("name", ELEMENTS)
def test_encode(name):
    element, v = ELEMENTS[name], VECTORS[f"elem_{name}"]
    codes = element.encode(torch.tensor(v["x"]))
    assert codes.dtype == element.storage and bytes_of(codes) == v["code"]
    assert same_floats(element.decode(codes), v["value"])


@pytest.mark.parametrize("name", ELEMENTS)
def test_generic_encoder(name):
    """Every element by its bits alone, e4m3 too, which has a faster way."""
    e, v = ELEMENTS[name], VECTORS[f"elem_{name}"]
    codes = encode_minifloat(torch.tensor(v["x"]), e.exponent_bits, e.mantissa_bits, e.bias, e.max)
    assert codes.tolist() == v["code"]
    assert same_floats(decode_minifloat(codes, e.exponent_bits, e.mantissa_bits, e.bias), v["value"])


@pytest.mark.parametrize("name", ELEMENTS)
def test_decode_every_code(name):
    element, want = ELEMENTS[name], VECTORS["decode"][name]
    codes = torch.arange(len(want), dtype=torch.uint8).view(element.storage)
    assert len(want) == 2**element.bits
    got = element.decode(codes)
    if name == "e5m2":  # a generic minifloat has no special codes: nobody writes them, and they decode as numbers
        numbers = [i for i, x in enumerate(want) if isinstance(x, float)]
        assert len(numbers) == 256 - 8
        got, want = got[numbers], [want[i] for i in numbers]
    assert same_floats(got, want)


def test_decode_e8m0():
    v = VECTORS["decode_e8m0"]
    codec = FORMATS["mxfp4"].weight

    def one(byte):
        scale = torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        ones = torch.full((1, 16), 0x22, dtype=torch.uint8)
        return codec.dequantize(QuantizedTensor(ones, scale, None, None, codec))

    assert all((one(byte) == value).all() for byte, value in zip(v["byte"], v["value"]))
    assert one(255).isnan().all()


@pytest.mark.parametrize("key,bits", [("pack_fp4", 4), ("pack_fp6", 6)])
def test_pack(key, bits):
    v = VECTORS[key]
    packed = pack(torch.tensor(v["codes"], dtype=torch.uint8), bits)
    assert packed.tolist() == v["bytes"] and unpack(packed, bits).tolist() == v["codes"]


def test_pack_int4():
    """int32 words of compressed-tensors are the same bytes, little-endian."""
    v = VECTORS["pack_int4"]
    codes = torch.tensor(v["codes"])
    packed = pack(INT4.encode(codes.float()), 4)
    assert packed.view(torch.int32).tolist() == v["int32"]
    assert torch.equal(INT4.decode(unpack(packed, 4)), codes.float())


# ---- shared exponents


@pytest.mark.parametrize("key", [k for k in VECTORS["shared_exp"] if k != "amax"])
def test_shared_exponent(key):
    name, mode = key.split("/")
    amax = torch.tensor(VECTORS["shared_exp"]["amax"])
    assert bytes_of(rule_of(mode)(amax, ELEMENTS[name])) == VECTORS["shared_exp"][key]


@pytest.mark.parametrize("key", VECTORS["mx"])
def test_mx_block(key):
    name, mode, block = key.split("/")
    element, v = ELEMENTS[name], VECTORS["mx"][key]
    codec = Codec(name=key, element=element, block=(1, 32), scale_dtype=torch.float8_e8m0fnu, scale_rule=rule_of(mode))
    q = codec.quantize(torch.tensor([VECTORS["blocks"][block]]))
    assert bytes_of(q.scale) == [[v["scale"]]]
    assert bytes_of(q.qdata) == [v["packed"]]
    assert bytes_of(unpack(q.qdata, element.bits) if codec.packed else q.qdata) == [v["codes"]]
    assert same_floats(codec.dequantize(q)[0], v["dequant"])


# ---- nvfp4


def test_nvfp4():
    v = VECTORS["nvfp4"]
    q = NVFP4.quantize(torch.tensor([v["x"]]))
    assert q.global_scale.item() == v["weight_scale_2"]
    assert bytes_of(q.scale) == [v["scales"]] and v["scales"] == v["scales_by_tool"]["exact"]
    assert bytes_of(q.qdata) == [v["packed"]] and unpack(q.qdata, 4).tolist() == [v["codes"]]
    assert same_floats(NVFP4.dequantize(q)[0], v["dequant"])


@pytest.mark.parametrize("tool", ["modelopt", "compressed_tensors"])
def test_nvfp4_of_other_tools_loads(tool):
    """They differ in the scale of the block of zeros alone, with the same codes: the tensor is the same."""
    v = VECTORS["nvfp4"]
    scale = torch.tensor([v["scales_by_tool"][tool]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = torch.tensor([v["packed"]], dtype=torch.uint8)
    q = QuantizedTensor(packed, scale, None, torch.tensor(v["weight_scale_2"]), NVFP4)
    assert NVFP4.dequantize(q)[0].tolist() == v["dequant"]


def test_nvfp4_reciprocal_convention():
    """weight_global_scale is 1 / g. With amax near 1 a mix-up is 7 million times off, and cannot pass."""
    v = VECTORS["nvfp4"]
    x = torch.tensor([v["x"]]) / 6.0
    q = NVFP4.quantize(x)
    reciprocal = 2688.0 / x.abs().max()  # as compressed-tensors finds it
    assert reciprocal.item() == v["weight_global_scale"] * 6.0
    theirs = replace(q, global_scale=1.0 / reciprocal)
    torch.testing.assert_close(NVFP4.dequantize(theirs), NVFP4.dequantize(q), rtol=2**-22, atol=0.0)
    torch.testing.assert_close(NVFP4.dequantize(theirs), x, rtol=0.0, atol=0.2)
    assert NVFP4.dequantize(replace(q, global_scale=reciprocal)).abs().max() > 1e6


# ---- fp8


def test_fp8_per_tensor():
    v, w = VECTORS["fp8"]["per_tensor"], torch.tensor(VECTORS["fp8"]["w"])
    q = MATRIX.quantize(w)
    assert q.scale.shape == () and q.scale.item() == v["scale"]
    assert bytes_of(q.qdata) == v["codes"] and MATRIX.dequantize(q).tolist() == v["dequant"]


def test_fp8_per_channel():
    v, w = VECTORS["fp8"]["per_channel"], torch.tensor(VECTORS["fp8"]["w"])
    q = ROW.quantize(w)
    assert q.scale.tolist() == [[s or 1.0] for s in v["scale"]]  # a row of zeros: scale 1
    assert bytes_of(q.qdata) == v["codes"] and ROW.dequantize(q).tolist() == v["dequant"]


def test_fp8_small_blocks():
    v = VECTORS["fp8_block_4x4"]
    codec = Codec(name="4x4", element=E4M3, block=(4, 4), scale_rule=amax_over_max)
    q = codec.quantize(torch.tensor(v["w"]))
    assert q.scale.tolist() == v["scale"] and bytes_of(q.qdata) == v["codes"]
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


# ---- integers


def test_int8():
    v = VECTORS["int8"]
    q = INT8_ROW.quantize(torch.tensor(v["w"]))
    assert q.scale.tolist() == [[s or 1.0] for s in v["scale"]]  # a row of zeros: scale 1
    assert q.qdata.tolist() == v["codes"] and INT8_ROW.dequantize(q).tolist() == v["dequant"]


def test_int8_divided_by_127_5_loads():
    """What tools write that divide by 127.5, -128 included, is read as it is. We write no -128, whatever the scale."""
    v, w = VECTORS["int8_127_5"], torch.tensor(VECTORS["int8_127_5"]["w"])
    codes, scale = torch.tensor(v["codes"], dtype=torch.int8), torch.tensor(v["scale"])[:, None]
    got = INT8_ROW.dequantize(QuantizedTensor(codes, scale, None, None, INT8_ROW))
    assert got.tolist() == (codes.float() * scale).tolist()
    assert ((got - w).abs() <= scale * (0.5 + 2**-10)).all()  # 127.5 rounds to even, to 128
    wide = INT8_ROW.quantize(w, scale)
    assert torch.equal(wide.qdata, codes.clamp(min=-127)) and torch.equal(wide.scale, scale)
    their_codec = replace(INT8_ROW, element=replace(INT8, max=127.5))
    assert their_codec.quantize(w).scale.tolist() == [[s if any(row) else 1.0] for s, row in zip(v["scale"], v["w"])]


def test_int4_g32():
    v = VECTORS["int4_g32"]
    codec = replace(FORMATS["int4_g32"].weight, scale_dtype=torch.float32)  # the vector's scale is not rounded to bf16
    q = codec.quantize(torch.tensor([v["x"]]))
    assert q.scale.item() == v["scale"] and (unpack(q.qdata, 4)[0].int() - 8).tolist() == v["codes"]
    assert q.qdata.view(torch.int32).tolist() == [v["int32"]]
    assert codec.dequantize(q)[0].tolist() == v["dequant"]


def test_int4_codes_belong_to_the_scale_that_is_stored():
    """bf16 rounds the scale; quantizing with the one before would leave codes that are not the nearest."""
    codec = FORMATS["int4_g32"].weight
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    q = codec.quantize(x)
    assert q.scale.dtype == torch.bfloat16
    again = replace(codec, scale_dtype=torch.float32).quantize(x, q.scale.float())
    before = replace(codec, scale_dtype=torch.float32).quantize(x)
    assert torch.equal(q.scale, before.scale.bfloat16())
    assert torch.equal(q.qdata, again.qdata) and not torch.equal(q.qdata, before.qdata)

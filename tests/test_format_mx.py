"""Shared exponents and mx blocks against exact arithmetic, ml_dtypes, torchao and compressed-tensors.

Where one of them is wrong or follows another convention, a test says so and leaves out just those blocks,
after asserting that they are what is expected of the fault.
"""

import math

import numpy as np
import pytest
import torch
from foreign import ELEMENTS, as_bytes, codes_of, compressed, every_bf16, generator, no_minus_zero

from moe_ops.formats import FORMATS, Codec, QuantizedTensor
from moe_ops.formats.fp8 import E4M3
from moe_ops.formats.packing import unpack
from moe_ops.formats.scales import even, floor, rceil

RULES = {"floor": floor, "even": even, "rceil": rceil}


def mx(element, rule):
    return Codec(name="mx", element=element, block=(1, 32), scale_dtype=torch.float8_e8m0fnu, scale_rule=rule)


def thresholds(element):
    """fp32 magnitudes around which a shared exponent changes, in every binade, and an ulp or two to each side."""
    mantissa = np.float32(element.max).view(np.int32).item() & 0x7FFFFF
    around = (0, mantissa, (1 << 23) - (1 << (22 - element.mantissa_bits)))
    fields = sorted({(m + d) & 0x7FFFFF for m in around for d in (-2, -1, 0, 1, 2, 30)})
    bits = [(e << 23) | m for e in range(255) for m in fields] + [1 << k | j for k in range(23) for j in range(3)]
    return torch.tensor(sorted(set(bits)), dtype=torch.int32).view(torch.float32)


def blocks(element, least=-148, most=124):
    """(B, 64) fp32 over all of the exponents: random ones, ones whose amax is a threshold, zeros, -0, subnormals."""
    g = generator()
    random = torch.randn(400, 64, generator=g) * torch.randint(least, most, (400, 1), generator=g).double().exp2()
    random[::2] = random[::2].bfloat16().float()
    amax = thresholds(element)
    amax = amax[(amax >= 2.0**least) & (amax <= 2.0 ** (most + 4))]
    edge = amax[::3].double()[:, None] * (torch.rand(len(amax[::3]), 64, generator=g).double() * 2 - 1)
    edge[:, 3], edge[:, 40] = amax[::3].double(), -amax[::3].double()
    zeros = torch.zeros(3, 64)
    zeros[1] = -0.0
    zeros[2, 32:] = 1.5
    return torch.cat([random.float(), edge.float(), zeros])


def exact_byte(mode, amax, element):
    """The rules in float64, where all of these values and their products are exact."""
    mantissa, exponent = math.frexp(amax)  # amax = 2 mantissa 2^(exponent - 1)
    if mode == "rceil":
        m, e = math.frexp(element.max)
        b = exponent - e + (mantissa > m)
    else:
        bumped = mode == "even" and 2 * mantissa >= 2 - 2.0 ** -(element.mantissa_bits + 1)
        b = exponent - 1 + bumped - math.floor(math.log2(element.max))
    return max(b + 127, 0) if amax else 0


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_shared_exponents_are_exact(name, mode):
    element, _ = ELEMENTS[name]
    amax = torch.cat([thresholds(element), every_bf16().abs().unique()])
    want = [exact_byte(mode, a, element) for a in amax.tolist()]
    assert as_bytes(RULES[mode](amax, element)).tolist() == want
    assert max(want) <= 254, "a finite amax never makes the byte that means NaN"
    specials = torch.tensor([math.nan, math.inf])
    assert as_bytes(RULES[mode](specials, element)).tolist() == [255, 255]


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_ml_dtypes(name, mode):
    """Codes of x / 2^(b - 127), which float64 holds exactly, and what they decode to, blocks of byte 0 included."""
    element, theirs = ELEMENTS[name]
    codec, x = mx(element, RULES[mode]), blocks(element)
    q = codec.quantize(x)
    byte = [[exact_byte(mode, a, element) for a in row] for row in x.unflatten(1, (-1, 32)).abs().amax(-1).tolist()]
    assert as_bytes(q.scale).tolist() == byte and byte[-1] != byte[-2] == [0, 0]
    scale = torch.tensor(byte).sub(127).double().exp2().repeat_interleave(32, 1)
    codes = (x.double() / scale).clamp(-element.max, element.max).numpy().astype(theirs)
    assert torch.equal(codes_of(q), torch.from_numpy(codes.view(np.uint8)))
    values = (torch.from_numpy(codes.astype(np.float64)) * scale).float()
    assert torch.equal(codec.dequantize(q).view(torch.int32), values.view(torch.int32))


@pytest.fixture(scope="module")
def torchao_mx():
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtypes = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    dtypes |= {name: getattr(mx_tensor, f"DTYPE_FP6_{name.upper()}") for name in ("e2m3", "e3m2")}

    def run(x, name, mode):
        mode = getattr(mx_tensor.ScaleCalculationMode, mode.upper())
        scale, codes = mx_tensor.to_mx(x, dtypes[name], 32, mode)
        codes = as_bytes(codes)
        return as_bytes(scale), unpack(codes, 4) if name == "e2m1" else codes

    return run


def rceil_is_wrong(x, element):
    """Blocks of which torchao's rceil is one less. It takes log2 of amax / max in fp32.

    That rounds to an integer for quotients just above a power of two, and so does the quotient itself, in the
    subnormals, for one amax: the one above max * 2^-127.
    """
    amax = x.unflatten(1, (-1, 32)).abs().amax(-1)
    q = amax / element.max
    log2_rounds = (q.log2() == q.log2().round()) & (q.frexp().mantissa > 0.5) & (q.frexp().mantissa < 0.75)
    return log2_rounds | ((q == 2.0**-127) & (amax > element.max * 2.0**-127))


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_torchao(name, mode, torchao_mx):
    """Scales and codes to the bit, but for two faults of torchao's.

    Its rceil rounds. And blocks of byte 0 it scales by 2^-126, in rceil by 1, instead of 2^-127.
    """
    element, _ = ELEMENTS[name]
    codec, x = mx(element, RULES[mode]), blocks(element)
    q, (scale, codes) = codec.quantize(x), torchao_mx(x, name, mode)
    ours, wrong = as_bytes(q.scale), rceil_is_wrong(x, element)
    if mode != "rceil":
        wrong = torch.zeros_like(wrong)
    assert torch.equal(scale[~wrong], ours[~wrong])
    assert torch.equal(scale[wrong], ours[wrong] - 1) and wrong.any() == (mode == "rceil")

    wrong, least = wrong.repeat_interleave(32, 1), (scale == 0).repeat_interleave(32, 1)
    assert torch.equal(codes_of(q)[~(wrong | least)], codes[~(wrong | least)])
    faulty = as_bytes(element.encode(x / (1.0 if mode == "rceil" else 2.0**-126)))
    assert torch.equal(codes[least], faulty[least]) and not torch.equal(codes_of(q)[least], faulty[least])


def test_nan_and_infinity_as_torchao(torchao_mx):
    """NaN is byte 255 for both. Of an infinity torchao makes a finite block, we one of NaN: it is not hidden."""
    for value, theirs in ((math.nan, 255), (math.inf, 254)):
        x = torch.ones(1, 64)
        x[0, 40] = value
        q, (scale, codes) = mx(E4M3, rceil).quantize(x), torchao_mx(x, "e4m3", "rceil")
        assert scale.tolist() == [[119, theirs]] and as_bytes(q.scale).tolist() == [[119, 255]]
        assert torch.equal(codes_of(q)[:, :32], codes[:, :32])


# format -> kind of checkpoint, bits, mantissa bits that its rule rounds amax to
MX = {
    "mxfp4": ("mxfp4-pack-quantized", 4, 1),
    "mxfp6_e2m3": ("mxfp6-pack-quantized", 6, 3),
    "mxfp8": ("mxfp8-quantized", 8, 1),
}


@pytest.mark.parametrize("name", MX)
def test_mx_is_compressed_tensors(name):
    """Bytes of the checkpoint, and what they decode to (in bf16 there), but for a fault and a convention of its.

    An amax that rounds to 2^128 overflows there. Its mxfp8 takes the exponent above for amax = 1.75 * 2^e, ours only
    for what is larger.
    """
    codec, (kind, bits, mantissa) = FORMATS[name].weight, MX[name]
    x = blocks(codec.element)
    amax = x.unflatten(1, (-1, 32)).abs().amax(-1)
    overflows = amax >= (2 - 2.0 ** -(mantissa + 1)) * 2.0**127
    above = (amax.frexp().mantissa == 0.875) & (codec.scale_rule is rceil) & ~overflows
    written, values = compressed(
        x, kind, 32, num_bits=bits, type="float", strategy="group", scale_dtype=torch.uint8, zp_dtype=torch.uint8
    )
    q, scale = codec.quantize(x), written["weight_scale"]
    theirs = as_bytes(written["weight_packed" if codec.packed else "weight"])
    same, ours = ~(overflows | above), as_bytes(q.scale)
    assert torch.equal(scale[same], ours[same]) and torch.equal(scale[above], ours[above] + 1)
    assert (scale[overflows] == 127).all() and 0 < overflows.sum() < 10

    keep = same.repeat_interleave(32, 1)
    codes = unpack(theirs, bits) if codec.packed else theirs
    assert torch.equal(no_minus_zero(codes, bits)[keep], no_minus_zero(codes_of(q), bits)[keep])
    read = QuantizedTensor(theirs.view(codec.element.storage), scale.view(codec.scale_dtype), None, None, codec)
    assert torch.equal(codec.dequantize(read, torch.bfloat16), values)

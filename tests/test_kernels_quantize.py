"""Triton's quantization against the definitions, to the bit: codes to numbers, scales to numbers, numbers to both."""

import math
from itertools import count

import pytest
import torch
from kernel_cases import CODECS, CUDA, DEVICE, DTYPE, OPS, alone, same
from oracle import takes_static

from moe_ops.formats import FORMATS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from moe_ops.kernels.decode import DECODE, DECODE_BITS, PAIR_UNIT, minifloat, pair_values, scale_value  # noqa: E402

pytestmark = pytest.mark.kernels
DTYPES = [torch.float32, *([torch.bfloat16, torch.float16] if CUDA else [])]  # to compute in
SOURCES = [torch.bfloat16, torch.float16, torch.float32]
ELEMENTS = {f.weight.element.name: f.weight.element for f in FORMATS.values() if f.quantized}
NATIVE = CUDA and torch.cuda.get_device_capability() >= (8, 9)
BYTES = torch.arange(256).to(torch.uint8)


# ---- codes and scales to numbers: all of them


@triton.jit
def _decode_kernel(in_ptr, out_ptr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = DECODE(tl.load(in_ptr + i), out_ptr.dtype.element_ty, ELEMENT[0], ELEMENT[1], ELEMENT[2])
    tl.store(out_ptr + i, value)


@triton.jit
def _pairs_kernel(in_ptr, out_ptr, ELEMENT: tl.constexpr, N: tl.constexpr):
    i, b = tl.arange(0, N), tl.arange(0, 2)
    w = tl.load(in_ptr + i)
    for p in tl.static_range(4):
        tl.store(out_ptr + i[:, None] * 8 + p + 4 * b[None, :], pair_values(w, p, ELEMENT))


@triton.jit
def _scale_kernel(in_ptr, out_ptr, KIND: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, scale_value(tl.load(in_ptr + i), out_ptr.dtype.element_ty, KIND))


def fields(element):
    return element.exponent_bits, element.mantissa_bits, element.bias


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=pytest.mark.skipif(not NATIVE, reason="no e4m3"))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code(name, dtype, native):
    element, n = ELEMENTS[name], 2 ** ELEMENTS[name].bits
    codes = BYTES[:n].view(element.storage)
    known = codes if native or not codes.is_floating_point() else codes.view(torch.uint8)
    out = torch.empty(n, dtype=dtype, device=DEVICE)
    decode = (DECODE if native else DECODE_BITS).get(name, minifloat)
    _decode_kernel[(1,)](known.to(DEVICE), out, DECODE=decode, ELEMENT=fields(element), N=n)
    assert same(out, element.decode(codes).to(dtype))


@pytest.mark.gpu  # the interpreter does not multiply in bf16
@pytest.mark.parametrize("name", [name for name, element in ELEMENTS.items() if element.bits == 4])
def test_every_pair_of_nibbles(name):
    data = torch.randint(256, (4096, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    out = torch.empty(4096, 8, dtype=torch.bfloat16, device=DEVICE)
    _pairs_kernel[(1,)](data.view(torch.int32).to(DEVICE), out, ELEMENT=fields(ELEMENTS[name]), N=4096)
    codes = torch.stack([data & 15, data >> 4], -1).flatten(1)
    unit = 1.0 if ELEMENTS[name].exponent_bits else PAIR_UNIT.value
    assert same(out * unit, ELEMENTS[name].decode(codes).bfloat16())


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float16])
@pytest.mark.parametrize("kind,stored", [("e8m0", torch.float8_e8m0fnu), ("e4m3", torch.float8_e4m3fn)])
def test_every_scale(kind, stored, dtype):
    for known in (BYTES, *([BYTES.view(stored)] if NATIVE and kind == "e4m3" else [])):
        out = torch.empty(256, dtype=dtype, device=DEVICE)
        _scale_kernel[(1,)](known.to(DEVICE), out, KIND=kind, N=256)
        assert same(out, BYTES.view(stored).float().to(dtype))


# ---- numbers to codes and scales


def fill(codec, size):
    """The next row width that the groups of a codec fill, where they must."""
    return next(k for k in count(size) if not FORMATS.codec(codec).check(1, k))


def check(x, codec, scale=None, there=lambda t: t.to(DEVICE)):
    got = OPS.quantize(there(x), None if scale is None else scale.to(DEVICE), codec, "triton")
    want = OPS.quantize(x, scale, codec, "reference")
    for what, a, b in zip(("global scales", "scales", "codes"), reversed(got), reversed(want)):
        assert same(a, b), what


def rows_of(x, codec):
    """x, or its rows one by one where they would share a scale."""
    return list(x[:, None]) if FORMATS.codec(codec).block == (0, 0) else [x]


SPECIAL = [0.0, -0.0, 448.0, -449.0, 464.0, 465.0, 1e-3, 1.0625, 2.0**-9, 2.0**-10, 3e38, 1e-38, 1e-40, -1e-45, 240.0]


def to_quantize(dtype, width):
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0)) * 3
    x[1] = 0.0
    x[2, : len(SPECIAL)] = torch.tensor(SPECIAL)
    x[3] *= 1e-30
    x[4] = 1e-42
    x[5, : len(SPECIAL)] = torch.tensor(SPECIAL).clamp(-448, 448)  # an unscaled copy of most, amax 448
    x[5, len(SPECIAL) :] = 0.0
    x[6, 200] = float("nan")
    x[7, 7] = float("inf")
    x[8, :64] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("codec", CODECS)
def test_quantize_to_the_bit(codec, dtype):
    x = to_quantize(dtype, fill(codec, 268))
    for part in rows_of(x, codec):
        check(part, codec)
    check(x[:6, : fill(codec, 40)], codec)


def around(values):
    """Values and their neighbours in fp32, those that are finite."""
    v = torch.as_tensor(values, dtype=torch.float32)
    v = torch.cat([v, v.nextafter(torch.tensor(torch.inf)), v.nextafter(torch.tensor(-torch.inf))])
    return v[v.isfinite()]


@pytest.mark.parametrize("codec", CODECS)
def test_ties(codec):
    """All values of an element, the middles between them, and what lies next to those, at a scale of 1."""
    element, width = FORMATS.codec(codec).element, fill(codec, 268)
    codes = BYTES[: 2**element.bits].view(element.storage)
    grid = element.decode(codes).abs().unique()
    grid = grid[grid <= element.max]
    values = torch.cat([grid, around((grid[1:] + grid[:-1]) / 2)])
    values = torch.cat([values, -values])
    x = torch.full((-(-len(values) // (width // 16 * 15)), width // 16, 16), element.max)
    x[..., 1:] = values[torch.arange(x[..., 1:].numel()) % len(values)].view(x[..., 1:].shape)
    for row in rows_of(torch.nn.functional.pad(x.flatten(1), (0, width - x[0].numel())), codec):
        check(row, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_edges_of_scales(codec):
    """Largest values at which a scale changes, at both ends of fp32: exponents 2^-127, subnormal amax, byte 254."""
    element = FORMATS.codec(codec).element
    up = 2.0 - 2.0 ** -(element.mantissa_bits + 1)
    edges = [m * 2.0**e for m in (element.max, 1.0, up) for e in (-129, -128, -127, -126, -40, 0, 1, 30)]
    edges += [2.0**-149, 3e38, element.max * 448.0, 2.0 ** (127 - math.floor(math.log2(element.max)))]
    amax = around(edges)
    x = (torch.rand(len(amax), fill(codec, 40), generator=torch.Generator().manual_seed(0)) * 2 - 1) * amax[:, None]
    x[:, 3] = amax
    for part in rows_of(x, codec):
        check(part, codec)


@pytest.mark.parametrize("shape", [(), (9, 1)], ids=str)
@pytest.mark.parametrize("codec", [c for c in CODECS if takes_static(FORMATS.codec(c))])
def test_static_scales(codec, shape):
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.01
    check(to_quantize(DTYPE, fill(codec, 268)), codec, scale / 448 if FORMATS.codec(codec).global_scale else scale)


@pytest.mark.parametrize("codec", CODECS)
def test_strided_and_long(codec):
    g = torch.Generator().manual_seed(0)
    x, long = torch.randn(32, 640, generator=g).to(DTYPE), torch.randn(2, fill(codec, 16400), generator=g).to(DTYPE)
    for view in (lambda t: t[:, 96:], lambda t: t[::8], lambda t: t[::8, ::2], lambda t: t[:, :48].T):
        check(view(x), codec, there=lambda _, view=view: view(x.to(DEVICE)))
    check(long, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_beyond_32_bits(codec):
    """On the CPU in memory that is only reserved."""
    x = torch.randn(3, fill(codec, 72), generator=torch.Generator().manual_seed(0)).to(DTYPE)
    with alone():
        far = torch.empty(2**31 + x.numel(), dtype=DTYPE, device=DEVICE).as_strided(x.shape, (2**30, 1))
        check(x, codec, there=far.copy_)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("codec", CODECS)
def test_many(codec, dtype):
    check((torch.randn(2048, 2880, generator=torch.Generator().manual_seed(0)) * 5).to(dtype), codec)

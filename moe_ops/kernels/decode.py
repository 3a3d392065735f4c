"""Codes to numbers and back, inside a kernel. Element name -> function; any minifloat is described by its bits.

A decoder takes codes and the type to compute in, an encoder fp32 numbers; both take the element's (EXPONENT, MANTISSA,
BIAS). With an element as a Triton type the operand is used as it is, or cast. Without (e4m3 before sm_89; in the
interpreter, whose cast to e4m3 loses the carry of the rounding) the same bytes come as uint8 and are taken apart.
"""

import triton
import triton.language as tl


@triton.jit
def raw(x, MMA: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    if x.dtype == tl.float8e4nv and MMA == tl.bfloat16:  # straight to it they go one by one, at a quarter of the speed
        return x.to(tl.float32).to(MMA)
    return x.to(MMA)


@triton.jit
def offset8(x, MMA: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    return (x.to(tl.int8) - 8).to(MMA)


@triton.jit
def minifloat(x, MMA: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Exact: sign and magnitude put in place give value * 2^(BIAS - 127), subnormals included."""
    sign: tl.constexpr = 1 << (EXPONENT + MANTISSA)
    if MMA == tl.bfloat16:
        c = x.to(tl.int16)
        bits = ((c & sign) << (15 - EXPONENT - MANTISSA)) | ((c & (sign - 1)) << (7 - MANTISSA))
        return bits.to(tl.bfloat16, bitcast=True) * tl.full((), 2.0 ** (127 - BIAS), tl.bfloat16)
    else:
        c = x.to(tl.int32)
        bits = ((c & sign) << (31 - EXPONENT - MANTISSA)) | ((c & (sign - 1)) << (23 - MANTISSA))
        return (bits.to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)).to(MMA)


@triton.jit
def e4m3_bits(x, MMA: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """uint8 codes of e4m3, whose 0x7f is NaN."""
    c = x.to(tl.int32)
    value = minifloat(c, tl.float32, EXPONENT, MANTISSA, BIAS)
    return tl.where((c & 0x7F) == 0x7F, float("nan"), value).to(MMA)


# Integers come out of `pair_values` as (code - 8) / 4: 2^127 is the largest power of two that one multiplication has.
PAIR_UNIT = tl.constexpr(4.0)


@triton.jit
def pair_values(w, P: tl.constexpr, ELEMENT: tl.constexpr):
    """Nibbles P and P + 4 of int32 words as two bf16 (..., 2), taken apart as the halves of one register.

    Minifloats as in `minifloat`. Integers in offset form (no exponent bits) in units of PAIR_UNIT: a nibble in bits 4
    to 7 of a bf16 is code * 2^-129, its highest bit, the lowest of the exponent, included.
    """
    MANTISSA: tl.constexpr = ELEMENT[1]
    near = w if P < 2 else w >> 8  # nibble P % 2 of each half
    if ELEMENT[0] == 0:
        bits = near & 0x00F000F0 if P % 2 else (near & 0x000F000F) << 4
    else:  # one product puts a copy of the nibble's sign at the sign, and one of its magnitude at the exponent
        BY: tl.constexpr = (1 + (1 << (5 + MANTISSA))) << (7 - MANTISSA - 4 * (P % 2))
        keep: tl.constexpr = (0x8000 + (7 << (7 - MANTISSA))) * 0x00010001 - (1 << 32)  # as an int32
        bits = ((near & (0x000F000F << (4 * (P % 2)))) * BY) & keep
    low, high = (bits & 0xFFFF).to(tl.int16), (bits >> 16).to(tl.int16)
    both = tl.join(low, high).to(tl.bfloat16, bitcast=True)
    if ELEMENT[0] == 0:
        return both * tl.full((), 2.0**127, tl.bfloat16) - tl.full((), 2.0, tl.bfloat16)
    else:
        return both * tl.full((), 2.0 ** (127 - ELEMENT[2]), tl.bfloat16)


@triton.jit
def scale_value(s, TYPE: tl.constexpr, KIND: tl.constexpr):
    """A stored scale as TYPE. KIND: "e8m0" and "e4m3" are bytes (e4m3 also its own type), else a float."""
    if KIND == "e8m0":
        if TYPE == tl.bfloat16:  # 2^-127 is below its normal numbers, but not below it
            b = s.to(tl.int16)
            bits = tl.where(b == 255, 0x7FC0, tl.maximum(b << 7, 0x40)).to(tl.int16)
            return bits.to(tl.bfloat16, bitcast=True)
        else:
            b = s.to(tl.int32)
            bits = tl.where(b == 255, 0x7FC00000, tl.maximum(b << 23, 0x400000))
            return bits.to(tl.float32, bitcast=True).to(TYPE)
    elif KIND == "e4m3" and s.dtype == tl.uint8:
        return e4m3_bits(s, TYPE, 4, 3, 7)
    else:
        return s.to(TYPE)


@triton.jit
def to_e4m3(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """By the chip: nearest, ties to even, saturating; the clamp keeps NaN."""
    return tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def to_minifloat(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """fp32 -> uint8 by integer bits (formats/minifloat.py has the equation); NaN becomes 0."""
    x = tl.where(x != x, 0.0, x)
    sign = (x.to(tl.int32, bitcast=True) >> (31 - EXPONENT - MANTISSA)) & (1 << (EXPONENT + MANTISSA))
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, 1 - BIAS)
    inverse_spacing = ((127 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    steps = magnitude * inverse_spacing  # exact, below 2^(MANTISSA + 1); adding 2^23 rounds it, ties to even
    steps = (steps + 8388608.0).to(tl.int32, bitcast=True) & ((4 << MANTISSA) - 1)
    return ((((exponent + BIAS - 1) << MANTISSA) + steps) | sign).to(tl.uint8)


@triton.jit
def to_e4m3_bits(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    code = to_minifloat(x, EXPONENT, MANTISSA, BIAS, LARGEST)
    return tl.where(x != x, 0x7F, code.to(tl.int32)).to(tl.uint8)


@triton.jit
def to_int8(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Nearest, ties to even: 1.5 * 2^23 puts the integer into the low bits. NaN becomes 0."""
    x = tl.minimum(tl.maximum(tl.where(x != x, 0.0, x), -LARGEST), LARGEST)
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


DECODE = {"bf16": raw, "e4m3": raw, "int8": raw, "int4": offset8}
DECODE_BITS = {**DECODE, "e4m3": e4m3_bits}
ENCODE = {"e4m3": to_e4m3, "int8": to_int8}
ENCODE_BITS = {**ENCODE, "e4m3": to_e4m3_bits}

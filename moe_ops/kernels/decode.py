"""Codes to numbers and back, inside a kernel. Element name -> function, by what the chip has.

With the element as a Triton type the operand is used as it is, or cast. Without (e4m3 before sm_89; the interpreter,
whose cast to e4m3 loses the carry of the rounding) the same bytes come as uint8 and are taken apart by hand.
"""

import triton
import triton.language as tl


@triton.jit
def raw(x):
    return x


@triton.jit
def e4m3_bits_to_float(code):
    """uint8 -> fp32, exact: sign and 7 bits in place, times 2^(127 - 7); 0x7f is NaN."""
    c = code.to(tl.int32)
    bits = ((c & 0x80) << 24) | ((c & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((c & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def float_to_e4m3(x):
    """fp32 -> e4m3 by the chip: nearest, ties to even, saturating; the clamp keeps NaN."""
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def float_to_e4m3_bits(x):
    """fp32 -> uint8, the same rounding by integer bits (formats/minifloat.py has the equation)."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    inverse_spacing = ((127 + 3 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = magnitude * inverse_spacing  # exact, at most 16; adding 2^23 rounds it to an integer, ties to even
    steps = ((steps + 8388608.0).to(tl.int32, bitcast=True)) & 0x1F
    code = ((exponent + 6) << 3) + steps
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


DECODE = {"bf16": raw, "e4m3": raw}
DECODE_BITS = {"bf16": raw, "e4m3": e4m3_bits_to_float}
ENCODE = {"e4m3": float_to_e4m3}
ENCODE_BITS = {"e4m3": float_to_e4m3_bits}

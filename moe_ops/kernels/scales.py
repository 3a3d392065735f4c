"""Scale rules by name, as in formats/scales.py: a group's largest magnitude -> what is stored, and its value.

What is stored is fp32, or the byte of a shared exponent (e8m0) as int32.
"""

import triton
import triton.language as tl

from .decode import scale_value


@triton.jit
def _over(amax, LARGEST: tl.constexpr):
    """Correctly rounded: an approximate quotient moves scales by an ulp."""
    return tl.div_rn(amax, tl.zeros(amax.shape, tl.float32) + LARGEST)


@triton.jit
def amax_over_max(amax, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMAX: tl.constexpr):
    scale = _over(amax, LARGEST)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return scale, scale


@triton.jit
def ratio(amax, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMAX: tl.constexpr):
    scale = _over(amax, LARGEST)
    return scale, scale


@triton.jit
def _shared(byte, amax):
    byte = tl.where(tl.abs(amax) <= 3.4028234663852886e38, tl.maximum(byte, 0), 255)  # NaN fails every comparison
    return byte, scale_value(byte, tl.float32, "e8m0")


@triton.jit
def rceil(amax, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMAX: tl.constexpr):
    byte = (_over(amax, LARGEST).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    return _shared(tl.where(amax <= LARGEST * 5.877471754111438e-39, 0, byte), amax)  # the quotient rounds there


@triton.jit
def even(amax, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMAX: tl.constexpr):
    return _shared(((amax.to(tl.int32, bitcast=True) + (1 << (22 - MANTISSA))) >> 23) - EMAX, amax)


@triton.jit
def floor(amax, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMAX: tl.constexpr):
    return _shared((amax.to(tl.int32, bitcast=True) >> 23) - EMAX, amax)


RULES = {"amax_over_max": amax_over_max, "ratio": ratio, "rceil": rceil, "even": even, "floor": floor}

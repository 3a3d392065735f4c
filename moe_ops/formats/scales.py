"""Scale rules: from the largest magnitude of a block to the scale that is stored.

Shared exponents are bytes b that mean 2^(b - 127), 255 NaN (e8m0). They are derived with integer bits: log2 in fp32 is
wrong one ulp above a power of two, and the cast to e8m0 rounds to the nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Element

_EXPONENT = 0x7F800000


def amax_over_max(amax: Tensor, element: Element) -> Tensor:
    """amax / element.max by true division (bit-equal to vLLM's online fp8); 1 where that is zero, NaN stays NaN."""
    scale = ratio(amax, element)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def ratio(amax: Tensor, element: Element) -> Tensor:
    """amax / element.max, 0 for zeros: what a scale that is itself scaled starts from."""
    return amax / amax.new_full((), element.max)  # a tensor: by a number torch multiplies by its reciprocal on CUDA


def rceil(amax: Tensor, element: Element) -> Tensor:
    """2^ceil(log2(amax / element.max)): the least that saturates nothing (NVIDIA's rule)."""
    byte = (ratio(amax, element).view(torch.int32) + 0x7FFFFF) >> 23
    least = amax <= element.max * 2.0**-127  # not of the quotient: it is subnormal there, and rounds
    return _e8m0(torch.where(least, 0, byte), amax)


def even(amax: Tensor, element: Element) -> Tensor:
    """2^(floor(log2 amax') - emax), amax' rounded to the element's mantissa (the rule of Quark and compressed-tensors).

    Saturates a little at the top of a binade, for a grid that is finer elsewhere.
    """
    return _floor(amax, element, 1 << (22 - element.mantissa_bits))


def floor(amax: Tensor, element: Element) -> Tensor:
    """2^(floor(log2 amax) - emax): OCP MX v1.0, section 6.3. Saturates up to half of a binade."""
    return _floor(amax, element, 0)


def _floor(amax: Tensor, element: Element, add: int) -> Tensor:
    emax = math.floor(math.log2(element.max))
    return _e8m0((((amax.view(torch.int32) + add) & _EXPONENT) >> 23) - emax, amax)


def _e8m0(byte: Tensor, amax: Tensor) -> Tensor:
    """Blocks that hold NaN or an infinity become NaN; others have a byte of at most 254 by themselves."""
    byte = torch.where(amax.isfinite(), byte.clamp(min=0), 255)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)

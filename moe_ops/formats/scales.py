"""Scale rules: from the largest magnitude of a block to the scale that is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Element


def amax_over_max(amax: Tensor, element: Element) -> Tensor:
    """amax / element.max by true division (bit-equal to vLLM's online fp8); 1 where that is zero, NaN stays NaN."""
    scale = amax / amax.new_full((), element.max)  # a tensor: by a number torch multiplies by its reciprocal on CUDA
    return torch.where(scale == 0, torch.ones_like(scale), scale)

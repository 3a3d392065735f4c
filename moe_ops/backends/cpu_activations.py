"""Rows of activations on the CPU, in the forms that products take.

T rows, R of them taken, K columns, in the order of P planes (cpu_decode.py).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..formats import Codec
from .base import Operand
from .cpu_decode import scale_values, to_planes
from .cpu_matrix import significand

_EXPONENT = 0x7F800000


class Activations:
    """x (T, K): value = values * scale (if any), with values that bf16 holds where they are `exact`."""

    def __init__(self, x: Operand, codec: Codec | None, planes: int):
        self.values, self.planes, self.exact = x.data, planes, x.data.dtype == torch.bfloat16
        self.scale = self.codes = None
        if x.scale is None:
            return
        assert codec is not None
        self.values, scale = codec.decode(x.data), scale_values(x.scale)
        by_row = not scale.ndim or scale.shape[-1] == 1
        if by_row:
            self.scale = scale.expand(self.values.shape[0], 1) if x.global_scale is None else scale * x.global_scale
            self.codes = x.data if x.data.dtype == torch.int8 else None
        else:
            self.values, self.scale = self.values * codec.spread(scale, *self.values.shape), x.global_scale
        self.exact = (codec.element.mantissa_bits + 1 if by_row else significand(codec)) <= 8
        if self.exact:
            self.values = self.values.bfloat16()

    def take(self, index: Tensor | slice) -> Taken:
        codes, scale = (None if t is None else t[index] for t in (self.codes, self.scale))
        return Taken(self.values[index].contiguous(), self.exact, codes, scale, self.planes)


class Taken:
    """Some rows (R, K), each form made when a product first asks for it."""

    def __init__(self, values: Tensor, exact: bool, codes: Tensor | None, scale: Tensor | None, planes: int):
        self.values, self.exact, self.codes, self.scale, self._planes = values, exact, codes, scale, planes
        self._halves: tuple[Tensor, Tensor] | None = None

    @cached_property
    def bf16(self) -> Tensor:
        """(R, K), planes one after the other."""
        return to_planes(self.values.bfloat16(), self._planes)

    @cached_property
    def floats(self) -> Tensor:
        """(P, R, L)"""
        return self.values.float().unflatten(1, (-1, self._planes)).permute(2, 0, 1).contiguous()

    def halves(self, largest: float) -> tuple[Tensor, Tensor]:
        """Rows (R, K), planes one after the other, divided by a power of two, in half, and the power (R, 1).

        Sums of products with numbers of up to `largest` stay below 2^15, and bf16 stays exact down to 2^-30 of that.
        """
        if self._halves is None:
            x = to_planes(self.values.float(), self._planes)
            size = x.abs().sum(1, keepdim=True).mul_(max(largest, 1.0)).clamp_(2.0**-112, 2.0**127)
            power = size.view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32).mul_(2.0**-14)
            self._halves = (x / power).half(), power
        return self._halves

    @cached_property
    def digits(self) -> tuple[Tensor, Tensor]:
        """Three digits of base 128 (3, R, K) in int8, and what (R, 1) the first counts: 20 bits below the largest.

        NaN for a row that is not finite.
        """
        x = self.values.float()
        largest = x.abs().amax(1, keepdim=True).clamp_(min=2.0**-120)
        unit = largest.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32) * 2.0**-5
        rest, digits = x / unit, []  # below 64
        for _ in range(3):
            digits.append(rest.round())
            rest = (rest - digits[-1]) * 128.0
        return torch.stack(digits).to(torch.int8), unit + (largest - largest)

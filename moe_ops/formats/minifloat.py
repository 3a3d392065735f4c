"""Floats of up to eight bits, described by their bits: one encoder, one decoder, any element."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .base import Element


def minifloat(
    name: str, *, exponent_bits: int, mantissa_bits: int, bias: int | None = None, largest: float | None = None
) -> Element:
    """An element without NaN and infinities: by default IEEE's bias, and every code a number."""
    bias = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
    largest = largest or (2.0 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    fields: dict[str, Any] = {"exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits, "bias": bias}
    return Element(
        name=name, bits=1 + exponent_bits + mantissa_bits, max=largest, storage=torch.uint8, **fields,
        encode=partial(encode_minifloat, largest=largest, **fields), decode=partial(decode_minifloat, **fields),
    )  # fmt: skip


def encode_minifloat(x: Tensor, exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Tensor:
    """fp32 -> uint8 codes, sign in the top bit: nearest, ties to even, |x| > largest saturates, -0 keeps its sign.

    With e = max(floor(log2 |x|), 1 - bias) the spacing is q = 2^(e - mantissa_bits), and the code of the magnitude is
    (e + bias - 1) * 2^mantissa_bits + round(|x| / q): the carry of the rounding runs into the exponent by itself. NaN,
    which such a float does not have, becomes 0: the scale of its block carries it.
    """
    x = torch.where(x.isnan(), 0.0, x.float())
    magnitude = x.abs().clamp(max=largest)
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=1 - bias)
    inverse = ((mantissa_bits - exponent + 127) << 23).view(torch.float32)  # of the spacing, a power of two
    steps = torch.round(magnitude * inverse).to(torch.int32)
    code = ((exponent + bias - 1) << mantissa_bits) + steps
    return (code + (torch.signbit(x).to(torch.int32) << (exponent_bits + mantissa_bits))).to(torch.uint8)


@cache
def minifloat_values(exponent_bits: int, mantissa_bits: int, bias: int, device: torch.device | str = "cpu") -> Tensor:
    """Value of every code as fp32, without NaN or infinities: an element with special codes overrides them."""
    code = torch.arange(1 << (exponent_bits + mantissa_bits), device="cpu")
    field, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    implicit = (field > 0).double() * (1 << mantissa_bits)
    value = (implicit + mantissa) * 2.0 ** (field.clamp(min=1) - bias - mantissa_bits).double()
    return torch.cat([value, -value]).float().to(device)


def decode_minifloat(codes: Tensor, exponent_bits: int, mantissa_bits: int, bias: int) -> Tensor:
    """uint8 codes -> fp32 by table."""
    plain = type(codes) in (Tensor, Parameter)  # a table made of fake tensors must not stay
    table = minifloat_values if plain else minifloat_values.__wrapped__
    values = table(exponent_bits, mantissa_bits, bias, codes.device)
    return values.index_select(0, codes.flatten().int()).view(codes.shape)  # 5 times as fast as values[codes]

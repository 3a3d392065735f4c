"""Codes in 32-bit words to fp32, by operators that tensors have as well as Inductor's values in a loop.

A minifloat's code with exponent field e and mantissa m stands for an integer in units of 2^(-bias - mantissa bits):

    (2^mantissa_bits + m) << e,  or m << 1 where e = 0

which needs no float with an exponent field of 0: those are flushed by some, and slow on some processors. With four bits
of exponent codes with e = 0 are rare, and below 2^-14 of the largest: then the bits are put where a float has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moe_ops.formats import Element


@dataclass(frozen=True)
class Operators:
    """What is no operator of Python's for both. `number` is an int32 or fp32, `right` keeps the sign."""

    number: Callable[[float], Any]
    maximum: Callable[[Any, Any], Any]
    right: Callable[[Any, Any], Any]
    as_float: Callable[[Any], Any]
    of_bits: Callable[[Any], Any]  # the fp32 with the bits of an int32


TENSORS = Operators(
    lambda n: torch.tensor(n, dtype=torch.float32 if isinstance(n, float) else torch.int32, device="cpu"),
    torch.maximum, torch.bitwise_right_shift,
    torch.Tensor.float, lambda bits: bits.view(torch.float32),
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """Bits from `at` on of an int32 that has its sign at bit `width` - 1 and above."""

    word: Any
    at: int
    width: int
    on: Operators

    def moved(self, to: int) -> Any:
        """With what begins at bit `at` at bit `to`."""
        if to > self.at:
            return self.word << self.on.number(to - self.at)
        return self.on.right(self.word, self.on.number(self.at - to)) if self.at > to else self.word

    def alone(self, bits: int, to: int = 0) -> Any:
        """That many bits, moved to bit `to`; all others are 0."""
        return self.moved(to) & self.on.number(((1 << bits) - 1) << to)

    def signed(self, bits: int, keep: int) -> Any:
        """The upper `keep` of the bits as a number in two's complement."""
        if self.at + bits == self.width:
            return self.moved(keep - bits)
        by = 32 - bits - self.at
        return self.on.right(self.word << self.on.number(by) if by else self.word, self.on.number(32 - keep))


def field(words: list[Any], at: int, bits: int, width: int, on: Operators) -> Field:
    """The code at bit `at` of several words of `width` bits."""
    index, first = divmod(at, width)
    if first + bits <= width:
        return Field(words[index], first, width, on)
    kept = width - first  # bits in this word, the others are the lowest of the next
    low = Field(words[index], first, width, on).alone(kept)
    return Field(low | (words[index + 1] << on.number(kept)), 0, 32, on)


def value(code: Field, element: Element) -> Any:
    """What a code stands for, in units of `unit(element)`: fp32."""
    if element.exponent_bits < 4:
        return code.on.as_float(_integer(code, element))
    on, lowest = code.on, 23 - element.mantissa_bits  # of the magnitude, where a float has it
    if code.at + element.bits == code.width:
        placed = code.moved(lowest)
    else:
        by = 32 - element.bits - code.at
        top = code.word << on.number(by) if by else code.word
        placed = on.right(top, on.number(8 - element.exponent_bits))
    keep = ((1 << (element.bits - 1)) - 1) << lowest  # and the sign
    return on.of_bits(placed & on.number(keep - (1 << 31))) * on.number(2.0 ** (127 - element.bias))


def _integer(code: Field, element: Element) -> Any:
    on, bits, m = code.on, element.bits, element.mantissa_bits
    if not element.exponent_bits:
        if element.storage is torch.uint8:
            return code.alone(bits) - on.number(1 << (bits - 1))
        return code.signed(bits, bits)
    table = _table(element)
    if table is not None:
        width = 32 >> (bits - 1)
        found = on.right(on.number(table), code.alone(bits - 1, width.bit_length() - 1))
        number = found & on.number((1 << width) - 1)
    else:
        magnitude = code.alone(bits - 1)
        exponent = on.maximum(on.right(magnitude, on.number(m)), on.number(1))
        number = (magnitude + on.number(1 << m) - (exponent << on.number(m))) << exponent
    sign = code.signed(bits, 1)  # 0 or -1
    return (number ^ sign) - sign


def unit(element: Element) -> float:
    """A power of two."""
    if not 0 < element.exponent_bits < 4:
        return 1.0
    return 2.0 ** ((_table(element) is not None) - element.bias - element.mantissa_bits)


@cache
def is_known(element: Element) -> bool:
    """Whether `integer` decodes it, found out by decoding each of its codes; NaN, which no weight holds, may differ."""
    if element.storage is None or element.exponent_bits > 4 or element.bits not in (4, 6, 8):
        return False
    codes = torch.arange(1 << element.bits, device="cpu").to(torch.uint8)
    values = element.decode(codes.view(element.storage))
    found = value(Field(codes.int(), 0, 32, TENSORS), element) * unit(element)
    return bool(((found == values) | values.isnan()).all())


@cache
def _table(element: Element) -> int | None:
    """Every magnitude, halved, in one int32, if that has room for them: it is looked up by a shift."""
    count, m = 1 << (element.bits - 1), element.mantissa_bits
    width = 32 // count
    exponents = [max(c >> m, 1) for c in range(count)]
    values = [(c + (1 << m) - (e << m)) << (e - 1) for c, e in enumerate(exponents)]
    if max(values) >= 1 << width:
        return None
    table = sum(value << (width * c) for c, value in enumerate(values))
    return table - (1 << 32) if table >= 1 << 31 else table

"""Codes to numbers by a few vector instructions of torch on the CPU: neither a table nor a conversion of floats.

A code of a minifloat is brought to the top of a 16-bit lane, then its exponent to where a half has it:

    half = (lane >> (5 - exponent_bits)) & (sign | exponent | mantissa);  value = half * 2^(15 - bias)

Exact, subnormals too. One lane holds `planes` codes of 4 or 6 bits, and decoding leaves them in as many planes of
K / planes columns: activations follow by `to_planes`. Codes of integers become bytes, in planes likewise.

B rows of a block, K columns, P planes of L = K / P lanes, G groups of columns that share a scale. Planes come first, so
that torch's loops run over whole blocks.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..formats import Element

_PLANES = {(4, True): 4, (6, True): 8, (8, True): 1, (4, False): 2, (8, False): 1}  # by bits, and whether it is a float


def _numbers(*values: int, dtype: torch.dtype = torch.int16) -> Tensor:
    """Operands as tensors: torch takes 1.5 us longer for a Python number."""
    return torch.tensor(values, dtype=dtype, device="cpu")


class Decoder:
    """What decoding an element gives: `dtype` (half or int8), times `factor` the value of a code."""

    def __init__(self, element: Element):
        self.bits, minifloat = element.bits, element.exponent_bits > 0
        self.planes = _PLANES[element.bits, minifloat]
        self.dtype = torch.float16 if minifloat else torch.int8
        self.factor = 2.0 ** (15 - element.bias) if minifloat else 1.0 if element.bits == 8 else 1 / 16
        if minifloat:
            shift = 5 - element.exponent_bits
            magnitude = ((1 << element.bits - 1) - 1) << (10 - element.mantissa_bits)
            self._shift, self._mask = _numbers(shift), _numbers(magnitude - (1 << 15))
            to_top = (12, 8, 4, 0) if element.bits == 4 else (8 - shift,)
            self._to_top = _numbers(*(1 << by for by in to_top))[:, None, None]
        self.largest = element.max / self.factor  # magnitude of what decoding gives
        self.is_bytes = self.dtype == element.storage  # codes are what decoding would give

    def __call__(self, codes: Tensor, out: Tensor) -> None:
        """codes (B, stored K), contiguous -> out (P, B, L) in `dtype`."""
        if self.dtype == torch.int8:
            _integers(codes.view(torch.int8), self.bits, out)
            return
        lanes = out.view(torch.int16)
        if self.bits == 8:  # a byte is widened with its sign, as a shift to the right would
            lanes.copy_(codes.view(torch.int8)).mul_(self._to_top)
        elif self.bits == 4:
            torch.mul(codes.view(torch.int16), self._to_top, out=lanes).bitwise_right_shift_(self._shift)
        else:
            _sixes(codes.view(torch.int16).unflatten(1, (-1, 3)), lanes)
            lanes.bitwise_right_shift_(self._shift)
        lanes.bitwise_and_(self._mask)


@cache
def decoder(element: Element) -> Decoder | None:
    """None for an element that this file does not decode; found out by decoding each of its codes."""
    if element.storage is None or (element.bits, element.exponent_bits > 0) not in _PLANES or element.exponent_bits > 5:
        return None
    found = Decoder(element)
    codes = torch.arange(1 << element.bits, device="cpu").to(torch.uint8)
    each = {4: 4, 6: 8, 8: 1}[element.bits]  # copies of a code that fill whole lanes
    bits = (codes[:, None, None].long() >> torch.arange(element.bits, device="cpu")) & 1
    stored = bits.expand(-1, each, -1).reshape(codes.numel(), -1, 8)  # (codes, bytes, 8)
    stored = (stored << torch.arange(8, device="cpu")).sum(-1).to(torch.uint8)
    out = torch.empty(found.planes, codes.numel(), each // found.planes, dtype=found.dtype, device="cpu")
    found(stored, out)
    values = element.decode(codes.view(element.storage))[:, None]  # NaN, which weights do not hold, may differ
    return found if bool(((out.float() * found.factor == values) | values.isnan()).all()) else None


def _sixes(words: Tensor, out: Tensor) -> None:
    """words (B, L, 3): eight codes each -> every code at the top of a lane of out (8, B, L)."""
    low, mid, high = words.permute(2, 0, 1).contiguous()
    for plane, word, shift in ((0, low, 10), (1, low, 4), (3, mid, 8), (4, mid, 2), (6, high, 6), (7, high, 0)):
        torch.mul(word, 1 << shift, out=out[plane])
    torch.bitwise_or(low >> 2 & 0x3C00, mid << 14, out=out[2])  # the two codes that lie in two words
    torch.bitwise_or(mid >> 4 & 0x0C00, high << 12, out=out[5])


def _integers(codes: Tensor, bits: int, out: Tensor) -> None:
    """Bytes as they are, or 16 times what nibbles in offset binary (value + 8) stand for."""
    if bits == 8:
        out.copy_(codes)
        return
    low, high = out[0], out[1]
    torch.bitwise_xor(codes, _FLIP, out=high)  # both nibbles in two's complement
    torch.mul(high, _SIXTEEN, out=low)
    high.bitwise_and_(_HIGH)


_FLIP, _SIXTEEN, _HIGH = (_numbers(n, dtype=torch.int8) for n in (0x88 - 256, 16, 0xF0 - 256))


def to_planes(x: Tensor, planes: int) -> Tensor:
    """Columns of x (M, K) in the order of decoded codes."""
    return x if planes == 1 else x.view(x.shape[0], -1, planes).transpose(1, 2).reshape(x.shape)


_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # numbers that are only copied


@cache
def _scale_table(dtype: torch.dtype, factor: float, copies: int, to: torch.dtype) -> Tensor:
    """For each byte (1, 256): its scale times a factor; several copies of that as one number."""
    values = (torch.arange(256, device="cpu").to(torch.uint8).view(dtype).double() * factor).to(to)
    return values.view(-1, 1).repeat(1, copies).view(_BYTES[copies * to.itemsize]).view(1, -1)


def scale_values(scale: Tensor, factor: float = 1.0, copies: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale (N, G) of any dtype, times a factor: (N, G * copies) in `dtype`.

    Bytes are looked up, for torch converts them one by one; only those may be copied, into up to 16 bytes.
    """
    if scale.dtype.itemsize > 1:
        assert copies == 1
        return scale.to(dtype, copy=True).mul_(factor)
    table = _scale_table(scale.dtype, factor, copies, dtype)
    return table.expand(scale.shape[0], -1).gather(1, scale.view(torch.uint8).long()).view(dtype)

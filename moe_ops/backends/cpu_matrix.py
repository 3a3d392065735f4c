"""Matrices of experts as blocks of numbers on the CPU, a few rows at a time.

E experts, N output channels, K contraction, B rows of a block in P planes of L lanes (cpu_decode.py), G groups of K,
X experts of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..formats import Codec
from . import cpu_nibbles
from .base import Weight
from .cpu_decode import Decoder, decoder, scale_values

_BLOCK = 1 << 20  # numbers in a block: they stay in the cache, and with less threads would meet too often
_SIGNIFICAND = {torch.float8_e8m0fnu: 1, torch.float8_e4m3fn: 4, torch.bfloat16: 8}

Block = tuple[int, int, Tensor]  # rows a to b of a matrix, and their numbers


def significand(codec: Codec) -> int:
    """Bits of an element, times its scale if that changes along K."""
    return codec.element.mantissa_bits + 1 + (_scale_bits(codec) if codec.block and codec.block[1] else 0)


def _scale_bits(codec: Codec) -> int:
    return _SIGNIFICAND.get(codec.scale_dtype, 24)


def _halves(codec: Codec) -> bool:
    assert codec.block is not None
    return codec.block[0] == 1 and codec.scale_dtype.itemsize == 1 and significand(codec) <= 11


@dataclass(frozen=True)
class Plan:
    """What follows from a codec alone."""

    decode: Decoder
    bits: int  # of the significand
    each: int  # lanes that share a scale; 0: scales do not change along K
    is_bytes: bool  # codes are int8, and scales do not change along K
    is_nibbles: bool  # codes are integers of 4 bits, and scales of groups are exact in bf16
    is_half: bool  # decoding gives halves, and so does a product with scales that change along K, if they are near


@cache
def plan_of(codec: Codec) -> Plan:
    found = decoder(codec.element)
    assert found is not None and codec.block is not None
    group = codec.block[1]
    is_half = found.dtype == torch.float16 and (_halves(codec) if group else found.planes == 1)
    is_nibbles = codec.element.bits == 4 and found.dtype == torch.int8 and codec.block[0] == 1 and group > 0
    is_nibbles = is_nibbles and _scale_bits(codec) <= 8
    each = group // found.planes
    return Plan(found, significand(codec), each, found.is_bytes and not group, is_nibbles, is_half)


@cache
def _scale_rows(n: int, shards: int, block: int, interleaved: bool) -> Tensor | None:
    """Row of the scale for each row of a matrix as it is stored; None where they are the same."""
    if block == 1:
        return None
    row, inner = torch.arange(n, device="cpu"), n // shards
    shard, row = (row % shards, row // shards) if interleaved else (row // inner, row % inner)
    return shard * -(-inner // block) + row // block if block else shard


class Matrix:
    """A projection of all experts: value = block * channels. Rows are in the order that is stored."""

    def __init__(self, weight: Weight, codec: Codec):
        assert weight.scale is not None and codec.block is not None
        self.weight, self.codec, self.scale, self.plan = weight, codec, weight.scale, plan_of(codec)
        self.n, self.k = weight.qdata.shape[1], codec.columns(weight.qdata.shape[2])
        self.block_n, self.group = codec.block
        self.decode, self.planes, self.each = self.plan.decode, self.plan.decode.planes, self.plan.each
        self.lanes = self.k // self.planes
        self.whole = not self.group or not self.k % self.group  # no group is partial
        self._rows = self._block_rows()
        self._buffers: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}

    def codes(self, e: int) -> Tensor:
        """(N, stored K)"""
        return self.weight.qdata[e].contiguous()

    def scales(self, experts: Tensor | slice) -> Tensor:
        """Of each of the experts, as they are stored."""
        return self.scale[experts] if isinstance(experts, slice) else self.scale.index_select(0, experts)

    def channels(self, experts: Tensor | slice) -> Tensor | None:
        """(R, N) for experts (R,): what each row of their product is multiplied by."""
        w, whole = self.weight, None
        if w.global_scale is not None:
            whole = self._by_row(w.global_scale[experts], 0)
        if self.group:
            return whole
        scale = self._by_row(self.scale[experts].float().flatten(1), self.block_n) * self.decode.factor
        return scale if whole is None else scale * whole

    def tall(self) -> bool:
        """Whether the rows of a matrix fall into whole tiles that share their scales."""
        whole = not self.weight.interleaved and not self.n // self.weight.shards % max(self.block_n, 1)
        return self.group > 0 and self.block_n > 1 and self.planes == 1 and whole

    def has_nibbles(self, products: int) -> bool:
        """Whether torch multiplies such codes as they are, by so many products at most."""
        exact = _SIGNIFICAND.get(self.scale.dtype, 24) <= 8  # what is stored may be wider than the codec's own
        fits = exact and self.whole and cpu_nibbles.fits(self.n, self.lanes, self.each)
        return fits and cpu_nibbles.unit_of(self.each) <= products * self.each and cpu_nibbles.has_kernel()

    def tiles(self, e: int) -> Tensor:
        """For such a matrix: scales of its tiles, for each column (R, K)."""
        return scale_values(self.scale[e], self.decode.factor).repeat_interleave(self.group, 1)[:, : self.k]

    def _block_rows(self) -> int:
        rows = max(1, min(self.n, _BLOCK // max(self.k, 1)))
        return max(rows // self.block_n, 1) * self.block_n if self.tall() else rows

    def _by_row(self, scale: Tensor, block: int, dim: int = -1) -> Tensor:
        index = _scale_rows(self.n, self.weight.shards, block, self.weight.interleaved)
        return scale if index is None else scale.index_select(dim, index)

    def _buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        if (dtype, shape) not in self._buffers:
            self._buffers[dtype, shape] = torch.empty(shape, dtype=dtype, device=self.weight.qdata.device)
        return self._buffers[dtype, shape]

    def decoded(self, e: int, by_row: bool = False) -> Iterator[Block]:
        """Blocks (P, B, L) without any scale, in the dtype of the decoder; in memory (B, P, L) if `by_row`."""
        codes = self.codes(e)
        for a in range(0, self.n, self._rows):
            b = min(a + self._rows, self.n)
            part = codes if b - a == self.n else codes[a:b]
            if self.plan.is_bytes:
                yield a, b, part[None]
                continue
            outer = (b - a, self.planes) if by_row else (self.planes, b - a)
            out = self._buffer(self.decode.dtype, *outer, self.lanes)
            out = out.transpose(0, 1) if by_row else out
            self.decode(part, out)
            yield a, b, out

    def floats(self, e: int, scaled: bool = True) -> Iterator[Block]:
        """Blocks (P, B, L) in fp32, times the scales of groups unless told otherwise."""
        scales = self._group_scales(e) if self.group and scaled else None
        for a, b, block in self.decoded(e):
            out = self._buffer(torch.float32, self.planes, b - a, self.lanes).copy_(block)
            if scales is not None:
                lanes = out if scales.ndim == 2 else out.unflatten(2, (-1, self.each))
                lanes.mul_(scales[a:b])
            yield a, b, out

    def half_factor(self, e: int) -> float | None:
        """Power of two times which all numbers of a matrix are exact in half, and at most 64; None if there is none."""
        if not self.group:
            return 1 / self.decode.factor
        scale, element = self.scale[e], self.codec.element
        low, high = _extremes(scale)
        by = 2.0 ** min(-math.ceil(math.log2(max(high * element.max / 64, high * self.decode.factor / 2**15))), 100)
        least = 2.0 ** (1 - element.bias - element.mantissa_bits)
        return by if low * least * by >= 2.0**-24 else None

    def halves(self, e: int, by: float) -> Iterator[Block]:
        """Blocks (B, K), planes one after the other, times what `half_factor` gave."""
        scales = self._group_scales(e, by, torch.float16)[:, None] if self.group else None
        for a, b, block in self.decoded(e, by_row=self.planes > 1):
            if scales is not None:
                out = block.transpose(0, 1)  # (B, P, L)
                lanes = out if scales.ndim == 3 else out.unflatten(2, (-1, self.each))
                lanes.mul_(scales[a:b])
            yield a, b, block[0] if self.planes == 1 else block.transpose(0, 1).flatten(1)

    def _group_scales(self, e: int, by: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, G, 1) where torch's product with a number for each run takes vectors of 16 floats, else (N, L)."""
        scale, factor = self._by_row(self.scale[e], self.block_n, 0), self.decode.factor * by
        if self.each >= 16 and self.whole:
            return scale_values(scale, factor, 1, dtype)[..., None]
        if self.each in (4, 8) and self.whole and scale.dtype.itemsize == 1:
            short = dtype if dtype.itemsize == 2 or self.each == 4 else torch.bfloat16
            found = scale_values(scale, factor, self.each, short)
            return found if short == dtype else self._buffer(dtype, self.n, self.lanes).copy_(found)
        return scale_values(scale, factor, 1, dtype).repeat_interleave(self.each, 1)[:, : self.lanes]

    def bf16(self, e: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks (B, K) as `floats`, in bf16: exact if `significand` is at most 8."""
        for a, b, block in self.decoded(e) if self.plan.is_bytes else self.floats(e):
            out = self._buffer(torch.bfloat16, b - a, self.planes, self.lanes)
            yield a, b, out.copy_(block.transpose(0, 1)).flatten(1)


def _extremes(scale: Tensor) -> tuple[float, float]:
    """The smallest and the largest of bytes that are exponents; of all that their type has for others."""
    info = torch.finfo(scale.dtype)
    if scale.dtype != torch.float8_e8m0fnu:
        return info.smallest_normal * info.eps, info.max
    low, high = (int(byte) for byte in scale.view(torch.uint8).aminmax())
    return 2.0 ** (low - 127), 2.0 ** (high - 127)

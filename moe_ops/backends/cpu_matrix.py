"""Matrices of experts as blocks of numbers on the CPU, a few rows at a time.

E experts, N output channels, K contraction, B rows of a block in P planes of L lanes (cpu_decode.py), G groups of K,
X experts of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..formats import Codec
from .base import Weight
from .cpu_decode import Decoder, decoder, half_scales, half_top, scale_values, spread

# Numbers in a block: 4 MB of them stay in the cache, and with less threads would meet too often.
_HALVES, _FLOATS = 1 << 21, 1 << 20
_SIGNIFICAND = {torch.float8_e8m0fnu: 1, torch.float8_e4m3fn: 4, torch.bfloat16: 8}

Block = tuple[int, int, Tensor]  # rows a to b of a matrix, and their numbers


def significand(codec: Codec) -> int:
    """Bits of an element, times its scale if that changes along K."""
    return codec.element.mantissa_bits + 1 + (_scale_bits(codec) if codec.block and codec.block[1] else 0)


def _scale_bits(codec: Codec) -> int:
    return _SIGNIFICAND.get(codec.scale_dtype, 24)


@dataclass(frozen=True)
class Plan:
    """What follows from a codec alone."""

    decode: Decoder
    bits: int  # of the significand
    each: int  # lanes that share a scale; 0: scales do not change along K
    is_bytes: bool  # codes are int8, and scales do not change along K
    fits_half: bool  # `Matrix.halves` is exact
    largest_half: float  # and no magnitude in it is larger


@cache
def plan_of(codec: Codec) -> Plan:
    found = decoder(codec.element)
    assert found is not None and codec.block is not None
    group, bits, largest = codec.block[1], significand(codec), found.largest
    one_byte = codec.scale_dtype.itemsize == 1
    if group and one_byte:
        largest *= 2.0 ** (half_top(codec.scale_dtype, found) + 1)
    fits = found.dtype == torch.float16 and bits <= 11 and largest < 2**15
    fits = fits and (not group or (one_byte and not group // found.planes % 4))
    return Plan(found, bits, group // found.planes, found.is_bytes and not group, fits, largest)


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
        self.whole = not self.group or not self.k % self.group  # no group is partial
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}

    def codes(self, e: int) -> Tensor:
        """(N, stored K)"""
        return self.weight.qdata[e].contiguous()

    def channels(self, experts: Tensor | slice) -> Tensor | None:
        """(R, N) for experts (R,): what each row of their product is multiplied by."""
        w, whole = self.weight, None
        if w.global_scale is not None:
            whole = self._by_row(w.global_scale[experts], 0)
        if self.group:
            return whole
        scale = self._by_row(scale_values(self.scale[experts]).flatten(1), self.block_n) * self.decode.factor
        return scale if whole is None else scale * whole

    def groups(self, experts: Tensor | slice | int) -> Tensor:
        """(N, G), or (X, N, G), as stored."""
        return self._by_row(self.scale[experts], self.block_n, -2)

    def _by_row(self, scale: Tensor, block: int, dim: int = -1) -> Tensor:
        index = _scale_rows(self.n, self.weight.shards, block, self.weight.interleaved)
        return scale if index is None else scale.index_select(dim, index)

    def _buffer(self, dtype: torch.dtype, rows: int) -> Tensor:
        """(B, P, L)"""
        if (dtype, rows) not in self._buffers:
            shape = rows, self.planes, self.k // self.planes
            self._buffers[dtype, rows] = torch.empty(shape, dtype=dtype, device=self.weight.qdata.device)
        return self._buffers[dtype, rows]

    def decoded(self, e: int, numbers: int) -> Iterator[Block]:
        """Blocks (B, P, L) without any scale, in the dtype of the decoder."""
        codes, rows = self.codes(e), max(1, numbers // max(self.k, 1))
        for a in range(0, self.n, rows):
            b = min(a + rows, self.n)
            if self.plan.is_bytes:
                yield a, b, codes[a:b, None]
            else:
                out = self._buffer(self.decode.dtype, b - a)
                self.decode(codes[a:b], out)
                yield a, b, out

    def floats(self, e: int, scaled: bool = True) -> Iterator[Block]:
        """Blocks (B, K) in fp32, times the scales of groups unless told otherwise."""
        groups = scale_values(self.groups(e)) * self.decode.factor if self.group and scaled else None
        for a, b, block in self.decoded(e, _FLOATS):
            out = self._buffer(torch.float32, b - a).copy_(block)
            if groups is not None:
                self._scale_floats(out, groups[a:b])
            yield a, b, out.flatten(1)

    def _scale_floats(self, block: Tensor, groups: Tensor) -> None:
        """block (B, P, L) times groups (B, G), in place."""
        if self.each >= 16 and self.whole:  # torch's product with a number for each run takes vectors of 16 floats
            block.view(*block.shape[:2], -1, self.each).mul_(groups[:, None, :, None])
        elif self.each % 4 or not self.whole or _scale_bits(self.codec) > 8:
            block.mul_(groups.repeat_interleave(self.each, 1)[:, None, : block.shape[2]])
        else:
            block.mul_(spread(groups.bfloat16(), self.each).float())

    def bf16(self, e: int) -> Iterator[Block]:
        """Blocks (B, K) as `floats`, in bf16: exact if `significand` is at most 8."""
        for a, b, block in self.decoded(e, _FLOATS) if self.plan.is_bytes else self.floats(e):
            out = self._buffer(torch.bfloat16, b - a)
            yield a, b, out.copy_(block.view_as(out)).flatten(1)

    def half_scales(self, experts: Tensor | slice) -> tuple[Tensor, Tensor] | None:
        """Of X experts, for `halves`: (X, N, G) and the unit (X, N) of the products."""
        return half_scales(self.groups(experts), self.decode) if self.group else None

    def halves(self, e: int, scales: Tensor | None) -> Iterator[Block]:
        """Blocks (B, K) in half, times scales (N, G)."""
        for a, b, block in self.decoded(e, _HALVES):
            if scales is None:
                pass
            elif self.each >= 32:  # vectors of 32 halves
                block.view(b - a, self.planes, -1, self.each).mul_(scales[a:b, None, :, None])
            else:
                block.mul_(spread(scales[a:b], self.each))
            yield a, b, block.flatten(1)

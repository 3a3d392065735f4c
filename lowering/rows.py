"""moe_ops::_rows: rows times the matrices of their experts on a CPU, each a sum whose terms are decoded inside of it.

    out[r, n] = sum over p, j of x[p, read[r], j] * number(code j * P + p of row n of expert owner[r]) * its scale

Inductor writes that as a loop with vector instructions: no number of a matrix is ever stored. R rows of the product, M
rows of x, E experts, N channels, K columns in J units of P codes, which are what whole words hold. Scales that do not
change along K are left to what follows, and so is the unit of the numbers (codes.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_ops.formats import FORMATS, Codec
from moe_ops.ops.library import define

from . import _compat
from .codes import field, unit, value

_LANES = 16  # units that share a scale: a multiple of it fills vectors, on every processor
_E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Words:
    """How a row of codes is read: units of `count` words of `dtype`, `planes` codes in each."""

    dtype: torch.dtype
    count: int
    planes: int
    each: int  # units that share a scale; 0: scales do not change along K

    @property
    def nested(self) -> bool:
        """Whether groups are a loop of their own: a scale is then loaded once for whole vectors."""
        return self.each > 0 and self.each % _LANES == 0


@cache
def words_of(codec: Codec, k: int) -> Words | None:
    """Bytes where each is a unit and scales last for vectors of them, else words of 32 bits; None where none fit."""
    bits, group = codec.element.bits, codec.block[1] if codec.block else 0
    for dtype in (torch.int8, torch.int32):
        width = dtype.itemsize * 8
        planes, count = math.lcm(bits, width) // bits, math.lcm(bits, width) // width
        found = Words(dtype, count, planes, group // planes)
        whole = not k % planes and not group % planes and (not group or not k % group)
        if whole and (dtype == torch.int32 or (count == 1 and (not group or found.nested))):
            return found
    return None


@dataclass(frozen=True)
class Channels:
    """N channels, `shards` matrices above each other, or their rows in turn; scales of `block` rows of a matrix."""

    count: int
    block: int
    shards: int
    interleaved: bool

    def scale_row(self, n: Any, div: Callable[[Any, int], Any] = operator.floordiv) -> Any:
        """Row of the scale of channel n."""
        if self.block == 1:
            return n
        inner = self.count // self.shards
        first = div(n, self.shards if self.interleaved else inner)
        last = n - first * (self.shards if self.interleaved else inner)
        shard, row = (last, first) if self.interleaved else (first, last)
        return shard * -(-inner // self.block) + div(row, self.block) if self.block else shard


def rows(
    x: Tensor, read: Tensor | None, owner: Tensor | None, codes: Tensor, scale: Tensor | None, *, format: str,
    shards: int, interleaved: bool,
) -> Tensor:  # fmt: skip
    """What the generated loop computes. x (P, M, J) fp32, codes (E, N, stored K) -> (R, N) fp32."""
    codec = FORMATS[format].weight
    assert codec.block is not None
    values = x.permute(1, 2, 0).flatten(1)  # (M, K)
    values = values if read is None else values.index_select(0, read)
    out = values.new_empty(values.shape[0], codes.shape[1])
    row = Channels(codes.shape[1], codec.block[0], shards, interleaved).scale_row(torch.arange(codes.shape[1]))
    for r in range(values.shape[0]):
        e = 0 if owner is None else int(owner[r])
        matrix = codec.decode(codes[e]) / unit(codec.element)  # (N, K)
        if scale is not None:
            matrix = matrix * scale[e].float()[row].repeat_interleave(codec.block[1], 1)
        out[r] = matrix @ values[r]
    return out


def _fake(x: Tensor, read: Tensor | None, owner: Tensor | None, codes: Tensor, *_: Any, **__: Any) -> Tensor:
    count = next((t.shape[0] for t in (read, owner) if t is not None), x.shape[1])
    return x.new_empty(count, codes.shape[1])


define(
    "_rows(Tensor x, Tensor? read, Tensor? owner, Tensor codes, Tensor? scale, *, str format, int shards, "
    "bool interleaved) -> Tensor",
    rows, _fake,
)  # fmt: skip


def lower(x: Any, read: Any, owner: Any, codes: Any, scale: Any, *, format: str, shards: int, interleaved: bool) -> Any:
    """Inductor's lowering: one reduction, or one for each row of a linear, which share what they decode."""
    codec = FORMATS[format].weight
    assert codec.block is not None
    channels = Channels(int(codes.get_size()[1]), codec.block[0], shards, interleaved)
    term, rows = _Term(codec, channels, x, read, owner, codes, scale), x.get_size()[1]
    if read is not None or owner is not None:
        return term.sums((owner if read is None else read).get_size()[0])
    if _compat.is_symbol(rows):
        return term.sums(rows)
    return _compat.concatenate([term.sums(1, row) for row in range(int(rows))])


class _Term:
    """What is summed, of tensors in memory."""

    def __init__(self, codec: Codec, channels: Channels, x: Any, read: Any, owner: Any, codes: Any, scale: Any):
        planes, _, units = (x.get_size()[0], None, int(x.get_size()[2]))
        words = words_of(codec, int(planes) * units)
        assert words is not None
        self.element, self.channels, self.words, self.device = codec.element, channels, words, x.get_device()
        self.experts, self.x_rows = codes.get_size()[0], x.get_size()[1]
        self.along = [units // words.each, words.each] if words.nested else [units]
        self.x, self.read, self.owner = (None if box is None else _compat.loader(box) for box in (x, read, owner))
        self.codes = _compat.loader(_compat.viewed(codes, words.dtype))
        self.scale = None if scale is None else _scale_loader(scale)

    def sums(self, rows: Any, first: int = 0) -> Any:
        """(rows, N)"""
        ranges = [rows, self.channels.count]
        return _compat.summed(lambda at, k: self._at(at[0] + first, at[1], k), ranges, self.along, self.device)

    def _at(self, r: Any, n: Any, k: Sequence[Any]) -> Any:
        w, bits, width = self.words, self.element.bits, self.words.dtype.itemsize * 8
        j = k[0] * w.each + k[1] if w.nested else k[0]
        e = 0 if self.owner is None else _compat.index(self.owner([r]), self.experts)
        m = r if self.read is None else _compat.index(self.read([r]), self.x_rows)
        words = [_compat.as_int(self.codes([e, n, j * w.count + i])) for i in range(w.count)]
        total = None
        for p in range(w.planes):
            code = field(words, p * bits, bits, width, _compat.OPERATORS)
            assert self.x is not None
            term = self.x([p, m, j]) * value(code, self.element)
            total = term if total is None else total + term
        if self.scale is None:
            return total
        group = k[0] if w.nested else _compat.floordiv(j, w.each)
        return total * self.scale(e, self.channels.scale_row(n, _compat.floordiv), group)


def _scale_loader(scale: Any) -> Callable[[Any, Any, Any], Any]:
    """Of the scale of an expert's row and group, as fp32.

    Shared exponents and bf16 are read as bytes: a loop that reads those types has no vector instructions, or slow ones.
    """
    number, dtype = _compat.OPERATORS.number, scale.get_dtype()
    if dtype not in (_E8M0, torch.bfloat16):
        load = _compat.loader(scale)
        return lambda e, n, g: _compat.OPERATORS.as_float(load([e, n, g]))
    load = _compat.loader(_compat.viewed(scale, torch.uint8))
    if dtype == torch.bfloat16:

        def bf16(e: Any, n: Any, g: Any) -> Any:
            low, high = (_compat.as_int(load([e, n, 2 * g + i])) for i in range(2))
            return _compat.OPERATORS.of_bits((high << number(24)) | (low << number(16)))

        return bf16

    def shared(e: Any, n: Any, g: Any) -> Any:
        """2^(b - 127): 2^-127 has no exponent field of its own, and 255 is NaN."""
        byte = _compat.as_int(load([e, n, g]))
        nan = _compat.OPERATORS.right(byte + number(1), number(8)) << number(22)
        return _compat.OPERATORS.of_bits(_compat.OPERATORS.maximum(byte << number(23), number(1 << 22)) | nan)

    return shared


LOWERINGS = {torch.ops.moe_ops._rows.default: lower}

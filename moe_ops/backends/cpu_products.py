"""Products of a few experts with their rows on the CPU, by the route that is fastest.

    int8    codes are bytes, x is int8 or bf16: torch's product with int8 weights, or exact sums of int8 products
    nibbles a result in bf16, integers of 4 bits in groups, a few rows: torch's product with those (cpu_nibbles.py)
    half    a result in bf16, up to 3 rows, scales of rows or of groups that half holds: torch's product with a vector
            of halves is fast
    bf16    a result in bf16, and more than a few rows: bf16 holds the decoded block and x exactly
    fp32    whatever else; x takes the scales of tiles, blocks of the matrix those of groups

torch rounds products of halves, of bf16 and of packed integers before they meet their scales or each other. A result in
bf16 bears that: its error is 1.0, 1.4 and 1.5 times the reference's. Where it is made into codes it does not, for those
that turn over cost more than the rounding: fp32 then, or bf16 twice, the second time with the first subtracted inside,
and the sum is as good as fp32.

R rows of a run of experts, M of one expert, N output channels, K contraction, G groups of K, P planes (cpu_decode.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import cpu_nibbles
from .cpu_activations import Taken
from .cpu_matrix import Matrix

# Up to how many rows of an expert a route is the fastest (two cores of an EPYC with AVX-512 and VNNI).
_HALF_ROWS, _BYTES_ROWS, _DIGITS_ROWS, _SPLIT_ROWS, _FP32_ROWS, _NIBBLE_ROWS = 3, 3, 24, 8, 3, 8
_RUN_ROWS, _RUN_EXPERTS = 64, 8


@cache
def _has_vnni() -> bool:
    """Whether sums of int8 products are exact: those of CPUs without this may saturate on the way."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # private
    return supported is not None and supported()


@cache
def _has_bf16() -> bool:
    """Whether products in bf16 have a kernel."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Run:
    """Experts next to each other with few rows each, or one: what surrounds their products is done once for all."""

    def __init__(self, spans: list[tuple[int, int, int]]):
        self.spans = spans  # expert, first row, row after its last
        self.rows = slice(spans[0][1], spans[-1][2])

    def experts(self) -> Tensor | slice:
        return self._index([e for e, *_ in self.spans])

    def owners(self) -> Tensor | slice:
        """Expert of each row; one for all of them if there is one."""
        return self._index([e for e, a, b in self.spans for _ in range(a, b)])

    def _index(self, experts: list[int]) -> Tensor | slice:
        e = self.spans[0][0]
        return slice(e, e + 1) if len(self.spans) == 1 else torch.tensor(experts, device="cpu")

    def __iter__(self) -> Iterator[tuple[int, int, slice]]:
        """Position in the run, expert, and its rows of the run's."""
        for i, (e, a, b) in enumerate(self.spans):
            yield i, e, slice(a - self.rows.start, b - self.rows.start)


def runs(bounds: list[int]) -> Iterator[Run]:
    """bounds (E + 1): where the rows of each expert begin."""
    spans: list[tuple[int, int, int]] = []
    for e, (a, b) in enumerate(pairwise(bounds)):
        if spans and a < b and (b - spans[0][1] > _RUN_ROWS or len(spans) == _RUN_EXPERTS):
            yield Run(spans)
            spans = []
        if a < b:
            spans.append((e, a, b))
    if spans:
        yield Run(spans)


class Product:
    """What is multiplied, and how it may be rounded before its scales."""

    def __init__(self, matrix: Matrix, x: Taken, run: Run, rounded: bool, twice: bool):
        self.matrix, self.x, self.run = matrix, x, run
        self.rounded = rounded and x.exact  # to bf16 or half, for the result is bf16
        self.twice = twice  # if so, not without making the product again
        self.tall = matrix.tall()

    @cached_property
    def nibble_rows(self) -> Tensor:
        return cpu_nibbles.spread_rows(self.x.bf16, self.matrix.each)

    @cached_property
    def nibble_scales(self) -> Tensor:
        """Of each expert of the run."""
        return cpu_nibbles.spread_scales(self.matrix.scales(self.run.experts()).bfloat16(), self.matrix.each)


def product(p: Product) -> Tensor:
    """(R, N) fp32, channels as stored."""
    y = p.x.values.new_empty(p.x.values.shape[0], p.matrix.n, dtype=torch.float32)
    for i, e, mine in p.run if p.matrix.n else ():
        _route(p, mine.stop - mine.start)(p, i, e, mine, y[mine])
    for scale in (p.matrix.channels(p.run.owners()), p.x.scale):
        if scale is not None:
            y *= scale
    return y


def _route(p: Product, m: int) -> Callable[[Product, int, int, slice, Tensor], None]:
    """For m rows: a function of the product, position in the run, expert and its rows, that fills what it is given."""
    matrix, x, plan = p.matrix, p.x, p.matrix.plan
    if plan.is_half and p.rounded and not p.twice and m <= _HALF_ROWS:
        return _half
    if plan.is_nibbles and p.rounded and not p.twice and m <= _NIBBLE_ROWS and matrix.has_nibbles(_NIBBLE_ROWS // m):
        return _nibbles
    bytes_ = plan.is_bytes and not matrix.k % 64  # torch's products read whole vectors of a row
    vnni = bytes_ and _has_vnni()
    if vnni and x.codes is not None:
        return _int8
    if bytes_ and p.rounded and not p.twice and m <= _BYTES_ROWS:
        return _bytes
    if vnni and x.exact and m <= _DIGITS_ROWS:
        return _digits
    if plan.bits <= 8 and p.rounded and m > (_SPLIT_ROWS if p.twice else _FP32_ROWS) and _has_bf16():
        return _bf16
    return _tiles if p.tall and m <= _SPLIT_ROWS else _fp32


def _int_mm(codes: Tensor, x: Tensor) -> Tensor:
    """codes (N, K), x (M, K), both int8 -> exact sums (M, N). The kernel is 1.5 to 3 times as fast for some M."""
    m = x.shape[0]
    rows = m if m in (1, 4) else -(-m // 8) * 8
    padded = x if rows == m else torch.cat([x, x.new_zeros(rows - m, x.shape[1])])
    return torch._int_mm(codes, padded.t())[:, :m].t()


def _int8(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    assert p.x.codes is not None
    out.copy_(_int_mm(p.matrix.codes(e), p.x.codes[mine]))


def _bytes(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    x = p.x.bf16[mine]
    out.copy_(torch._weight_int8pack_mm(x, p.matrix.codes(e), x.new_ones(p.matrix.n)))


def _digits(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    digits, unit = p.x.digits
    high, mid, low = _int_mm(p.matrix.codes(e), digits[:, mine].flatten(0, 1)).float().unflatten(0, (3, -1))  # (M, N)
    torch.add(high, torch.add(mid, low, alpha=2.0**-7), alpha=2.0**-7, out=out).mul_(unit[mine])


def _nibbles(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    x = p.nibble_rows[:, 2 * mine.start : 2 * mine.stop]
    cpu_nibbles.multiply(x, p.matrix.codes(e), p.nibble_scales[i], out)


def _half(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    by = p.matrix.half_factor(e)
    if by is None:  # scales that are too far apart
        return _fp32(p, i, e, mine, out)
    rows, power = p.x.halves(64.0 if p.matrix.group else p.matrix.decode.largest)
    for a, b, block in p.matrix.halves(e, by):
        for j, y in enumerate(out[:, a:b].unbind()):
            y.copy_(torch.mv(block, rows[mine.start + j]))
    out.mul_(power[mine])
    if p.matrix.group:
        out.div_(by)


def _bf16(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    rows = p.x.bf16[mine]
    for a, b, block in p.matrix.bf16(e):
        first = linear(rows, block)
        out[:, a:b] = first
        if p.twice:
            out[:, a:b] += torch.addmm(-first, rows, block.t())


def _fp32(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    rows = p.x.floats[:, mine]  # (P, M, L)
    for a, b, block in p.matrix.floats(e):
        if out.shape[0] <= _SPLIT_ROWS:
            out[:, a:b] = _split(rows, block)
            continue
        out[:, a:b] = linear(rows[0], block[0])
        for plane, lanes in zip(rows[1:], block[1:], strict=True):
            out[:, a:b].addmm_(plane, lanes.t())


def _split(x: Tensor, block: Tensor) -> Tensor:
    """x (P, M, L), block (P, B, L) -> (M, B): torch runs a batch of products on every core, one of few rows on one."""
    planes, m, lanes = x.shape
    parts = math.gcd(block.shape[1], -(-torch.get_num_threads() // planes))
    x = x if parts == 1 else x[:, None].expand(-1, parts, -1, -1).reshape(-1, m, lanes)
    y = torch.bmm(x, block.reshape(x.shape[0], -1, lanes).transpose(1, 2))  # (P * parts, M, B / parts)
    y = y if planes == 1 else y.unflatten(0, (planes, parts)).sum(0)
    return y.transpose(0, 1).reshape(m, -1)


def _tiles(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    """x times the scales of each row of tiles, which are much fewer than numbers of the matrix."""
    matrix = p.matrix
    rows = p.x.floats[:, mine] * matrix.tiles(e)[:, None]  # (R, M, K)
    for a, b, block in matrix.floats(e, scaled=False):
        first, last = a // matrix.block_n, b // matrix.block_n
        y = torch.bmm(rows[first:last], block.view(last - first, matrix.block_n, -1).transpose(1, 2))
        out[:, a:b] = y.transpose(0, 1).flatten(1)

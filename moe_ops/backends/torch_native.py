"""The parts on the CPU by what torch has: its int8 products, and bit arithmetic before its half, bf16 and fp32 ones.

A matrix is decoded a block of rows at a time, into buffers that stay in the cache; scales that change along K multiply
the block, others the product. Every route computes what the reference does; which one is taken is a matter of speed:

    int8    codes are bytes, x is int8 or bf16: torch's product with int8 weights, or exact sums of int8 products
    half    up to 3 rows: halves hold the decoded codes exactly, and torch's product with a vector of halves is fast
    bf16    more rows: bf16 holds the decoded block and x exactly
    fp32    whatever else

torch rounds products of halves and of bf16 before they meet their scales. A result in bf16 bears that: its error is 1.0
and 1.4 times the reference's. Where it is made into codes it does not, for those that turn over cost more than the
rounding; there a product is made twice, the second time with the first subtracted inside, and the sum of both is as
good as fp32.

R sorted rows, or those of a run of experts, M of one expert, E experts, N output channels, K contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import routing
from ..activation import Gate, deinterleave, interleave, run_gate
from ..formats import FORMATS, Format
from . import compose, reference
from .base import Operand, Problem, Rows, Weight
from .cpu_activations import Activations, Taken
from .cpu_decode import decoder, from_planes
from .cpu_matrix import Matrix

# Up to how many rows of an expert a route is the fastest (two cores of an EPYC with AVX-512 and VNNI).
_HALF_ROWS, _BYTES_ROWS, _DIGITS_ROWS, _CHUNKED_ROWS = 3, 4, 24, 8
_CHUNK = 128  # columns of fp32 in a product of few rows: torch runs a batch of those on every core, one product on one
_RUN_ROWS, _RUN_EXPERTS = 64, 8


class Run:
    """Experts next to each other with few rows each, or one: what surrounds their products is done once for all."""

    def __init__(self, spans: list[tuple[int, int, int]]):
        self.spans = spans  # expert, first row, row after its last
        self.rows = slice(spans[0][1], spans[-1][2])

    @cached_property
    def experts(self) -> Tensor | slice:
        return self._index([e for e, *_ in self.spans])

    @cached_property
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


def _runs(bounds: list[int]) -> Iterator[Run]:
    spans: list[tuple[int, int, int]] = []
    for e, (a, b) in enumerate(pairwise(bounds)):
        if spans and a < b and (b - spans[0][1] > _RUN_ROWS or len(spans) == _RUN_EXPERTS):
            yield Run(spans)
            spans = []
        if a < b:
            spans.append((e, a, b))
    if spans:
        yield Run(spans)


def grouped_mm(
    x: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """As the reference's."""
    matrix = Matrix(weight, fmt.weight)
    activations = Activations(x, fmt.activation, 1 if transpose else matrix.planes)
    width = matrix.k if transpose else matrix.n // 2 if gate and gate.gated else matrix.n
    num_rows = x.data.shape[0] if rows.read is None else rows.read.shape[0]
    out = x.data.new_zeros(num_rows, width, dtype=out_dtype)
    read = None if rows.read is None else rows.read // rows.top_k
    twice = gate is not None and fmt.activation is not None
    with torch.autocast("cpu", enabled=False):
        for run in _runs([0, num_rows] if rows.offsets is None else rows.offsets.tolist()):
            taken = activations.take(run.rows if read is None else read[run.rows])
            if transpose:
                y = _transposed(matrix, taken, run)
            else:
                y = _product(matrix, taken, run, out_dtype == torch.bfloat16, twice)
                y = _finish(y, weight, run, gate, out_dtype)
            write = run.rows if rows.write is None else rows.write[run.rows].long()
            if rows.weights is not None:
                y = y.float() * rows.weights[write][:, None]
            out[write] = y.to(out_dtype)
    return out


def _finish(y: Tensor, w: Weight, run: Run, gate: Gate | None, out_dtype: torch.dtype) -> Tensor:
    """y (R, N) fp32, channels as stored: bias, gate first, one cast, activation."""
    if w.bias is not None:
        y = y + w.bias[run.owners].float()
    if w.interleaved:
        y = deinterleave(y)
    return y if gate is None else run_gate(gate, y.to(out_dtype))


def _transposed(matrix: Matrix, x: Taken, run: Run) -> Tensor:
    """x (R, N), gate first -> (R, K)"""
    rows, channels = x.floats, matrix.channels(run.owners)
    rows = interleave(rows) if matrix.weight.interleaved else rows
    rows = rows if channels is None else rows * channels
    out = rows.new_zeros(rows.shape[0], matrix.k)
    for _, e, mine in run:
        for a, b, block in matrix.floats(e):
            out[mine].addmm_(rows[mine, a:b], block)
    return from_planes(out, matrix.planes)


def _product(matrix: Matrix, x: Taken, run: Run, rounded: bool, twice: bool) -> Tensor:
    """(R, N) fp32, channels as stored. rounded: for a result in bf16; twice: which is made into codes."""
    y = torch.empty(x.values.shape[0], matrix.n, dtype=torch.float32, device=x.values.device)
    few = [rounded and x.exact and matrix.fits_half and mine.stop - mine.start <= _HALF_ROWS for _, _, mine in run]
    scales = matrix.half_scales(run.experts) if any(few) else None
    for i, e, mine in run:
        if few[i]:
            _half(matrix, e, x, mine, y[mine], twice, None if scales is None else (scales[0][i], scales[1][i]))
        else:
            _route(matrix, x, mine.stop - mine.start, rounded, twice)(matrix, e, x, mine, y[mine])
    for scale in (matrix.channels(run.owners), x.scale):
        if scale is not None:
            y *= scale
    return y


def _route(matrix: Matrix, x: Taken, m: int, rounded: bool, twice: bool) -> Callable:
    bytes_ = matrix.is_bytes and not matrix.k % 64  # torch's products read whole vectors of a row
    vnni = bytes_ and torch.cpu._is_vnni_supported()  # else sums of int8 products may saturate
    bf16 = rounded and x.exact and matrix.bits <= 8 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if vnni and x.codes is not None:
        return _int8
    if bytes_ and bf16 and not twice and m <= _BYTES_ROWS:
        return _bytes
    if vnni and x.exact and m <= _DIGITS_ROWS:
        return _digits
    if bf16 and not (twice and m <= _CHUNKED_ROWS):
        return _bf16_twice if twice else _bf16
    return _grouped if m <= _CHUNKED_ROWS and matrix.each >= _CHUNK // 2 and matrix.whole else _fp32


def _int8(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    assert x.codes is not None
    out.copy_(torch._int_mm(matrix.codes(e), x.codes[mine].t()).t())


def _bytes(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    ones = x.bf16.new_ones(matrix.n)
    out.copy_(torch._weight_int8pack_mm(x.bf16[mine], matrix.codes(e), ones))


def _digits(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    digits, unit = x.digits
    sums = torch._int_mm(matrix.codes(e), digits[:, mine].flatten(0, 1).t()).t().float()  # (3 M, N)
    high, mid, low = sums.unflatten(0, (3, -1))
    torch.add(high, torch.add(mid, low, alpha=2.0**-7), alpha=2.0**-7, out=out).mul_(unit[mine])


def _half(
    matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor, twice: bool, scales: tuple[Tensor, Tensor] | None
) -> None:
    rows, power = x.halves(matrix.largest_half)
    y = rows.new_empty(2, *out.shape)
    for a, b, block in matrix.halves(e, None if scales is None else scales[0]):
        for i in range(out.shape[0]):
            torch.mv(block, rows[mine.start + i], out=y[0, i, a:b])
            if twice:
                torch.addmv(-y[0, i, a:b], block, rows[mine.start + i], out=y[1, i, a:b])
    out.copy_(y[0])
    if twice:
        out += y[1]
    out *= power[mine] if scales is None else power[mine] * scales[1]


def _bf16(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    for a, b, block in matrix.bf16(e):
        out[:, a:b] = linear(x.bf16[mine], block)


def _bf16_twice(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    rows = x.bf16[mine]
    for a, b, block in matrix.bf16(e):
        first = linear(rows, block)
        out[:, a:b].copy_(first).add_(torch.addmm(-first, rows, block.t()))


def _fp32(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    few = out.shape[0] <= _CHUNKED_ROWS and not matrix.k % _CHUNK
    for a, b, block in matrix.floats(e):
        out[:, a:b] = _chunked(x.floats[mine], block, _CHUNK).sum(0) if few else linear(x.floats[mine], block)


def _grouped(matrix: Matrix, e: int, x: Taken, mine: slice, out: Tensor) -> None:
    """Scales of long groups multiply the sums of their groups."""
    scales = (matrix.groups(e).float() * matrix.decode.factor).t().unsqueeze(1)  # (G, 1, N)
    for a, b, block in matrix.floats(e, scaled=False):
        sums = _chunked(x.floats[mine], block, matrix.each).unflatten(0, (matrix.planes, -1))  # (P, G, M, B)
        out[:, a:b] = (sums * scales[..., a:b]).sum((0, 1))


def _chunked(x: Tensor, block: Tensor, chunk: int) -> Tensor:
    """x (M, K), block (B, K) -> sums over chunks of columns (K / chunk, M, B)"""
    return torch.bmm(x.unflatten(1, (-1, chunk)).transpose(0, 1), block.unflatten(1, (-1, chunk)).permute(1, 2, 0))


class Parts:
    """What `compose` builds the layer from."""

    sort_by_expert = staticmethod(routing.sort_by_expert)
    combine = staticmethod(routing.combine)
    quantize = staticmethod(reference.quantize)
    grouped_mm = staticmethod(grouped_mm)


def supports(problem: Problem) -> bool | str:
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.batch_invariant:
        return "multiplies few rows otherwise than many: it is not batch-invariant"
    if problem.op in ("sort_by_expert", "combine", "quantize"):
        return True
    element = FORMATS[problem.format].weight.element
    return True if decoder(element) else f"does not decode {element.name}"


compose.register_all("torch", Parts, supports)

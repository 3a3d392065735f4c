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
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return grouped_mm(x, weight, rows, gate, fmt, out_dtype=out_dtype, transpose=transpose)
    matrix = Matrix(weight, fmt.weight)
    activations = Activations(x, fmt.activation, 1 if transpose else matrix.planes)
    rounded, twice = out_dtype == torch.bfloat16, gate is not None and fmt.activation is not None
    width = matrix.k if transpose else matrix.n // 2 if gate and gate.gated else matrix.n
    num_rows = x.data.shape[0] if rows.read is None else rows.read.shape[0]
    out = x.data.new_zeros(num_rows, width, dtype=out_dtype)
    read = None if rows.read is None else rows.read // rows.top_k
    for run in _runs([0, num_rows] if rows.offsets is None else rows.offsets.tolist()):
        taken = activations.take(run.rows if read is None else read[run.rows])
        if transpose:
            y = _transposed(matrix, taken, run)
        else:
            y = _finish(_product(Product(matrix, taken, run, rounded, twice)), weight, run, gate, out_dtype)
        write = run.rows if rows.write is None else rows.write[run.rows].long()
        if rows.weights is not None:
            y = y.float() * rows.weights[write][:, None]
        out[write] = y.to(out_dtype)
    return out


def _finish(y: Tensor, w: Weight, run: Run, gate: Gate | None, out_dtype: torch.dtype) -> Tensor:
    """y (R, N) fp32, channels as stored: bias, gate first, one cast, activation."""
    if w.bias is not None:
        y = y + w.bias[run.owners()].float()
    if w.interleaved:
        y = deinterleave(y)
    return y if gate is None else run_gate(gate, y.to(out_dtype))


def _transposed(matrix: Matrix, x: Taken, run: Run) -> Tensor:
    """x (R, N), gate first -> (R, K)"""
    rows, channels = x.floats, matrix.channels(run.owners())
    rows = interleave(rows) if matrix.weight.interleaved else rows
    rows = rows if channels is None else rows * channels
    out = rows.new_zeros(rows.shape[0], matrix.k)
    for _, e, mine in run:
        for a, b, block in matrix.floats(e):
            out[mine].addmm_(rows[mine, a:b], block)
    return from_planes(out, matrix.planes)


class Product:
    """What is multiplied, and how it may be rounded before its scales."""

    def __init__(self, matrix: Matrix, x: Taken, run: Run, rounded: bool, twice: bool):
        self.matrix, self.x, self.run = matrix, x, run
        self.rounded = rounded and x.exact  # to bf16 or half, for the result is bf16
        self.twice = twice  # if so, not without making the product again
        self.few = _HALF_ROWS if self.rounded and matrix.plan.fits_half and matrix.whole else 0  # rows for `_half`
        scaled = matrix.group and any(b - a <= self.few for _, a, b in run.spans)
        self.half_scales = matrix.half_scales(run.experts()) if scaled else None


def _product(p: Product) -> Tensor:
    """(R, N) fp32, channels as stored."""
    y = p.x.values.new_empty(p.x.values.shape[0], p.matrix.n, dtype=torch.float32)
    for i, e, mine in p.run:
        _route(p, mine.stop - mine.start)(p, i, e, mine, y[mine])
    for scale in (p.matrix.channels(p.run.owners()), p.x.scale):
        if scale is not None:
            y *= scale
    return y


def _route(p: Product, m: int) -> Callable[[Product, int, int, slice, Tensor], None]:
    """For m rows: a function of the product, position in the run, expert and its rows, that fills what it is given."""
    if m <= p.few:
        return _half
    matrix, x, plan = p.matrix, p.x, p.matrix.plan
    bytes_ = plan.is_bytes and not matrix.k % 64  # torch's products read whole vectors of a row
    vnni = bytes_ and torch.cpu._is_vnni_supported()  # else sums of int8 products may saturate
    if vnni and x.codes is not None:
        return _int8
    if bytes_ and p.rounded and not p.twice and m <= _BYTES_ROWS:
        return _bytes
    if vnni and x.exact and m <= _DIGITS_ROWS:
        return _digits
    bf16 = plan.bits <= 8 and p.rounded and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if bf16 and (m > _CHUNKED_ROWS or not p.twice):
        return _bf16
    return _grouped if plan.each >= _CHUNK // 2 and m <= _CHUNKED_ROWS and matrix.whole else _fp32


def _int8(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    assert p.x.codes is not None
    out.copy_(torch._int_mm(p.matrix.codes(e), p.x.codes[mine].t()).t())


def _bytes(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    x = p.x.bf16[mine]
    out.copy_(torch._weight_int8pack_mm(x, p.matrix.codes(e), x.new_ones(p.matrix.n)))


def _digits(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    digits, unit = p.x.digits
    sums = torch._int_mm(p.matrix.codes(e), digits[:, mine].flatten(0, 1).t()).t().float()  # (3 M, N)
    high, mid, low = sums.unflatten(0, (3, -1))
    torch.add(high, torch.add(mid, low, alpha=2.0**-7), alpha=2.0**-7, out=out).mul_(unit[mine])


def _half(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    rows, power = p.x.halves(p.matrix.plan.largest_half)
    scales, unit = (None, None) if p.half_scales is None else (p.half_scales[0][i], p.half_scales[1][i])
    first = rows.new_empty(out.shape)
    rest = torch.empty_like(first) if p.twice else None
    for a, b, block in p.matrix.halves(e, scales):
        for j in range(out.shape[0]):
            torch.mv(block, rows[mine.start + j], out=first[j, a:b])
            if rest is not None:
                torch.addmv(-first[j, a:b], block, rows[mine.start + j], out=rest[j, a:b])
    torch.mul(first, power[mine], out=out)
    if rest is not None:
        out += rest * power[mine]
    if unit is not None:
        out *= unit


def _bf16(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    rows = p.x.bf16[mine]
    for a, b, block in p.matrix.bf16(e):
        first = linear(rows, block)
        out[:, a:b] = first
        if p.twice:
            out[:, a:b] += torch.addmm(-first, rows, block.t())


def _fp32(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    rows, few = p.x.floats[mine], out.shape[0] <= _CHUNKED_ROWS and not p.matrix.k % _CHUNK
    for a, b, block in p.matrix.floats(e):
        out[:, a:b] = _chunked(rows, block, _CHUNK).sum(0) if few else linear(rows, block)


def _grouped(p: Product, i: int, e: int, mine: slice, out: Tensor) -> None:
    """Scales of long groups multiply the sums of their groups."""
    matrix = p.matrix
    scales = (matrix.groups(e).float() * matrix.plan.decode.factor).t().unsqueeze(1)  # (G, 1, N)
    for a, b, block in matrix.floats(e, scaled=False):
        sums = _chunked(p.x.floats[mine], block, matrix.each).unflatten(0, (matrix.planes, -1))  # (P, G, M, B)
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

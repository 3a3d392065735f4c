"""The parts on the CPU by what torch has: its int8 products, and bit arithmetic before its half, bf16 and fp32 ones.

A matrix is decoded a block of rows at a time, into buffers that stay in the cache; scales that change along K multiply
the block, others the product. What is computed is what the reference computes.

R sorted rows, or those of a run of experts, E experts, N output channels, K contraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import routing
from ..activation import Gate, activation_grad, deinterleave, interleave, run_gate
from ..formats import FORMATS, Format
from . import compose, reference
from .base import Operand, Problem, Rows, Weight
from .cpu_activations import Activations, Taken
from .cpu_decode import decoder
from .cpu_matrix import Matrix
from .cpu_products import Product, Run, product, runs


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
    for run in runs([0, num_rows] if rows.offsets is None else rows.offsets.tolist()):
        taken = activations.take(run.rows if read is None else read[run.rows])
        if transpose:
            y = _transposed(matrix, taken, run)
        else:
            y = _finish(product(Product(matrix, taken, run, rounded, twice)), weight, run, gate, out_dtype)
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
    rows, channels = x.floats[0], matrix.channels(run.owners())
    rows = interleave(rows) if matrix.weight.interleaved else rows
    rows = rows if channels is None else rows * channels
    out = rows.new_zeros(matrix.planes, rows.shape[0], matrix.k // matrix.planes)
    for _, e, mine in run:
        for a, b, block in matrix.floats(e):
            for plane, lanes in zip(out, block, strict=True):
                plane[mine].addmm_(rows[mine, a:b], lanes)
    return out.permute(1, 2, 0).flatten(1)


class Parts:
    """What `compose` builds the layer from."""

    sort_by_expert = staticmethod(routing.sort_by_expert)
    combine = staticmethod(routing.combine)
    quantize = staticmethod(reference.quantize)
    values = staticmethod(reference.values)
    grouped_mm = staticmethod(grouped_mm)
    activation_grad = staticmethod(activation_grad)
    grouped_wgrad = staticmethod(reference.grouped_wgrad)
    quantize_weight = staticmethod(reference.quantize_weight)


def supports(problem: Problem) -> bool | str:
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.batch_invariant:
        return "multiplies few rows otherwise than many: it is not batch-invariant"
    if problem.op in ("sort_by_expert", "combine", "quantize", "grouped_wgrad", "quantize_weight"):
        return True
    element = FORMATS[problem.format].weight.element
    return True if decoder(element) else f"does not decode {element.name}"


compose.register_all("torch", Parts, supports)

"""The expert layer, forward and backward, as a composition of a backend's parts.

T tokens, A experts per token, R = T * A slots, E experts, H hidden, I intermediate. The order of operations is the
contract: quantize, product in fp32, scales, bias, one cast, activation, quantize, product, scales, bias, router weight,
one cast, sum over a token's slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import routing
from ..activation import Gate, activation_grad, interleave, run_gate
from ..formats import Codec, Format
from .base import Impl, Operand, Problem, Rows, Weight, register


def experts(
    parts: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Weight, down: Weight, fmt: Format, gate: Gate, *,
    router_weight_on_input: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x (T, H), topk_ids and topk_weights (T, A) -> (T, H). `up` holds gate and up: (E, 2I, H) or (E, I, H)."""
    num_experts, top_k = up.qdata.shape[0], topk_ids.shape[1]
    order, offsets = parts.sort_by_expert(topk_ids, num_experts)
    weights: Tensor | None = topk_weights.float().reshape(-1).contiguous()  # (R,) in slot order
    read = Rows(offsets, read=order, top_k=top_k)
    if router_weight_on_input:
        x, read, weights = _weigh_input(x, order, weights, top_k), Rows(offsets), None  # (R, H) sorted
    whole = fmt.activation is not None  # codes are made of whole rows; else the next part may add what this one left
    h = _project(parts, x, up, read, gate, fmt, batch_invariant, whole)  # (R, I) sorted
    write = Rows(offsets, write=order, weights=weights)
    y = _project(parts, h, down, write, None, fmt, batch_invariant, whole=False)  # (R, H) slots
    return parts.combine(y, top_k)


def _project(
    parts: Any, x: Any, w: Weight, rows: Rows, gate: Gate | None, fmt: Format, invariant: bool, whole: bool = True,
) -> Any:  # fmt: skip
    """A product of rows in float, in their dtype. Not `whole`: in the form that the backend's other parts take."""
    dtype = x.dtype
    return grouped_mm(parts, Operand(x), w, rows, gate, fmt, out_dtype=dtype, batch_invariant=invariant, whole=whole)


def grouped_mm(
    parts: Any, x: Operand, w: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False, whole: bool = True,
) -> Tensor:  # fmt: skip
    """The part `grouped_mm`, with x quantized first if the format says so and it is not: a gradient never is."""
    if x.scale is None and not transpose and fmt.activation is not None:
        x, rows = quantize_rows(parts, x.data, w, rows, fmt.activation)
    multiply = parts.grouped_mm if whole else getattr(parts, "product", parts.grouped_mm)
    return multiply(x, w, rows, gate, fmt, out_dtype=out_dtype, transpose=transpose, batch_invariant=batch_invariant)


def quantize_rows(parts: Any, x: Tensor, w: Weight, rows: Rows, codec: Codec) -> tuple[Operand, Rows]:
    """Codes, and where their rows are now. A static scale is its expert's, so it follows the gather."""
    if w.input_scale is not None:
        if rows.read is not None:
            x, rows = routing.permute(x, rows.read, rows.top_k), Rows(rows.offsets, None, rows.write, rows.weights)
        return parts.quantize(x, codec, _static_scale(x, w.input_scale.float(), rows)), rows
    if codec.block == (0, 0):
        return parts.quantize(x, codec, _matrix_scale(x, rows, codec)), rows
    return parts.quantize(x, codec), rows


def _static_scale(x: Tensor, input_scale: Tensor, rows: Rows) -> Tensor:
    """(R, 1): every sorted row's scale is its expert's."""
    if rows.offsets is None:
        return input_scale.reshape(1, 1)
    owner = routing.experts_of_rows(rows.offsets, x.shape[0]).clamp(max=input_scale.shape[0] - 1)
    return input_scale[owner][:, None]


def _matrix_scale(x: Tensor, rows: Rows, codec: Codec) -> Tensor:
    """One scale over the rows that some expert reads; what other rows hold, NaN included, does not count."""
    assert codec.scale_rule is not None
    if rows.offsets is None:
        used = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    elif rows.read is None:
        used = torch.arange(x.shape[0], device=x.device) < rows.offsets[-1]
    else:
        owned = torch.arange(rows.read.shape[0], device=x.device) < rows.offsets[-1]
        used = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
        used = used.scatter_reduce(0, (rows.read // rows.top_k).long(), owned.int(), "amax") > 0
    amax = x.float().abs().masked_fill(~used[:, None], 0.0)
    return codec.scale_rule(amax.amax(-1).amax() if amax.numel() else amax.new_zeros(()), codec.element)


def _weigh_input(x: Tensor, order: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """(R, H) sorted rows, each times its router weight, rounded to x's dtype."""
    assert weights is not None
    return (routing.permute(x, order, top_k).float() * weights[order][:, None]).to(x.dtype)


def experts_backward(
    parts: Any, grad: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Weight, down: Weight, fmt: Format,
    gate: Gate, *, router_weight_on_input: bool = False, need: tuple[bool, bool, bool, bool] = (True,) * 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, topk_weights and both biases, those not needed empty. Recomputes what it needs from x.

    Quantized activations pass gradients straight through; weights act as their dequantized values.
    """
    top_k, num_rows = topk_ids.shape[1], topk_ids.numel()
    order, offsets = parts.sort_by_expert(topk_ids, up.qdata.shape[0])
    sorted_rows = Rows(offsets)
    weights = topk_weights.float().reshape(-1)[order]  # (R,) sorted
    x_rows = routing.permute(x, order, top_k)  # (R, H)
    x_in = (x_rows.float() * weights[:, None]).to(x.dtype) if router_weight_on_input else x_rows
    pre = _project(parts, x_in, up, sorted_rows, None, fmt, False)  # (R, 2I), gate first, rounded as in the forward
    grad_rows = routing.permute(grad, order, top_k)  # (R, H)
    grad_weights = x.new_empty(0)
    if need[1] and not router_weight_on_input:
        h = run_gate(gate, pre)
        y = grouped_mm(parts, Operand(h), down, sorted_rows, None, fmt, out_dtype=torch.float32)  # (R, H)
        grad_weights = _row_dots(grad_rows, y, offsets)
    if not router_weight_on_input:
        grad_rows = (grad_rows.float() * weights[:, None]).to(x.dtype)
    grad_down_bias = _bias_grad(grad_rows, offsets, down) if need[3] else x.new_empty(0)
    back = {"out_dtype": x.dtype, "transpose": True}
    grad_h = parts.grouped_mm(Operand(grad_rows), down, sorted_rows, None, fmt, **back)  # (R, I)
    grad_pre = activation_grad(gate, pre, grad_h)
    grad_up_bias = _bias_grad(grad_pre, offsets, up) if need[2] else x.new_empty(0)
    if not need[0] and not (need[1] and router_weight_on_input):
        return x.new_empty(0), _to_slots(grad_weights, order, topk_weights), grad_up_bias, grad_down_bias
    grad_x = parts.grouped_mm(Operand(grad_pre), up, sorted_rows, None, fmt, **back)  # (R, H)
    if router_weight_on_input:
        grad_weights = _row_dots(grad_x, x_rows, offsets) if need[1] else grad_weights
        grad_x = (grad_x.float() * weights[:, None]).to(x.dtype)
    grad_x = parts.combine(routing.unpermute(grad_x, order), top_k) if num_rows else torch.zeros_like(x)
    return grad_x, _to_slots(grad_weights, order, topk_weights), grad_up_bias, grad_down_bias


def grouped_mm_backward(
    parts: Any, grad: Tensor, x: Operand, w: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    need: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (its rows, of K numbers), bias (E, N) and the row weights; those not needed are empty."""
    dtype, empty = grad.dtype, grad.new_empty(0)
    plain = Rows(rows.offsets, rows.read, None, None, rows.top_k)  # sorted rows out
    grad_rows = grad if rows.write is None else grad.index_select(0, rows.write)  # (R, N) sorted
    grad_weights = empty
    if rows.weights is not None:
        if need[2]:
            y = grouped_mm(parts, x, w, plain, gate, fmt, out_dtype=torch.float32)
            grad_weights = _row_dots(grad_rows, y, rows.offsets)
            grad_weights = grad_weights if rows.write is None else routing.unpermute(grad_weights, rows.write)
        weights = rows.weights if rows.write is None else rows.weights[rows.write]
        grad_rows = (grad_rows.float() * weights[:, None]).to(dtype)
    if gate is not None:
        pre = grouped_mm(parts, x, w, plain, None, fmt, out_dtype=dtype)
        grad_rows = activation_grad(gate, pre, grad_rows)
    grad_bias = _bias_grad(grad_rows, rows.offsets, w) if need[1] else empty
    if not need[0]:
        return empty, grad_bias, grad_weights
    back = parts.grouped_mm(Operand(grad_rows), w, Rows(rows.offsets), None, fmt, out_dtype=dtype, transpose=True)
    if rows.read is not None:  # rows read more than once: summed in a fixed order
        back = grad.new_zeros(x.data.shape[0], back.shape[1], dtype=torch.float32).index_put(
            ((rows.read // rows.top_k).long(),), back.float(), accumulate=True)  # fmt: skip
    return back.to(dtype), grad_bias, grad_weights


def _row_dots(a: Tensor, b: Tensor, offsets: Tensor | None) -> Tensor:
    """(R, N) sorted, twice -> (R,) fp32; 0 for rows that no expert owns, even where they hold NaN."""
    dots = (a.float() * b.float()).sum(-1)
    if offsets is None:
        return dots
    return torch.where(torch.arange(dots.shape[0], device=dots.device) < offsets[-1], dots, 0.0)


def _bias_grad(rows: Tensor, offsets: Tensor | None, w: Weight) -> Tensor:
    """rows (R, N) sorted -> (E, N) fp32, its columns in the order of the stored bias."""
    grad = rows.sum(0, dtype=torch.float32)[None] if offsets is None else routing.sum_by_expert(rows, offsets)
    return interleave(grad) if w.interleaved else grad


def _to_slots(grad_weights: Tensor, order: Tensor, topk_weights: Tensor) -> Tensor:
    """(R,) sorted -> (T, A) in the dtype of the weights; empty stays empty."""
    if not grad_weights.numel():
        return torch.zeros_like(topk_weights) if topk_weights.numel() == 0 else grad_weights.to(topk_weights.dtype)
    return routing.unpermute(grad_weights, order).view_as(topk_weights).to(topk_weights.dtype)


def register_all(backend: str, parts: Any, supports: Callable[[Problem], bool | str]) -> None:
    """Enter a backend's parts and everything composed of them into the list of implementations."""
    for op in ("sort_by_expert", "combine", "quantize", "grouped_wgrad", "quantize_weight"):
        register(Impl(backend, op, getattr(parts, op), supports))
    for fn in (grouped_mm, grouped_mm_backward, experts, experts_backward):
        register(Impl(backend, fn.__name__, partial(fn, parts), supports))

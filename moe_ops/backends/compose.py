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
from ..activation import Gate, interleave, run_gate
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
    if getattr(parts, "shared", bool)():  # the gate apart: the backward has the same product
        h = run_gate(gate, _project(parts, x, up, read, None, fmt, batch_invariant))
    else:
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


_GRADS = ("x", "w", "b1", "b2", "W1", "W2")  # of experts_backward, in this order


def experts_backward(
    parts: Any, grad: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: Weight, down: Weight, fmt: Format,
    gate: Gate, *, router_weight_on_input: bool = False, need: tuple[bool, ...] = (True,) * 6,
    grad_fmt: Format | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, topk_weights, both biases and both float weights; of those not needed, empty ones.

    Recomputes from x. What is quantized passes gradients straight through. With g that of y, w a row's router weight:

        dh = g W2,  dw = dh . q(h) + g . b2,  dpre = act'(pre) w dh,  dx = dpre W1,  dW2 = g^T (w h),  dW1 = dpre^T x
    """
    top_k, on_input, wants = topk_ids.shape[1], router_weight_on_input, dict(zip(_GRADS, need, strict=True))
    order, offsets = parts.sort_by_expert(topk_ids, up.qdata.shape[0])
    in_order, gathered = Rows(offsets), Rows(offsets, read=order, top_k=top_k)
    w, x_in, x_rows = topk_weights.float().reshape(-1)[order][:, None], x, gathered  # w (R, 1) sorted
    if on_input:
        x_in, x_rows = (routing.permute(x, order, top_k).float() * w).to(x.dtype), in_order  # (R, H)
    pre = _project(parts, x_in, up, x_rows, None, fmt, False)  # (R, 2I), gate first, rounded as in the forward
    h = run_gate(gate, pre) if wants["w"] or wants["W2"] else pre.new_empty(0)  # (R, I)
    grad_h = _back(parts, grad, down, gathered, fmt, grad_fmt, torch.float32)  # (R, I)
    out = dict.fromkeys(wants, x.new_empty(0))
    wgrad = partial(_wgrad, parts, offsets=offsets, top_k=top_k, grad_fmt=grad_fmt)
    if wants["W2"] or wants["w"]:
        h = _seen(parts, Operand(h), down, in_order, fmt)[0].float()
    if wants["w"] and not on_input:
        dots = (grad_h * h).sum(-1) + _bias_dots(grad, down, order, offsets, top_k)
        out["w"] = _to_slots(_owned(dots, offsets), order, topk_weights)
    if not on_input and wants["W2"]:
        h = h * w
    if wants["b2"]:
        rows = routing.permute(grad, order, top_k)  # (R, H)
        out["b2"] = _bias_grad(rows if on_input else rows.float() * w, offsets, down)
    if wants["W2"]:
        out["W2"] = wgrad(grad, h.to(x.dtype), down, grad_read=order)
    if not (wants["x"] or wants["b1"] or wants["W1"] or (wants["w"] and on_input)):
        return tuple(out.values())
    grad_pre = parts.activation_grad(gate, pre, grad_h, None if on_input else w)  # (R, 2I)
    if wants["b1"]:
        out["b1"] = _bias_grad(grad_pre, offsets, up)
    if wants["W1"]:
        seen, rows_in = _seen(parts, Operand(x_in), up, x_rows, fmt)
        out["W1"] = wgrad(grad_pre, seen.to(x.dtype), up, x_read=rows_in.read)
    back = partial(_back, parts, grad_pre, up, fmt=fmt, grad_fmt=grad_fmt, dtype=x.dtype)
    if on_input and (wants["x"] or wants["w"]):
        grad_x = back(in_order)  # (R, H)
        out["w"] = _to_slots(_row_dots(grad_x, routing.permute(x, order, top_k), offsets), order, topk_weights)
        out["x"] = parts.combine(routing.unpermute((grad_x.float() * w).to(x.dtype), order), top_k)
    elif wants["x"]:
        out["x"] = parts.combine(back(Rows(offsets, write=order)), top_k)  # of (R, H) slots
    return tuple(out.values())


def _back(
    parts: Any, grad: Tensor, w: Weight, rows: Rows, fmt: Format, grad_fmt: Format | None, dtype: torch.dtype
) -> Tensor:
    """Rows of grad (., N) . W (N, K): with W as it is stored, or with both quantized along N."""
    if grad_fmt is None:
        return parts.grouped_mm(Operand(grad), w, rows, None, fmt, out_dtype=dtype, transpose=True)
    assert w.master is not None
    q = parts.quantize_weight(grad_fmt.weight, w.master.mT)  # (E, K, N)
    turned = Weight(q.qdata, q.scale, q.global_scale)
    return grouped_mm(parts, Operand(grad), turned, rows, None, grad_fmt, out_dtype=dtype)


def _wgrad(parts: Any, grad: Tensor, x: Tensor, w: Weight, *, grad_fmt: Format | None, **rows: Any) -> Tensor:
    """(E, N, K) in the dtype of the float weight, its rows in the order in which they are stored."""
    out = parts.grouped_wgrad(
        grad.contiguous(), x, rows.pop("offsets"), grad_fmt and grad_fmt.activation, num_experts=w.trained.shape[0],
        out_dtype=w.trained.dtype, **rows,
    )  # fmt: skip
    return interleave(out.mT).mT.contiguous() if w.interleaved else out


def _seen(parts: Any, x: Operand, w: Weight, rows: Rows, fmt: Format) -> tuple[Tensor, Rows]:
    """The numbers that a product multiplies, those of codes if it quantizes x, and where its rows are in them."""
    codec = fmt.activation
    if codec is None:
        return x.data, rows
    if x.scale is None:
        x, rows = quantize_rows(parts, x.data, w, rows, codec)
    return parts.values(x, codec), rows


def _bias_dots(grad: Tensor, w: Weight, order: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """grad[t] . bias[e] of every sorted row (R,): (T, E) of them all first, for H is long and a row is read A times."""
    if w.bias is None:
        return grad.new_zeros((), dtype=torch.float32)
    every = grad.float() @ w.bias.float().T  # (T, E)
    owner = routing.experts_of_rows(offsets, order.shape[0]).clamp(max=w.bias.shape[0] - 1)
    return every[(order // top_k).long(), owner]


def grouped_mm_backward(
    parts: Any, grad: Tensor, x: Operand, w: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    need: tuple[bool, ...] = (True,) * 4, grad_fmt: Format | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x (its rows, of K numbers), bias (E, N), the row weights and the float weight; else empty."""
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
        grad_rows = parts.activation_grad(gate, pre, grad_rows)
    grad_bias = _bias_grad(grad_rows, rows.offsets, w) if need[1] else empty
    grad_w = empty
    if need[3]:
        seen, rows_in = _seen(parts, x, w, plain, fmt)
        grad_w = _wgrad(parts, grad_rows, seen.to(dtype), w, offsets=rows.offsets, x_read=rows_in.read,
                        top_k=rows.top_k, grad_fmt=grad_fmt)  # fmt: skip
    if not need[0]:
        return empty, grad_bias, grad_weights, grad_w
    back = _back(parts, grad_rows, w, Rows(rows.offsets), fmt, grad_fmt, dtype)
    if rows.read is not None:  # rows read more than once: summed in a fixed order
        back = grad.new_zeros(x.data.shape[0], back.shape[1], dtype=torch.float32).index_put(
            ((rows.read // rows.top_k).long(),), back.float(), accumulate=True)  # fmt: skip
    return back.to(dtype), grad_bias, grad_weights, grad_w


def _row_dots(a: Tensor, b: Tensor, offsets: Tensor | None) -> Tensor:
    """(R, N) sorted, twice -> (R,) fp32."""
    return _owned((a.float() * b.float()).sum(-1), offsets)


def _owned(dots: Tensor, offsets: Tensor | None) -> Tensor:
    """(R,) sorted, with 0 for rows that no expert owns, even where they hold NaN."""
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

"""moe_ops::linear: x W^T + bias with one quantized matrix. M rows, N outputs, K contraction (bytes where packed)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import Operand, Rows, Weight, select
from ..formats import FORMATS
from .grouped_mm import _problem, check_floats, check_input_scale, check_invariant, check_weight
from .library import define, gradient, needs_grad, no_gradient
from .training import check_frozen, check_training, gradient_format

_ROWS = Rows(None)


def _one_expert(weight: Tensor, scale: Tensor | None, global_scale: Tensor | None, zero_point: Tensor | None,
                bias: Tensor | None, input_scale: Tensor | None, master: Tensor | None = None) -> Weight:  # fmt: skip
    """The matrix as the only expert: a leading dim of 1 on everything; a number for all of it becomes (1, 1)."""
    scale, global_scale = (t[None] if t is not None and not t.ndim else t for t in (scale, global_scale))
    tensors = (scale, global_scale, zero_point, bias, input_scale, master)
    scale, global_scale, zero_point, bias, input_scale, master = (None if t is None else t[None] for t in tensors)
    return Weight(weight[None], scale, global_scale, zero_point, bias, input_scale, master=master)


def linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None = None, weight_global_scale: Tensor | None = None,
    weight_zero_point: Tensor | None = None, bias: Tensor | None = None, input_scale: Tensor | None = None,
    weight_master: Tensor | None = None, *, format: str, grad_format: str | None = None, backend: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x (..., K), weight (N, stored K) -> cast(x . W^T + bias) (..., N) in x's dtype; x quantized as the format says.

    weight_master (N, K), grad_format: as gate_up_proj_master and grad_format of moe_ops::experts.
    input_scale: () for a static activation scale. Raises ValueError for shapes and scales that do not fit the format.
    """
    fmt = FORMATS[format]
    if weight.ndim != 2:
        raise ValueError(f"weight must be (N, stored K), got {tuple(weight.shape)}")
    columns = fmt.weight.columns(weight.shape[1])
    if not x.ndim or x.shape[-1] != columns:
        raise ValueError(f"x must be (..., {columns}) for a weight {tuple(weight.shape)} of format {format!r}, "
                         f"got {tuple(x.shape)}")  # fmt: skip
    check_floats(x)
    check_input_scale(fmt, input_scale, (), "input_scale")
    w = _one_expert(weight, weight_scale, weight_global_scale, weight_zero_point, bias, input_scale, weight_master)
    check_weight(fmt, w)
    check_training(fmt, grad_format, w)
    if batch_invariant:
        check_invariant(fmt, w)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    impl = select(_problem("grouped_mm", rows, w, fmt, None, batch_invariant), backend)
    out = impl.fn(Operand(rows), w, _ROWS, None, fmt, out_dtype=x.dtype, batch_invariant=batch_invariant)
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])  # no view: it may be changed in place


def _fake(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, weight_scale: Tensor | None, weight_global_scale: Tensor | None,
    weight_zero_point: Tensor | None, weight_master: Tensor | None, format: str, grad_format: str | None,
    need: list[bool], backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad (..., N) -> grad . W (..., K) in grad's dtype and, with x, grad^T x (N, K); empty where not in `need`."""
    fmt = FORMATS[format]
    w = _one_expert(weight, weight_scale, weight_global_scale, weight_zero_point, None, None, weight_master)
    g = grad.reshape(-1, grad.shape[-1]).contiguous()  # (M, N)
    rows = g if x is None else x.reshape(-1, x.shape[-1])  # (M, K), which only grad^T x reads
    impl = select(_problem("grouped_mm_backward", g, w, fmt, None), backend)
    gx, _, _, gw = impl.fn(g, Operand(rows), w, _ROWS, None, fmt, need=(need[0], False, False, need[1]),
                           grad_fmt=gradient_format(grad_format))  # fmt: skip
    return gx.view(*grad.shape[:-1], gx.shape[1]) if need[0] else gx, gw[0] if need[1] else gw


def _backward_fake(
    grad: Tensor, x: Tensor | None, weight: Tensor, weight_scale: Tensor | None, weight_global_scale: Tensor | None,
    weight_zero_point: Tensor | None, weight_master: Tensor | None, format: str, grad_format: str | None,
    need: list[bool], backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w, empty = weight if weight_master is None else weight_master, grad.new_empty(0)
    k = FORMATS[format].weight.columns(weight.shape[1])
    return grad.new_empty(*grad.shape[:-1], k) if need[0] else empty, w.new_empty(w.shape) if need[1] else empty


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: Tensor) -> None:
    x, weight, scale, global_scale, zero_point, bias, _, master = inputs
    check_frozen(keyword_only_inputs["format"], weight, scale, global_scale)
    trains = weight.requires_grad or (master is not None and master.requires_grad)
    ctx.save_for_backward(x if trains else None, weight, scale, global_scale, zero_point, master)
    ctx.options, ctx.bias_dtype = keyword_only_inputs, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    need, o = needs_grad(ctx, 8), ctx.options
    grad_x = grad_w = grad_bias = None
    wanted = [need[0], need[7] if FORMATS[o["format"]].quantized else need[1]]
    if any(wanted):
        options = o["format"], o["grad_format"], wanted, o["backend"]
        gx, gw = torch.ops.moe_ops.linear_backward(grad, *ctx.saved_tensors, *options)
        grad_x, grad_w = gx if wanted[0] else None, gw if wanted[1] else None
    if need[5]:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, grad_w if need[1] else None, None, None, None, grad_bias, None, grad_w if need[7] else None


define(
    "linear(Tensor x, Tensor weight, Tensor? weight_scale=None, Tensor? weight_global_scale=None, "
    "Tensor? weight_zero_point=None, Tensor? bias=None, Tensor? input_scale=None, Tensor? weight_master=None, *, "
    "str format, str? grad_format=None, str backend='auto', bool batch_invariant=False) -> Tensor",
    linear, _fake, repeats=True,
)  # fmt: skip
define(
    "linear_backward(Tensor grad, Tensor? x, Tensor weight, Tensor? weight_scale, Tensor? weight_global_scale, "
    "Tensor? weight_zero_point, Tensor? weight_master, str format, str? grad_format, bool[] need, str backend='auto') "
    "-> (Tensor, Tensor)",
    linear_backward, _backward_fake,
)  # fmt: skip
gradient("linear", _setup, _backward)
no_gradient("linear_backward")

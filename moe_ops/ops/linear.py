"""moe_ops::linear: x W^T + bias with one quantized matrix. M rows, N outputs, K contraction (bytes where packed)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import Operand, Rows, Weight, select
from ..formats import FORMATS
from .grouped_mm import _problem, check_floats, check_input_scale, check_invariant, check_weight
from .library import define, gradient, needs_grad

_ROWS = Rows(None)


def _one_expert(weight: Tensor, scale: Tensor | None, global_scale: Tensor | None, zero_point: Tensor | None,
                bias: Tensor | None, input_scale: Tensor | None) -> Weight:  # fmt: skip
    """The matrix as the only expert: a leading dim of 1 on everything; a number for all of it becomes (1, 1)."""
    scale, global_scale = (t[None] if t is not None and not t.ndim else t for t in (scale, global_scale))
    tensors = (scale, global_scale, zero_point, bias, input_scale)
    scale, global_scale, zero_point, bias, input_scale = (None if t is None else t[None] for t in tensors)
    return Weight(weight[None], scale, global_scale, zero_point, bias, input_scale)


def linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None = None, weight_global_scale: Tensor | None = None,
    weight_zero_point: Tensor | None = None, bias: Tensor | None = None, input_scale: Tensor | None = None, *,
    format: str, backend: str = "auto", batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x (..., K), weight (N, stored K) -> cast(x . W^T + bias) (..., N) in x's dtype; x quantized as the format says.

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
    w = _one_expert(weight, weight_scale, weight_global_scale, weight_zero_point, bias, input_scale)
    check_weight(fmt, w)
    if batch_invariant:
        check_invariant(fmt, w)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    impl = select(_problem("grouped_mm", rows, w, fmt, None, batch_invariant), backend)
    out = impl.fn(Operand(rows), w, _ROWS, None, fmt, out_dtype=x.dtype, batch_invariant=batch_invariant)
    return out.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Tensor, weight: Tensor, weight_scale: Tensor | None, weight_global_scale: Tensor | None,
    weight_zero_point: Tensor | None, format: str, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """grad (..., N) -> grad . W (..., K) in grad's dtype, with W dequantized."""
    fmt = FORMATS[format]
    w = _one_expert(weight, weight_scale, weight_global_scale, weight_zero_point, None, None)
    rows = grad.reshape(-1, grad.shape[-1])  # (M, N)
    impl = select(_problem("grouped_mm", rows, w, fmt, None), backend)
    out = impl.fn(Operand(rows), w, _ROWS, None, fmt, out_dtype=grad.dtype, transpose=True)
    return out.view(*grad.shape[:-1], out.shape[1])


def _backward_fake(
    grad: Tensor, weight: Tensor, weight_scale: Tensor | None, weight_global_scale: Tensor | None,
    weight_zero_point: Tensor | None, format: str, backend: str = "auto",
) -> Tensor:  # fmt: skip
    return grad.new_empty(*grad.shape[:-1], FORMATS[format].weight.columns(weight.shape[1]))


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: Tensor) -> None:
    _, weight, scale, global_scale, zero_point, bias, _ = inputs
    ctx.save_for_backward(weight, scale, global_scale, zero_point)
    ctx.options, ctx.bias_dtype = keyword_only_inputs, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    need, grad_x, grad_bias = needs_grad(ctx, 7), None, None
    if need[0]:
        options = ctx.options["format"], ctx.options["backend"]
        grad_x = torch.ops.moe_ops.linear_backward(grad, *ctx.saved_tensors, *options)
    if need[5]:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


define(
    "linear(Tensor x, Tensor weight, Tensor? weight_scale=None, Tensor? weight_global_scale=None, "
    "Tensor? weight_zero_point=None, Tensor? bias=None, Tensor? input_scale=None, *, str format, str backend='auto', "
    "bool batch_invariant=False) -> Tensor",
    linear, _fake,
)  # fmt: skip
define(
    "linear_backward(Tensor grad, Tensor weight, Tensor? weight_scale, Tensor? weight_global_scale, "
    "Tensor? weight_zero_point, str format, str backend='auto') -> Tensor",
    linear_backward, _backward_fake,
)  # fmt: skip
gradient("linear", _setup, _backward)

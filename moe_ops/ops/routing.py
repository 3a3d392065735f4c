"""moe_ops::sort_by_expert, permute, unpermute, combine: slots to sorted rows and back (letters as in routing.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import routing
from ..backends.base import Problem, arch_of, select
from .library import define, gradient


def sort_by_expert(topk_ids: Tensor, num_experts: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """topk_ids (T, A) -> order (R,), offsets (E + 1,), int32; ids outside 0..E-1 sort last and are not counted."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if topk_ids.is_floating_point() or topk_ids.dtype == torch.bool:
        raise ValueError(f"topk_ids must be integers, got {topk_ids.dtype}")
    problem = Problem("sort_by_expert", topk_ids.device.type, arch_of(topk_ids.device), num_experts=num_experts)
    return select(problem, backend).fn(topk_ids, num_experts)


def _sort_fake(topk_ids: Tensor, num_experts: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    order = topk_ids.new_empty(topk_ids.numel(), dtype=torch.int32)
    return order, topk_ids.new_empty(num_experts + 1, dtype=torch.int32)


def permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x (T, H), order (R,) of slots -> (R, H): row i = x[order[i] // top_k]."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return routing.permute(x, order, top_k)


def _permute_fake(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _permute_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.order, ctx.top_k = inputs


def _permute_backward(ctx: Any, grad: Tensor) -> tuple:
    ops = torch.ops.moe_ops
    return ops.combine(ops.unpermute(grad.contiguous(), ctx.order), ctx.top_k), None, None


def unpermute(rows: Tensor, order: Tensor) -> Tensor:
    """rows (R, H) -> (R, H) in slot order: out[order[i]] = rows[i]."""
    return routing.unpermute(rows, order)


def _unpermute_fake(rows: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _unpermute_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.order = inputs[1]


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple:
    return torch.ops.moe_ops.permute(grad, ctx.order, 1), None


def combine(rows: Tensor, top_k: int, backend: str = "auto") -> Tensor:
    """rows (T * A, H) in slot order -> (T, H): fp32 sum over slots 0..A-1, one cast."""
    if top_k < 1 or rows.shape[0] % top_k:
        raise ValueError(f"{rows.shape[0]} rows are not a multiple of top_k = {top_k}")
    problem = Problem("combine", rows.device.type, arch_of(rows.device), rows.dtype)
    return select(problem, backend).fn(rows, top_k)


def _combine_fake(rows: Tensor, top_k: int, backend: str = "auto") -> Tensor:
    return rows.new_empty(rows.shape[0] // top_k, rows.shape[1])


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.top_k = inputs[1]


def _combine_backward(ctx: Any, grad: Tensor) -> tuple:
    return grad.repeat_interleave(ctx.top_k, 0), None, None


define(
    "sort_by_expert(Tensor topk_ids, int num_experts, str backend='auto') -> (Tensor, Tensor)",
    sort_by_expert, _sort_fake,
)  # fmt: skip
define("permute(Tensor x, Tensor order, int top_k) -> Tensor", permute, _permute_fake)
define("unpermute(Tensor rows, Tensor order) -> Tensor", unpermute, _unpermute_fake)
define("combine(Tensor rows, int top_k, str backend='auto') -> Tensor", combine, _combine_fake)
gradient("permute", _permute_setup, _permute_backward)
gradient("unpermute", _unpermute_setup, _unpermute_backward)
gradient("combine", _combine_setup, _combine_backward)

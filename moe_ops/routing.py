"""Routing: slots (token, k-th expert) sorted by expert, and the way back. Independent of any tile size.

T tokens, A experts per token, R = T * A slots (slot = t * A + a), E experts, H width of a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """topk_ids (T, A) -> order (R,), offsets (E + 1,), both int32: rows order[offsets[e]:offsets[e + 1]] are e's slots.

    Stable. Ids outside 0..E-1 sort last and are not counted.
    """
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)  # (R,)
    counts = ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    offsets[1:] = counts[:num_experts].cumsum(0)
    return torch.argsort(ids, stable=True).int(), offsets.int()


def experts_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """Expert of every sorted row (R,), E for a row that no expert owns."""
    rows = torch.arange(num_rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], rows, right=True)


def permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x (T, H) -> rows (R, H): row i = x[order[i] // top_k]."""
    return x.index_select(0, order // top_k)


def unpermute(rows: Tensor, order: Tensor) -> Tensor:
    """rows (R, H) -> (R, H) in slot order: out[order[i]] = rows[i]."""
    return torch.empty_like(rows).index_copy(0, order.long(), rows)  # not in place, for compilers


def combine(rows: Tensor, top_k: int) -> Tensor:
    """rows (T * A, H) in slot order -> (T, H): summed over a token's slots 0..A-1 in fp32, one cast."""
    slots = rows.unflatten(0, (-1, top_k)).float().unbind(1)  # torch.sum adds in an order of its own
    return functools.reduce(torch.add, slots).to(rows.dtype)


def sum_by_expert(rows: Tensor, offsets: Tensor) -> Tensor:
    """rows (R, N) sorted -> (E, N) fp32: each expert's rows in their order; what others hold does not count."""
    return torch.segment_reduce(rows.float(), "sum", offsets=offsets, axis=0, unsafe=True)  # unsafe: no host checks

"""moe_ops::sort_by_expert, permute, unpermute, combine opened for Inductor.

T tokens, A experts per token, R = T * A slots, E experts, H width of a row, P parts that add up. The sort is our Triton
kernels, launched by the generated code itself, without Python or a host copy in between. The others are plain torch:
they fuse with what stands around them.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import SymInt, Tensor

from moe_ops import routing
from moe_ops.backends.base import Problem, arch_of

from . import _compat
from .where import kept_whole, opens

FEW = 64  # tokens: up to here one graph, above it another


def few(tokens: int | SymInt) -> bool:
    """Whether T <= 64: the only thing that is assumed of a symbolic T."""
    return bool(tokens <= FEW)


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """topk_ids (T, A) -> order (R,), offsets (E + 1,), int32, as routing.sort_by_expert has them."""
    from moe_ops.kernels import routing as kernels

    known = _compat.derived(topk_ids)  # of a training step's graph: its backward sorts the same ids again
    if (key := ("sorted", num_experts)) not in known:
        known[key] = _sorted(kernels, topk_ids, num_experts)
    return known[key]


def _sorted(kernels, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    ids, r = topk_ids.reshape(-1).contiguous(), topk_ids.numel()
    if isinstance(r, int) and not r:
        return ids.new_empty(0, dtype=torch.int32), ids.new_zeros(num_experts + 1, dtype=torch.int32)
    symbolic = isinstance(topk_ids.shape[0], SymInt)
    if few(topk_ids.shape[0]) if symbolic else r <= kernels._ONE_KERNEL_ROWS:
        most = FEW * topk_ids.shape[1] if symbolic else r
        return _one_launch(kernels, ids, num_experts, min(max(_power_of_2(most), 128), 1024))
    return _three_launches(kernels, ids, num_experts)


def _one_launch(kernels, ids: Tensor, e: int, block: int) -> tuple[Tensor, Tensor]:
    order, offsets = _empty(ids, ids.shape[0]), _empty(ids, e + 1)
    done = _compat.launch(
        kernels._sort_kernel, (e + 1,), ("order_ptr", "offsets_ptr"),
        ids_ptr=ids, order_ptr=order, offsets_ptr=offsets, R=ids.shape[0], E=e, BLOCK=block,
    )  # fmt: skip
    return done["order_ptr"], done["offsets_ptr"]


def _three_launches(kernels, ids: Tensor, e: int) -> tuple[Tensor, Tensor]:
    r, chunk = ids.shape[0], kernels._CHUNK
    chunks = (r + chunk - 1) // chunk
    sizes = {"R": r, "E": e, "num_chunks": chunks, "CHUNK": chunk, "E_BLOCK": _power_of_2(e + 1)}
    counts = _compat.launch(
        kernels._count_kernel, (chunks,), ("counts_ptr",), ids_ptr=ids, counts_ptr=_empty(ids, e + 1, chunks), **sizes
    )
    done = _compat.launch(
        kernels._scan_kernel, (e + 1,), ("counts_ptr", "totals_ptr"),
        counts_ptr=counts["counts_ptr"], totals_ptr=_empty(ids, e + 1), num_chunks=chunks,
        BLOCK=1024 if isinstance(chunks, SymInt) else min(_power_of_2(chunks), 1024),
    )  # fmt: skip
    out = _compat.launch(
        kernels._scatter_kernel, (chunks,), ("order_ptr", "offsets_ptr"),
        ids_ptr=ids, **done, order_ptr=_empty(ids, r), offsets_ptr=_empty(ids, e + 1), **sizes,
    )  # fmt: skip
    return out["order_ptr"], out["offsets_ptr"]


def _empty(ids: Tensor, *size: int | SymInt) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=ids.device)


def _power_of_2(n: int) -> int:
    """The next one, n included."""
    return 1 << (n - 1).bit_length()


def combine(rows: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Tensor:
    """rows (T * A, H), or (P, T * A, H) fp32 in parts, in slot order -> (T, H) of `dtype`, or theirs.

    A row is the sum of its parts, rounded to `dtype`; rows are added in fp32, slots in order.
    """
    dtype = dtype or rows.dtype
    if rows.ndim == 3:
        rows = reduce(torch.add, rows.unbind(0)).to(dtype)
    return routing.combine(rows, top_k).to(dtype)


permute = routing.permute


def unpermute(rows: Tensor, order: Tensor) -> Tensor:
    """rows (R, H) -> (R, H) in slot order: out[order[i]] = rows[i]. Read by the inverse: what is read can be fused."""
    slots = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    inverse = torch.empty_like(order).index_put((order.long(),), slots)
    return rows.index_select(0, inverse)


def _sort_op(topk_ids: Tensor, num_experts: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    device = topk_ids.device
    if not opens(Problem("sort_by_expert", device.type, arch_of(device), num_experts=num_experts), backend, topk_ids):
        return NotImplemented
    return sort_by_expert(topk_ids, num_experts)


def _combine_op(rows: Tensor, top_k: int, backend: str = "auto") -> Tensor:
    if not opens(Problem("combine", rows.device.type, arch_of(rows.device), rows.dtype), backend, rows):
        return NotImplemented
    return combine(rows, top_k)


def _permute_op(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return permute(x, order, top_k) if x.device.type == "cuda" and not kept_whole() else NotImplemented


def _unpermute_op(rows: Tensor, order: Tensor) -> Tensor:
    return unpermute(rows, order) if rows.device.type == "cuda" and not kept_whole() else NotImplemented


DECOMPOSITIONS = {
    torch.ops.moe_ops.sort_by_expert.default: _sort_op,
    torch.ops.moe_ops.combine.default: _combine_op,
    torch.ops.moe_ops.permute.default: _permute_op,
    torch.ops.moe_ops.unpermute.default: _unpermute_op,
}

"""Slots sorted by expert: stable, no atomics, no host. R slots, E experts. And the sum over a token's slots."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import enqueue, power_of_2
from .parts import added


@triton.jit
def _sort_kernel(ids_ptr, order_ptr, offsets_ptr, R, E, BLOCK: tl.constexpr):
    """Program e: offset = how many ids are smaller; then the positions of its own ids in turn. Program E: the rest."""
    e = tl.program_id(0)
    smaller = tl.zeros((BLOCK,), tl.int32)
    r = tl.arange(0, BLOCK)
    for start in range(0, R, BLOCK):
        ids = tl.load(ids_ptr + start + r, mask=start + r < R, other=-1)
        smaller += ((ids >= 0) & (ids < e)).to(tl.int32)
    at = tl.sum(smaller, 0)
    tl.store(offsets_ptr + e, at)
    for start in range(0, R, BLOCK):
        ids = tl.load(ids_ptr + start + r, mask=start + r < R, other=-1)
        mine = (start + r < R) & (ids == e)
        if e == E:
            mine = (start + r < R) & ((ids < 0) | (ids >= E))
        count = mine.to(tl.int32)
        rank = tl.cumsum(count, 0) - count
        tl.store(order_ptr + at + rank, start + r, mask=mine)
        at += tl.sum(count, 0)


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, R, E, num_chunks, CHUNK: tl.constexpr, E_BLOCK: tl.constexpr):
    """counts[e, chunk]: ids of a chunk per expert; row E counts those of no expert."""
    chunk = tl.program_id(0)
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + r, mask=r < R, other=0)
    ids = tl.where((ids < 0) | (ids > E), E, ids).to(tl.int32)
    e = tl.arange(0, E_BLOCK)
    counts = tl.histogram(ids, E_BLOCK, mask=r < R)
    tl.store(counts_ptr + e * num_chunks + chunk, counts, mask=e <= E)


@triton.jit
def _scan_kernel(counts_ptr, totals_ptr, num_chunks, BLOCK: tl.constexpr):
    """Program e: its counts become the number of its ids in earlier chunks; totals[e] is their sum."""
    e = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    before = 0
    for start in range(0, num_chunks, BLOCK):
        ptrs = counts_ptr + e * num_chunks + start + c
        counts = tl.load(ptrs, mask=start + c < num_chunks, other=0)
        tl.store(ptrs, before + tl.cumsum(counts, 0) - counts, mask=start + c < num_chunks)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + e, before)


@triton.jit
def _scatter_kernel(
    ids_ptr, counts_ptr, totals_ptr, order_ptr, offsets_ptr, R, E, num_chunks,
    CHUNK: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """Position of a slot: its expert's offset + ids of that expert in earlier chunks + earlier ones in this chunk."""
    chunk = tl.program_id(0)
    e = tl.arange(0, E_BLOCK)
    totals = tl.load(totals_ptr + e, mask=e < E, other=0)
    offsets = tl.cumsum(totals, 0) - totals
    if chunk == 0:
        tl.store(offsets_ptr + e, offsets, mask=e <= E)
    lane = tl.arange(0, CHUNK)
    r = chunk * CHUNK + lane
    ids = tl.load(ids_ptr + r, mask=r < R, other=0)
    ids = tl.where((ids < 0) | (ids > E), E, ids).to(tl.int32)
    same = (ids[:, None] == ids[None, :]) & (lane[None, :] < lane[:, None])  # (CHUNK, CHUNK), earlier ones
    rank = tl.sum(same.to(tl.int32), 1)
    offset = tl.gather(offsets, ids, 0)
    before = tl.load(counts_ptr + ids * num_chunks + chunk, mask=r < R, other=0)
    tl.store(order_ptr + offset + before + rank, r, mask=r < R)


_ONE_KERNEL_ROWS = 2048  # up to here every program reads all ids; above, three kernels over chunks of them
_CHUNK = 128


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """topk_ids (T, A) -> order (R,), offsets (E + 1,), int32."""
    ids, r = topk_ids.reshape(-1).contiguous(), topk_ids.numel()
    order = torch.empty(r, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    if r <= _ONE_KERNEL_ROWS:
        block = min(max(power_of_2(r), 128), 1024)
        enqueue(_sort_kernel, (num_experts + 1,), ids, order, offsets, r, num_experts, BLOCK=block, num_warps=4)
        return order, offsets
    chunks, e_block = -(-r // _CHUNK), power_of_2(num_experts + 1)
    counts = torch.empty(num_experts + 1, chunks, dtype=torch.int32, device=ids.device)
    totals = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    sizes = {"CHUNK": _CHUNK, "E_BLOCK": e_block, "num_warps": 4}
    enqueue(_count_kernel, (chunks,), ids, counts, r, num_experts, chunks, **sizes)
    block = min(power_of_2(chunks), 1024)
    enqueue(_scan_kernel, (num_experts + 1,), counts, totals, chunks, BLOCK=block, num_warps=4)
    enqueue(_scatter_kernel, (chunks,), ids, counts, totals, order, offsets, r, num_experts, chunks, **sizes)
    return order, offsets


@triton.jit
def _combine_kernel(rows_ptr, out_ptr, H, stride_p, PARTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over a of rows[t * A + a], slots in order, fp32; a row is the sum of its parts, rounded."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(TOP_K):
        row = added(rows_ptr + (t * TOP_K + a) * H + h, stride_p, h < H, PARTS)
        total += row.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + t * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def combine(rows: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Tensor:
    """rows (T * A, H), or (P, T * A, H) in P parts that add up, in slot order -> (T, H) of `dtype`, or theirs."""
    tokens, width = rows.shape[-2] // top_k, rows.shape[-1]
    rows, out = rows.contiguous(), rows.new_empty(tokens, width, dtype=dtype or rows.dtype)
    parts, stride_p = (rows.shape[0], rows.stride(0)) if rows.ndim == 3 else (1, 0)
    block = min(power_of_2(width), 1024)
    if tokens:
        enqueue(_combine_kernel, (tokens, -(-width // block)), rows, out, width, stride_p, PARTS=parts, TOP_K=top_k,
                BLOCK=block, num_warps=4)  # fmt: skip
    return out

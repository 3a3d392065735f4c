"""Codes of columns whose contraction is rows: scale = rule(max |x| over a group of rows), code = encode(x / scale).

R sorted rows, E experts, C columns. Groups never join two experts. A program takes 128 rows of one expert, numbered as
tiles are (tile.py, `find_rows`); where a scale is that of all rows of an expert, a launch before it finds their maxima.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import enqueue
from .quantize import _nan_max
from .tile import find_rows

BLOCK = 128


@triton.jit
def source_rows(read_ptr, m, inside, top_k):
    """Where sorted row m is read."""
    if read_ptr is None:
        return m.to(tl.int64)
    else:
        return (tl.load(read_ptr + m, mask=inside, other=0) // top_k).to(tl.int64)


@triton.jit
def load_rows(ptr, read_ptr, m, inside, c, C, top_k, stride_m):
    """(rows, columns); zeros outside: what lies there may be NaN."""
    at = ptr + source_rows(read_ptr, m, inside, top_k)[:, None] * stride_m + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _column_amax_kernel(
    x_ptr, read_ptr, offsets_ptr, amax_ptr, num_rows, C, top_k, stride_xm, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """amax (E, C) over all rows of an expert, which one program reads."""
    expert, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = 0, num_rows
    if offsets_ptr is not None:
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    amax = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(begin, end, ROWS):
        m = first + tl.arange(0, ROWS)
        x = load_rows(x_ptr, read_ptr, m, m < end, c, C, top_k, stride_xm)
        amax = _nan_max(amax, tl.abs(x.to(tl.float32)))
    at = amax_ptr + tl.cast(expert, tl.int64) * C + c
    tl.store(at, tl.reduce(amax, 0, _nan_max), mask=c < C)


@triton.jit
def _quantize_columns_kernel(
    x_ptr, read_ptr, offsets_ptr, amax_ptr, q_ptr, s_ptr, num_rows, E, C, rows_each, top_k, stride_xm,
    ENCODE: tl.constexpr, RULE: tl.constexpr, ELEMENT: tl.constexpr, EMAX: tl.constexpr, GROUP: tl.constexpr,
    EXACT: tl.constexpr, E_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes (tile, C, ROWS), or (E, C, rows_each); layouts of scales: `quantize_columns`.

    EXACT: divided as every quantizer does; else multiplied by the reciprocal, which moves a tie now and then.
    """
    tile = tl.program_id(0)
    expert, first, end = find_rows(offsets_ptr, tile, num_rows, E, ROWS, E_BLOCK, False)
    if (first >= end) | (expert >= E):
        return
    groups: tl.constexpr = ROWS // GROUP if GROUP else 1
    r, c = tl.arange(0, ROWS), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m, in_c, group = first + r, (c < C)[None, :], tl.arange(0, groups)[:, None]
    x = load_rows(x_ptr, read_ptr, m, m < end, c, C, top_k, stride_xm).to(tl.float32)
    x = x.reshape(groups, ROWS // groups, BLOCK_C)
    owner = tl.cast(expert, tl.int64) * C + c
    if GROUP:
        amax = tl.reduce(tl.abs(x), 1, _nan_max)  # (groups, BLOCK_C)
    else:
        amax = tl.load(amax_ptr + owner, mask=c < C, other=0.0)[None, :]
    stored, scale = RULE(amax, ELEMENT[3], ELEMENT[1], EMAX)
    inside = tl.multiple_of(first - (0 if offsets_ptr is None else tl.load(offsets_ptr + expert)), ROWS)
    if GROUP == 0:
        tl.store(s_ptr + owner[None, :], stored.to(s_ptr.dtype.element_ty), mask=in_c)
    elif rows_each is None:
        at = s_ptr + (tile.to(tl.int64) * groups + group) * C + c[None, :]
        tl.store(at, stored.to(s_ptr.dtype.element_ty), mask=in_c)
    else:
        of = inside // GROUP + group
        at = s_ptr + owner[None, :] * tl.cdiv(rows_each, GROUP) + of
        tl.store(at, stored.to(s_ptr.dtype.element_ty), mask=in_c & (of * GROUP < rows_each))
    if EXACT:
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None, :], x.shape))
    else:
        x = x * tl.minimum(1.0 / scale, 3.0e38)[:, None, :]
    codes = ENCODE(x, ELEMENT[0], ELEMENT[1], ELEMENT[2], ELEMENT[3]).reshape(ROWS, BLOCK_C)
    if rows_each is None:
        tl.store(q_ptr + (tile.to(tl.int64) * C + c)[None, :] * ROWS + r[:, None], codes, mask=in_c)
    else:
        at = q_ptr + owner[None, :] * rows_each + (inside + r)[:, None]
        tl.store(at, codes, mask=in_c & (inside + r < rows_each)[:, None])


def num_blocks(num_rows: int, num_experts: int) -> int:
    """Upper bound, known on the host, of the blocks of 128 rows that belong to one expert each."""
    return num_rows // BLOCK + num_experts + 1


def quantize_columns(
    x: Tensor, read: Tensor | None, offsets: Tensor | None, q: Tensor, s: Tensor, num_rows: int, num_experts: int,
    rows_each: int | None, top_k: int, group: int, element: tuple, emax: int, encode, rule, exact: bool,
) -> None:  # fmt: skip
    """Rows of x (., C) -> codes q and scales s; blocks, and experts, that have no rows are not written.

    rows_each: None, or how many rows every expert has. Codes are (blocks, C, 128), or (E, C, rows_each). A scale for
    `group` rows, which divide 128: (blocks, 128 / group, C), or (E, C, ceil(rows_each / group)); group 0, a scale for
    all rows of an expert: (E, C). element = (exponent bits, mantissa bits, bias, largest).
    """
    c, block_c = x.shape[1], 64
    grid = num_blocks(num_rows, num_experts), triton.cdiv(c, block_c)
    sizes, amax = {"ROWS": BLOCK, "BLOCK_C": block_c, "num_warps": 8}, None
    if not group:
        amax = torch.empty(num_experts, c, dtype=torch.float32, device=x.device)
        numbers = num_rows, c, top_k, x.stride(0)
        enqueue(_column_amax_kernel, (num_experts, grid[1]), x, read, offsets, amax, *numbers, **sizes)
    enqueue(
        _quantize_columns_kernel, grid, x, read, offsets, amax, q, s, num_rows, num_experts, c, rows_each, top_k,
        x.stride(0), ENCODE=encode, RULE=rule,
        ELEMENT=element, EMAX=emax, GROUP=group, EXACT=exact, E_BLOCK=triton.next_power_of_2(num_experts), **sizes,
    )  # fmt: skip

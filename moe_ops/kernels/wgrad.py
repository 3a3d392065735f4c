"""dW[e] = sum over the rows i of expert e of grad[i]^T x[i]: the gradient of a grouped product's weights.

R sorted rows, E experts, N channels, K columns, C columns of either operand. In low precision both operands are codes
in blocks of 128 rows of one expert (block, C, 128), contiguous along the contraction, which is the rows
(columns.py has the layouts). Blocks are numbered as tiles are (tile.py, `find_rows`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import load_rows
from .decode import scale_value
from .tile import swizzle


@triton.jit
def _load_codes(q_ptr, block, c, C, ROWS: tl.constexpr):
    """(columns, ROWS) of a block."""
    c = tl.minimum(c, C - 1)
    return tl.load(q_ptr + (tl.cast(block, tl.int64) * C + c)[:, None] * ROWS + tl.arange(0, ROWS)[None, :])


@triton.jit
def _load_one(s_ptr, block, c, C, KIND: tl.constexpr):
    """Values of scales (columns,), one for all rows of a block, or of an expert."""
    return scale_value(tl.load(s_ptr + tl.cast(block, tl.int64) * C + c, mask=c < C, other=0), tl.float32, KIND)


@triton.jit
def _load_scales(s_ptr, block, c, C, GROUPS: tl.constexpr):
    """(columns, groups) of a block."""
    at = s_ptr + (tl.cast(block, tl.int64) * GROUPS + tl.arange(0, GROUPS))[None, :] * C + c[:, None]
    return tl.load(at, mask=(c < C)[:, None], other=0)


@triton.jit
def _decoded(q, s, DECODE: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, MMA: tl.constexpr):
    """Codes times the scales of their groups, if any: exact in MMA where they are powers of two."""
    if s is None:
        return DECODE(q, MMA, ELEMENT[0], ELEMENT[1], ELEMENT[2])
    else:
        columns: tl.constexpr = q.shape[0]
        rows: tl.constexpr = q.shape[1]
        groups: tl.constexpr = s.shape[1]
        value = scale_value(s, tl.float32, KIND)
        value = tl.broadcast_to(value[:, :, None], (columns, groups, rows // groups)).reshape(columns, rows)
        return (DECODE(q, tl.float32, ELEMENT[0], ELEMENT[1], ELEMENT[2]) * value).to(MMA)


@triton.jit
def _wgrad_kernel(
    g_ptr, x_ptr, gs_ptr, xs_ptr, offsets_ptr, out_ptr, num_rows, N, K, stride_gm, stride_xm,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, CODES: tl.constexpr, PROMOTE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """GROUP: rows that share a scale, 0 for all of an expert, None for floats. CODES: the tensor core takes codes as
    they are; scales multiply the product of a step, or the sum."""
    expert = tl.program_id(1)
    tile_n, tile_k = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
    begin, end = 0, num_rows
    if offsets_ptr is not None:
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    n, k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GROUP is None:
        for first in range(begin, end, ROWS):
            m = first + tl.arange(0, ROWS)
            g = load_rows(g_ptr, None, m, m < end, n, N, 1, stride_gm).to(MMA)
            x = load_rows(x_ptr, None, m, m < end, k, K, 1, stride_xm).to(MMA)
            acc = tl.dot(g.T, x, acc, input_precision="ieee")
    else:
        start = begin // ROWS + expert
        for block in range(start, start + tl.cdiv(end - begin, ROWS)):
            g, x = _load_codes(g_ptr, block, n, N, ROWS), _load_codes(x_ptr, block, k, K, ROWS)
            if CODES and GROUP:
                gs, xs = _load_one(gs_ptr, block, n, N, KIND), _load_one(xs_ptr, block, k, K, KIND)
                acc += tl.dot(g, x.T) * gs[:, None] * xs[None, :]
            elif CODES:
                acc = tl.dot(g, x.T, acc, max_num_imprecise_acc=PROMOTE)
            else:
                gs, xs = None, None
                if GROUP:
                    groups: tl.constexpr = ROWS // GROUP
                    gs, xs = _load_scales(gs_ptr, block, n, N, groups), _load_scales(xs_ptr, block, k, K, groups)
                g = _decoded(g, gs, DECODE, ELEMENT, KIND, MMA)
                acc = tl.dot(g, _decoded(x, xs, DECODE, ELEMENT, KIND, MMA).T, acc, input_precision="ieee")
        if GROUP == 0:
            gs, xs = _load_one(gs_ptr, expert, n, N, KIND), _load_one(xs_ptr, expert, k, K, KIND)
            acc = acc * gs[:, None] * xs[None, :]
    at = out_ptr + (tl.cast(expert, tl.int64) * N + n)[:, None] * K + k[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def wgrad_grid(n: int, k: int, num_experts: int, block_n: int, block_k: int) -> tuple[int, int]:
    return triton.cdiv(n, block_n) * triton.cdiv(k, block_k), num_experts

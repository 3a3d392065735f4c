"""dW[e] = sum over the rows i of expert e of grad[i]^T x[i]: the gradient of a grouped product's weights.

R sorted rows, E experts, N channels, K columns, C columns of either operand. In low precision both operands are codes
in blocks of 128 rows of one expert (block, C, 128), contiguous along the contraction, which is the rows; their scales
(block, 128 / GROUP, C) never join two experts. Blocks are numbered as tiles are (tile.py, `find_rows`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .decode import scale_value
from .quantize import _nan_max
from .tile import find_rows, swizzle

BLOCK = 128


@triton.jit
def _source(read_ptr, m, inside, top_k):
    """Where sorted row m is read."""
    if read_ptr is None:
        return m.to(tl.int64)
    else:
        return (tl.load(read_ptr + m, mask=inside, other=0) // top_k).to(tl.int64)


@triton.jit
def _load_rows(ptr, read_ptr, m, inside, c, C, top_k, stride_m):
    """(rows, columns); zeros outside: what lies there may be NaN."""
    at = ptr + _source(read_ptr, m, inside, top_k)[:, None] * stride_m + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _quantize_columns_kernel(
    x_ptr, read_ptr, offsets_ptr, q_ptr, s_ptr, num_rows, E, C, top_k, stride_xm,
    ENCODE: tl.constexpr, RULE: tl.constexpr, ELEMENT: tl.constexpr, EMAX: tl.constexpr, GROUP: tl.constexpr,
    E_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """scale = rule(max |x| over GROUP rows of a column); code = encode(x / scale)."""
    tile = tl.program_id(0)
    expert, first, end = find_rows(offsets_ptr, tile, num_rows, E, ROWS, E_BLOCK, False)
    if (first >= end) | (expert >= E):
        return
    groups: tl.constexpr = ROWS // GROUP
    r, c = tl.arange(0, ROWS), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = first + r
    x = _load_rows(x_ptr, read_ptr, m, m < end, c, C, top_k, stride_xm).to(tl.float32)
    x = x.reshape(groups, GROUP, BLOCK_C)
    stored, scale = RULE(tl.reduce(tl.abs(x), 1, _nan_max), ELEMENT[3], ELEMENT[1], EMAX)  # (groups, BLOCK_C)
    at = s_ptr + (tile.to(tl.int64) * groups + tl.arange(0, groups))[:, None] * C + c[None, :]
    tl.store(at, stored.to(s_ptr.dtype.element_ty), mask=(c < C)[None, :])
    codes = ENCODE(tl.div_rn(x, tl.broadcast_to(scale[:, None, :], x.shape)), ELEMENT[0], ELEMENT[1], ELEMENT[2],
                   ELEMENT[3]).reshape(ROWS, BLOCK_C)  # fmt: skip
    at = q_ptr + (tile.to(tl.int64) * C + c)[None, :] * ROWS + r[:, None]
    tl.store(at, codes, mask=(c < C)[None, :])


@triton.jit
def _load_block(q_ptr, s_ptr, block, c, C, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Codes (columns, ROWS) of a block, and their scales (columns, groups)."""
    groups: tl.constexpr = ROWS // GROUP
    c = tl.minimum(c, C - 1)
    q = tl.load(q_ptr + (block.to(tl.int64) * C + c)[:, None] * ROWS + tl.arange(0, ROWS)[None, :])
    s = tl.load(s_ptr + (block.to(tl.int64) * groups + tl.arange(0, groups))[None, :] * C + c[:, None])
    return q, s


@triton.jit
def _decoded(q, s, DECODE: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, MMA: tl.constexpr):
    """Codes times the scales of their groups, exact in MMA where scales are powers of two."""
    columns: tl.constexpr = q.shape[0]
    rows: tl.constexpr = q.shape[1]
    groups: tl.constexpr = s.shape[1]
    value = scale_value(s, tl.float32, KIND)
    value = tl.broadcast_to(value[:, :, None], (columns, groups, rows // groups)).reshape(columns, rows)
    return (DECODE(q, tl.float32, ELEMENT[0], ELEMENT[1], ELEMENT[2]) * value).to(MMA)


@triton.jit
def _wgrad_kernel(
    g_ptr, x_ptr, gs_ptr, xs_ptr, g_read_ptr, x_read_ptr, offsets_ptr, out_ptr, num_rows, N, K, top_k, stride_gm,
    stride_xm, MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):  # fmt: skip
    """WHOLE: the tensor core takes codes, and one scale for all rows of a block multiplies the product of a step."""
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
            g = _load_rows(g_ptr, g_read_ptr, m, m < end, n, N, top_k, stride_gm).to(MMA)
            x = _load_rows(x_ptr, x_read_ptr, m, m < end, k, K, top_k, stride_xm).to(MMA)
            acc = tl.dot(g.T, x, acc, input_precision="ieee")
    else:
        block = begin // ROWS + expert
        for step in range(0, tl.cdiv(end - begin, ROWS)):
            g, gs = _load_block(g_ptr, gs_ptr, block + step, n, N, ROWS, GROUP)
            x, xs = _load_block(x_ptr, xs_ptr, block + step, k, K, ROWS, GROUP)
            if WHOLE:
                acc += tl.dot(g, x.T) * gs * xs.reshape(1, BLOCK_K)
            else:
                g = _decoded(g, gs, DECODE, ELEMENT, KIND, MMA)
                acc = tl.dot(g, _decoded(x, xs, DECODE, ELEMENT, KIND, MMA).T, acc, input_precision="ieee")
    at = out_ptr + (tl.cast(expert, tl.int64) * N + n)[:, None] * K + k[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def num_blocks(num_rows: int, num_experts: int) -> int:
    """Upper bound, known on the host, of the blocks of 128 rows that belong to one expert each."""
    return num_rows // BLOCK + num_experts + 1


def quantize_columns(
    x: Tensor, read: Tensor | None, offsets: Tensor | None, q: Tensor, s: Tensor, num_rows: int, num_experts: int,
    top_k: int, group: int, element: tuple, emax: int, encode, rule,
) -> None:  # fmt: skip
    """Rows of x (., C) -> codes q (blocks, C, 128), scales s (blocks, 128 / group, C); unused blocks are not written.

    element = (exponent bits, mantissa bits, bias, largest).
    """
    block_c = 64
    _quantize_columns_kernel[(q.shape[0], triton.cdiv(x.shape[1], block_c))](
        x, read, offsets, q, s, num_rows, num_experts, x.shape[1], top_k, x.stride(0), ENCODE=encode, RULE=rule,
        ELEMENT=element, EMAX=emax, GROUP=group, E_BLOCK=triton.next_power_of_2(num_experts), ROWS=BLOCK,
        BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def wgrad_grid(n: int, k: int, num_experts: int, block_n: int, block_k: int) -> tuple[int, int]:
    return triton.cdiv(n, block_n) * triton.cdiv(k, block_k), num_experts

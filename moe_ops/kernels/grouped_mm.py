"""out[o] = weight[o] * act((x[r] . W[e]^T) * x_scale * w_scale + bias[e]) for every row of every expert e, one launch.

M rows (sorted by expert), N output channels, K contraction, E experts. A program finds its expert from the offsets, so
no table of tiles is prepared, and any BLOCK_M serves any routing. Rows that no expert owns are written as 0.
"""

from types import FunctionType
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activation import gate
from .tile import (
    accumulate,
    accumulate_nibbles,
    accumulate_scaled,
    along_m,
    along_n,
    channel_rows,
    find_rows,
    store_tile,
    swizzle,
    zero_rows,
)  # fmt: skip


@triton.jit
def finish(acc, xr, wc_ptrs, bias_ptrs, part, SWAP: tl.constexpr):
    """Scales that do not change along K, one per row and per channel, then the bias, in the first part of K."""
    acc = acc.to(tl.float32)
    if xr is not None:
        acc = acc * along_m(xr, SWAP)
    if wc_ptrs is not None:
        acc = acc * along_n(tl.load(wc_ptrs).to(tl.float32), SWAP)
    if bias_ptrs is not None:
        bias = tl.load(bias_ptrs).to(tl.float32)
        if part is not None:
            bias = tl.where(part == 0, bias, 0.0)
        acc = acc + along_n(bias, SWAP)
    return acc


@triton.jit
def product_tile(
    x_ptr, xs_ptr, xr_ptr, w_ptr, ws_ptr, wc_ptr, bias_ptr, read_ptr, write_ptr, weights_ptr, expert, first, end, part,
    tile_n, N, K, shard_rows, top_k, alpha, beta, limit, up_w, up_ws, up_wc, up_b,
    stride_xm, stride_xk, stride_xsm, stride_xsk, stride_xrm, stride_we, stride_wn, stride_wk, stride_wse, stride_wsn,
    stride_wsk, stride_wce, stride_wcn, stride_be,
    TYPE: tl.constexpr, MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr,
    X_TYPE: tl.constexpr, W_TYPE: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    FOLD: tl.constexpr, AHEAD: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, GROUP_X: tl.constexpr,
    CHANNEL_N: tl.constexpr, UNIFORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP: tl.constexpr, PROMOTE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile: rows first.. of an expert, at most BLOCK_M of them, times BLOCK_N of its channels.

    Results in fp32, of gate's (or all) channels and of up's where PARTS are left to be added; then the rows `to` that
    they belong to, the channels, and which rows are the expert's. TYPE is what they are stored as.
    """
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < end
    m = tl.where(in_m, m, first)  # rows past the end repeat the first: loads stay inside, their results are dropped
    to = m if write_ptr is None else tl.load(write_ptr + m)

    source = m if read_ptr is None else tl.load(read_ptr + m) // top_k
    c = tl.minimum(n, N - 1)
    row, scale_row = channel_rows(c, shard_rows, GROUP_N, INTERLEAVED)
    _, channel = channel_rows(c, shard_rows, CHANNEL_N, INTERLEAVED)
    if UNIFORM:  # every channel of the tile has the scale of the first
        _, scale_row = channel_rows(tl.minimum(tile_n * BLOCK_N, N - 1), shard_rows, GROUP_N, INTERLEAVED)
    NIBBLES: tl.constexpr = BITS == 4 and X_TYPE is None
    if NIBBLES:
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    kk = tl.arange(0, 32 if NIBBLES else BLOCK_K // 2 if X_TYPE == "e2m1" else BLOCK_K)
    units: tl.constexpr = 16 if NIBBLES else BLOCK_K // 4 if BITS == 6 else BLOCK_K // 2 if BITS == 4 else BLOCK_K
    uu = tl.arange(0, units) * (3 if BITS == 6 else 1)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xm + kk[None, :] * stride_xk
    w_ptrs = w_ptr + tl.cast(expert, tl.int64) * stride_we + row[:, None] * stride_wn + uu[None, :] * stride_wk
    xs_ptrs = xs_ptr if xs_ptr is None else xs_ptr + source * stride_xsm
    ws_ptrs = ws_ptr if ws_ptr is None else ws_ptr + expert * stride_wse + scale_row * stride_wsn
    begin, until = 0, K
    if PARTS > 1:
        UNIT: tl.constexpr = max(BLOCK_K, 128)
        span = tl.cdiv(tl.cdiv(K, PARTS), UNIT) * UNIT
        begin, until = part * span, tl.minimum((part + 1) * span, K)
        x_ptrs += begin // (2 if X_TYPE == "e2m1" else 1) * stride_xk
        w_ptrs += (begin // 8 if NIBBLES else begin * BITS // 8 if BITS < 8 else begin) * stride_wk
    if X_TYPE is not None:
        acc, acc_up = accumulate_scaled(
            x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, begin, until, K, stride_xk, stride_wk, stride_xsk,
            stride_wsk, X_TYPE, W_TYPE, GROUP_K, BLOCK_M, BLOCK_N, BLOCK_K, GATED, EVEN_K,
        )  # fmt: skip
    elif NIBBLES:
        acc, acc_up = accumulate_nibbles(
            x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, begin, until, K, stride_wk, stride_xsk, stride_wsk,
            MMA, DECODE, ELEMENT, KIND, BLOCK_M, BLOCK_N, GROUP_X, GROUP_K, FOLD, AHEAD, GATED, SCALED, UNIFORM, EVEN_K,
            SWAP,
        )  # fmt: skip
    else:
        acc, acc_up = accumulate(
            x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, begin, until, K, stride_xk, stride_wk, stride_xsk,
            stride_wsk, MMA, DECODE, ELEMENT, BITS, KIND, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_X, GROUP_K, FOLD, GATED,
            SCALED, UNIFORM, EVEN_K, SWAP, PROMOTE,
        )  # fmt: skip

    xr = None
    if xr_ptr is not None:
        xr = tl.load(xr_ptr + source * stride_xrm)
    wc_ptrs = wc_ptr if wc_ptr is None else wc_ptr + expert * stride_wce + channel * stride_wcn
    bias_ptrs = bias_ptr if bias_ptr is None else bias_ptr + expert * stride_be + row
    acc = finish(acc, xr, wc_ptrs, bias_ptrs, part, SWAP)
    if GATED:
        up_wc_ptrs = wc_ptrs if wc_ptr is None else wc_ptrs + up_wc
        up_bias_ptrs = bias_ptrs if bias_ptr is None else bias_ptrs + up_b
        acc_up = finish(acc_up, xr, up_wc_ptrs, up_bias_ptrs, part, SWAP)
    if PARTS == 1 and ACT is not None:  # one cast before the activation, one after: what an unfused layer computes
        acc = gate(acc.to(TYPE).to(tl.float32), acc_up.to(TYPE).to(tl.float32), alpha, beta, limit, ACT, GATED)
    if weights_ptr is not None:
        if ACT is not None:
            acc = acc.to(TYPE).to(tl.float32)
        acc = acc * along_m(tl.load(weights_ptr + to), SWAP)
    return acc, acc_up, to, n, in_m


@triton.jit
def _grouped_mm_kernel(
    x_ptr, xs_ptr, xr_ptr, w_ptr, ws_ptr, wc_ptr, bias_ptr, offsets_ptr, read_ptr, write_ptr, weights_ptr, out_ptr,
    num_rows, num_m, E, N, K, shard_rows, top_k, alpha, beta, limit, up_w, up_ws, up_wc, up_b,
    stride_xm, stride_xk, stride_xsm, stride_xsk, stride_xrm, stride_we, stride_wn, stride_wk, stride_wse, stride_wsn,
    stride_wsk, stride_wce, stride_wcn, stride_be, stride_om,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    X_TYPE: tl.constexpr, W_TYPE: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    FOLD: tl.constexpr, AHEAD: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, GROUP_X: tl.constexpr,
    CHANNEL_N: tl.constexpr, UNIFORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr, E_BLOCK: tl.constexpr, ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    PROMOTE: tl.constexpr, SHORT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rows (x): xs changes along K, xr does not. Weights (w): ws changes along K, wc is one per channel or shard.

    BITS of a code decide how w is read (kernels/tile.py); x holds numbers, in the order of nibbles for 4 bits.
    PARTS > 1: program p of a tile sums over its part of K and writes fp32 to out[p], gate's columns before up's and
    the activation left out: kernels/parts.py adds them.
    """
    part = None
    if PARTS > 1:
        part = tl.program_id(1)
        out_ptr += part.to(tl.int64) * num_rows * stride_om
    tile, tile_n = swizzle(tl.program_id(0), num_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, end = find_rows(offsets_ptr, tile, num_rows, E, BLOCK_M, E_BLOCK, ROW_TILES)
    if first >= end:
        return
    if expert >= E:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        zero_rows(out_ptr, write_ptr, first, tl.minimum(first + BLOCK_M, end), n, N, stride_om)
        if PARTS > 1 and GATED:
            zero_rows(out_ptr + N, write_ptr, first, tl.minimum(first + BLOCK_M, end), n, N, stride_om)
        return
    for TAIL in tl.static_range(1 + (SHORT > 0)):  # the last rows of an expert, if few: mostly empty tiles cost as much
        if (end - first <= SHORT).to(tl.int32) == TAIL:
            acc, acc_up, to, n, in_m = product_tile(
                x_ptr, xs_ptr, xr_ptr, w_ptr, ws_ptr, wc_ptr, bias_ptr, read_ptr, write_ptr, weights_ptr, expert, first,
                end, part, tile_n, N, K, shard_rows, top_k, alpha, beta, limit, up_w, up_ws, up_wc, up_b,
                stride_xm, stride_xk, stride_xsm, stride_xsk, stride_xrm, stride_we, stride_wn, stride_wk, stride_wse,
                stride_wsn, stride_wsk, stride_wce, stride_wcn, stride_be, out_ptr.dtype.element_ty, MMA, DECODE,
                ELEMENT, BITS, KIND, X_TYPE, W_TYPE, ACT, GATED, SCALED, FOLD, AHEAD, GROUP_N, GROUP_K, GROUP_X,
                CHANNEL_N, UNIFORM, INTERLEAVED, EVEN_K, SHORT if TAIL else BLOCK_M, BLOCK_N, BLOCK_K, SWAP, PROMOTE,
                PARTS,
            )  # fmt: skip
            store_tile(out_ptr, acc, to, n, in_m, N, stride_om, SWAP)
            if PARTS > 1 and GATED:  # the activation is applied to the sum
                store_tile(out_ptr + N, acc_up, to, n, in_m, N, stride_om, SWAP)


def sized(kernel: Any) -> Any:
    """The kernel with sizes and strides compiled in, but for the number of rows: another of it for every weight."""
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        return kernel
    fn = kernel.fn
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__)
    constant = [name for name in kernel.arg_names if name in _SIZES or name.startswith(("stride_", "up_"))]
    copy.__annotations__ = fn.__annotations__ | dict.fromkeys(constant, tl.constexpr)
    return triton.jit(copy)


_SIZES = ("E", "N", "K", "shard_rows", "top_k")
_grouped_mm_sized_kernel = sized(_grouped_mm_kernel)


def row_tiles(num_rows: int, num_experts: int, block_m: int, has_offsets: bool) -> tuple[int, bool]:
    """Upper bound of the row tiles, known on the host, and whether a tile is a row (see `find_rows`)."""
    if not has_offsets:
        return -(-num_rows // block_m), False
    by_expert = num_rows // block_m + num_experts + 1
    return (num_rows, True) if num_rows < by_expert else (by_expert, False)


def launch_grid(num_m: int, n: int, block_n: int, parts: int = 1) -> tuple[int, int]:
    return num_m * -(-n // block_n), parts


def stride(t: Tensor | None, dim: int) -> int:
    """0 where a scale does not vary: no tensor, one value, or an extent of 1."""
    return 0 if t is None or t.ndim == 0 or t.shape[dim] == 1 else t.stride(dim)

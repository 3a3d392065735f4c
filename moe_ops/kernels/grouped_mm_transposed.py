"""out[o] = x[r] . W[e] for every row i of every expert e: the gradient of a grouped product with respect to its rows.

r = read[i] // top_k and o = write[i], or both i.

M rows (sorted by expert), C channels of the weight (the contraction), K its columns (the output), E experts. The weight
is dequantized as it is read, (code * scales) rounded to the type of x: scales lie along the contraction here. Where
many row tiles would do that again, `expand` does it once, for some experts at a time.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .decode import scale_value
from .launch import enqueue
from .tile import (
    channel_rows,
    find_rows,
    load_codes,
    load_k,
    load_scales,
    spread_scales,
    store_tile,
    swizzle,
    zero_rows,
)


@triton.jit
def weight_tile(
    w_ptr, ws_ptr, wg_ptr, c, tile_k, C, K, shard_rows, stride_wn, stride_wsn, stride_wsk, stride_wgn,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Channels c of one expert's weight and the columns of a tile: (BK, BN), columns contiguous as in memory."""
    UNIT: tl.constexpr = 2 if BITS == 4 else 4 if BITS == 6 else 1  # codes behind a pointer
    EXACT: tl.constexpr = ws_ptr is None or (KIND == "e8m0" and wg_ptr is None)  # code times scale, in the type of x
    TYPE: tl.constexpr = MMA if EXACT else tl.float32
    u = tile_k * (BLOCK_N // UNIT) + tl.arange(0, BLOCK_N // UNIT)
    row, scale_row = channel_rows(tl.minimum(c, C - 1), shard_rows, GROUP_N, INTERLEAVED)
    ptrs = w_ptr + row[:, None] * stride_wn + u[None, :] * (3 if BITS == 6 else 1)
    codes = load_codes(ptrs, (c < C)[:, None] & (u < K // UNIT)[None, :], BITS, False)
    w = DECODE(codes, TYPE, ELEMENT[0], ELEMENT[1], ELEMENT[2])
    if ws_ptr is not None:
        ws_ptrs = ws_ptr + scale_row * stride_wsn
        if GROUP_K % BLOCK_N == 0:  # one for the columns of the tile
            group = 0 if GROUP_K == 0 else tile_k * BLOCK_N // GROUP_K
            s = scale_value(tl.load(ws_ptrs + group * stride_wsk), TYPE, KIND)[:, None]
        elif BLOCK_N % GROUP_K == 0:
            s = load_scales(ws_ptrs, tile_k * BLOCK_N, K, stride_wsk, GROUP_K, BLOCK_N)
            s = spread_scales(s, TYPE, KIND, BLOCK_N)
        else:
            k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
            at = ws_ptrs[:, None] + (k // GROUP_K)[None, :] * stride_wsk
            s = scale_value(tl.load(at, mask=(k < K)[None, :], other=0.0), TYPE, KIND)
        if wg_ptr is not None:
            _, shard = channel_rows(tl.minimum(c, C - 1), shard_rows, 0, INTERLEAVED)
            s = s * tl.load(wg_ptr + shard * stride_wgn)[:, None]
        w = w * s
    return w.to(MMA)


@triton.jit
def transposed_tile(
    x_ptr, w_ptr, ws_ptr, wg_ptr, read_ptr, write_ptr, expert, first, end, tile_k, C, K, shard_rows, top_k,
    stride_xm, stride_we, stride_wn, stride_wse, stride_wsn, stride_wsk, stride_wge, stride_wgn,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """One tile in fp32, the rows `to` that it belongs to, its columns, and which rows are the expert's."""
    m = first + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < end
    m = tl.where(in_m, m, first)
    to = m if write_ptr is None else tl.load(write_ptr + m)
    source = m if read_ptr is None else tl.load(read_ptr + m) // top_k

    w_ptr += tl.cast(expert, tl.int64) * stride_we
    ws_ptr = ws_ptr if ws_ptr is None else ws_ptr + expert * stride_wse
    wg_ptr = wg_ptr if wg_ptr is None else wg_ptr + expert * stride_wge
    cc = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xm + cc[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, C, BLOCK_K):
        x = load_k(x_ptrs, (c0 + cc < C)[None, :], EVEN_C)
        w = weight_tile(
            w_ptr, ws_ptr, wg_ptr, c0 + cc, tile_k, C, K, shard_rows, stride_wn, stride_wsn, stride_wsk, stride_wgn,
            MMA, DECODE, ELEMENT, BITS, KIND, GROUP_N, GROUP_K, INTERLEAVED, BLOCK_N,
        )  # fmt: skip
        if SWAP:
            acc = tl.dot(w.T, x.to(MMA).T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x.to(MMA), w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
    return acc, to, k, in_m


@triton.jit
def _grouped_mm_transposed_kernel(
    x_ptr, w_ptr, ws_ptr, wg_ptr, offsets_ptr, read_ptr, write_ptr, out_ptr,
    num_rows, num_m, E, C, K, shard_rows, top_k, begin_expert, end_expert,
    stride_xm, stride_we, stride_wn, stride_wse, stride_wsn, stride_wsk, stride_wge, stride_wgn, stride_om,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, EVEN_C: tl.constexpr, E_BLOCK: tl.constexpr, ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """begin_expert, end_expert: the experts whose weights lie at w_ptr, all where they are None."""
    tile, tile_k = swizzle(tl.program_id(0), num_m, tl.cdiv(K, BLOCK_N), GROUP_M)
    expert, first, end = find_rows(offsets_ptr, tile, num_rows, E, BLOCK_M, E_BLOCK, ROW_TILES)
    if begin_expert is not None:
        end = tl.where((expert < begin_expert) | ((expert >= end_expert) & (end_expert < E)), first, end)
    if first >= end:
        return
    if expert >= E:
        k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
        zero_rows(out_ptr, write_ptr, first, tl.minimum(first + BLOCK_M, end), k, K, stride_om)
        return
    expert = expert if begin_expert is None else expert - begin_expert
    acc, to, k, in_m = transposed_tile(
        x_ptr, w_ptr, ws_ptr, wg_ptr, read_ptr, write_ptr, expert, first, end, tile_k, C, K, shard_rows, top_k,
        stride_xm, stride_we, stride_wn, stride_wse, stride_wsn, stride_wsk, stride_wge, stride_wgn, MMA, DECODE,
        ELEMENT, BITS, KIND, GROUP_N, GROUP_K, INTERLEAVED, EVEN_C, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
    )  # fmt: skip
    store_tile(out_ptr, acc, to, k, in_m, K, stride_om, SWAP)


@triton.jit
def _expand_kernel(
    w_ptr, ws_ptr, wg_ptr, out_ptr, begin_expert, C, K, shard_rows,
    stride_we, stride_wn, stride_wse, stride_wsn, stride_wsk, stride_wge, stride_wgn,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_k, c, e = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2)
    expert, k = begin_expert + e, tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    w = weight_tile(
        w_ptr + tl.cast(expert, tl.int64) * stride_we, ws_ptr if ws_ptr is None else ws_ptr + expert * stride_wse,
        wg_ptr if wg_ptr is None else wg_ptr + expert * stride_wge, c, tile_k, C, K, shard_rows, stride_wn, stride_wsn,
        stride_wsk, stride_wgn, MMA, DECODE, ELEMENT, BITS, KIND, GROUP_N, GROUP_K, INTERLEAVED, BLOCK_N,
    )  # fmt: skip
    at = out_ptr + (tl.cast(e, tl.int64) * C + c)[:, None] * K + k[None, :]
    tl.store(at, w, mask=(c < C)[:, None] & (k < K)[None, :])


def expand(arguments: dict[str, Any], begin_expert: int, out: Tensor) -> None:
    """Weights of as many experts as out (experts, C, K) has, from begin_expert on, gate's channels before up's.

    The arguments are those of the product, by name; it may have more of them.
    """
    block_c, block_n = 32, 256
    experts, c, k = out.shape
    taken = {name: value for name, value in arguments.items() if name in _expand_kernel.arg_names}
    given = taken | {"out_ptr": out, "begin_expert": begin_expert, "BLOCK_C": block_c, "BLOCK_N": block_n}
    enqueue(_expand_kernel, (-(-k // block_n), -(-c // block_c), experts), **given, num_warps=4)

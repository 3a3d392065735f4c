"""out[o] = x[r] . W[e] for every row i of every expert e: the gradient of a grouped product with respect to its rows.

r = read[i] // top_k and o = write[i], or both i.

M rows (sorted by expert), C channels of the weight (the contraction), K its columns (the output), E experts. The weight
is dequantized as it is read, (code * scales) rounded to the type of x: scales lie along the contraction here.
"""

import triton
import triton.language as tl

from .arrange import load_code
from .decode import scale_value
from .tile import channel_rows, find_rows, mma, store_tile, swizzle, zero_rows


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

    column = tl.minimum(k, K - 1)
    w_ptr += tl.cast(expert, tl.int64) * stride_we
    ws_ptr = ws_ptr if ws_ptr is None else ws_ptr + expert * stride_wse
    wg_ptr = wg_ptr if wg_ptr is None else wg_ptr + expert * stride_wge
    cc = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xm + cc[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, C, BLOCK_K):
        c = c0 + cc
        inside = (c < C)[None, :]
        row, scale_row = channel_rows(tl.minimum(c, C - 1), shard_rows, GROUP_N, INTERLEAVED)
        x = tl.load(x_ptrs) if EVEN_C else tl.load(x_ptrs, mask=inside, other=0.0)
        codes = load_code(w_ptr + row[None, :] * stride_wn, column[:, None], inside, BITS)  # (BN, BK)
        if ws_ptr is None:
            w = DECODE(codes, MMA, ELEMENT[0], ELEMENT[1], ELEMENT[2])
        else:
            at = scale_row[None, :] * stride_wsn
            if GROUP_K > 0:
                at += (column // GROUP_K)[:, None] * stride_wsk
            s = scale_value(tl.load(ws_ptr + at), tl.float32, KIND)
            if wg_ptr is not None:
                _, shard = channel_rows(tl.minimum(c, C - 1), shard_rows, 0, INTERLEAVED)
                s = s * tl.load(wg_ptr + shard * stride_wgn)[None, :]
            w = DECODE(codes, tl.float32, ELEMENT[0], ELEMENT[1], ELEMENT[2]) * s
        acc = mma(x.to(MMA), w.to(MMA), acc, SWAP, None)
        x_ptrs += BLOCK_K
    return acc, to, k, in_m


@triton.jit
def _grouped_mm_transposed_kernel(
    x_ptr, w_ptr, ws_ptr, wg_ptr, offsets_ptr, read_ptr, write_ptr, out_ptr,
    num_rows, num_m, E, C, K, shard_rows, top_k,
    stride_xm, stride_we, stride_wn, stride_wse, stride_wsn, stride_wsk, stride_wge, stride_wgn, stride_om,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, EVEN_C: tl.constexpr, E_BLOCK: tl.constexpr, ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    tile, tile_k = swizzle(tl.program_id(0), num_m, tl.cdiv(K, BLOCK_N), GROUP_M)
    expert, first, end = find_rows(offsets_ptr, tile, num_rows, E, BLOCK_M, E_BLOCK, ROW_TILES)
    if first >= end:
        return
    if expert >= E:
        k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
        zero_rows(out_ptr, write_ptr, first, tl.minimum(first + BLOCK_M, end), k, K, stride_om)
        return
    acc, to, k, in_m = transposed_tile(
        x_ptr, w_ptr, ws_ptr, wg_ptr, read_ptr, write_ptr, expert, first, end, tile_k, C, K, shard_rows, top_k,
        stride_xm, stride_we, stride_wn, stride_wse, stride_wsn, stride_wsk, stride_wge, stride_wgn, MMA, DECODE,
        ELEMENT, BITS, KIND, GROUP_N, GROUP_K, INTERLEAVED, EVEN_C, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
    )  # fmt: skip
    store_tile(out_ptr, acc, to, k, in_m, K, stride_om, SWAP)

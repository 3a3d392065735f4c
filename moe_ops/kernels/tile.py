"""Parts of every grouped product: program -> tile -> rows of an expert, addresses of channels, the main loop.

M rows (sorted by expert), N output channels, K contraction, E experts; BM, BN, BK tile sizes.
"""

import triton
import triton.language as tl


@triton.jit
def swizzle(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program -> (row tile, column tile): row tiles fastest within groups of GROUP_M, which share weights in L2."""
    per_group = GROUP_M * num_n
    first = (pid // per_group) * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    inside = pid % per_group
    return first + inside % size, inside // size


@triton.jit
def find_rows(
    offsets_ptr, tile, num_rows, E, BLOCK_M: tl.constexpr, E_BLOCK: tl.constexpr, ROW_TILES: tl.constexpr
):
    """Row tile -> (expert, first row, end). Expert E owns the rows that nobody does; first >= end: nothing to do.

    Tiles of e begin at offsets[e] // BM + e: that leaves room for all of them and needs no prefix sum. With fewer rows
    than experts ROW_TILES is shorter: a tile is a row, and only every BM-th row of an expert has work.
    """
    if offsets_ptr is None:
        return 0, tile * BLOCK_M, num_rows
    else:
        e = tl.arange(0, E_BLOCK)
        ends = tl.load(offsets_ptr + 1 + e, mask=e < E, other=1 << 30)
        if ROW_TILES:
            expert = tl.sum((ends <= tile).to(tl.int32), 0)
        else:
            expert = tl.sum((ends // BLOCK_M + e + 1 <= tile).to(tl.int32), 0)
        begin = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=num_rows)
        if ROW_TILES:
            first = tl.where((tile - begin) % BLOCK_M == 0, tile, end)
        else:
            first = begin + (tile - begin // BLOCK_M - expert) * BLOCK_M
        return expert, first, end


@triton.jit
def channel_rows(c, shard_rows, GROUP_N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channel, gate's before up's -> (its row in the weight, its row in the scale)."""
    shard, inside = c // shard_rows, c % shard_rows
    row = c
    if INTERLEAVED:
        row = inside * 2 + shard
    if GROUP_N == 0:
        return row, shard
    elif GROUP_N == 1:
        return row, row
    else:
        return row, shard * tl.cdiv(shard_rows, GROUP_N) + inside // GROUP_N


@triton.jit
def along_m(v, SWAP: tl.constexpr):
    """A vector over rows, broadcast into the orientation of the accumulator: (M, N), or (N, M) when SWAP."""
    return v[None, :] if SWAP else v[:, None]


@triton.jit
def along_n(v, SWAP: tl.constexpr):
    return v[:, None] if SWAP else v[None, :]


@triton.jit
def store_tile(out_ptr, values, to, n, in_m, N, stride_om, SWAP: tl.constexpr):
    """Rows `to` and columns n of the output. Addresses are made here, not before the main loop: they fill registers."""
    ptrs = out_ptr + along_m(to.to(tl.int64) * stride_om, SWAP) + along_n(n, SWAP)
    tl.store(ptrs, values.to(out_ptr.dtype.element_ty), mask=along_m(in_m, SWAP) & along_n(n < N, SWAP))


@triton.jit
def zero_rows(out_ptr, write_ptr, first, end, n, N, stride_om):
    """Rows that no expert owns. One at a time: a whole tile of zeros would share registers with the tile of results."""
    for row in range(first, end):
        to = row if write_ptr is None else tl.load(write_ptr + row)
        zeros = tl.zeros((n.shape[0],), out_ptr.dtype.element_ty)
        tl.store(out_ptr + to.to(tl.int64) * stride_om + n, zeros, mask=n < N)


@triton.jit
def mma(x, w, acc, SWAP: tl.constexpr, PROMOTE: tl.constexpr):
    """acc + x w^T, x (BM, BK), w (BN, BK). SWAP puts the weights first: they fill the 64 rows of a warp group.

    PROMOTE: how many products of fp8 are summed before the sum joins an fp32 register; None leaves it to the chip.
    """
    if SWAP:
        return tl.dot(w, x.T, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
    else:
        return tl.dot(x, w.T, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)


@triton.jit
def load_k(ptrs, inside, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def scaled_mma(
    x, w, acc, xs, ws_ptr, SCALED: tl.constexpr, UNIFORM: tl.constexpr, SWAP: tl.constexpr, PROMOTE: tl.constexpr
):
    """acc + x w^T, or acc + (x w^T) * xs * ws when scales change along K: xs per row or 1, ws per channel or one."""
    if SCALED:
        ws = tl.load(ws_ptr)
        part = mma(x, w, None, SWAP, PROMOTE)
        if UNIFORM:
            return acc + part * (along_m(xs * ws, SWAP) if len(xs.shape) > 0 else xs * ws)
        else:
            return acc + part * (along_m(xs, SWAP) if len(xs.shape) > 0 else xs) * along_n(ws, SWAP)
    elif x.dtype == tl.float32:  # sums of sums: one chain of fp32 additions over all of K loses bits
        return acc + mma(x, w, None, SWAP, PROMOTE)
    else:
        return mma(x, w, acc, SWAP, PROMOTE)


@triton.jit
def accumulate(
    x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, K, stride_xk, stride_wk, stride_xsk, stride_wsk,
    MMA: tl.constexpr, DECODE_X: tl.constexpr, DECODE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_K: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr,
    EVEN_K: tl.constexpr, SWAP: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """The main loop: x_ptrs (BM, BK), w_ptrs (BN, BK) -> fp32 products with gate's (or all) channels, and with up's.

    Up's weights and scales lie up_w and up_ws elements behind gate's. SCALED: scales change along K, every GROUP_K;
    pointers to them are one per row and channel, or one for all channels when UNIFORM.
    """
    kk = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    for k in range(0, K, BLOCK_K):
        inside = (k + kk)[None, :] < K
        group = k // GROUP_K
        x = DECODE_X(load_k(x_ptrs, inside, EVEN_K)).to(MMA)
        w = DECODE_W(load_k(w_ptrs, inside, EVEN_K)).to(MMA)
        xs = tl.full((), 1.0, tl.float32)
        if SCALED and xs_ptrs is not None:
            xs = tl.load(xs_ptrs + group * stride_xsk)
        at = ws_ptrs + group * stride_wsk if SCALED else None
        acc = scaled_mma(x, w, acc, xs, at, SCALED, UNIFORM, SWAP, PROMOTE)
        if GATED:
            u = DECODE_W(load_k(w_ptrs + up_w, inside, EVEN_K)).to(MMA)
            acc_up = scaled_mma(x, u, acc_up, xs, at + up_ws if SCALED else None, SCALED, UNIFORM, SWAP, PROMOTE)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    return acc, acc_up

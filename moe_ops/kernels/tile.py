"""Parts of every grouped product: program -> tile -> rows of an expert, addresses of channels, the main loop.

M rows (sorted by expert), N output channels, K contraction, E experts; BM, BN, BK tile sizes.
"""

import triton
import triton.language as tl

from .decode import PAIR_UNIT, pair_values, scale_value


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
def halves(acc, SWAP: tl.constexpr):
    """The left and the right half of a tile's columns; no thread gives anything to another."""
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1]
    if SWAP:
        return tl.split(acc.reshape(2, rows // 2, columns).permute(1, 2, 0))
    else:
        return tl.split(acc.reshape(rows, 2, columns // 2).permute(0, 2, 1))


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
    sums: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    if SWAP:
        return tl.dot(w, x.T, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE, out_dtype=sums)
    else:
        return tl.dot(x, w.T, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE, out_dtype=sums)


@triton.jit
def load_k(ptrs, inside, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def scaled_mma(
    x, w, acc, xs, ws_ptr, KIND: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr, SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
):  # fmt: skip
    """acc + x w^T, or acc + (x w^T) * xs * ws when scales change along K: xs per row or 1, ws per channel or one."""
    if SCALED:
        return acc + scaled(mma(x, w, None, SWAP, PROMOTE), xs, ws_ptr, KIND, UNIFORM, SWAP)
    elif x.dtype == tl.float32:  # sums of sums: one chain of fp32 additions over all of K loses bits
        return acc + mma(x, w, None, SWAP, PROMOTE)
    else:
        return mma(x, w, acc, SWAP, PROMOTE)


@triton.jit
def scaled(part, xs, ws_ptr, KIND: tl.constexpr, UNIFORM: tl.constexpr, SWAP: tl.constexpr):
    """part * xs * ws; xs is a vector over rows or 1, ws one number when UNIFORM, or absent."""
    if ws_ptr is None:
        return part * (along_m(xs, SWAP) if len(xs.shape) > 0 else xs)
    else:
        ws = scale_value(tl.load(ws_ptr), tl.float32, KIND)
        if UNIFORM:
            return part * (along_m(xs * ws, SWAP) if len(xs.shape) > 0 else xs * ws)
        else:
            return part * (along_m(xs, SWAP) if len(xs.shape) > 0 else xs) * along_n(ws, SWAP)


@triton.jit
def load_scales(ws_ptrs, k, K, stride_wsk, GROUP: tl.constexpr, SPAN: tl.constexpr):
    """Scales of SPAN columns of K from k on, as they are stored: (BN, SPAN / GROUP)."""
    first = k // GROUP + tl.arange(0, max(SPAN // GROUP, 1))[None, :]
    return tl.load(ws_ptrs[:, None] + first * stride_wsk, mask=first * GROUP < K, other=0.0)


@triton.jit
def spread_scales(s, TYPE: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """(BN, groups) as they are stored -> their values, spread evenly over the columns of a tile."""
    rows: tl.constexpr = s.shape[0]
    groups: tl.constexpr = s.shape[1]
    value = scale_value(s, TYPE, KIND)
    if groups == 1:
        return value
    else:
        return tl.broadcast_to(value[:, :, None], (rows, groups, COLUMNS // groups)).reshape(rows, COLUMNS)


@triton.jit
def load_codes(ptrs, inside, BITS: tl.constexpr, EVEN_K: tl.constexpr):
    """Codes (BN, BK): bytes as they are, or out of units, ptrs (BN, units): 4 of 6 bits in 3 bytes, 2 of 4 in one."""
    if BITS == 6:
        word = load_k(ptrs, inside, EVEN_K).to(tl.int32) | (load_k(ptrs + 1, inside, EVEN_K).to(tl.int32) << 8)
        word |= load_k(ptrs + 2, inside, EVEN_K).to(tl.int32) << 16
        pairs = tl.join(word & 63, (word >> 12) & 63), tl.join((word >> 6) & 63, word >> 18)  # codes 0, 2 and 1, 3
        return tl.join(pairs[0], pairs[1]).reshape(ptrs.shape[0], 4 * ptrs.shape[1])
    elif BITS == 4:
        both = load_k(ptrs, inside, EVEN_K)
        return tl.join(both & 0xF, both >> 4).reshape(ptrs.shape[0], 2 * ptrs.shape[1])
    else:
        return load_k(ptrs, inside, EVEN_K)


@triton.jit
def plane(words, P: tl.constexpr, TYPE: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr):
    """Nibbles P and P + 4 of every word of eight codes (BN, J) -> their values (BN, 2 J): see kernels/arrange.py.

    In bf16 both are taken apart at once, as halves of a register, and never leave it.
    """
    if TYPE == tl.bfloat16:
        both = pair_values(words, P, ELEMENT)
    else:
        w = words >> (4 * P)
        codes = tl.join((w & 0xF).to(tl.uint8), ((w >> 16) & 0xF).to(tl.uint8))
        both = DECODE(codes, TYPE, ELEMENT[0], ELEMENT[1], ELEMENT[2])
    return both.reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def accumulate_nibbles(
    x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, begin, end, K, stride_wk, stride_xsk, stride_wsk,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP_X: tl.constexpr, GROUP_K: tl.constexpr, FOLD: tl.constexpr, AHEAD: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """`accumulate` for weights of 4 bits: w_ptrs (BN, 16) to words, x_ptrs (BM, 32) to rows in the order of nibbles.

    AHEAD: scales are read for the next step.
    """
    i = tl.arange(0, 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    TYPE: tl.constexpr = MMA if not FOLD or (MMA == tl.bfloat16 and KIND != "float32") else tl.float32
    ahead, ahead_up = acc, acc
    if AHEAD:
        ahead = load_scales(ws_ptrs, begin, K, stride_wsk, FOLD, 128)
        ahead_up = load_scales(ws_ptrs + up_ws, begin, K, stride_wsk, FOLD, 128) if GATED else ahead
    for k in range(begin, end, 128):
        inside = (k + 8 * i)[None, :] < K
        w = load_k(w_ptrs, inside, EVEN_K)
        part = tl.zeros_like(acc) if SCALED else acc
        part_up, u = part, w
        ws = tl.full((1, 1), 1.0, TYPE)
        us = ws
        if AHEAD:
            ws = spread_scales(ahead, TYPE, KIND, 32)
            ahead = load_scales(ws_ptrs, k + 128, K, stride_wsk, FOLD, 128)
        elif FOLD:
            ws = spread_scales(load_scales(ws_ptrs, k, K, stride_wsk, FOLD, 128), TYPE, KIND, 32)
        if GATED:
            u = load_k(w_ptrs + up_w, inside, EVEN_K)
            part_up = tl.zeros_like(acc) if SCALED else acc_up
            if AHEAD:
                us = spread_scales(ahead_up, TYPE, KIND, 32)
                ahead_up = load_scales(ws_ptrs + up_ws, k + 128, K, stride_wsk, FOLD, 128)
            elif FOLD:
                us = spread_scales(load_scales(ws_ptrs + up_ws, k, K, stride_wsk, FOLD, 128), TYPE, KIND, 32)
        for p in tl.static_range(4):
            x = tl.load(x_ptrs + 32 * p)
            part = mma(x, (plane(w, p, TYPE, DECODE, ELEMENT) * ws).to(MMA), part, SWAP, None)
            if GATED:
                part_up = mma(x, (plane(u, p, TYPE, DECODE, ELEMENT) * us).to(MMA), part_up, SWAP, None)
        if SCALED:
            xs = tl.full((), 1.0, tl.float32)
            if xs_ptrs is not None:
                xs = tl.load(xs_ptrs + k // GROUP_X * stride_xsk)
            at = None if FOLD or ws_ptrs is None else ws_ptrs + k // GROUP_K * stride_wsk
            acc += scaled(part, xs, at, KIND, UNIFORM, SWAP)
            if GATED:
                acc_up += scaled(part_up, xs, at if at is None else at + up_ws, KIND, UNIFORM, SWAP)
        else:
            acc, acc_up = part, part_up
        x_ptrs += 128
        w_ptrs += 16 * stride_wk
    if TYPE == tl.bfloat16 and ELEMENT[0] == 0:
        acc, acc_up = acc * PAIR_UNIT, acc_up * PAIR_UNIT
    return acc, acc_up


@triton.jit
def accumulate_scaled(
    x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, begin, end, K, stride_xk, stride_wk, stride_xsk, stride_wsk,
    X_TYPE: tl.constexpr, W_TYPE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`accumulate` by a tensor core that takes codes, named as Triton does, and the scales of their groups.

    x_ptrs (BM, BK) and w_ptrs (BN, BK), half as many columns where two codes are a byte.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    X: tl.constexpr = 2 if X_TYPE == "e2m1" else 1  # codes in a byte
    W: tl.constexpr = 2 if W_TYPE == "e2m1" else 1
    xx, ww = X * tl.arange(0, BLOCK_K // X)[None, :], W * tl.arange(0, BLOCK_K // W)[None, :]
    for k in range(begin, end, BLOCK_K):
        x, xs = load_k(x_ptrs, k + xx < K, EVEN_K), load_scales(xs_ptrs, k, K, stride_xsk, GROUP, BLOCK_K)
        w, ws = load_k(w_ptrs, k + ww < K, EVEN_K), load_scales(ws_ptrs, k, K, stride_wsk, GROUP, BLOCK_K)
        acc = tl.dot_scaled(x, xs, X_TYPE, w.T, ws, W_TYPE, acc)
        if GATED:
            u = load_k(w_ptrs + up_w, k + ww < K, EVEN_K)
            us = load_scales(ws_ptrs + up_ws, k, K, stride_wsk, GROUP, BLOCK_K)
            acc_up = tl.dot_scaled(x, xs, X_TYPE, u.T, us, W_TYPE, acc_up)
        x_ptrs += BLOCK_K // X * stride_xk
        w_ptrs += BLOCK_K // W * stride_wk
    return acc, acc_up


@triton.jit
def accumulate(
    x_ptrs, w_ptrs, xs_ptrs, ws_ptrs, up_w, up_ws, begin, end, K, stride_xk, stride_wk, stride_xsk, stride_wsk,
    MMA: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_X: tl.constexpr, GROUP_K: tl.constexpr,
    FOLD: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr, EVEN_K: tl.constexpr,
    SWAP: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """The main loop: x_ptrs (BM, BK), w_ptrs (BN, BK) -> fp32 products with gate's (or all) channels, and with up's.

    Up's weights and scales lie up_w and up_ws elements behind gate's. SCALED: scales change along K, every GROUP_X or
    GROUP_K columns, and multiply the product of a step; FOLD: every FOLD columns, and multiply the weights.
    """
    UNIT: tl.constexpr = 4 if BITS == 6 else 1  # codes behind a pointer
    kk, uu = tl.arange(0, BLOCK_K), UNIT * tl.arange(0, BLOCK_K // UNIT)
    TYPE: tl.constexpr = MMA if not FOLD or (MMA == tl.bfloat16 and KIND != "float32") else tl.float32
    sums: tl.constexpr = tl.int32 if MMA == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), sums)
    acc_up = acc
    for k in range(begin, end, BLOCK_K):
        inside = (k + uu)[None, :] < K
        x = load_k(x_ptrs, (k + kk)[None, :] < K, EVEN_K).to(MMA)
        w = DECODE(load_codes(w_ptrs, inside, BITS, EVEN_K), TYPE, ELEMENT[0], ELEMENT[1], ELEMENT[2])
        if FOLD:
            s = load_scales(ws_ptrs, k, K, stride_wsk, FOLD, BLOCK_K)
            w = (w * spread_scales(s, TYPE, KIND, BLOCK_K)).to(MMA)
        xs = tl.full((), 1.0, tl.float32)
        if xs_ptrs is not None:
            xs = tl.load(xs_ptrs + k // GROUP_X * stride_xsk)
        at = ws_ptrs + k // GROUP_K * stride_wsk if SCALED and ws_ptrs is not None and not FOLD else None
        acc = scaled_mma(x, w, acc, xs, at, KIND, SCALED, UNIFORM, SWAP, PROMOTE)
        if GATED:
            u = DECODE(load_codes(w_ptrs + up_w, inside, BITS, EVEN_K), TYPE, ELEMENT[0], ELEMENT[1], ELEMENT[2])
            if FOLD:
                s = load_scales(ws_ptrs + up_ws, k, K, stride_wsk, FOLD, BLOCK_K)
                u = (u * spread_scales(s, TYPE, KIND, BLOCK_K)).to(MMA)
            at = at + up_ws if at is not None else None
            acc_up = scaled_mma(x, u, acc_up, xs, at, KIND, SCALED, UNIFORM, SWAP, PROMOTE)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * BITS // (8 if BITS == 6 else BITS) * stride_wk
    return acc, acc_up

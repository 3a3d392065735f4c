"""scale = max |x| over a group / max of the element; code = encode(x / scale). M rows, K columns, groups of G columns."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantize_kernel(
    x_ptr, scale_ptr, q_ptr, s_ptr, M, K, G, num_groups, stride_xm, stride_sm, element_max,
    ENCODE: tl.constexpr, STATIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS groups of up to BLOCK columns; LOOP: a group is longer than BLOCK and is read twice."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m, group = i // num_groups, i % num_groups
    live = m < M
    row = tl.where(live, m, 0).to(tl.int64)
    k = group[:, None] * G + tl.arange(0, BLOCK)[None, :]  # (ROWS, BLOCK)
    end = tl.minimum(group * G + G, K)[:, None]
    x_ptrs = x_ptr + row[:, None] * stride_xm + k
    if STATIC:
        scale = tl.load(scale_ptr + row * stride_sm)
    else:
        amax = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, G if LOOP else 1, BLOCK):
            x = tl.abs(tl.load(x_ptrs + start, mask=k + start < end, other=0.0).to(tl.float32))
            amax = tl.maximum(amax, x, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.div_rn(_max_nan(amax), tl.zeros((ROWS,), tl.float32) + element_max)
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(s_ptr + row * num_groups + group, scale, mask=live)
    for start in range(0, G if LOOP else 1, BLOCK):
        inside = (k + start < end) & live[:, None]
        x = tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
        q = ENCODE(tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, BLOCK))))
        tl.store(q_ptr + row[:, None] * K + k + start, q, mask=inside)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max_nan(x):
    """Row maximum that a NaN survives: tl.max drops it."""
    return tl.reduce(x, 1, _nan_max)


def quantize(x: Tensor, scale: Tensor | None, q: Tensor, s: Tensor, group: int, element_max: float, encode) -> None:
    """x (M, K), rows contiguous -> q (M, K), s (M, ceil(K / group)) unless a scale (M, 1) or () is given."""
    m, k = x.shape
    groups = triton.cdiv(k, group)
    block = min(triton.next_power_of_2(group), 8192)
    rows = max(1, min(16, 2048 // block))
    _quantize_kernel[(triton.cdiv(m * groups, rows),)](
        x, scale, q, s, m, k, group, groups, x.stride(0), 0 if scale is None or scale.numel() == 1 else scale.stride(0),
        element_max, ENCODE=encode, STATIC=scale is not None, ROWS=rows, BLOCK=block, LOOP=group > block,
        num_warps=4 if rows * block <= 4096 else 8,
    )  # fmt: skip

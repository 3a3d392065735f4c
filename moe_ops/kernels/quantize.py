"""scale = max |x| over a group / max of the element; code = encode(x / scale). M rows, K columns, groups of G."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax(x):
    """Largest magnitude of each row (ROWS,); a NaN survives it, as it does not tl.max."""
    return tl.reduce(tl.abs(x), 1, _nan_max)


@triton.jit
def _load(ptrs, inside):
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _encode(x, scale, ENCODE: tl.constexpr):
    """Codes of x / scale, divided exactly: an approximate quotient moves ties."""
    return ENCODE(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))


@triton.jit
def _quantize_kernel(
    x_ptr, scale_ptr, q_ptr, s_ptr, M, K, G, num_groups, stride_xm, stride_sm, element_max,
    ENCODE: tl.constexpr, STATIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS groups. LOOP: a group is longer than BLOCK, and is read a second time for its codes."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m, group = i // num_groups, (i % num_groups).to(tl.int32)
    live = m < M
    m = tl.where(live, m, 0)
    k = group[:, None] * G + tl.arange(0, BLOCK)[None, :]  # (ROWS, BLOCK)
    end = tl.where(live, tl.minimum(group * G + G, K), 0)[:, None]
    x_ptrs, q_ptrs = x_ptr + m[:, None] * stride_xm + k, q_ptr + m[:, None] * K + k
    x = _load(x_ptrs, k < end)
    if STATIC:
        scale = tl.load(scale_ptr + m * stride_sm)
    else:
        amax = _amax(x)
        if LOOP:
            for start in range(BLOCK, G, BLOCK):
                amax = _nan_max(amax, _amax(_load(x_ptrs + start, k + start < end)))
        scale = tl.div_rn(amax, tl.zeros((ROWS,), tl.float32) + element_max)
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(s_ptr + m * num_groups + group, scale, mask=live)
    tl.store(q_ptrs, _encode(x, scale, ENCODE), mask=k < end)
    if LOOP:
        for start in range(BLOCK, G, BLOCK):
            inside = k + start < end
            tl.store(q_ptrs + start, _encode(_load(x_ptrs + start, inside), scale, ENCODE), mask=inside)


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

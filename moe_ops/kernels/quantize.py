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
    x_ptr, scale_ptr, q_ptr, s_ptr, K, G, num_groups, stride_xm, stride_sm, element_max,
    ENCODE: tl.constexpr, STATIC: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """A program takes GROUPS groups of a row. LOOP: a group is longer than BLOCK, and is read again for its codes."""
    m = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * G + tl.arange(0, BLOCK)[None, :]  # (GROUPS, BLOCK)
    end = tl.minimum(group * G + G, K)[:, None]
    x_ptrs, q_ptrs = x_ptr + m * stride_xm + k, q_ptr + m * K + k
    x = _load(x_ptrs, k < end)
    if STATIC:
        scale = tl.zeros((GROUPS,), tl.float32) + tl.load(scale_ptr + m * stride_sm)
    else:
        amax = _amax(x)
        if LOOP:
            for start in range(BLOCK, G, BLOCK):
                amax = _nan_max(amax, _amax(_load(x_ptrs + start, k + start < end)))
        scale = tl.div_rn(amax, tl.zeros((GROUPS,), tl.float32) + element_max)
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(s_ptr + m * num_groups + group, scale, mask=group < num_groups)
    tl.store(q_ptrs, _encode(x, scale, ENCODE), mask=k < end)
    if LOOP:
        for start in range(BLOCK, G, BLOCK):
            inside = k + start < end
            tl.store(q_ptrs + start, _encode(_load(x_ptrs + start, inside), scale, ENCODE), mask=inside)


_ELEMENTS = 4096  # of one program, in registers, where groups are shorter than that


def quantize(x: Tensor, scale: Tensor | None, q: Tensor, s: Tensor, group: int, element_max: float, encode) -> None:
    """x (M, K), rows contiguous -> q (M, K), s (M, ceil(K / group)) unless a scale (M, 1) or () is given."""
    m, k = x.shape
    num_groups, block = triton.cdiv(k, group), min(triton.next_power_of_2(group), 16384)
    groups = max(1, min(triton.next_power_of_2(num_groups), _ELEMENTS // block))
    stride_sm = 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    _quantize_kernel[(m, triton.cdiv(num_groups, groups))](
        x, scale, q, s, k, group, num_groups, x.stride(0), stride_sm, element_max,
        ENCODE=encode, STATIC=scale is not None, GROUPS=groups, BLOCK=block, LOOP=group > block,
        num_warps=4 if groups * block <= 4096 else 8 if groups * block <= 8192 else 16,
    )  # fmt: skip

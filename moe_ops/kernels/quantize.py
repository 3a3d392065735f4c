"""scale = rule(max |x| over a group); code = encode(x / scale). M rows, K columns, groups of G."""

import triton
import triton.language as tl
from torch import Tensor

from .decode import e4m3_bits
from .launch import enqueue, power_of_2


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
def _row_amax(row_ptr, K, BLOCK: tl.constexpr):
    """Of a whole row, as one number."""
    k = tl.arange(0, BLOCK)
    amax = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        amax = _nan_max(amax, tl.abs(_load(row_ptr + start + k, start + k < K)))
    return tl.reduce(amax, 0, _nan_max)


@triton.jit
def _encode(x, scale, ENCODE: tl.constexpr, ELEMENT: tl.constexpr, GLOBAL: tl.constexpr):
    """Codes of x / scale, divided exactly: an approximate quotient moves ties."""
    scale = tl.broadcast_to(scale[:, None], x.shape)
    quotient = tl.div_rn(x, scale)
    if GLOBAL:  # the scale of a group may round to zero
        quotient = tl.where(scale == 0.0, 0.0, quotient)
    return ENCODE(quotient, ELEMENT[0], ELEMENT[1], ELEMENT[2], ELEMENT[3])


@triton.jit
def _store_codes(q_ptr, codes, k, end, BITS: tl.constexpr):
    """codes (GROUPS, BLOCK) of columns k (a row from q_ptr on), packed as formats/packing.py says."""
    groups: tl.constexpr = codes.shape[0]
    block: tl.constexpr = codes.shape[1]
    if BITS == 4:
        low, high = tl.split(codes.reshape(groups, block // 2, 2))
        even, _ = tl.split(k.reshape(groups, block // 2, 2))
        tl.store(q_ptr + even // 2, low | (high << 4), mask=even < end)
    elif BITS == 6:
        even, odd = tl.split(codes.to(tl.int32).reshape(groups, block // 4, 2, 2))  # codes (0, 2), (1, 3)
        a, c = tl.split(even)
        b, d = tl.split(odd)
        word = a | (b << 6) | (c << 12) | (d << 18)
        first, _ = tl.split(k.reshape(groups, block // 4, 2, 2))
        first, _ = tl.split(first)
        at = q_ptr + first // 4 * 3
        tl.store(at, word.to(tl.uint8), mask=first < end)
        tl.store(at + 1, (word >> 8).to(tl.uint8), mask=first < end)
        tl.store(at + 2, (word >> 16).to(tl.uint8), mask=first < end)
    else:
        tl.store(q_ptr + k, codes, mask=k < end)


@triton.jit
def _quantize_kernel(
    x_ptr, scale_ptr, q_ptr, s_ptr, global_ptr, K, G, num_groups, stride_xm, stride_qm, stride_sm,
    ENCODE: tl.constexpr, ENCODE_SCALE: tl.constexpr, RULE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr,
    EMAX: tl.constexpr, SCALE_MAX: tl.constexpr, STATIC: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """A program takes GROUPS groups of a row. LOOP: a group is longer than BLOCK, and is read again for its codes.

    SCALE_MAX: above the scales of groups, which are e4m3, there is one per row, given (STATIC) or the row's amax over
    the product of both maxima; every program of a row finds it for itself.
    """
    m = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * G + tl.arange(0, BLOCK)[None, :]  # (GROUPS, BLOCK)
    end = tl.minimum(group * G + G, K)[:, None]
    row_ptr, q_ptr = x_ptr + m * stride_xm, q_ptr + m * stride_qm
    x = _load(row_ptr + k, k < end)
    scale = tl.zeros((GROUPS,), tl.float32)
    if STATIC:
        scale += tl.load(scale_ptr + m * stride_sm)
    if STATIC and SCALE_MAX is None:
        pass
    else:
        amax = _amax(x)
        if LOOP:
            for start in range(BLOCK, G, BLOCK):
                amax = _nan_max(amax, _amax(_load(row_ptr + k + start, k + start < end)))
        stored, value = RULE(amax, ELEMENT[3], ELEMENT[1], EMAX)
        if SCALE_MAX is not None:
            if not STATIC:
                scale = tl.div_rn(scale + _row_amax(row_ptr, K, 1024), scale + ELEMENT[3] * SCALE_MAX)
                scale = tl.where(scale == 0.0, 1.0, scale)
            tl.store(global_ptr + m + group, scale, mask=group == 0)
            stored = ENCODE_SCALE(tl.div_rn(value, scale), 4, 3, 7, SCALE_MAX)
            if stored.dtype == tl.uint8:
                scale = e4m3_bits(stored, tl.float32, 4, 3, 7) * scale
            else:
                scale = stored.to(tl.float32) * scale
        else:
            scale = value
        tl.store(s_ptr + m * num_groups + group, stored.to(s_ptr.dtype.element_ty), mask=group < num_groups)
    two_levels: tl.constexpr = SCALE_MAX is not None
    _store_codes(q_ptr, _encode(x, scale, ENCODE, ELEMENT, two_levels), k, end, BITS)
    if LOOP:
        for start in range(BLOCK, G, BLOCK):
            codes = _encode(_load(row_ptr + k + start, k + start < end), scale, ENCODE, ELEMENT, two_levels)
            _store_codes(q_ptr, codes, k + start, end, BITS)


_ELEMENTS = 4096  # of one program, in registers, where groups are shorter than that


def quantize(
    x: Tensor, scale: Tensor | None, q: Tensor, s: Tensor | None, g: Tensor | None, group: int, element: tuple,
    bits: int, emax: int, scale_max: float | None, encode, encode_scale, rule,
) -> None:  # fmt: skip
    """x (M, K), rows contiguous -> codes q (M, stored K), scales s (M, ceil(K / group)), g (M, 1).

    scale, (M, 1) or one value, is static: the scale itself, or g where there is one above others. element = (exponent
    bits, mantissa bits, bias, largest).
    """
    m, k = x.shape
    num_groups, block = -(-k // group), min(power_of_2(group), 16384)
    groups = max(1, min(power_of_2(num_groups), _ELEMENTS // block))
    stride_sm = 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    enqueue(
        _quantize_kernel, (m, -(-num_groups // groups)), x, scale, q, s, g, k, group, num_groups, x.stride(0),
        q.stride(0), stride_sm,
        ENCODE=encode, ENCODE_SCALE=encode_scale, RULE=rule, ELEMENT=element, BITS=bits, EMAX=emax,
        SCALE_MAX=scale_max, STATIC=scale is not None, GROUPS=groups, BLOCK=block, LOOP=group > block,
        num_warps=4 if groups * block <= 4096 else 8 if groups * block <= 8192 else 16,
    )  # fmt: skip

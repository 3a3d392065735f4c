"""Sums over parts of K, added in their order: few tiles would leave multiprocessors idle, parts of tiles do not.

P parts, R rows, N columns of the result.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activation import gate
from .arrange import CHUNK, in_nibbles
from .launch import enqueue, power_of_2


@triton.jit
def added(ptrs, stride_p, inside, PARTS: tl.constexpr):
    total = tl.load(ptrs, mask=inside, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(ptrs + p * stride_p, mask=inside, other=0.0)
    return total


@triton.jit
def _add_kernel(
    parts_ptr, out_ptr, N, width, stride_p, stride_r, alpha, beta, limit,
    PARTS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, NIBBLES: tl.constexpr, TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = in_nibbles(j) if NIBBLES else j
    ptrs = parts_ptr + r * stride_r + n
    y = added(ptrs, stride_p, n < N, PARTS)
    if ACT is not None:  # one cast before the activation, one after, as without parts
        u = added(ptrs + N, stride_p, n < N, PARTS) if GATED else y
        y = gate(y.to(TYPE).to(tl.float32), u.to(TYPE).to(tl.float32), alpha, beta, limit, ACT, GATED).to(TYPE)
    tl.store(out_ptr + r * width + j, y.to(out_ptr.dtype.element_ty), mask=j < width)


def add(parts: Tensor, out: Tensor, n: int, act, gated: bool, numbers: tuple, nibbles: bool, type: tl.dtype) -> None:
    """parts (P, R, N), or (P, R, 2N) if gated -> out (R, N): the sums, or the activation `act` of them as `type`.

    nibbles: columns in the order of kernels/arrange.py, N rounded up to whole chunks.
    """
    width = -(-n // CHUNK) * CHUNK if nibbles else n
    block = min(power_of_2(width), 1024)
    enqueue(
        _add_kernel, (parts.shape[1], -(-width // block)), parts, out, n, width, parts.stride(0), parts.stride(1),
        *numbers, PARTS=parts.shape[0], ACT=act, GATED=gated, NIBBLES=nibbles, TYPE=type, BLOCK=block, num_warps=4,
    )  # fmt: skip

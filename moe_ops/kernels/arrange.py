"""Activations as the product wants them: codes with group scales as exact numbers, columns in the order of nibbles.

Weights of four bits are read as words of eight codes. Nibbles p and p + 4 of a word become one register of two numbers,
for p = 0..3, so that within every chunk of 128 columns the products run over k = 8 i + 4 b + p in the order
j = 32 p + 2 i + b. Arranging the activations once costs less than arranging the weights in every loop.
"""

import triton
import triton.language as tl
from torch import Tensor

from .decode import scale_value
from .launch import enqueue, power_of_2

CHUNK = 128


@triton.jit
def in_nibbles(j):
    """The column that stands at j."""
    return j // 128 * 128 + j % 32 // 2 * 8 + j % 2 * 4 + j % 128 // 32


@triton.jit
def load_code(row_ptr, k, inside, BITS: tl.constexpr):
    """Codes at columns k of a row: a byte, a nibble, or six bits out of two bytes."""
    if BITS == 4:
        return (tl.load(row_ptr + k // 2, mask=inside, other=0.0) >> ((k % 2) * 4).to(tl.uint8)) & 0xF
    elif BITS == 6:
        at, shift = row_ptr + k // 4 * 3 + k % 4 * 6 // 8, k % 4 * 6 % 8
        low = tl.load(at, mask=inside, other=0.0).to(tl.int32)
        high = tl.load(at + 1, mask=inside & (shift > 2), other=0.0).to(tl.int32)
        return (((low | (high << 8)) >> shift) & 63).to(tl.uint8)
    else:
        return tl.load(row_ptr + k, mask=inside, other=0.0)


@triton.jit
def _arrange_kernel(
    x_ptr, s_ptr, out_ptr, K, width, stride_xm, stride_sm,
    DECODE: tl.constexpr, ELEMENT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    NIBBLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = j
    if NIBBLES:
        k = in_nibbles(j)
    value = DECODE(load_code(x_ptr + m * stride_xm, k, k < K, BITS), tl.float32, ELEMENT[0], ELEMENT[1], ELEMENT[2])
    if s_ptr is not None:
        s = tl.load(s_ptr + m * stride_sm + k // GROUP, mask=k < K, other=0.0)
        value = value * scale_value(s, tl.float32, KIND)
    value = tl.where(k < K, value, 0.0)
    tl.store(out_ptr + m * width + j, value.to(out_ptr.dtype.element_ty), mask=j < width)


def arrange(
    x: Tensor, scale: Tensor | None, out: Tensor, k: int, group: int, decode, element: tuple, bits: int, kind: str,
    nibbles: bool,
) -> None:  # fmt: skip
    """x (M, stored K), scale (M, ceil(K / group)) -> out (M, K), or K rounded up to whole chunks of nibbles."""
    m, width = out.shape
    block = min(power_of_2(width), 1024)
    enqueue(
        _arrange_kernel, (m, -(-width // block)), x, scale, out, k, width, x.stride(0),
        0 if scale is None else scale.stride(0), DECODE=decode, ELEMENT=element, BITS=bits, KIND=kind, GROUP=group,
        NIBBLES=nibbles, BLOCK=block, num_warps=4,
    )  # fmt: skip

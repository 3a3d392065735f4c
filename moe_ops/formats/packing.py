"""Codes of less than eight bits in bytes, along the last axis, in the order that every producer of them uses.

4 bits: code 2j in the low half of byte j, 2j + 1 in the high half. 6 bits: four codes make a 24-bit little-endian word.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., K) -> bytes (..., K * bits / 8)."""
    if bits == 4:
        low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
        return low | (high << 4)
    if bits == 6:
        a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
        return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], -1).flatten(-2)
    raise ValueError(f"codes of {bits} bits are not packed: 4 or 6")


def unpack(data: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`."""
    if bits == 4:
        return torch.stack([data & 0xF, data >> 4], -1).flatten(-2)
    if bits == 6:
        x, y, z = data.unflatten(-1, (-1, 3)).unbind(-1)
        return torch.stack([x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2], -1).flatten(-2)
    raise ValueError(f"codes of {bits} bits are not packed: 4 or 6")

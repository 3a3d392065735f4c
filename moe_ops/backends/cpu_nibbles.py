"""torch's product with 4-bit integers in groups, on codes as they are stored: for each call their bytes are transposed.

That kernel sums x[k] * (code[k, n] - 8) * scale[group of k, n] in fp32. It takes 64 channels n in 32 bytes: channel i
in the low half of byte i, channel i + 32 in its high half. A stored byte holds two numbers k of one channel instead, so
the kernel is told that it is one number of two channels, and gets the even and the odd columns of x as two rows:

    y[n] = even * low halves of n + odd * high halves of n

The other two of the four products are left. Each is rounded to bf16, which together costs as much as one rounding.

M rows of x, N channels, L bytes of a channel, E of them with the same scale, G = L / E groups.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BYTES = 32  # next to each other, one of each channel
_UNITS = (256, 128, 64, 32)  # numbers along K that may share a scale


@cache
def has_kernel() -> bool:
    """Whether torch packs as above: other processors have other kernels."""
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is None:
        return False
    codes = (torch.arange(64 * 32, device="cpu", dtype=torch.int32) * 40503 >> 7 & 15).view(64, 32)
    low, high = codes.to(torch.uint8).t().split(_BYTES, 1)
    try:
        return torch.equal(pack(codes, 1).flatten(), (low | high << 4).flatten())
    except RuntimeError:  # not built for this processor
        return False


def fits(n: int, lanes: int, each: int) -> bool:
    """Whether the kernel takes a matrix (n, lanes) with scales for `each` bytes, or a few products with it do."""
    least = _UNITS[-1]
    return not n % _BYTES and not lanes % least and each > 0 and (not each % least or not least % each)


def unit_of(each: int) -> int:
    """What the kernel takes for one group: a group, a part of it, or several."""
    return next((u for u in _UNITS if not each % u), _UNITS[-1])


def multiply(x: Tensor, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """x (P, 2 * M, L) bf16; codes (N, L) contiguous; scales (P, L / unit, 2 * N, 2) -> out (M, N) fp32."""
    n, lanes = codes.shape
    unit, strip = lanes // scales.shape[1], _BYTES * lanes
    strips = codes.as_strided((n // _BYTES, strip, 1, 1), (strip, 1, strip, strip))  # channels last: vectorized
    packed = torch.channel_shuffle(strips, _BYTES).view(2 * n, lanes // 2)  # as if of 2 * N channels
    out = out.view(-1, n // _BYTES, _BYTES)
    for part in range(x.shape[0]):
        four = torch.ops.aten._weight_int4pack_mm_for_cpu(x[part], packed, unit, scales[part])
        four = four.view(-1, 2, n // _BYTES, 2, _BYTES)
        (out.add_ if part else out.copy_)(four[:, 0, :, 0]).add_(four[:, 1, :, 1])


def spread_rows(x: Tensor, each: int) -> Tensor:
    """x (R, 2 * L), even columns and then odd ones -> (P, 2 * R, L): of P groups in a unit, one alone, others 0."""
    unit = unit_of(each)
    parts, rows = max(unit // each, 1), x.view(2 * x.shape[0], -1)
    if parts == 1:
        return rows[None]
    groups = rows.view(rows.shape[0], -1, parts, each)
    spread = rows.new_zeros(parts, *groups.shape)
    for part in range(parts):
        spread[part, :, :, part] = groups[:, :, part]
    return spread.flatten(2)


def spread_scales(scale: Tensor, each: int) -> Tensor:
    """scale (X, N, G) bf16 -> (X, P, L / unit, 2 * N, 2): of both channels of a byte, with the zero point 0."""
    unit = unit_of(each)
    if each > unit:
        scale = scale.repeat_interleave(each // unit, 2)
    parts, (x, n, groups) = max(unit // each, 1), scale.shape
    scale = scale.view(torch.uint16).view(x, n // _BYTES, 1, _BYTES, groups // parts, parts)
    pairs = scale.new_empty(x, parts, groups // parts, n // _BYTES, 2, _BYTES, dtype=torch.int32)
    pairs.copy_(scale.permute(0, 5, 4, 1, 2, 3))  # the zero point is the upper half
    return pairs.flatten(3).view(torch.bfloat16).unflatten(3, (-1, 2))

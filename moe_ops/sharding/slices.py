"""Slices of quantized weights for tensor and expert parallelism: pure functions on canonical tensors.

Tensor parallel: every rank holds columns [a, b) of the intermediate size I of all experts, as rows of gate and of up,
and as columns of down; the outputs of the ranks sum to the whole. Expert parallel: every rank holds experts [a, b).

Codes are never changed. Where the codec has blocks, ranks end at block boundaries, so that their sizes may differ by a
block (2880 over 4 ranks in groups of 32: 736, 736, 704, 704): nothing is stored twice, and dynamic scales of groups of
activations are those of the whole. With fewer blocks than ranks the blocks are cut, and their scales repeated; the
format of such a slice is `name@unit`. Neither needs another rounding.

What a rank cannot see: activations that are quantized with one dynamic scale per token, or for all of them, take it
from the rank's own columns before `down`. It is never larger than that of the whole.

E experts, I intermediate size, S shards (gate and up are two), N rows of one shard, K contraction, BN x BK blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import FORMATS, Codec, Format, QuantizedTensor

_ALIGNED = 16  # columns: kernels read 16 bytes at a time
_PACKED = 8  # codes that fill whole bytes, and words, whatever their bits


def bounds(size: int, ranks: int, unit: int = 1) -> tuple[int, ...]:
    """Where ranks begin and end: ranks + 1 positions in 0..size, multiples of `unit` (the last is `size`).

    Ranks differ by at most one unit, the first ones being larger; the last unit may be partial. Raises ValueError where
    a rank would be empty.
    """
    units = -(-size // unit)
    if ranks < 1 or units < ranks:
        raise ValueError(f"{size} in units of {unit} cannot be split over {ranks} ranks")
    each, more = divmod(units, ranks)
    return tuple(min(size, unit * (r * each + min(r, more))) for r in range(ranks + 1))


def unit_for(format: str | Format, size: int, ranks: int) -> int:
    """Of how many columns of I ranks are made: whole blocks of weights and activations, cut only if there are too few.

    Raises ValueError where even the smallest unit leaves a rank empty: one column, eight of packed codes, a group of
    packed activations.
    """
    fmt = FORMATS.resolve(format)
    return _unit(fmt.weight, fmt.activation, size, ranks)


def _unit(weight: Codec, activation: Codec | None, size: int, ranks: int) -> int:
    blocks, groups = weight.block or (), (activation and activation.block) or ()
    unit = math.lcm(_ALIGNED, *(extent for extent in (*blocks, *groups) if extent))
    least = _PACKED if weight.packed else 1
    if activation is not None and activation.packed:  # made for each call: there is no stored scale to repeat
        least = math.lcm(_PACKED, *(extent for extent in groups if extent))
    while -(-size // unit) < ranks and unit % (2 * least) == 0:
        unit //= 2
    bounds(size, ranks, unit)
    return unit


def shard(
    q: QuantizedTensor, dim: int, tp_rank: int, tp_size: int, *, shards: int = 1, unit: int | None = None
) -> QuantizedTensor:  # fmt: skip
    """This rank's rows (dim -2) of each of S matrices, or its columns (dim -1): a copy that dequantizes to the slice.

    q (..., S*N, K) as `quantize_weight` gives it. gate_up_proj is cut along -2 with its shards, down_proj along -1,
    both with one `unit` (default: as `unit_for`, of the codec alone). Scales of rows and groups are sliced, those of
    whole matrices copied; the codec is `q.codec.refined(unit)`. Raises ValueError for a unit that would cut bytes.
    """
    if dim not in (-1, -2):
        raise ValueError(f"dim is -2 (rows) or -1 (columns), got {dim}")
    k = q.codec.columns(q.qdata.shape[-1])
    n, size = q.qdata.shape[-2] // shards, q.qdata.shape[-2] // shards if dim == -2 else k
    unit = _unit(q.codec, None, size, tp_size) if unit is None else unit
    if dim == -1 and q.codec.packed and unit % _PACKED:
        raise ValueError(f"columns of {q.codec.name} are packed: they are cut at multiples of {_PACKED}, not of {unit}")
    start, stop = range_of(size, tp_rank, tp_size, unit)
    rows, columns = ((start, stop), (0, k)) if dim == -2 else ((0, n), (start, stop))
    stored = slice(*(q.codec.stored(c) for c in columns))
    codec = q.codec.refined(unit) if tp_size > 1 else q.codec

    def scales(t: Tensor | None) -> Tensor | None:
        if t is None or q.codec.block in (None, (0, 0)):
            return None if t is None else t.clone()
        assert q.codec.block is not None and codec.block is not None
        (bn, bk), (fine_n, fine_k) = q.codec.block, codec.block
        t = _take(t.unflatten(-2, (shards, -1)), -2, rows, bn, fine_n).flatten(-3, -2)
        return _take(t, -1, columns, bk, fine_k)

    qdata = q.qdata.unflatten(-2, (shards, -1))[..., slice(*rows), stored].flatten(-3, -2)
    whole = None if q.global_scale is None else q.global_scale.clone()
    return QuantizedTensor(qdata.clone(memory_format=torch.contiguous_format), scales(q.scale), scales(q.zero_point),
                           whole, codec)  # fmt: skip


def _take(scale: Tensor, dim: int, span: tuple[int, int], extent: int, fine: int) -> Tensor:
    """Scales of the fine blocks that begin in span, each that of the block it lies in; extent 0 is the whole axis."""
    if not extent:
        return scale.clone()
    index = torch.arange(*span, fine, device=scale.device) // extent
    data = scale.view(torch.uint8) if scale.element_size() == 1 else scale  # not every device selects such floats
    return data.index_select(dim, index).view(scale.dtype)


def range_of(size: int, rank: int, ranks: int, unit: int = 1) -> tuple[int, int]:
    at = bounds(size, ranks, unit)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of 0..{ranks - 1}")
    return at[rank], at[rank + 1]


def shard_bias(bias: Tensor, dim: int, tp_rank: int, tp_size: int, *, shards: int = 1, unit: int = 1) -> Tensor:
    """Bias (..., S*N) of a weight cut along `dim`: its rows, or for columns all of it on rank 0 and zeros elsewhere."""
    if dim == -1:
        return bias.clone() if tp_rank == 0 else torch.zeros_like(bias)
    split = bias.unflatten(-1, (shards, -1))
    start, stop = range_of(split.shape[-1], tp_rank, tp_size, unit)
    return split[..., start:stop].flatten(-2).clone()


def shard_experts(q: QuantizedTensor, ep_rank: int, ep_size: int) -> QuantizedTensor:
    """This rank's experts of q (E, ...): a copy. The first E % ep_size ranks hold one more."""
    start, stop = range_of(q.qdata.shape[0], ep_rank, ep_size)
    return each_tensor(q, lambda t: t[start:stop].clone())


def each_tensor(q: QuantizedTensor, fn: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    scale, zero_point, whole = (None if t is None else fn(t) for t in (q.scale, q.zero_point, q.global_scale))
    return QuantizedTensor(fn(q.qdata), scale, zero_point, whole, q.codec)


def local_ids(topk_ids: Tensor, num_experts: int, ep_rank: int, ep_size: int, *, identities: int = 0) -> Tensor:
    """Ids of the model's experts -> of this rank's, -1 (which contributes zero) for those of other ranks and none.

    identities: as many ids after those of experts hand their input on (ExpertsSpec); rank 0 does that.
    """
    start, stop = range_of(num_experts, ep_rank, ep_size)
    local = torch.where((topk_ids >= start) & (topk_ids < stop), topk_ids - start, -1)
    same = (topk_ids >= num_experts) & (topk_ids < num_experts + identities)
    return torch.where(same, topk_ids - num_experts + stop, local) if identities and ep_rank == 0 else local

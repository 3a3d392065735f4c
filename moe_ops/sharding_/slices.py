"""Slices of quantized experts for tensor and expert parallelism: pure functions on canonical tensors, and on modules.

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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .activation import interleave
from .experts import QuantizedExperts, _new
from .formats import FORMATS, Codec, Format, QuantizedTensor
from .storage import carry_over

_ALIGNED = 16  # columns: kernels read 16 bytes at a time
_BY_ID = ("topk", "items")  # ways to call experts (calls.py)
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
    start, stop = _range(size, tp_rank, tp_size, unit)
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


def _range(size: int, rank: int, ranks: int, unit: int = 1) -> tuple[int, int]:
    at = bounds(size, ranks, unit)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of 0..{ranks - 1}")
    return at[rank], at[rank + 1]


def shard_bias(bias: Tensor, dim: int, tp_rank: int, tp_size: int, *, shards: int = 1, unit: int = 1) -> Tensor:
    """Bias (..., S*N) of a weight cut along `dim`: its rows, or for columns all of it on rank 0 and zeros elsewhere."""
    if dim == -1:
        return bias.clone() if tp_rank == 0 else torch.zeros_like(bias)
    split = bias.unflatten(-1, (shards, -1))
    start, stop = _range(split.shape[-1], tp_rank, tp_size, unit)
    return split[..., start:stop].flatten(-2).clone()


def shard_experts(q: QuantizedTensor, ep_rank: int, ep_size: int) -> QuantizedTensor:
    """This rank's experts of q (E, ...): a copy. The first E % ep_size ranks hold one more."""
    start, stop = _range(q.qdata.shape[0], ep_rank, ep_size)
    return _each(q, lambda t: t[start:stop].clone())


def _each(q: QuantizedTensor, fn: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    scale, zero_point, whole = (None if t is None else fn(t) for t in (q.scale, q.zero_point, q.global_scale))
    return QuantizedTensor(fn(q.qdata), scale, zero_point, whole, q.codec)


def local_ids(topk_ids: Tensor, num_experts: int, ep_rank: int, ep_size: int, *, identities: int = 0) -> Tensor:
    """Ids of the model's experts -> of this rank's, -1 (which contributes zero) for those of other ranks and none.

    identities: as many ids after those of experts hand their input on (ExpertsSpec); rank 0 does that.
    """
    start, stop = _range(num_experts, ep_rank, ep_size)
    local = torch.where((topk_ids >= start) & (topk_ids < stop), topk_ids - start, -1)
    same = (topk_ids >= num_experts) & (topk_ids < num_experts + identities)
    return torch.where(same, topk_ids - num_experts + stop, local) if identities and ep_rank == 0 else local


@torch.no_grad()
def shard_module(
    experts: QuantizedExperts, tp_rank: int = 0, tp_size: int = 1, *, ep_rank: int = 0, ep_size: int = 1,
    unit: int | None = None,
) -> QuantizedExperts:  # fmt: skip
    """This rank's slice as a module: its outputs, summed over the ranks, are those of `experts`, which stays as it is.

    Expert parallel ranks are called with `local_ids`. unit: cut I at its multiples instead of at those of `unit_for`.
    The down bias is kept by tensor parallel rank 0, others hold frozen zeros; identity experts are rank 0's. Raises
    ValueError where a rank would be empty, for experts that are not called by ids under expert parallelism, and under
    tensor parallelism for experts with a norm after them, or a gate that does not act on each column by itself: their
    partial outputs do not sum.
    """
    if not isinstance(experts, QuantizedExperts):
        raise ValueError(f"shard_module takes QuantizedExperts, got {type(experts).__name__}: quantize_ first")
    spec, fmt = experts.spec, FORMATS[experts.format]
    if tp_size > 1 and (spec.post_norm is not None or not spec.down):
        what = f"{spec.post_norm} needs whole outputs of experts" if spec.down else f"{spec.up} alone has no sum"
        raise ValueError(f"{what}: tensor parallel ranks cannot run it")
    if ep_size > 1 and spec.call not in _BY_ID:
        raise ValueError(f"experts that are called by {spec.call}, not by ids, cannot be spread over ranks")
    mine = slice(*_range(experts._get(spec.up).qdata.shape[0], ep_rank, ep_size))
    unit = unit_for(fmt, spec.intermediate_size, tp_size) if unit is None else unit
    start, stop = _range(spec.intermediate_size, tp_rank, tp_size, unit)
    new = carry_over(experts, _new(experts.original_class, spec.call))
    new.spec = replace(
        spec, num_experts=mine.stop - mine.start, intermediate_size=stop - start, keys=spec.keys[mine],
        identities=0 if tp_rank or ep_rank else spec.identities,
    )  # fmt: skip
    new.format = fmt.refined(unit).name if tp_size > 1 else fmt.name
    new.__dict__["num_experts"] = new.spec.num_experts
    for name, shards, _, _ in spec.matrices:
        dim = -2 if name == spec.up else -1
        part = _each(experts._get(name), lambda t: t[mine])
        new._put(name, shard(part, dim, tp_rank, tp_size, shards=shards, unit=unit))
        if (scale := experts.part(name, "input_scale")) is not None:
            new._parameters[f"{name}_input_scale"] = nn.Parameter(scale.detach()[mine].clone(), requires_grad=False)
        if (bias := experts._parameters.get(f"{name}_bias")) is not None:
            cut = shard_bias(bias.detach()[mine], dim, tp_rank, tp_size, shards=shards, unit=unit)
            trainable = bias.requires_grad and (dim == -2 or tp_rank == 0)
            new._parameters[f"{name}_bias"] = nn.Parameter(cut, requires_grad=trainable)
    new._mark()
    if tp_size > 1 and spec.gate is None:
        _check_gate(experts, new, start, stop)
    return new


def _check_gate(whole: QuantizedExperts, part: QuantizedExperts, start: int, stop: int) -> None:
    """The module's own gate, on the columns of a rank, must give the columns of what it gives on all."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, whole.spec.shards, whole.spec.intermediate_size, generator=generator)  # (R, S, I)
    device = part._get(part.spec.up).qdata.device
    h = h.to("cpu" if device.type == "meta" else device, whole.float_dtype)

    def run(module: QuantizedExperts, x: Tensor) -> Tensor:
        own: Any = module.spec.own_gate or (module._apply_gate if module.spec.gated else module.act_fn)
        x = x.flatten(1)
        return own(interleave(x) if module.spec.interleaved else x)

    got, want = run(part, h[..., start:stop]), run(whole, h)[..., start:stop]
    if got.shape != want.shape or not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-3):
        raise ValueError("the gate of these experts does not act on each column by itself: they cannot be cut along I")

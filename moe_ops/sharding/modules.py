"""A rank's slice of an experts module, as a module.

E experts, H hidden size, I intermediate size, S shards (gate and up), R rows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activation import interleave
from ..adapters import ExpertsSpec
from ..experts import QuantizedExperts, _new
from ..formats import FORMATS, Format, QuantizedTensor
from ..storage import carry_over
from .slices import bounds, each_tensor, range_of, shard, shard_bias, unit_for

_BY_ID = ("topk", "items")  # ways to call experts (calls.py)


class Part(NamedTuple):
    """Which part of experts a rank holds: some of them, and of each some columns of I, in multiples of `unit`."""

    tp_rank: int
    tp_size: int
    ep_rank: int
    ep_size: int
    unit: int

    def experts(self, num_experts: int) -> tuple[int, int]:
        return range_of(num_experts, self.ep_rank, self.ep_size)

    def spec(self, whole: ExpertsSpec) -> ExpertsSpec:
        first, last = self.experts(whole.num_experts)
        start, stop = range_of(whole.intermediate_size, self.tp_rank, self.tp_size, self.unit)
        return replace(
            whole, num_experts=last - first, intermediate_size=stop - start, keys=whole.keys[first:last],
            identities=0 if self.tp_rank or self.ep_rank else whole.identities,
        )  # fmt: skip

    def format(self, whole: Format) -> Format:
        return whole.refined(self.unit) if self.tp_size > 1 else whole

    def matrix(self, q: QuantizedTensor, dim: int, shards: int = 1) -> QuantizedTensor:
        """Of the experts that q holds, this rank's rows (-2) of each shard, or columns (-1)."""
        return shard(q, dim, self.tp_rank, self.tp_size, shards=shards, unit=self.unit)

    def bias(self, bias: nn.Parameter, dim: int, shards: int) -> nn.Parameter:
        """Of all experts' (E, S*N): this rank's. Whoever does not hold the down bias holds frozen zeros."""
        first, last = self.experts(bias.shape[0])
        mine = bias.detach()[first:last]
        cut = shard_bias(mine, dim, self.tp_rank, self.tp_size, shards=shards, unit=self.unit)
        return nn.Parameter(cut, requires_grad=bias.requires_grad and (dim == -2 or self.tp_rank == 0))


def dim_of(spec: ExpertsSpec, name: str) -> int:
    """Along which dimension tensor parallel ranks cut a weight: rows of gate and up, columns of down."""
    return -2 if name == spec.up else -1


def part_of(
    experts: QuantizedExperts, tp_rank: int = 0, tp_size: int = 1, ep_rank: int = 0, ep_size: int = 1,
    unit: int | None = None,
) -> Part:  # fmt: skip
    """This rank's part. Raises ValueError, on every rank, where the experts cannot be cut so (`shard_module`)."""
    spec = experts.spec
    if tp_size > 1 and (spec.post_norm is not None or not spec.down):
        what = f"{spec.post_norm} needs whole outputs of experts" if spec.down else f"{spec.up} alone has no sum"
        raise ValueError(f"{what}: tensor parallel ranks cannot run it")
    if unit is None:
        unit = unit_for(experts.format, spec.intermediate_size, tp_size)
    bounds(spec.num_experts, ep_size)
    at = bounds(spec.intermediate_size, tp_size, unit)
    if tp_size > 1 and spec.gate is None:
        _check_gate(experts, at)
    part = Part(tp_rank, tp_size, ep_rank, ep_size, unit)
    part.experts(spec.num_experts), range_of(spec.intermediate_size, tp_rank, tp_size, unit)
    return part


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
    if ep_size > 1 and experts.spec.call not in _BY_ID:
        raise ValueError(f"experts that are called by {experts.spec.call}, not by ids, cannot be spread over ranks")
    return slice_of(experts, part_of(experts, tp_rank, tp_size, ep_rank, ep_size, unit))


@torch.no_grad()
def slice_of(experts: QuantizedExperts, part: Part) -> QuantizedExperts:
    """A module that holds this part of the experts."""
    spec = experts.spec
    new = carry_over(experts, _new(experts.original_class, spec.call))
    narrow_(new, part)
    first, last = part.experts(spec.num_experts)
    for name, shards, _, _ in spec.matrices:
        mine = each_tensor(experts._get(name), lambda t: t[first:last])
        new._put(name, part.matrix(mine, dim_of(spec, name), shards))
        if (scale := experts.part(name, "input_scale")) is not None:
            new._parameters[f"{name}_input_scale"] = nn.Parameter(scale.detach()[first:last].clone(), False)
        if (bias := experts._parameters.get(f"{name}_bias")) is not None:
            new._parameters[f"{name}_bias"] = part.bias(bias, dim_of(spec, name), shards)
    new._mark()
    return new


def narrow_(experts: QuantizedExperts, part: Part) -> None:
    """Have a module say that it holds this part; its parameters stay as they are."""
    experts.format = part.format(FORMATS[experts.format]).name
    experts.spec = part.spec(experts.spec)
    experts.__dict__["num_experts"] = experts.spec.num_experts


def _check_gate(experts: QuantizedExperts, at: tuple[int, ...]) -> None:
    """The module's own gate, on the columns of each rank, must give the columns of what it gives on all."""
    spec, device = experts.spec, experts._get(experts.spec.up).qdata.device
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, spec.shards, spec.intermediate_size, generator=generator)  # (R, S, I)
    h = h.to("cpu" if device.type == "meta" else device, experts.float_dtype)

    def run(x: Tensor) -> Tensor:
        own: Any = spec.own_gate or (experts._apply_gate if spec.gated else experts.act_fn)
        x = x.flatten(1)
        return own(interleave(x) if spec.interleaved else x)

    want = run(h)
    for start, stop in pairwise(at):
        got = run(h[..., start:stop])
        same = got.shape == want[..., start:stop].shape
        if not same or not torch.allclose(got.float(), want[..., start:stop].float(), rtol=1e-2, atol=1e-3):
            raise ValueError("the gate of these experts does not act on each column by itself: they cannot be cut")

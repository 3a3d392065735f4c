"""What a rank keeps of weights that are read whole: other ranks' experts are not read, matrices are cut as they come.

E experts, N rows and K columns of one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..experts import QuantizedExperts
from ..formats import Codec, Format, QuantizedTensor
from ..linear import QuantizedLinear
from .collectives import Group
from .dense import Cut, bias_of, narrow_linear_
from .experts import Ranks, parallel_
from .modules import Part, dim_of, narrow_
from .slices import each_tensor, range_of, shard


class ExpertsShare:
    """streaming.Share of experts; made before the module is told of its part, which `join_` does."""

    def __init__(self, experts: QuantizedExperts, part: Part) -> None:
        self.spec, self.format, self.part = experts.spec, experts.quantization, part

    def index(self, expert: int) -> int | None:
        first, last = self.part.experts(self.spec.num_experts)
        return expert - first if first <= expert < last else None

    def codes(self, weight: str, matrix: Tensor) -> QuantizedTensor:
        p = self.part
        return quantize_part(self.format.weight, matrix, dim_of(self.spec, weight), p.tp_rank, p.tp_size, p.unit)

    def join_(self, experts: QuantizedExperts, group: Group) -> None:
        """Experts, whose parameters are those of the whole, become this rank's."""
        narrow_(experts, self.part)
        ranks = Ranks(Group(), group, group, self.part, self.spec.num_experts, self.spec.identities)
        parallel_(experts, ranks)

    @torch.no_grad()
    def cut_(self, experts: QuantizedExperts, codes: bool) -> None:
        """Of parameters that were loaded whole keep this rank's: biases, and `codes` that were not made here."""
        first, last = self.part.experts(self.spec.num_experts)
        for name, shards, _, _ in self.spec.matrices:
            dim = dim_of(self.spec, name)
            if (bias := experts._parameters.get(f"{name}_bias")) is not None:
                experts._parameters[f"{name}_bias"] = self.part.bias(bias, dim, shards)
            if codes:
                scale = experts.part(name, "input_scale")
                mine = each_tensor(_whole(experts, name, self.format), lambda t: t[first:last])
                experts._put(name, self.part.matrix(mine, dim, shards))
                if scale is not None:
                    experts._parameters[f"{name}_input_scale"] = nn.Parameter(scale.detach()[first:last].clone(), False)
        experts._mark()


class LinearShare:
    """streaming.Share of a Linear."""

    def __init__(self, linear: QuantizedLinear, cut: Cut) -> None:
        self.format, self.cut = linear.quantization, cut

    def index(self, expert: int) -> int | None:
        return expert

    def codes(self, weight: str, matrix: Tensor) -> QuantizedTensor:
        c = self.cut
        return quantize_part(self.format.weight, matrix, c.dim, c.group.rank, c.group.size, c.unit)

    def join_(self, linear: QuantizedLinear, group: Group) -> None:
        narrow_linear_(linear, self.cut)

    @torch.no_grad()
    def cut_(self, linear: QuantizedLinear, codes: bool) -> None:
        if linear.bias is not None:
            linear._parameters["bias"] = bias_of(linear.bias, self.cut)
        if codes:
            c, scale = self.cut, linear._parameters.get("weight_input_scale")
            mine = shard(_whole(linear, "weight", self.format), c.dim, c.group.rank, c.group.size, unit=c.unit)
            linear._put("weight", mine)
            linear._parameters["weight_input_scale"] = scale
        linear._mark()


def quantize_part(codec: Codec, matrix: Tensor, dim: int, rank: int, ranks: int, unit: int) -> QuantizedTensor:
    """This rank's part of codec.quantize(matrix), bit for bit: cut first where no scale is of more than a part."""
    if ranks == 1:
        return codec.quantize(matrix)
    whole_blocks = codec.block is not None and codec.block[dim] > 0 and codec.refined(unit) == codec
    if codec.block is None or (whole_blocks and not codec.global_scale):
        start, stop = range_of(matrix.shape[dim], rank, ranks, unit)
        return codec.quantize(matrix.narrow(dim, start, stop - start).contiguous())
    return shard(codec.quantize(matrix), dim, rank, ranks, unit=unit)


def _whole(module: QuantizedExperts | QuantizedLinear, name: str, fmt: Format) -> QuantizedTensor:
    q = module._get(name)
    return QuantizedTensor(q.qdata, q.scale, q.zero_point, q.global_scale, fmt.weight)

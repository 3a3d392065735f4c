"""What a rank keeps of weights that are read whole: other ranks' experts are not read, matrices are cut as they come.

E experts, N rows and K columns of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..experts import QuantizedExperts
from ..formats import Codec, QuantizedTensor
from ..linear import QuantizedLinear
from ..storage import PARTS
from .collectives import Group
from .dense import Cut, bias_of, narrow_linear_
from .experts import Ranks, parallel_
from .modules import Part, dim_of, narrow_
from .slices import each_tensor, range_of, shard


class ExpertsShare:
    """streaming.Share of experts; made before the module is told of its part, which `join_` does."""

    def __init__(self, experts: QuantizedExperts, part: Part) -> None:
        self.spec, self.format, self.part = experts.spec, experts.quantization, part
        self.shapes = {name: experts.code_shape(name) for name in experts.weight_names()}

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

    def tensor(self, key: str, t: Tensor) -> Tensor:
        """This rank's part of a parameter that holds codes or scales of the whole."""
        weight, part = _named(key, self.shapes)
        first, last = self.part.experts(self.spec.num_experts)
        q = _one(self.format.weight, self.shapes[weight], part, t)
        shards = self.spec.shards if weight == self.spec.up else 1
        mine = each_tensor(q, lambda t: t[first:last])
        return _of(self.part.matrix(mine, dim_of(self.spec, weight), shards), part, t[first:last])

    def cut_biases_(self, experts: QuantizedExperts) -> None:
        for name, shards, _, _ in self.spec.matrices:
            if (bias := experts._parameters.get(f"{name}_bias")) is not None:
                experts._parameters[f"{name}_bias"] = self.part.bias(bias, dim_of(self.spec, name), shards)
        experts._mark()


class LinearShare:
    """streaming.Share of a Linear."""

    def __init__(self, linear: QuantizedLinear, cut: Cut) -> None:
        self.format, self.cut = linear.quantization, cut
        self.shapes = {"weight": linear.code_shape("weight")}

    def index(self, expert: int) -> int | None:
        return expert

    def codes(self, weight: str, matrix: Tensor) -> QuantizedTensor:
        c = self.cut
        return quantize_part(self.format.weight, matrix, c.dim, c.group.rank, c.group.size, c.unit)

    def join_(self, linear: QuantizedLinear, group: Group) -> None:
        narrow_linear_(linear, self.cut)

    def tensor(self, key: str, t: Tensor) -> Tensor:
        c, (weight, part) = self.cut, _named(key, self.shapes)
        q = _one(self.format.weight, self.shapes[weight], part, t)
        return _of(shard(q, c.dim, c.group.rank, c.group.size, unit=c.unit), part, t)

    def cut_biases_(self, linear: QuantizedLinear) -> None:
        if linear.bias is not None:
            linear._parameters["bias"] = bias_of(linear.bias, self.cut)
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


def _named(key: str, weights: Iterable[str]) -> tuple[str, str]:
    """The weight that a parameter is of, and which part of it: "" for codes."""
    found = [(w, part) for w in weights for part in ("", *PARTS) if key == (f"{w}_{part}" if part else w)]
    return found[0]


def _one(codec: Codec, shape: tuple[int, ...], part: str, t: Tensor) -> QuantizedTensor:
    """A part of a quantized weight alone; where it is not the codes, they are only a shape."""
    codes = t if not part else torch.empty(shape, dtype=torch.uint8, device="meta")
    return QuantizedTensor(codes, t if part == "scale" else None, t if part == "zero_point" else None, None, codec)


def _of(q: QuantizedTensor, part: str, whole: Tensor) -> Tensor:
    """The part again; what is one number for a matrix, or for its input, is every rank's."""
    found = {"": q.qdata, "scale": q.scale, "zero_point": q.zero_point}.get(part)
    return whole.clone() if found is None else found

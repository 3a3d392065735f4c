"""Linears and embeddings of which a rank holds rows or columns. N output features, K input features, V vocabulary."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linear import QuantizedLinear
from ..storage import carry_over
from .collectives import Group, join, largest, shared, total
from .slices import range_of, shard, shard_bias
from .states import OfRank


class Cut(NamedTuple):
    """This rank's slice of a Linear: `dim` -2 rows, -1 columns, in multiples of `unit` of `size`.

    whole: the other side is whole, too: rows are joined, columns are taken from an input that every rank has.
    """

    group: Group
    dim: int
    size: int
    unit: int
    whole: bool = False

    def span(self, rank: int | None = None) -> tuple[int, int]:
        return range_of(self.size, self.group.rank if rank is None else rank, self.group.size, self.unit)

    def widths(self) -> tuple[int, ...]:
        spans = [self.span(rank) for rank in range(self.group.size)]
        return tuple(stop - start for start, stop in spans)

    def said(self) -> str:
        return f"{'rows' if self.dim == -2 else 'columns'} of rank {self.group.rank} of {self.group.size}"

    def uneven(self) -> bool:
        return len(set(self.widths())) > 1


class ParallelLinear(OfRank, nn.Linear):
    """y = x W^T + bias, as of the whole.

    rows: x is the same on every rank, y is this rank's features, or joined. columns: x is this rank's features, or cut
    here; y is summed, and the same on every rank.
    """

    ranks: Cut

    def forward(self, x: Tensor) -> Tensor:
        cut = self.ranks
        if cut.dim == -2:
            y = super().forward(shared(x, cut.group))
            return join(y, cut.group, cut.widths()) if cut.whole else y
        if cut.whole:
            start, stop = cut.span()
            x = shared(x, cut.group)[..., start:stop]
        return total(super().forward(x), cut.group)

    def static_scale(self, x: Tensor) -> Tensor | None:
        """Of a QuantizedLinear: one scale for all of x is that of the columns of all ranks."""
        found: Tensor | None = super().static_scale(x)  # type: ignore[misc]
        computes: Any = self.computes
        codec = computes.activation
        if found is not None or self.ranks.dim == -2 or codec is None or codec.block != (0, 0):
            return found
        amax = x.detach().float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)
        scale: Tensor = codec.scale_rule(largest(amax, self.ranks.group), codec.element)
        return scale

    def said(self) -> str:
        return self.ranks.said()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.said()}"


class ParallelEmbedding(OfRank, nn.Embedding):
    """Rows of ids in this rank's part of the vocabulary, summed over the ranks."""

    ranks: Cut

    def said(self) -> str:
        return self.ranks.said()

    def forward(self, input: Tensor) -> Tensor:
        start, stop = self.ranks.span()
        mine = (input >= start) & (input < stop)
        found = super().forward(torch.where(mine, input - start, 0))
        return total(torch.where(mine[..., None], found, 0.0), self.ranks.group)


@torch.no_grad()
def slice_of_linear(linear: nn.Linear, cut: Cut) -> nn.Linear:
    """A module that holds this rank's slice; `linear` stays as it is. The bias of columns is rank 0's."""
    new = carry_over(linear, type(linear).__new__(type(linear)))
    g = cut.group
    if isinstance(linear, QuantizedLinear):
        new._put("weight", shard(linear._get("weight"), cut.dim, g.rank, g.size, unit=cut.unit))  # type: ignore[operator]
        if (scale := linear.part("weight", "input_scale")) is not None:
            new._parameters["weight_input_scale"] = nn.Parameter(scale.detach().clone(), False)
    else:
        new._parameters["weight"] = slice_of_parameter(linear.weight, cut.dim, cut)
    if linear.bias is not None:
        new._parameters["bias"] = bias_of(linear.bias, cut)
    return narrow_linear_(new, cut)


def bias_of(bias: nn.Parameter, cut: Cut) -> nn.Parameter:
    mine = shard_bias(bias.detach(), cut.dim, cut.group.rank, cut.group.size, unit=cut.unit)
    return nn.Parameter(mine, requires_grad=bias.requires_grad and (cut.dim == -2 or cut.group.rank == 0))


def narrow_linear_(linear: nn.Linear, cut: Cut) -> nn.Linear:
    """Have a Linear say that it holds this slice, and know of the other ranks; its parameters stay as they are."""
    start, stop = cut.span()
    setattr(linear, "out_features" if cut.dim == -2 else "in_features", stop - start)
    if isinstance(linear, QuantizedLinear):
        linear.format = linear.quantization.refined(cut.unit).name
    linear.__class__ = _parallel(linear, ParallelLinear)
    linear.ranks = cut  # type: ignore[assignment]
    return linear


@torch.no_grad()
def slice_of_embedding(embedding: nn.Embedding, cut: Cut) -> nn.Embedding:
    """A module that holds this rank's part of the vocabulary."""
    new = carry_over(embedding, type(embedding).__new__(type(embedding)))
    new._parameters["weight"] = slice_of_parameter(embedding.weight, -2, cut)
    (start, stop), padding = cut.span(), embedding.padding_idx
    new.num_embeddings = stop - start
    new.padding_idx = padding - start if padding is not None and start <= padding < stop else None
    new.__class__ = _parallel(embedding, ParallelEmbedding)
    new.ranks = cut  # type: ignore[assignment]
    return new


def slice_of_parameter(weight: Tensor, dim: int, cut: Cut) -> nn.Parameter:
    """A copy of this rank's slice."""
    start, stop = cut.span()
    return nn.Parameter(weight.detach().narrow(dim, start, stop - start).clone(), requires_grad=weight.requires_grad)


def _parallel(module: nn.Module, mixin: Any) -> Any:
    cls: Any = type(module)
    return _parallel_class(cls, mixin)


@cache
def _parallel_class(base: Any, mixin: Any) -> Any:
    return type(f"Parallel{base.__name__}", (mixin, base), {})

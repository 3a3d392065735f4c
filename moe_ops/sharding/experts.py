"""Experts of which a rank holds a part, called as the whole: results are summed over the ranks.

T tokens, A experts per token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experts import QuantizedExperts, _new
from .collectives import Group, gather, largest, scatter_total, shared, total
from .modules import Part
from .slices import local_ids
from .states import OfRank


class Ranks(NamedTuple):
    """Who holds the other parts. `own`: ranks that have tokens of their own; `same`: ranks that see the same tokens."""

    own: Group
    same: Group
    every: Group
    part: Part
    num_experts: int
    identities: int


class ParallelExperts(OfRank, QuantizedExperts):
    """Takes ids of all experts. What other ranks hold, and ids of nobody, add zero here."""

    ranks: Ranks

    def routed(self, x: Tensor, ids: Tensor, weights: Tensor, on_input: bool = False) -> Tensor:
        """x (T, H), ids and weights (T, A), the same on every rank of `same` -> (T, H), of all experts.

        Ranks of `own` have as many tokens each: rows, ids and weights are gathered, and sums handed back to whom they
        are of.
        """
        r = self.ranks
        x, weights = (shared(gather(t, r.own), r.same) for t in (x, weights))
        identities = 0 if r.part.tp_rank else r.identities
        ids = local_ids(gather(ids, r.own), r.num_experts, r.part.ep_rank, r.part.ep_size, identities=identities)
        out = super().routed(x, ids, weights, on_input)
        return scatter_total(total(out, r.same), r.own)

    def as_one_op(self) -> bool:
        return not self._one_scale_for_all()

    def static_scale(self, name: str, x: Tensor, offsets: Tensor, rows: Mapping[str, Any]) -> Tensor | None:
        """Where there is one scale for all rows, it is that of the rows and columns of all ranks."""
        if self.part(name, "input_scale") is not None or not self._one_scale_for_all():
            return self.part(name, "input_scale")
        codec = self.computes.activation
        assert codec is not None and codec.scale_rule is not None
        used = torch.arange(rows["rows_in"].shape[0] if "rows_in" in rows else x.shape[0], device=x.device)
        used = used < offsets[-1]  # sorted rows that some expert of this rank reads
        if "rows_in" in rows:
            token = (rows["rows_in"] // rows["top_k"]).long()
            used = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device).scatter_reduce(
                0, token, used.int(), "amax") > 0  # fmt: skip
        amax = torch.where(used[:, None], x.detach().float().abs(), 0.0).amax()
        scale = codec.scale_rule(largest(amax, self.ranks.every), codec.element)
        return scale.expand(offsets.shape[0] - 1)

    def _one_scale_for_all(self) -> bool:
        """Activations are quantized with one scale, from their values."""
        codec = self.computes.activation
        dynamic = any(self.part(name, "input_scale") is None for name in self.weight_names())
        return codec is not None and codec.block == (0, 0) and dynamic

    def said(self) -> str:
        p = self.ranks.part
        return f"ep={p.ep_rank} of {p.ep_size}, tp={p.tp_rank} of {p.tp_size}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.said()}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_parallel, *reduced[1:]


def parallel_(experts: QuantizedExperts, ranks: Ranks) -> QuantizedExperts:
    """Have experts that hold a rank's part know of the others."""
    cls: Any = type(experts)
    experts.__class__ = _parallel_class(cls)
    experts.ranks = ranks
    return experts


@cache
def _parallel_class(base: Any) -> Any:
    name = f"Parallel{base.__name__.removeprefix('Quantized')}"
    return type(name, (ParallelExperts, base), {})


def _new_parallel(original: Any, call: str) -> QuantizedExperts:
    new = _new(original, call)
    cls: Any = type(new)
    new.__class__ = _parallel_class(cls)
    return new

"""Experts that are called in another way than (hidden, ids, weights): one subclass each, and CALLS, the list of them.

T tokens, A experts per token, E experts, H hidden size, R rows sorted by expert, N x K one projection.
"""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from .experts import QuantizedExperts
from .storage import autocast


class MaskedExperts(QuantizedExperts):
    """Called with ids as one-hot rows; a row of zeros is a slot without an expert."""

    def forward(self, hidden: Tensor, mask: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden (T, H), mask (T, A, E), topk_weights (T, A) -> (T, H)."""
        ids = torch.where(mask.any(-1), mask.int().argmax(-1), -1)
        return super().forward(hidden, ids, topk_weights)


class ScoredExperts(QuantizedExperts):
    """Called with a weight for every expert, of which those of the ids count."""

    def forward(self, hidden: Tensor, topk_ids: Tensor, scores: Tensor) -> Tensor:
        """hidden (T, H), topk_ids (T, A), scores (T, E) -> (T, H)."""
        return super().forward(hidden, topk_ids, scores.gather(-1, topk_ids))


class SwappedScoredExperts(ScoredExperts):
    """The same, with the arguments in another order."""

    def forward(self, hidden: Tensor, scores: Tensor, topk_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden, topk_ids, scores)


class DenseExperts(QuantizedExperts):
    """Called with the rows of every expert, (E * T, H) -> (E * T, H), the first T the first expert's.

    A block whose routing is known does not call it: `routed` computes only what is routed.
    """

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        x = hidden.reshape(-1, self.spec.hidden_size)
        num_experts = getattr(self, self.spec.up).shape[0]
        ids = torch.arange(num_experts, device=x.device).repeat_interleave(x.shape[0] // num_experts)[:, None]
        return self.routed(x, ids, torch.ones_like(ids, dtype=torch.float32)).view(hidden.shape)


class GroupedLinear(QuantizedExperts):
    """One projection alone: rows that are sorted by expert, and how many each expert has."""

    def forward(self, rows: Tensor, sizes: Tensor | list[int]) -> Tensor:  # type: ignore[override]
        """rows (R, K), sizes (E,) -> (R, N) in the dtype of the rows, under autocast in its."""
        self.check_frozen()
        counts = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes)  # a list of unbacked ones, when compiled
        offsets = nn.functional.pad(counts.to(rows.device).cumsum(0), (1, 0)).int()  # (E + 1,)
        return self._project(autocast(rows), self.spec.up, offsets)


CALLS: dict[str, type[QuantizedExperts]] = {
    "topk": QuantizedExperts,
    "items": QuantizedExperts,  # experts in a list, that their block calls one by one: it is routed anew
    "mask": MaskedExperts,
    "scores": ScoredExperts,
    "swapped scores": SwappedScoredExperts,
    "dense": DenseExperts,
    "sizes": GroupedLinear,
}


@cache
def swapped_class(original: Any, base: Any) -> type[QuantizedExperts]:
    """The class that stands in for `original`, and derives from it."""
    body: dict[str, Any] = {"original_class": original, "forward": _under_its_names(base.forward, original)}
    if hasattr(original, "__len__"):  # of a list whose children are gone
        body["__len__"] = lambda self: self.spec.num_experts
    return type(f"Quantized{original.__name__}", (base, original), body)


def _under_its_names(forward: Any, original: Any) -> Any:
    """forward, whose arguments may be named as in the original class."""
    ours, its = (
        [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        for f in (forward, original.forward)
    )
    names = dict(zip(its, ours, strict=False))

    @wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, *args, **{names.get(k, k): v for k, v in kwargs.items()})

    return called

"""Adds to a quantized weight, in place: dequantize, add, quantize again, matrix by matrix; and takes it back.

The error that quantizing again makes is measured, and said once for all modules that are merged in one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import dequantize_weight
from ..storage import PARTS, QuantizedModule
from ..streaming import Stream

Saved = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Of one weight, squared Frobenius norms: of what should be stored, of what was added, and of what is off now."""

    name: str
    format: str
    wanted: float
    added: float
    off: float

    @property
    def error(self) -> float:
        """What is off, relative to the merged weight."""
        return _ratio(self.off, self.wanted)


class _InFp32(Stream):
    """Sums are not rounded to the type of the float model before they are quantized."""

    def dtype(self, weight: str) -> torch.dtype:
        return torch.float32


@torch.no_grad()
def save(module: QuantizedModule, weight: str) -> Saved:
    """Codes and scales of a weight, copied to main memory."""
    keys = [weight, *(f"{weight}_{part}" for part in PARTS)]
    found = {key: module._parameters.get(key) for key in keys}
    return {key: p.detach().to("cpu", copy=True) for key, p in found.items() if p is not None}


@torch.no_grad()
def restore(module: QuantizedModule, saved: Saved) -> None:
    """Put codes and scales back, bit for bit, into the module's storage. ValueError where they do not fit."""
    for key, t in saved.items():
        p = module._parameters.get(key)
        if p is None or p.shape != t.shape or p.dtype != t.dtype:
            raise ValueError(f"{key} was replaced since the merge: the codes of before do not fit it any more")
    for key, t in saved.items():
        module.get_parameter(key).copy_(t)


@torch.no_grad()
def add_(
    module: QuantizedModule, weight: str, delta: Callable[[int], Tensor], before: Saved, name: str = ""
) -> Cost:
    """weight[e] = quantize(dequantize(weight[e]) + delta(e)), delta (S*N, K), in the storage that the weight has.

    One matrix in fp32 is all that is held beside it. Raises ValueError for sums that are not finite: the codes are then
    those of `before`, which is what `save` gave.
    """
    stream, layout = _InFp32(module, name), module.layouts()[weight]
    norms = torch.zeros(3, dtype=torch.float64, device=module.get_parameter(weight).device)
    try:
        for e in range(layout.experts or 1):
            d = delta(e).float()  # (S*N, K)
            want = _matrix(module, weight, e) + d
            for s, matrix in enumerate(want.unflatten(0, (layout.shards, layout.n))):
                stream.write(weight, e, s, matrix)
            off = _matrix(module, weight, e) - want
            norms += torch.stack([t.double().square().sum() for t in (want, d, off)])
    except BaseException:  # interrupted too: a weight is wholly old or wholly new
        restore(module, before)
        raise
    return Cost(stream.label(weight), module.format, *norms.tolist())


def _matrix(module: QuantizedModule, weight: str, e: int) -> Tensor:
    """(S*N, K) in fp32: what the codes of one expert, or of a Linear, stand for."""
    q, layout = module._get(weight), module.layouts()[weight]
    if layout.experts is None:
        return q.codec.dequantize(q).float()
    return dequantize_weight(q.expert(e), layout.shards, torch.float32)[0]


_costs: ContextVar[list[Cost] | None] = ContextVar("costs", default=None)


def tell(cost: Cost) -> None:
    """Say what a merge cost: now, or with the others at the end of `report`."""
    costs = _costs.get()
    if costs is None:
        warnings.warn(describe([cost]), stacklevel=3)
    else:
        costs.append(cost)


@contextmanager
def report() -> Iterator[None]:
    """Merges within are told of in one warning."""
    token = _costs.set([])
    try:
        yield
        costs = _costs.get()
        if costs:
            warnings.warn(describe(costs), stacklevel=4)
    finally:
        _costs.reset(token)


def describe(costs: list[Cost]) -> str:
    wanted, added, off = (sum(getattr(c, key) for c in costs) for key in ("wanted", "added", "off"))
    worst = max(costs, key=lambda c: c.error)
    formats = ", ".join(dict.fromkeys(c.format for c in costs))
    most = f" ({worst.error:.2%} at most, in {worst.name})" if len(costs) > 1 else ""
    return (
        f"merged an adapter into {len(costs)} quantized weight{'s' * (len(costs) > 1)} ({formats}): quantizing again"
        f" put a relative error of {_ratio(off, wanted):.2%} on the merged weights{most}; it is"
        f" {_ratio(off, added):.2f} times as large as what the adapter adds"
    )


def _ratio(a: float, b: float) -> float:
    return (a / b) ** 0.5 if b else 0.0

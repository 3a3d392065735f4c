"""Sums over the layers of two models: errors of experts on the same input, of the residual stream, and other routes.

T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .report import LayerQuality
from .taps import Arguments, Tap, find_taps, first_tensor


@dataclass
class Error:
    """|difference|^2 over |reference|^2."""

    noise: float = 0.0
    signal: float = 0.0

    def add(self, reference: Tensor, model: Tensor, mask: Tensor | None) -> None:
        """(..., H) each; mask: which of the T rows count."""
        if reference.shape != model.shape:
            raise ValueError(f"outputs {tuple(reference.shape)} and {tuple(model.shape)} cannot be compared")
        want = reference.to(model.device).flatten(0, -2).float()  # (T, H)
        difference = model.flatten(0, -2).float() - want
        if mask is not None and len(mask) == len(want):
            kept = mask.to(want.device)
            want, difference = want[kept], difference[kept]
        self.noise += float(difference.norm()) ** 2
        self.signal += float(want.norm()) ** 2

    @property
    def relative(self) -> float | None:
        """None where nothing was added, or zeros alone."""
        if not self.noise:
            return 0.0 if self.signal else None
        return (self.noise / self.signal) ** 0.5 if self.signal else float("inf")


@dataclass
class _Sums:
    experts: Error = field(default_factory=Error)
    tokens: int = 0
    flipped: int = 0
    calls: list[int] = field(default_factory=lambda: [0, 0])  # in the reference, in the model


class LayerSums:
    """The experts of two models, by name. For each batch: `of_reference`, then `of_model`.

    Between the two it holds the reference's choices and the outputs of its layers, and nothing from batch to batch.
    """

    def __init__(self, reference: Any, model: nn.Module) -> None:
        self.taps, self.peers, unread = {}, {}, {}  # type: ignore[var-annotated]
        if isinstance(reference, nn.Module):
            self.taps, unread = find_taps(reference)
            self.peers, unread_too = find_taps(model)
            unread |= unread_too
        self.notes = [f"{name}: {why}" for name, why in unread.items()]
        for name in sorted({*self.taps} ^ {*self.peers}):
            self.notes.append(f"{name}: experts in only one of the two models")
        self.names = [name for name in self.taps if name in self.peers]
        for name in self.names:
            _check_alike(self.taps[name], self.peers[name])
            if (self.taps[name].routing is None) != (self.peers[name].routing is None):
                self.notes.append(f"{name}: run by its block in only one of the two models: no error on the same input")
        layers = {tap.layer: self.peers[n].layer for n, tap in self.taps.items() if n in self.peers}
        self._modules = [dict(m.named_modules()) if isinstance(m, nn.Module) else {} for m in (reference, model)]
        self._layers = [layer for layer, other in layers.items() if layer is not None and layer == other]
        self.sums = {name: _Sums() for name in self.names}
        self.streams = {layer: Error() for layer in self._layers}
        self._chosen: dict[str, list[Tensor | None]] = {}
        self._outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def of_reference(self, mask: Tensor | None) -> Iterator[None]:
        """While the reference runs: each call of its experts is repeated with the model's. mask (B, S)."""
        self._chosen, self._outputs = {n: [] for n in self.names}, {n: [] for n in self._layers}
        mask = None if mask is None else mask.flatten()

        def see(name: str) -> Callable[[Arguments, Tensor | None], None]:
            tap, peer = self.taps[name], self.peers[name]

            def call(given: Arguments, out: Tensor | None) -> None:
                self.sums[name].calls[0] += 1
                self._chosen[name].append(tap.chosen(given))
                if (tap.routing is None) == (peer.routing is None):
                    self.sums[name].experts.add(tap.run(given) if out is None else out, peer.run(given), mask)

            return call

        hooks = [h for n in self.names for h in self.taps[n].on_call(see(n))]
        with _removed(hooks + self._watched(0, lambda layer, out: self._outputs[layer].append(out))):
            yield

    @contextmanager
    def of_model(self, mask: Tensor | None) -> Iterator[None]:
        """While the model runs on the same batch."""
        mask = None if mask is None else mask.flatten()

        def see(name: str) -> Callable[[Arguments, Tensor | None], None]:
            def call(given: Arguments, out: Tensor | None) -> None:
                self.sums[name].calls[1] += 1
                earlier, mine = self._chosen[name], self.peers[name].chosen(given)
                theirs = earlier.pop(0) if earlier else None
                if mine is not None and theirs is not None and mine.shape == theirs.shape:
                    flipped = (mine.cpu() != theirs.cpu()).any(-1)  # (T,)
                    flipped = flipped[mask] if mask is not None and len(mask) == len(flipped) else flipped
                    self.sums[name].tokens += len(flipped)
                    self.sums[name].flipped += int(flipped.sum())

            return call

        def arrived(layer: str, out: Tensor) -> None:
            if self._outputs[layer]:
                self.streams[layer].add(self._outputs[layer].pop(0), out, mask)

        with _removed([h for n in self.names for h in self.peers[n].on_call(see(n))] + self._watched(1, arrived)):
            yield

    def report(self) -> tuple[tuple[LayerQuality, ...], tuple[str, ...]]:
        """A row for each experts module, and notes on what could not be measured."""
        rows, notes = [], list(self.notes)
        for name, sums in self.sums.items():
            if sums.calls[0] != sums.calls[1] or not sums.calls[0]:
                notes.append(f"{name}: called {sums.calls[0]} times in the reference, {sums.calls[1]} in the model")
            stream = self.streams.get(self.taps[name].layer or "")
            rows.append(LayerQuality(
                name=name, error=sums.experts.relative, stream_error=stream.relative if stream else None,
                flips=sums.flipped / sums.tokens if sums.tokens else None,
            ))  # fmt: skip
        return tuple(rows), tuple(notes)

    def _watched(self, which: int, see: Callable[[str, Tensor], None]) -> list[Any]:
        """Hooks on decoder layers."""

        def hook(layer: str) -> Callable[..., None]:
            def left(module: nn.Module, args: Arguments, out: Any) -> None:
                x = first_tensor(out)
                if x is not None:
                    see(layer, x)

            return left

        return [self._modules[which][layer].register_forward_hook(hook(layer)) for layer in self._layers]


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_alike(one: Tap, other: Tap) -> None:
    sizes = [(t.spec.num_experts, t.spec.hidden_size) for t in (one, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{one.name}: {sizes[0][0]} experts of hidden size {sizes[0][1]} in the reference, {sizes[1][0]} of"
            f" {sizes[1][1]} in the model"
        )

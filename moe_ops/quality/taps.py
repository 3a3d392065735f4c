"""Taps: what a model's experts modules are called with, whatever the way, found by structure as `quantize_` finds them.

Experts with a call of their own are watched there. The others (a list of MLPs, or every expert on every row) are run by
their block: there the block is watched, and its routing, as it was read, gives ids and weights.

T tokens, A experts per token, E experts, H hidden size, R rows sorted by expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import ExpertsSpec, Routing
from ..blocks import RoutedBlock, experts_of
from ..experts import QuantizedExperts
from ..targets import find_experts, places

Arguments = tuple[Any, ...]


@dataclass
class Tap:
    """An experts module. `block`, `routing`: of experts that are run by their block. `layer`: the decoder layer."""

    name: str
    module: nn.Module
    spec: ExpertsSpec
    block: nn.Module | None
    routing: Routing | None
    layer: str | None
    around: dict[str, nn.Module]  # modules that it is in, the innermost first
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of those, in the call that is running

    def on_call(self, see: Callable[[Arguments, Tensor | None], None]) -> list[Any]:
        """Hooks that hand each call's arguments to `see`, with the output where the module itself was called."""
        if self.routing is not None:
            assert self.block is not None

            def routed(block: nn.Module, args: Arguments, kwargs: dict[str, Any]) -> None:
                assert self.routing is not None
                hidden = first_tensor((*args, *kwargs.values()))
                assert hidden is not None
                ids, weights, _ = self.routing.route(block, hidden)
                see((hidden.reshape(-1, hidden.shape[-1]), ids, weights), None)

            return [self.block.register_forward_pre_hook(routed, with_kwargs=True)]

        def called(module: nn.Module, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
            see(self._positional(args, kwargs), out)

        return [self.module.register_forward_hook(called, with_kwargs=True), *self._around()]

    def chosen(self, given: Arguments) -> Tensor | None:
        """(T, E + 1) bool: which experts each token chose, the last for ids of none; None where a call does not say."""
        return CHOSEN["topk" if self.routing is not None else self.spec.call](self, given)

    def run(self, given: Arguments) -> Tensor:
        """What the experts make of a call's arguments. No hook of the module itself runs."""
        device = next(self.module.parameters()).device
        given = tuple(t.to(device) if isinstance(t, Tensor) else t for t in given)
        if self.routing is None:
            return self.module.forward(*given)
        if isinstance(self.module, QuantizedExperts):
            x, ids, weights = given
            return self.module.routed(x, ids, weights, on_input=self.routing.on_input)
        return (_dense if self.spec.call == "dense" else _one_by_one)(self, *given)

    def _positional(self, args: Arguments, kwargs: dict[str, Any]) -> Arguments:
        original: Any = getattr(self.module, "original_class", None) or type(self.module)  # whose names callers use
        return tuple(inspect.signature(original.forward).bind(self.module, *args, **kwargs).arguments.values())[1:]

    def _around(self) -> list[Any]:
        """Sorted rows do not say which token they are of: for that, the inputs of the modules around are needed."""
        if self.spec.call != "sizes":
            return []

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Arguments, kwargs: dict[str, Any]) -> None:
                x = first_tensor((*args, *kwargs.values()))
                if x is not None and x.shape[-1] == self.spec.hidden_size:
                    self.inputs[name] = x.reshape(-1, x.shape[-1])

            return hook

        return [m.register_forward_pre_hook(keep(name), with_kwargs=True) for name, m in self.around.items()]


def find_taps(model: nn.Module) -> tuple[dict[str, Tap], dict[str, str]]:
    """{name: tap} of experts modules, and {name: why not} of those that cannot be read."""
    good, bad = find_experts(places(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    taps = {}
    for place, spec in good:
        block = place.parents[0][0] if place.parents else None
        routing = place.routing
        if isinstance(block, RoutedBlock) and experts_of(block) is place.module:
            routing = block._moe_ops_routing
        parts = place.name.split(".")
        around = {n: modules[n] for n in (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))}
        layers = [n for n, m in around.items() if _is_layer(modules, n) and type(m).forward is not nn.Module.forward]
        taps[place.name] = Tap(place.name, place.module, spec, block, routing, layers[-1] if layers else None, around)
    return taps, {place.name: why for place, why in bad}


def first_tensor(values: Any) -> Tensor | None:
    """The first floating-point tensor among arguments, or in what a module returned."""
    for value in (values,) if isinstance(values, Tensor) else values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def _is_layer(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules[name.rpartition(".")[0]], nn.ModuleList)


def _of_ids(tap: Tap, ids: Tensor) -> Tensor:
    num_experts = tap.spec.num_experts + tap.spec.identities
    ids = ids.reshape(-1, ids.shape[-1]).long()  # (T, A)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    return torch.zeros(len(ids), num_experts + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def _of_sizes(tap: Tap, given: Arguments) -> Tensor | None:
    """Of (R, H) sorted rows: the token of each is the one with the same values, in the input of a module around."""
    rows, sizes = given[0], torch.as_tensor(given[1])
    owner = torch.arange(len(sizes), device=rows.device).repeat_interleave(sizes.to(rows.device))  # (R,)
    for name in tap.around:
        x = tap.inputs.get(name)
        if x is None or x.dtype != rows.dtype or rows.shape[-1] != x.shape[-1] or len(rows) % max(len(x), 1):
            continue
        same = torch.unique(torch.cat([x, rows]), dim=0, return_inverse=True)[1]
        token, row = same[: len(x)], same[len(x) :]
        chosen = torch.zeros(len(same), tap.spec.num_experts + 1, dtype=torch.bool, device=rows.device)
        if bool(torch.isin(row, token).all()):
            chosen[row, owner] = True
            return chosen[token]
    return None


CHOSEN: dict[str, Callable[[Tap, Arguments], Tensor | None]] = {  # by how experts are called, as `calls.CALLS`
    "topk": lambda tap, given: _of_ids(tap, given[1]),
    "mask": lambda tap, given: nn.functional.pad(given[1].flatten(0, -3).bool().any(1), (0, 1)),
    "scores": lambda tap, given: _of_ids(tap, given[1]),
    "swapped scores": lambda tap, given: _of_ids(tap, given[2]),
    "dense": lambda tap, given: None,
    "sizes": _of_sizes,
}


def _one_by_one(tap: Tap, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x (T, H), ids and weights (T, A) -> (T, H): float experts in a list; ids after them give back their input."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        if e < tap.spec.num_experts + tap.spec.identities:
            y = tap.module.get_submodule(tap.spec.keys[e])(x[token]) if e < tap.spec.num_experts else x[token]
            out.index_add_(0, token, y.float() * weights[token, slot, None].float())
    return out.to(x.dtype)


def _dense(tap: Tap, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same of experts that all run on every row, weighed before."""
    scores = weights.new_zeros(len(x), tap.spec.num_experts).scatter(1, ids, weights)  # (T, E)
    rows = (x[None] * scores.T[:, :, None].to(x.dtype)).flatten(0, 1)  # (E * T, H)
    return tap.module.forward(rows).reshape(-1, *x.shape).sum(0)

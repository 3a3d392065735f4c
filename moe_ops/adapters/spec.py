"""ExpertsSpec: what an experts module was found to hold, and the way from there to the canonical layout and back.

E experts, H hidden size (or the latent size that the block works in), I intermediate size, S shards (gate and up).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import Gate, deinterleave, interleave

FLAGS = ("is_transposed", "is_concatenated")
POST_NORM = "post_expert_norm"


class CannotAdapt(ValueError):
    """The module holds experts, in a layout that no rule explains."""


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """An experts module as it was found.

    `up` and `down` are the names of the parameters that are stored, canonical: (E, S*I, H) and (E, H, I). `down` is
    empty for a projection that stands alone: (E, I, H), no activation. In the float module they have the same names,
    unless `up_from` and `down_from` name others (relative, one per shard, or one that holds all): stacks of all
    experts, (E, N, K) or (`flat`) (E * N, K), or, where a name has "{}" in it, one matrix per module in `keys`.

    call: how the module is called, a key of `calls.CALLS`.
    gate: what lies between the projections; None when `own_gate`, or the module's `_apply_gate` or `act_fn`, has to be
        called.
    identities: ids E..E+identities-1 add their weight times the input. They have rows of `up`, without meaning.
    dropout, row_dropout: of the activations, and of the weighted rows; only the latter also scales when not training.
    checked: the reading was compared with what the module itself computes, or follows from the flags.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    up: str = "gate_up_proj"
    down: str = "down_proj"
    up_from: tuple[str, ...] = ()
    down_from: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    call: str = "topk"
    gated: bool = True
    transposed: bool = False
    down_transposed: bool | None = None
    interleaved: bool = False
    has_bias: bool = False
    post_norm: str | None = None
    gate: Gate | None = None
    own_gate: Any = None
    flat: bool = False
    identities: int = 0
    dropout: float = 0.0
    row_dropout: float = 0.0
    trainable: bool = True
    checked: bool = True
    flags: tuple[tuple[str, bool], ...] = ()

    @property
    def shards(self) -> int:
        """Matrices stored above each other in the first projection: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def matrices(self) -> tuple[tuple[str, int, int, int], ...]:
        """(parameter name, shards, N, K) of what is stored; N rows per shard."""
        h, i = self.hidden_size, self.intermediate_size
        up = (self.up, self.shards, i, h)
        return (up, (self.down, 1, h, i)) if self.down else (up,)

    def canonical(self, name: str, weight: Tensor) -> Tensor:
        """One projection, or a shard of it, as found -> (..., S*N, K), gate rows first. A view where it can be."""
        w = weight.transpose(-1, -2) if self.transposes(name) else weight
        if name == self.up and self.interleaved:
            w = deinterleave(w.transpose(-1, -2)).transpose(-1, -2)
        return w

    def original(self, name: str, weight: Tensor) -> Tensor:
        """Inverse of `canonical`."""
        if name == self.up and self.interleaved:
            weight = interleave(weight.transpose(-1, -2)).transpose(-1, -2)
        return weight.transpose(-1, -2) if self.transposes(name) else weight

    def canonical_bias(self, name: str, bias: Tensor) -> Tensor:
        """Bias (E, S*N) as found -> gate first."""
        return deinterleave(bias) if name == self.up and self.interleaved else bias

    def original_bias(self, name: str, bias: Tensor) -> Tensor:
        return interleave(bias) if name == self.up and self.interleaved else bias

    def paths(self, name: str) -> tuple[str, ...]:
        """Where the float module holds a stored parameter; "{}" stands for each of `keys`."""
        return (self.up_from if name == self.up else self.down_from) or (name,)

    @property
    def moved(self) -> bool:
        """The float module holds its weights under other names than they are stored under."""
        return bool(self.up_from)

    def floats(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of all float matrices of the module as found."""
        names = [each for name, *_ in self.matrices for path in self.paths(name) for each in self._each(path)]
        return [(name, module.get_parameter(name)) for name in names]

    def expert(self, module: nn.Module, name: str, e: int) -> Tensor:
        """One expert's matrix of the module as found -> (S*N, K), canonical."""
        parts = [self.canonical(name, self._one(module, path, e)) for path in self.paths(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bias(self, module: nn.Module, name: str) -> Tensor | None:
        """Bias of the module as found -> (E, S*N), gate first; None without."""
        if not self.has_bias:
            return None
        if not self.keys:
            return self.canonical_bias(name, module.get_parameter(f"{name}_bias"))
        paths = [_bias_of(path) for path in self.paths(name)]
        parts = [torch.stack([module.get_parameter(n) for n in self._each(path)]) for path in paths]
        return torch.cat(parts, -1)

    def take_out(self, module: nn.Module) -> None:
        """Remove the float weights from a copy of the module that holds them under other names than they are stored.

        Children that held some are kept aside, emptied: `put_back` makes them modules again.
        """
        if not self.moved:
            return
        order, aside = tuple(module._modules), {}
        for path in self._all_paths():
            for child, _, _ in (name.partition(".") for name in self._each(path)):
                if child in module._modules:
                    aside[child] = _emptied(module.__dict__["_modules"].pop(child))
        module.__dict__[_ASIDE] = (order, aside)

    def put_back(self, module: nn.Module, floats: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        """{stored name: (E, S*N, K) and bias (E, S*N), canonical} -> parameters of the float module, as found."""
        if self.moved:
            order, aside = module.__dict__.pop(_ASIDE)
            children = {**module._modules, **{key: _emptied(child) for key, child in aside.items()}}
            module.__dict__["_modules"] = {key: children[key] for key in order}
        for name, (weight, bias) in floats.items():
            paths = self.paths(name)
            for path, part in zip(paths, weight.chunk(len(paths), 1), strict=True):
                w = self.original(name, part)
                if name == self.up and self.identities and not self.keys:  # their rows never had a meaning
                    w = torch.cat([w, w.new_zeros(self.identities, *w.shape[1:])])
                self._spread(module, path, w.flatten(0, 1) if self.flat else w)
            if bias is not None and self.keys:
                for path, part in zip(paths, bias.chunk(len(paths), 1), strict=True):
                    self._spread(module, _bias_of(path), part)

    def transposes(self, name: str) -> bool:
        """The float module holds this projection as (..., K, S*N)."""
        own = self.down_transposed if name == self.down else None
        return self.transposed if own is None else own

    def _each(self, path: str) -> list[str]:
        return [path.format(key) for key in self.keys] if "{}" in path else [path]

    def _all_paths(self) -> list[str]:
        paths = [path for name, *_ in self.matrices for path in self.paths(name)]
        return paths + ([_bias_of(path) for path in paths] if self.has_bias and self.keys else [])

    def _one(self, module: nn.Module, path: str, e: int) -> Tensor:
        if "{}" in path:
            return module.get_parameter(path.format(self.keys[e])).detach()
        p = module.get_parameter(path).detach()
        return (p.unflatten(0, (self.num_experts, -1)) if self.flat else p)[e]

    def _spread(self, module: nn.Module, path: str, values: Tensor) -> None:
        names = self._each(path)
        for name, value in zip(names, values if "{}" in path else [values], strict=True):
            owner, _, key = name.rpartition(".")
            p = nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=self.trainable)
            module.get_submodule(owner)._parameters[key] = p


_ASIDE = "_float_children"


def _bias_of(path: str) -> str:
    return path.removesuffix("weight") + "bias"


def _emptied(module: nn.Module) -> nn.Module:
    """A copy of the module and of its children, without parameters. What has none is shared: an activation may be."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(module.__dict__)
    new.__dict__["_parameters"] = dict.fromkeys(module._parameters)
    children = module._modules.items()
    new.__dict__["_modules"] = {k: m if m is None or not _holds(m) else _emptied(m) for k, m in children}
    return new


def _holds(module: nn.Module) -> bool:
    """Parameters, or places for some."""
    return any(m._parameters for m in module.modules())

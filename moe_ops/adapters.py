"""Reads the geometry of an experts module from its attributes and shapes, whatever model it comes from.

Structures: gated `gate_up_proj` (E, 2I, H) or plain `up_proj` (E, I, H), with `down_proj` (E, H, I); either of them
transposed; gate and up concatenated or interleaved; with biases; with a norm after each expert. What says so are the
layout flags of transformers' experts interface (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`,
`has_post_expert_norm`), which any class may carry.

E experts, H hidden size (or the latent size that the block works in), I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .activation import Gate, deinterleave, interleave, recognise_gate

FLAGS = ("is_transposed", "is_concatenated")
POST_NORM = "post_expert_norm"


class CannotAdapt(ValueError):
    """The module holds experts, in a layout that no rule explains."""


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """An experts module as it was found. `gate` is None when the module's own gate has to be called."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    up: str = "gate_up_proj"
    down: str = "down_proj"
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    post_norm: str | None = None
    gate: Gate | None = None
    trainable: bool = True
    flags: tuple[tuple[str, bool], ...] = ()

    @property
    def shards(self) -> int:
        """Matrices stored above each other in the first projection: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def matrices(self) -> tuple[tuple[str, int, int, int], ...]:
        """(parameter name, shards, N, K) of both projections; N rows per shard."""
        h, i = self.hidden_size, self.intermediate_size
        return (self.up, self.shards, i, h), (self.down, 1, h, i)

    def canonical(self, name: str, weight: Tensor) -> Tensor:
        """One projection as found -> (..., S*N, K), gate rows first. A view where it can be."""
        w = weight.transpose(-1, -2) if self.transposed else weight
        if name == self.up and self.interleaved:
            w = deinterleave(w.transpose(-1, -2)).transpose(-1, -2)
        return w

    def original(self, name: str, weight: Tensor) -> Tensor:
        """Inverse of `canonical`."""
        if name == self.up and self.interleaved:
            weight = interleave(weight.transpose(-1, -2)).transpose(-1, -2)
        return weight.transpose(-1, -2) if self.transposed else weight

    def canonical_bias(self, name: str, bias: Tensor) -> Tensor:
        """Bias (E, S*N) as found -> gate first."""
        return deinterleave(bias) if name == self.up and self.interleaved else bias

    def original_bias(self, name: str, bias: Tensor) -> Tensor:
        return interleave(bias) if name == self.up and self.interleaved else bias


def read(module: nn.Module) -> ExpertsSpec | None:
    """Spec of an experts module; None for any other module.

    Raises CannotAdapt, with the reason, for a module that holds experts and cannot be read.
    """
    if not _carries_flags(module):
        reason = _looks_like_experts(module)
        if reason:
            raise CannotAdapt(f"{reason}, but its class does not carry the layout flags of the experts interface")
        return None
    gated = getattr(module, "has_gate", True)
    up, down = ("gate_up_proj" if gated else "up_proj"), "down_proj"
    shapes = {name: _shape(module, name, 3) for name in (up, down)}
    transposed = bool(module.is_transposed)
    e, rows, h = _rows_first(shapes[up], transposed)
    e2, h2, i = _rows_first(shapes[down], transposed)
    if (e, h) != (e2, h2) or rows != i * (2 if gated else 1):
        raise CannotAdapt(
            f"{up} {shapes[up]} and {down} {shapes[down]} do not fit together"
            f" ({'transposed' if transposed else 'not transposed'}, {'gated' if gated else 'not gated'})"
        )
    if module.has_bias:
        _shape(module, f"{up}_bias", 2)
        _shape(module, f"{down}_bias", 2)
    post_norm = POST_NORM if getattr(module, "has_post_expert_norm", False) else None
    _check_complete(module, {up, down}, bool(module.has_bias))
    gate = recognise_gate(module, i, gated)
    concatenated = getattr(module, "is_concatenated", True)
    return ExpertsSpec(
        num_experts=e, hidden_size=h, intermediate_size=i, up=up, down=down, gated=gated, transposed=transposed,
        # what the gate computes decides, the flag only where the gate is not recognised
        interleaved=gate.interleaved if gate is not None else gated and not concatenated,
        has_bias=bool(module.has_bias), post_norm=post_norm, gate=gate, trainable=getattr(module, up).requires_grad,
        flags=tuple((name, getattr(module, name)) for name in FLAGS if name in vars(module)),
    )  # fmt: skip


def _carries_flags(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(type(module), "_apply_gate")


def _looks_like_experts(module: nn.Module) -> str | None:
    """Why an unadapted module must not be passed over in silence."""
    stacks = [
        f"{name} {tuple(p.shape)}"
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] > 1 and p.is_floating_point()
    ]
    kind = type(module).__name__
    if len(stacks) > 1:
        return f"{kind} holds stacks of matrices ({', '.join(stacks)})"
    if kind.endswith("Experts") and any(True for _ in module.parameters()):
        return f"{kind} is named as experts"
    return None


def _shape(module: nn.Module, name: str, ndim: int) -> tuple[int, ...]:
    p = getattr(module, name, None)
    if not isinstance(p, nn.Parameter) or p.ndim != ndim:
        got = "absent" if p is None else f"{type(p).__name__} {tuple(getattr(p, 'shape', ()))}"
        raise CannotAdapt(f"{type(module).__name__}.{name} must be a {ndim}-D parameter, got {got}")
    return tuple(p.shape)


def _rows_first(shape: tuple[int, ...], transposed: bool) -> tuple[int, int, int]:
    e, n, k = shape
    return (e, k, n) if transposed else (e, n, k)


def _check_complete(module: nn.Module, weights: set[str], has_bias: bool) -> None:
    """Nothing beside the projections may hold numbers that the computation could use in a way unknown here."""
    known = weights | ({f"{name}_bias" for name in weights} if has_bias else set())
    unknown = [n for n, _ in module.named_parameters(recurse=False) if n not in known]
    if unknown:
        raise CannotAdapt(f"{type(module).__name__} has parameters that no rule explains: {', '.join(unknown)}")

"""Experts that are modules of their own, in a list or a dict: E MLPs of two or three Linears each.

What lies between the Linears is not read from code: the MLP is run with stand-ins for its Linears, that hand a row of
[gate | up] through it, and so it is its own gate.

T tokens, A experts per token, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import Gate, recognise_gate
from . import evaluate
from .spec import CannotAdapt, ExpertsSpec
from .standins import Columns, Expert, Plain, Scaled, with_children

_TOKENS = 8


@dataclass(frozen=True)
class Mlp:
    """Names of the Linears, the first projection's in the order gate, up; what lies between; dropout of its output."""

    ups: tuple[str, ...]
    down: str
    gate: Gate | None
    own: nn.Module
    dropout: float


def listed(module: nn.Module) -> ExpertsSpec | None:
    """Children of one class, each an MLP; after them, possibly, children that return their input.

    The module is called with (hidden, ids, weights), or (hidden, one-hot ids, weights), or it has no call of its own.
    """
    experts, identities = _alike(module)
    if len(experts) < 2 or (has_call(module) and len(inspect.signature(type(module).forward).parameters) != 4):
        return None
    first = next(iter(experts.values()))
    mlp = read_mlp(first)
    if mlp is None:
        return None
    down = first.get_submodule(mlp.down)
    assert isinstance(down, nn.Linear)
    spec = ExpertsSpec(
        num_experts=len(experts), hidden_size=down.out_features, intermediate_size=down.in_features,
        up="gate_up_proj" if len(mlp.ups) == 2 else "up_proj", up_from=tuple(f"{{}}.{n}.weight" for n in mlp.ups),
        down_from=(f"{{}}.{mlp.down}.weight",), keys=tuple(experts), gated=len(mlp.ups) == 2, gate=mlp.gate,
        own_gate=None if mlp.gate else mlp.own, has_bias=down.bias is not None, identities=identities,
        dropout=mlp.dropout, call="items", trainable=down.weight.requires_grad,
    )  # fmt: skip
    if has_call(module):
        spec = _called(module, spec)
    error = evaluate.error_of(spec, module)
    if error is not None and not evaluate.small(spec, module, error):
        raise CannotAdapt(f"{type(module).__name__} of {type(first).__name__}: the reading differs by {error:.1%}")
    return replace(spec, checked=error is not None)


def has_call(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def read_mlp(mlp: nn.Module) -> Mlp | None:
    """None for a module that is not two or three Linears, with or without biases, around an activation."""
    linears = {name: m for name, m in mlp.named_modules() if type(m) is nn.Linear}
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    held = sum(len(m._parameters) - (m.bias is None) for m in linears.values())
    tensors = [*mlp.parameters(), *mlp.buffers()]
    if len(linears) not in (2, 3) or len(tensors) != held or len({m.bias is None for m in linears.values()}) != 1:
        return None
    readings = []
    for *ups, down in permutations(linears):
        h, i = shapes[down]
        if all(shapes[name] == (i, h) for name in ups):
            readings.append(_between(mlp, linears, tuple(ups), down))
    found = [r for r in readings if r is not None]
    # one in which the gate is known; with a gate of its own it does not matter which of the two is called gate
    return next((r for r in found if r.gate is not None), found[0] if found else None)


def _between(mlp: nn.Module, linears: dict[str, nn.Linear], ups: tuple[str, ...], down: str) -> Mlp | None:
    """The MLP with stand-ins, if `down` is what it runs last."""
    i, log = linears[down].in_features, list[str]()
    parts = {n: Columns(linears[n], a * i, a * i + i, n, log) for a, n in enumerate(ups)}
    parts[down] = Columns(linears[down], None, None, down, log)
    drops = {name: m.p for name, m in mlp.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    own = with_children(mlp, {**parts, **{name: nn.Identity() for name in drops}}).eval()
    try:
        h = torch.randn(3, len(ups) * i, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        out: Any = own(h)
    except Exception:  # a stranger's code, run with stand-ins that it may not take
        return None
    if not isinstance(out, Tensor) or out.shape != (3, i) or sorted(log) != sorted(parts) or log[-1] != down:
        return None
    if drops and not _before_down(mlp, parts, drops, down, h, out):
        return None
    gate = recognise_gate(Plain(own), i, len(ups) == 2)
    if gate is not None and gate.interleaved:
        gate = None
    for part in parts.values():
        part.log = None
    return Mlp(ups, down, gate, own, next(iter(drops.values()), 0.0))


def _before_down(mlp: nn.Module, parts: dict, drops: dict, down: str, h: Tensor, out: Tensor) -> bool:
    """One dropout, of what goes into the last Linear: were it after, doubling it would not be squared there."""
    square = with_children(mlp, {**parts, **{n: Scaled(2.0) for n in drops}, down: _Square()}).eval()
    return len(drops) == 1 and torch.allclose(square(h), 4 * out.square(), rtol=1e-4)


class _Square(Columns):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), None, None)

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def _alike(module: nn.Module) -> tuple[dict[str, nn.Module], int]:
    """Children of the first one's class and shapes, and how many follow that return their input; none for others."""
    children = dict(module.named_children())
    first = next(iter(children.values()), None)
    if first is None or not isinstance(module, nn.ModuleList | nn.ModuleDict) or module._parameters:
        return {}, 0
    describe = [(n, p.shape, p.dtype) for n, p in first.named_parameters()]
    experts = {k: m for k, m in children.items() if type(m) is type(first)}
    rest = list(children.values())[len(experts) :]
    same = all([(n, p.shape, p.dtype) for n, p in m.named_parameters()] == describe for m in experts.values())
    identities = sum(type(m) is nn.Identity for m in rest)
    if not describe or not same or any(True for m in rest for _ in m.parameters()):
        return {}, 0
    return experts, identities if has_call(module) or identities == len(rest) else 0


def _called(module: nn.Module, spec: ExpertsSpec) -> ExpertsSpec:
    """How the module's own forward is called, and what it makes of the weights: read with stand-ins for the experts."""
    experts = {key: Expert(e) for e, key in enumerate(spec.keys)}
    probe = with_children(module, dict(experts)).eval()
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(_TOKENS, spec.num_experts, generator=g, dtype=torch.float32).argsort(-1)[:, :2]
    weights = torch.rand(_TOKENS, 2, generator=g, dtype=torch.float32)
    for call, a in (("topk", 2), ("mask", 1)):
        candidate = replace(spec, call=call)
        want = weights.new_zeros(_TOKENS, spec.num_experts).scatter(1, ids[:, :a], weights[:, :a])
        try:
            x = weights.new_ones(_TOKENS, spec.hidden_size)
            (args,) = evaluate.to_calls(candidate, x, ids[:, :a], weights[:, :a])
            got: Any = type(module).forward(probe, *args)[:, : spec.num_experts]
        except Exception:  # another call
            continue
        for p in (0.0, *(m.p for m in module.children() if isinstance(m, nn.Dropout))):
            if torch.allclose(got, want * (1.0 - p), atol=1e-5):
                return replace(candidate, row_dropout=p)
    signature = inspect.signature(type(module).forward)
    raise CannotAdapt(f"{type(module).__name__}{signature}: no known way to call experts")

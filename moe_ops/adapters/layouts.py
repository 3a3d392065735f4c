"""LAYOUTS: the ways to hold experts, in the order in which they are tried. One function each, module -> spec.

`flagged` trusts the flags of transformers' experts interface, which any class may carry. The others read shapes, and
then `evaluate` decides: the first candidate that computes what the module computes.

E experts, H hidden size (or the latent size that the block works in), I intermediate size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations, product
from typing import Any

from torch import nn

from ..activation import ACTIVATIONS, Gate, recognise_gate
from . import evaluate, mlps
from .spec import FLAGS, POST_NORM, CannotAdapt, ExpertsSpec


def read(module: nn.Module) -> ExpertsSpec | None:
    """Spec of an experts module; None for any other module.

    Raises CannotAdapt, with the reason, for a module that holds experts and cannot be read.
    """
    for layout in LAYOUTS:
        spec = layout(module)
        if spec is not None:
            return spec
    if type(module).__name__.endswith("Experts") and any(True for _ in module.parameters()):
        raise CannotAdapt(f"{type(module).__name__} is named as experts, in a layout that no rule explains")
    return None


def flagged(module: nn.Module) -> ExpertsSpec | None:
    """The flags `is_transposed`, `is_concatenated`, `has_bias`, `has_gate`, `has_post_expert_norm`."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(type(module), "_apply_gate")):
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


def stacked(module: nn.Module) -> ExpertsSpec | None:
    """Two parameters (E, ., .), called with (hidden, ids, weights), or with the rows of every expert (hidden).

    The first projection may have rows for ids that leave the input as it is.
    """
    held = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    found = {n: shape for n, shape in held.items() if not n.endswith("_bias")}
    biases = [n for n in found if len(held.get(f"{n}_bias", ())) == 2]
    if len(_stacks(module)) < 2:
        return None
    what = f"{type(module).__name__} holds stacks of matrices ({', '.join(_stacks(module))})"
    if len(found) != 2 or len(held) != 2 + len(biases) or len(biases) == 1:
        raise CannotAdapt(f"{what} beside parameters that no rule explains")
    calls = {3: ("topk", "scores", "swapped scores"), 1: ("dense",)}.get(_arguments(module) or 0, ())
    specs = [s for up, down in permutations(found, 2) for s in _fitting(found, up, down)]
    if not calls or not specs:
        why = "do not fit together" if calls else "are not called with (hidden, ids, weights)"
        raise CannotAdapt(f"{what} that {why}")
    return _first_right(module, [replace(s, call=c, has_bias=bool(biases)) for s, c in product(specs, calls)], what)


def flat(module: nn.Module) -> ExpertsSpec | None:
    """A child with three parameters (E * I, H), called with (hidden, ids, weights) by a parent that knows E."""
    children = [(key, m) for key, m in module.named_children() if any(True for _ in m.parameters())]
    if len(children) != 1 or _arguments(module) != 3 or any(True for _ in module.parameters(recurse=False)):
        return None
    key, child = children[0]
    found = {f"{key}.{n}": tuple(p.shape) for n, p in child.named_parameters()}
    shapes = set(found.values())
    if len(found) != 3 or len(shapes) != 1 or len(*shapes) != 2 or len(list(child.parameters(recurse=False))) != 3:
        return None
    (rows, h), numbers = *shapes, _integers(module) | _integers(child)
    specs = [
        ExpertsSpec(
            num_experts=e, hidden_size=h, intermediate_size=rows // e, up_from=names[:2], down_from=names[2:],
            down_transposed=True, flat=True,
        )
        for e, names in product(sorted(numbers), permutations(found))
        if e > 1 and rows % e == 0 and rows // e in numbers
    ]  # fmt: skip
    what = f"{type(module).__name__} holds matrices of experts above each other ({key}: 3 x {(rows, h)})"
    try:
        return _first_right(module, specs, what) if specs else None
    except CannotAdapt:  # three matrices of one shape are nothing rare
        return None


def single(module: nn.Module) -> ExpertsSpec | None:
    """One parameter (E, ., .) and nothing else, called with (rows sorted by expert, rows of each expert)."""
    found = list(module.named_parameters())
    if len(found) != 1 or found[0][1].ndim != 3 or found[0][1].shape[0] < 2 or _arguments(module) != 2:
        return None
    (name, p), numbers = found[0], _integers(module)
    if "." in name or not p.is_floating_point() or not set(p.shape) <= numbers:
        return None
    specs = []
    for transposed in (False, True):
        e, n, k = _rows_first(tuple(p.shape), transposed)
        specs.append(ExpertsSpec(num_experts=e, hidden_size=k, intermediate_size=n, up=name, down="", gated=False,
                                 transposed=transposed, call="sizes"))  # fmt: skip
    width = next((v for k, v in vars(module).items() if k.startswith("in") and isinstance(v, int)), None)
    specs.sort(key=lambda s: s.hidden_size != width)  # decides only where nothing can be compared
    what = f"{type(module).__name__} holds a stack of matrices {tuple(p.shape)}"
    return _first_right(module, specs, what, gate=False)


LAYOUTS: tuple[Callable[[nn.Module], ExpertsSpec | None], ...] = (flagged, stacked, flat, single, mlps.listed)


def _first_right(module: nn.Module, specs: list[ExpertsSpec], what: str, gate: bool = True) -> ExpertsSpec:
    """The first candidate that agrees with the module; the likeliest, unchecked, where nothing can be compared."""
    trainable = next(module.parameters()).requires_grad
    candidates = [c for s in specs for c in (_gates(module, replace(s, trainable=trainable)) if gate else [s])]
    errors = []
    for spec in candidates:
        error = evaluate.error_of(spec, module)
        if error is None:
            return replace(spec, checked=False)
        if evaluate.small(spec, module, error):
            return spec
        errors.append(error)
    if not errors:
        raise CannotAdapt(f"{what}, but no activation, and on the meta device none can be tried")
    near = "" if min(errors) == float("inf") else f" (the nearest differs by {min(errors):.1%})"
    raise CannotAdapt(f"{what}, but no reading of them computes what it does{near}")


def _gates(module: nn.Module, spec: ExpertsSpec) -> Iterator[ExpertsSpec]:
    """The gate that the module has as a method; else its activation, on [gate | up] or on columns in turn; else any."""
    if hasattr(type(module), "_apply_gate") and spec.gated:
        gate = recognise_gate(module, spec.intermediate_size, True)
        yield replace(spec, gate=gate, interleaved=bool(gate and gate.interleaved))
        return
    own = [g for m in (module, *module.children()) for g in _activations(m, spec)]
    known = [Gate(activation=a.base, gated=spec.gated, alpha=a.alpha, beta=a.beta, limit=a.limit)
             for a in ACTIVATIONS.values() if spec.gated or a.base == a.name]  # fmt: skip
    others = [] if spec.floats(module)[0][1].is_meta else known  # a guess that nothing could confirm
    for gate, interleaved in product((*own, *(g for g in others if g not in own)), (False, True)):
        if spec.gated or not interleaved:
            yield replace(spec, gate=replace(gate, interleaved=interleaved), interleaved=interleaved)


def _activations(module: nn.Module, spec: ExpertsSpec) -> Iterator[Gate]:
    held = [m for m in module._modules.values() if m is not None and not any(True for _ in m.parameters())]
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "forward"}
    held += [v for v in own.values() if callable(v) and not isinstance(v, type)]
    for act in held:
        gate = recognise_gate(mlps.Plain(act), spec.intermediate_size, False)
        if gate is not None:
            yield replace(gate, gated=spec.gated)


def _fitting(found: dict[str, tuple[int, ...]], up: str, down: str) -> Iterator[ExpertsSpec]:
    for transposed, gated in product((False, True), (True, False)):
        e, rows, h = _rows_first(found[up], transposed)
        e2, h2, i = _rows_first(found[down], transposed)
        if e >= e2 and h == h2 and rows == i * (2 if gated else 1):
            yield ExpertsSpec(num_experts=e2, hidden_size=h, intermediate_size=i, up=up, down=down, gated=gated,
                              transposed=transposed, identities=e - e2)  # fmt: skip


def _arguments(module: nn.Module) -> int | None:
    """How many arguments its own forward takes; None without one."""
    forward: Any = type(module).forward
    if forward is nn.Module.forward:
        return None
    kinds = [p.kind for p in list(inspect.signature(forward).parameters.values())[1:]]
    return sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)


def _integers(module: nn.Module) -> set[int]:
    return {v for v in vars(module).values() if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def _stacks(module: nn.Module) -> list[str]:
    own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]
    return [f"{n} {tuple(p.shape)}" for n, p in own if p.shape[0] > 1]


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

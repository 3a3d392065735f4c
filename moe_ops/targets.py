"""Finds what `quantize_` replaces, what it leaves and why, and what it must refuse; changes nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import experts, linear
from .adapters import CannotAdapt, ExpertsSpec, Routing, read, read_routing
from .experts import QuantizedExperts
from .formats import Format
from .linear import QuantizedLinear
from .rules import Rules
from .storage import QuantizedModule, wrong_dtype
from .summary import OPENED, Row

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_EMBEDDED = "experts that are rows of an embedding: they are looked up, not multiplied"
_MULTIPLE = 16  # narrower or odd Linears: routers, gates, heads; no kernel gains from them


@dataclass
class Place:
    """A module, the names that the model has for it, and where it is stored: (parent, key)."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    routing: Routing | None = None  # of the block around experts, which is to be made anew

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass
class Target(Place):
    """A module to replace. `spec` is None for a Linear."""

    format: Format | None = None
    spec: ExpertsSpec | None = None


@dataclass
class Plan:
    targets: list[Target] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def leave(self, place: Place, kind: str, note: str) -> None:
        self.left.append(Row(place.name, kind, None, None, 0, 0, note))


def places(model: nn.Module) -> list[Place]:
    """Every module once, with all its names and parents."""
    found: dict[int, Place] = {id(model): Place(model, [""])}
    for name, parent in model.named_modules(remove_duplicate=False):
        for key, child in parent._modules.items():
            if child is None:
                continue
            place = found.setdefault(id(child), Place(child))
            place.names.append(f"{name}.{key}" if name else key)
            if not any(p is parent and k == key for p, k in place.parents):
                place.parents.append((parent, key))
    return list(found.values())


def check_not_compiled(model: nn.Module) -> None:
    """Raises ValueError for a compiled model: its graphs would keep running the modules they were made from."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be an nn.Module, got {type(model).__name__}")
    for name, m in model.named_modules():
        if "_orig_mod" in m._modules or m.__dict__.get("_compiled_call_impl") is not None:
            raise ValueError(f"{name or 'the model'} is compiled ({type(m).__name__}): quantize first, then compile")


def plan(model: nn.Module, rules: Rules, strict: bool, loaded: bool = True) -> Plan:
    """What to do with every module. All refusals are collected; non-finite weights are looked for only without any.

    loaded: the weights are there; else they may be on meta, and nothing is read from them.
    """
    check_not_compiled(model)
    found, everything = Plan(), places(model)
    unmatched = rules.unmatched([name for p in everything for name in p.names])
    if unmatched:
        raise ValueError(f"these patterns match no module: {', '.join(map(repr, unmatched))}")
    experts, unreadable = find_experts(everything)
    opened = [(p, why) for p, why in unreadable if _is_linears(p.module)]
    closed = [p for p, _ in [*experts, *unreadable] if all(p is not o for o, _ in opened)]
    inside = {id(m) for p in closed for m in p.module.modules() if m is not p.module}
    within = {id(m) for p, _ in opened for m in p.module.modules()}
    fixed = _always_left(model, everything, [*experts, *unreadable])
    specs = {id(p.module): spec for p, spec in experts}
    reasons = {id(p.module): reason for p, reason in unreadable}
    for place in everything:
        m = place.module
        if id(m) in inside:
            continue
        if isinstance(m, QuantizedModule):
            _already(found, place, rules)
        elif id(m) in specs:
            _take_experts(found, place, specs[id(m)], rules, strict, loaded)
        elif id(m) in reasons and id(m) not in within:
            _refuse_experts(found, place, reasons[id(m)], rules, strict)
        elif type(m) is nn.Linear or id(m) in fixed:
            _take_linear(found, place, fixed.get(id(m)), rules, loaded, "experts" if id(m) in within else "linear")
        else:
            _check_foreign(found, place, rules)
    for place, why in opened:
        _open(found, place, why, rules, strict)
    if loaded and not found.problems:
        found.problems += [text for t in found.targets for text in _non_finite(t)]
    return found


def find_experts(everything: list[Place]) -> tuple[list[tuple[Place, ExpertsSpec]], list[tuple[Place, str]]]:
    """Experts modules that can be adapted, and those that cannot, with the reason."""
    good: list[tuple[Place, ExpertsSpec]] = []
    bad: list[tuple[Place, str]] = []
    for place in everything:
        if isinstance(place.module, QuantizedModule):
            if isinstance(place.module, QuantizedExperts):
                good.append((place, place.module.spec))
            continue
        try:
            spec = read(place.module)
            if spec is not None:
                place.routing = _routing(place, spec)
        except CannotAdapt as e:
            if _named_experts(place) or not _is_linears(place.module):
                bad.append((place, str(e)))
            continue
        if spec is not None:
            good.append((place, spec))
        elif _named_experts(place):
            kind = type(place.module).__name__
            bad.append((place, f"{kind} is held as `experts`, in a layout that no rule explains"))
    blocks = {id(parent) for p, _ in good for parent, _ in p.parents}
    adapted = {id(m) for p, _ in good for m in (p.module, *p.module.modules())}
    bad = [  # not what is beside routed experts (shared ones are dense), and not what contains some
        (p, why) for p, why in bad
        if all(id(parent) not in blocks for parent, _ in p.parents)
        and all(id(m) not in adapted for m in p.module.modules())
    ]  # fmt: skip
    within = {id(m) for p, _ in bad for m in p.module.modules() if m is not p.module}
    return good, [(p, why) for p, why in bad if id(p.module) not in within]


def _routing(place: Place, spec: ExpertsSpec) -> Routing | None:
    """Of the block that holds experts without a call of their own, or with one that runs every expert on every row.

    Raises CannotAdapt where such a block cannot be read; the latter experts then stay as dense as they are.
    """
    if spec.call not in ("items", "dense"):
        return None
    try:
        if len(place.parents) != 1:
            raise CannotAdapt(f"{type(place.module).__name__} is shared between {len(place.parents)} blocks")
        return read_routing(*place.parents[0], spec)
    except CannotAdapt:
        if spec.call == "dense":
            return None
        raise


def _is_linears(module: nn.Module) -> bool:
    """All its weights are in Linears, which can be quantized one by one, or were."""
    linears = [m for m in module.modules() if type(m) is nn.Linear or isinstance(m, QuantizedLinear)]
    held = {id(p) for m in linears for p in m.parameters(recurse=False)}
    return bool(held) and all(id(p) in held for p in module.parameters() if p.ndim > 1)


def _open(found: Plan, place: Place, why: str, rules: Rules, strict: bool) -> None:
    """Experts that could not be read as such: a line that says so, and an error if none of their Linears is taken."""
    picked, own = rules.pick(place.names, "experts"), list(place.module.modules())
    taken = {id(t.module) for t in found.targets}
    if picked.format is None:
        found.leave(place, "experts", picked.note)
    elif any(id(m) in taken or isinstance(m, QuantizedModule) for m in own):
        found.leave(place, OPENED, f"its Linears one by one: {why}")
    else:
        _refuse_experts(found, place, why, rules, strict)


def _named_experts(place: Place) -> bool:
    weights = any(True for _ in place.module.parameters())
    return weights and any(name.rpartition(".")[2] == "experts" for name in place.names)


def _always_left(model: nn.Module, everything: list[Place], experts: list) -> dict[int, str]:
    """Modules that are never quantized, with the reason: routers, embeddings, output heads, adapters."""
    left: dict[int, str] = {}
    for place, spec in experts:
        num_experts = spec.num_experts if isinstance(spec, ExpertsSpec) else None
        for parent, _ in place.parents:
            for key, child in parent._modules.items():
                if child is not None and child is not place.module and _is_router(key, child, num_experts):
                    left |= {id(m): "router" for m in child.modules()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for place in everything:
        m, parts = place.module, {part for name in place.names for part in name.split(".")}
        if isinstance(m, nn.Embedding):
            left[id(m)] = _EMBEDDED if any(_has_router(parent) for parent, _ in place.parents) else "embedding"
        elif any("router" in part for part in parts):
            left[id(m)] = "router"
        elif "lm_head" in parts or (type(m) is nn.Linear and id(m.weight) in embedded):
            left[id(m)] = "output head"
        if "base_layer" in m._modules:  # an adapter's wrapper: its own small matrices are what is being trained
            base = {id(c) for c in m._modules["base_layer"].modules()}  # type: ignore[union-attr]
            left |= {id(c): "adapter" for c in m.modules() if id(c) not in base and c is not m}
    return left | {id(head): "output head" for head in _output_heads(model)}


def _has_router(parent: nn.Module) -> bool:
    return any("router" in key for key in parent._modules)


def _output_heads(model: nn.Module) -> Iterator[nn.Module]:
    for m in model.modules():
        if hasattr(m, "get_output_embeddings"):
            try:
                head: Any = m.get_output_embeddings()  # type: ignore[operator]
            except NotImplementedError:
                continue
            if isinstance(head, nn.Module):
                yield from head.modules()


def _is_router(key: str, module: nn.Module, num_experts: int | None) -> bool:
    """By name, or by shape: one row per expert, and no Linear that leads back to the input's width (as an MLP has)."""
    if key in ("gate", "router"):
        return True
    back = {m.out_features for m in module.modules() if isinstance(m, nn.Linear)}
    return any(p.ndim == 2 and p.shape[0] == num_experts and p.shape[1] not in back for p in module.parameters())


def _already(found: Plan, place: Place, rules: Rules) -> None:
    m = place.module
    assert isinstance(m, QuantizedModule)
    wanted = rules.pick(place.names, "experts" if isinstance(m, QuantizedExperts) else "linear").format
    have = m.quantization
    if wanted is not None and (wanted.weight, wanted.activation) != (have.weight, have.activation):
        found.problems.append(
            f"{place.name or 'the model'} is already quantized to {have.name}, not {wanted.name}: dequantize_ first"
        )


def _take_experts(
    found: Plan, place: Place, spec: ExpertsSpec, rules: Rules, strict: bool, loaded: bool
) -> None:
    picked = rules.pick(place.names, "experts")
    if picked.format is None:
        found.leave(place, "experts", picked.note)
        return
    weights = [p for _, p in spec.floats(place.module)]
    if reason := experts.cannot_take(spec, picked.format):
        _refuse_experts(found, place, reason, rules, strict)
    elif problem := _unusable(place.module, loaded):
        found.problems.append(f"{place.name or 'the model'} {problem}")
    elif reason := wrong_dtype(*weights):
        _refuse_experts(found, place, reason, rules, strict)
    else:
        found.targets.append(Target(place.module, place.names, place.parents, place.routing, picked.format, spec))


def _refuse_experts(found: Plan, place: Place, reason: str, rules: Rules, strict: bool) -> None:
    picked = rules.pick(place.names, "experts")
    if picked.format is None or not strict:
        found.leave(place, "experts", reason if picked.format else picked.note)
    else:
        found.problems.append(f"{place.name or 'the model'}: {reason} (strict=False leaves such experts in float)")


def _take_linear(
    found: Plan, place: Place, fixed: str | None, rules: Rules, loaded: bool, rule: str = "linear"
) -> None:
    m, picked = place.module, rules.pick(place.names, rule)
    kind = "linear" if type(m) is nn.Linear else type(m).__name__
    if fixed is not None:
        if picked.exact and picked.format is not None:
            found.problems.append(f"{place.name} ({kind}) is always left in float: {fixed}")
        elif any(True for _ in m.parameters(recurse=False)):
            found.leave(place, kind, fixed)
        return
    assert isinstance(m, nn.Linear)
    n, k = m.out_features, m.in_features
    if picked.format is None:
        found.leave(place, kind, picked.note)
    elif not picked.format.quantized:
        found.leave(place, kind, f"{picked.format.name} is not quantized")
    elif n % _MULTIPLE or k % _MULTIPLE or n == 1:
        found.leave(place, kind, f"{n} x {k} is not a multiple of {_MULTIPLE}")
    elif not isinstance(m._parameters.get("weight"), nn.Parameter):  # weight_norm, spectral_norm, prune
        found.leave(place, kind, f"its weight is computed, from {', '.join(m._parameters)}")
    elif reason := linear.cannot_take(m, picked.format) or _read_by_parent(place):
        found.leave(place, kind, reason)
    elif problem := _unusable(m, loaded):
        found.problems.append(f"{place.name or 'the model'} {problem}")
    elif reason := wrong_dtype(m.weight):
        found.leave(place, kind, reason)
    else:
        found.targets.append(Target(m, place.names, place.parents, format=picked.format))


def _read_by_parent(place: Place) -> str | None:
    """The parent's own code takes the weight (x.to(self.proj.weight.dtype), a fused kernel): codes would mislead it."""
    for parent, key in place.parents:
        pattern = rf"\.{re.escape(key)}\.weight\b(?!\.(device|shape|size|ndim))"
        bases: Any = type(parent).__mro__
        if any(re.search(pattern, _source(cls)) for cls in bases if issubclass(cls, nn.Module)):
            return f"the code of {type(parent).__name__} reads {key}.weight"
    return None


@cache
def _source(cls: Any) -> str:
    if cls is nn.Module:
        return ""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # made at run time, or compiled
        return ""


def _unusable(m: nn.Module, loaded: bool) -> str | None:
    """Why a module of the right kind cannot be replaced."""
    hook = m.__dict__.get("_hf_hook")
    hooks = [hook, *getattr(hook, "hooks", ())]
    if any(getattr(h, "offload", False) for h in hooks):
        return "is offloaded (its weights are not in memory): load the model without offloading"
    if "forward" in m.__dict__ and hook is None:
        return "has its forward replaced on the instance, which replacing the module would lose"
    for name, p in m.named_parameters():
        if loaded and p.is_meta:
            return f"is on the meta device ({name}): load its weights first"
        if _is_foreign(p):
            return f"holds {_describe(name, p)}: quantized or sharded by another library"
    return None


def _check_foreign(found: Plan, place: Place, rules: Rules) -> None:
    """Modules of other kinds are left alone, but not if they are another library's quantized ones."""
    m = place.module
    weights = [(n, p) for n, p in m._parameters.items() if p is not None and p.ndim > 1]
    codes = [(n, b) for n, b in m._buffers.items() if b is not None and b.ndim > 1 and "weight" in n and _is_foreign(b)]
    bad = [(n, t) for n, t in [*weights, *codes] if _is_foreign(t)]
    kind = "experts" if weights and weights[0][1].ndim > 2 else "linear"
    if bad and rules.pick(place.names, kind).format is not None:
        library = type(m).__module__.partition(".")[0]
        found.problems.append(
            f"{place.name or 'the model'} ({library}'s {type(m).__name__}) holds {_describe(*bad[0])}:"
            " quantized or sharded by another library; add it to ignore, or load the model in float"
        )
    elif isinstance(m, nn.Linear):
        found.leave(place, "linear", f"{type(m).__name__} is a class of its own, not nn.Linear")


def _is_foreign(t: Tensor) -> bool:
    plain = type(t) in (nn.Parameter, torch.Tensor) and type(t.data) is torch.Tensor
    return not plain or t.dtype not in _FLOATS


def _describe(name: str, t: Tensor) -> str:
    kind = type(t.data) if type(t) in (nn.Parameter, torch.Tensor) else type(t)
    return f"{name} ({kind.__name__}, {str(t.dtype).removeprefix('torch.')})"


def _non_finite(target: Target) -> Iterator[str]:
    """Weights with inf or NaN: amax over them would spread that over whole rows."""
    spec, m = target.spec, target.module
    floats = [("weight", m.get_parameter("weight"))] if spec is None else spec.floats(m)
    for name, p in floats:
        w = p.detach()
        if w.numel() and not all(bool(torch.isfinite(x)) for x in torch.aminmax(w)):
            stacked = spec is not None and w.ndim > 2
            bad = [e for e in range(w.shape[0]) if stacked and not bool(torch.isfinite(w[e]).all())]
            where = f" (experts {', '.join(map(str, bad[:8]))})" if bad else ""
            yield f"{target.name}.{name} has non-finite values{where}"

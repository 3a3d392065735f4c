"""parallelize_: every rank keeps its part of a quantized model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import DeviceMesh

from ..blocks import RoutedBlock
from ..experts import QuantizedExperts
from ..quantize import check_problems, store
from ..targets import Place, check_not_compiled, places
from .collectives import Group, group_of
from .dense import Cut, slice_of_embedding, slice_of_linear, slice_of_parameter
from .experts import Ranks, parallel_
from .modules import Part, part_of, slice_of
from .plans import cuts

DIMS = ("dp", "ep", "tp")
TOKENS = ("replicated", "sharded")


@torch.no_grad()
def parallelize_(
    model: nn.Module, mesh: DeviceMesh, *, tokens: str = "replicated", dense: str | tuple[str, ...] | None = None,
    plan: Mapping[str, str] | None = None,
) -> nn.Module:  # fmt: skip
    """Keep this rank's part of a model that `quantize_` made, in place, and have it ask the others. Returns the model.

    mesh: dimensions "ep" (whole experts, any number to a rank), "tp" (the intermediate size I of every expert) and
        "dp" (outside: every rank along it has all of the rest), in any combination. Ranks along "ep" and "tp" are
        called with the same tokens, and what they add to the output of experts is summed over them.
    tokens: "sharded": ranks along "ep" have tokens of their own, equally many: rows are gathered before the experts,
        and sums scattered after them.
    dense: the dimensions along which attention, MLPs, embeddings and heads are cut, as `plan` says; () none. Default:
        all along which tokens are the same. Without a plan they stay whole.
    plan: names of modules -> styles of `plans.STYLES`. Default: the model's own `_tp_plan`, as transformers has it.

    All ranks of the mesh call this with the same model. Codes are never changed, and formats of slices say where blocks
    were cut (`fp8...@unit`). The result is one graph when compiled; it is for inference: the gradient of inputs is that
    of the whole model, parameters that ranks hold whole get their rank's part of it. Raises ValueError, listing every
    reason, before anything is changed, on every rank alike: a mesh with other dimensions or of another device, more
    ranks than experts or columns, heads that ranks cannot share, experts that cannot be cut (`shard_module`), styles
    that are not known, adapters, modules that hold a part already.
    """
    check_not_compiled(model)
    groups = _groups(model, mesh, tokens, dense)
    plan = (getattr(model, "_tp_plan", None) or {}) if plan is None else plan
    everything, problems = places(model), []
    parts: list[tuple[Place, Part]] = []
    for place in everything:
        if getattr(place.module, "ranks", None) is not None:
            problems.append(f"{place.name or 'the model'} holds a rank's part already")
        elif isinstance(place.module, QuantizedExperts):
            try:
                parts.append((place, _part(place, groups)))
            except ValueError as e:
                problems.append(f"{place.name or 'the model'}: {e}")
    found, wrong = cuts(model, plan, groups.dense) if groups.dense.size > 1 else ({}, [])
    if dense and not found and not wrong:
        wrong.append(f"dense={dense!r}: {type(model).__name__} has no tp_plan that says how, give plan=")
    check_problems(problems + wrong)
    if not parts and not found:
        raise ValueError("nothing to share: the model has no quantized experts, and no plan; quantize_ comes first")
    for place, part in parts:
        _replace(place, _experts(place.module, part, groups))
    _store_dense(everything, found)
    for name, cut in found.items():
        owner, _, key = name.rpartition(".")
        if key in (parameters := model.get_submodule(owner)._parameters):
            parameters[key] = slice_of_parameter(parameters[key], cut.dim, cut)  # type: ignore[arg-type]
    return model


class _Groups:
    """The process groups of a mesh, by what they are for."""

    def __init__(self, mesh: DeviceMesh, sharded: bool, dense: tuple[str, ...]) -> None:
        names = tuple(d for d in DIMS[1:] if d in (mesh.mesh_dim_names or ()))
        ep, tp = (tuple(d for d in names if d == dim) for dim in DIMS[1:])
        self.ep, self.tp, self.every = group_of(mesh, ep), group_of(mesh, tp), group_of(mesh, names)
        self.own = self.ep if sharded else Group()
        self.same = self.tp if sharded else self.every
        self.dense = group_of(mesh, tuple(d for d in names if d in dense))


def _groups(model: nn.Module, mesh: DeviceMesh, tokens: str, dense: str | tuple[str, ...] | None) -> _Groups:
    """Raises ValueError for a mesh that does not fit. Then, and not before, ranks talk to each other."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh is a DeviceMesh, got {type(mesh).__name__}: torch.distributed.init_device_mesh")
    names = mesh.mesh_dim_names or ()
    problems = [f"dimension {n!r} of the mesh is not one of {', '.join(DIMS)}" for n in names if n not in DIMS]
    if not {"ep", "tp"} & set(names):
        problems.append(f"the mesh has no dimension 'ep' or 'tp': {tuple(mesh.shape)} with names {names}")
    if tokens not in TOKENS:
        problems.append(f"tokens is one of {', '.join(TOKENS)}, got {tokens!r}")
    same = tuple(d for d in names if d in ("ep", "tp") and (d == "tp" or tokens != "sharded"))
    chosen = same if dense is None else ((dense,) if isinstance(dense, str) else tuple(dense))
    for dim in chosen:
        if dim not in same:
            problems.append(f"dense={dim!r}: dense modules are cut along dimensions with the same tokens, {same}")
    devices = {p.device.type for p in model.parameters()} - {mesh.device_type}
    if devices:
        problems.append(f"the mesh is of {mesh.device_type}, the model is on {', '.join(sorted(devices))}")
    if mesh.get_coordinate() is None:
        problems.append("this rank is not in the mesh")
    check_problems(problems)
    return _Groups(mesh, tokens == "sharded", chosen)


def _part(place: Place, groups: _Groups) -> Part:
    m: Any = place.module
    routed = any(isinstance(parent, RoutedBlock) for parent, _ in place.parents)
    if groups.every.size > 1 and (m.spec.call == "sizes" or (m.spec.call == "dense" and not routed)):
        raise ValueError(f"experts that are called by {m.spec.call} have no ids that ranks could share")
    if m.adapters:
        raise ValueError("it has adapters: merge or unload them first")
    return part_of(m, groups.tp.rank, groups.tp.size, groups.ep.rank, groups.ep.size)


def _experts(experts: nn.Module, part: Part, groups: _Groups) -> QuantizedExperts:
    assert isinstance(experts, QuantizedExperts)
    ranks = Ranks(groups.own, groups.same, groups.every, part, experts.spec.num_experts, experts.spec.identities)
    return parallel_(slice_of(experts, part), ranks)


def _store_dense(everything: list[Place], found: Mapping[str, Cut]) -> None:
    """Weights that modules share stay shared where their slices are the same."""
    cut_of = {id(p): found[name] for p in everything for name in p.names if name in found}
    mine = [p for p in everything if id(p) in cut_of]
    users = Counter(id(p.module.weight) for p in mine)
    shared: dict[tuple, Any] = {}
    kept: list[nn.Parameter] = []
    for place in mine:
        m: Any = place.module
        cut, tied = cut_of[id(place)], users[id(m.weight)] > 1
        new = slice_of_embedding(m, cut) if isinstance(m, nn.Embedding) else slice_of_linear(m, cut)
        if tied:
            key = (id(m.weight), cut.dim, cut.span())
            new._parameters["weight"] = shared.setdefault(key, new.weight)
            kept.append(m.weight)  # or its id might be another's
        _replace(place, new)


def _replace(place: Place, new: nn.Module) -> None:
    """And forget the whole, so that it can be freed."""
    store(place, new)
    place.module = new

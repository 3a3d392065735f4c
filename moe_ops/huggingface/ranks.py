"""Quantized modules under transformers' tensor and expert parallelism: each rank keeps its part while it loads.

transformers walks its plan, and asks a style for each name: to make a parameter a DTensor, which the loader then reads
slices for, and to wrap a forward. Codes are not cut at those places, and scales not before they are known. So its
styles are wrapped: modules of ours are told of the mesh, and cut what the loader hands them; others are as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import DeviceMesh

from ..blocks import RoutedBlock
from ..experts import QuantizedExperts
from ..linear import QuantizedLinear
from ..sharding.collectives import Group, total
from ..sharding.modules import part_of
from ..sharding.plans import cuts, generic
from ..sharding.streams import ExpertsShare, LinearShare
from ..storage import QuantizedModule
from ..streaming import Stream, streams
from . import disk

_JOIN = "_moe_ops_join"  # on a module of ours: what is called with the mesh
_AS_IT_IS = "_moe_ops_as_it_is"  # on a router whose experts take ids of all experts, and on norms (`_hooked`)
_BY_EXPERT = ("grouped_gemm", "ep_dispatch_experts")
_BY_COLUMN = "moe_tp_experts"
_NORMS = "replicated_with_grad_allreduce"
_LEFT = ("ep_router", _NORMS)  # styles that have nothing to do where a module is marked so


class Ranks:
    """How the modules of a model that is being loaded are shared by `config`, transformers' DistributedConfig."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        self.shares: dict[str, ExpertsShare | LinearShare] = {}
        self.size: int = config.tp_size or 1
        self.groups: list[Group] = []
        self.plan, self.experts_plan = _plans(model, config)

    def problems(self) -> list[str]:
        """Why the model cannot be shared so, the same on every rank; else every module waits for its mesh."""
        c, found = self.config, []
        for key in ("fsdp_size", "dp_replicate_size", "pp_size"):
            if (getattr(c, key, None) or 1) > 1:
                found.append(f"{key}={getattr(c, key)}: load the model first, then fully_shard it")
        ep = getattr(c, "ep_size", None) or 1
        if ep not in (1, self.size):
            found.append(f"ep_size={ep} must be tp_size, {self.size}: ranks of a group see the same tokens")
        if getattr(c, "ep_implementation", "auto") not in ("auto", "all_reduce"):
            found.append(f"ep_implementation={c.ep_implementation!r}: quantized experts have 'auto' and 'all_reduce'")
        if found or self.size == 1:
            return found
        linears, found = cuts(self.model, self.plan, Group("", 0, self.size), alone=False)
        for name, m in streams(self.model):
            share: ExpertsShare | LinearShare | None = None
            try:
                share = self._of_experts(name, m) if isinstance(m, QuantizedExperts) else None
            except ValueError as e:
                found.append(f"{name}: {e}")
                continue
            if isinstance(m, QuantizedLinear) and name in linears:
                share = LinearShare(m, linears[name])
            if share is not None:
                self.shares[name] = share
        return found

    def wait(self, opened: Mapping[str, Stream], sizes: dict[str, float], expected: Mapping[str, disk.Shapes]) -> None:
        """Have modules take their part once transformers comes to them with its mesh.

        opened, expected: by module, streams, or what a quantized checkpoint has for it.
        """
        _wrap_styles()
        for name in self._hooked():
            self.model.get_submodule(name).__dict__[_AS_IT_IS] = True
        for name, share in self.shares.items():
            m = self.model.get_submodule(name)
            m.__dict__[_JOIN] = _Join(share, opened.get(name), sizes, expected.get(name), self.groups)

    def _hooked(self) -> list[str]:
        """Norms of a rank's heads, whose gradients are summed. Before transformers 5.21 by hooks that break graphs."""
        if hasattr(self.config, "ep_size"):
            return []
        return [name for name, _ in self.model.named_modules() if self.plan.get(generic(name)) == _NORMS]

    def sum_gradients(self) -> None:
        """The same by hooks of the parameters, once they are there."""
        if not self.groups:
            return
        for name in self._hooked():
            for p in self.model.get_submodule(name).parameters(recurse=False):
                if p.requires_grad:
                    p.register_hook(_sum_over(self.groups[0]))

    def _of_experts(self, name: str, m: QuantizedExperts) -> ExpertsShare | None:
        key = generic(name)
        by_expert = self.experts_plan.get(f"{key}.{m.spec.up}", self.experts_plan.get(key)) in _BY_EXPERT
        if not by_expert and self.plan.get(key) != _BY_COLUMN:
            return None  # whole on every rank
        parents = [p for p in self.model.modules() if any(child is m for child in p._modules.values())]
        routed = any(isinstance(p, RoutedBlock) for p in parents)
        if m.spec.call == "sizes" or (m.spec.call == "dense" and by_expert and not routed):
            raise ValueError(f"experts that are called by {m.spec.call} have no ids that ranks could share")
        if by_expert:
            for child in (c for p in parents for c in p._modules.values() if c is not None):
                child.__dict__[_AS_IT_IS] = True
        return ExpertsShare(m, part_of(m, 0, 1, 0, self.size) if by_expert else part_of(m, 0, self.size))


class _Join:
    def __init__(
        self, share: Any, stream: Stream | None, sizes: dict[str, float], expected: disk.Shapes | None,
        groups: list[Group],
    ) -> None:  # fmt: skip
        self.share, self.stream, self.sizes, self.expected, self.groups = share, stream, sizes, expected, groups

    def __call__(self, module: Any, mesh: DeviceMesh) -> None:
        del module.__dict__[_JOIN]
        group = Group(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())
        self.groups.append(group)
        s = self.share
        if isinstance(s, ExpertsShare):
            by_expert = s.part.ep_size > 1
            s.part = s.part._replace(**{"ep_rank" if by_expert else "tp_rank": group.rank})
        else:
            s.cut = s.cut._replace(group=group)
        s.join_(module, group)
        if self.stream is not None:
            self.stream.share = s
            self.stream.of_others()
            for weight in module.weight_names():
                self.sizes[self.stream.label(weight)] /= group.size
        if self.expected is not None:
            disk.cut_as_loaded(module, s.tensor, self.expected)


class _Style:
    """A style of transformers, which passes modules of ours by."""

    def __init__(self, name: str, style: Any) -> None:
        self.name, self.style = name, style

    def __getattr__(self, name: str) -> Any:
        return getattr(self.style, name)

    def validate_param(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not isinstance(module, QuantizedModule):
            self.style.validate_param(module, *args, **kwargs)

    def shard_param(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not isinstance(module, QuantizedModule):
            self.style.shard_param(module, *args, **kwargs)

    def install_forward(self, module: nn.Module, mesh: Any = None, *args: Any, **kwargs: Any) -> Any:
        join = module.__dict__.get(_JOIN)
        if join is not None:
            join(module, kwargs["ep_mesh"] if mesh is None else mesh)
        elif not isinstance(module, QuantizedModule) and not (self.name in _LEFT and _AS_IT_IS in module.__dict__):
            given = args if mesh is None else (mesh, *args)
            return self.style.install_forward(module, *given, **kwargs)
        return module


def _sum_over(group: Group) -> Any:
    return lambda grad: total(grad, group)


def _wrap_styles() -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    for name in list(ALL_PARALLEL_STYLES.keys()):
        if not isinstance(ALL_PARALLEL_STYLES[name], _Style):
            ALL_PARALLEL_STYLES.register(name, _Style(name, ALL_PARALLEL_STYLES[name]))


def _plans(model: Any, config: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Generic names -> styles, of dense modules and of experts: one plan before transformers 5.21, two since."""
    given = config.tp_plan if isinstance(config.tp_plan, dict) else None
    if not hasattr(config, "ep_size"):
        own = model._ep_plan if config.enable_expert_parallel else model._tp_plan
        plan = dict(own or {}) if given is None else given
        return plan, plan
    plan = {} if given == {} else {**(model._tp_plan or {}), **(given or {})}
    experts = {**(model._ep_plan or {}), **(config.ep_plan or {})} if (config.ep_size or 1) > 1 else {}
    return plan, experts


def agreed(problems: list[str]) -> list[str]:
    """What any rank found: all of them raise, or none."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems)
    return list(dict.fromkeys(text for each in found for text in each))

"""Which modules of a model a checkpoint holds quantized, and how: the producer's rules against its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..quantize import skeleton_
from ..rules import parse
from ..storage import QuantizedModule
from ..summary import _LEFT
from ..targets import plan
from .files import Checkpoint
from .names import Source
from .place import FLOATS
from .reader import CODES, Reader, Scheme, readable

ALWAYS_FLOAT = ("router", "embedding", "output head")  # what plan() says of modules that producers leave, too


@dataclass(frozen=True)
class Layout:
    """What `load_quantized` found before it reads any tensor. Both are keyed by parameters in memory."""

    found: Mapping[str, list[Source]]
    schemes: Mapping[str, Scheme]

    def prepare_(self, model: nn.Module) -> nn.Module:
        """Put empty quantized modules in the places of those that the checkpoint holds quantized."""
        formats: dict[str, set[str]] = {}
        for parameter, scheme in self.schemes.items():
            formats.setdefault(scheme.format, set()).add(parameter.rpartition(".")[0])
        patterns = {_any_of(modules): name for name, modules in formats.items()}
        skeleton_(model, patterns)
        seen = {r.name for r in model.__dict__.get(_LEFT, ())}
        for module in sorted(m for modules in formats.values() for m in modules):
            if module not in seen and not isinstance(model.get_submodule(module), QuantizedModule):
                raise ValueError(f"{module} is within a block of experts whose layout no rule reads: it would be float")
        return model


def layout(model: nn.Module, checkpoint: Checkpoint, reader: Reader, found: Mapping[str, list[Source]]) -> Layout:
    """Raises ValueError where the config and the files disagree on what is quantized, and for mixed experts."""
    fixed = {r.name for r in plan(model, parse({"linear": "bf16"}, ()), False, loaded=False).left
             if r.note in ALWAYS_FLOAT}  # fmt: skip
    schemes = {}
    for parameter, tensors in found.items():
        module, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(module)
        kind = _kind(owner, leaf)
        parts = [s.key for s in tensors if s.part != CODES]
        if kind is None and not parts:
            continue
        scheme = _scheme(reader, tensors, module, kind or "linear")
        codes = any(checkpoint.entries[s.key].dtype not in FLOATS for s in tensors if s.part == CODES)
        if scheme is None and (parts or codes):
            raise ValueError(f"{(parts or [tensors[0].key])[0]}: the checkpoint's config leaves this layer in float")
        if scheme is not None and not parts and not codes:
            if kind == "experts" or module not in fixed:
                raise ValueError(
                    f"{tensors[0].key} holds {checkpoint.entries[tensors[0].key].dtype} numbers without a scale; by the"
                    f" checkpoint's config it is quantized ({scheme.format})"
                )
            continue
        if scheme is not None:
            schemes[parameter] = scheme
    _check_experts(model, found, schemes)
    if not schemes:
        raise ValueError(f"{checkpoint.path}: config.json says {reader.name}, but no layer is quantized")
    return Layout(found, schemes)


def _kind(owner: nn.Module, leaf: str) -> str | None:
    """What the producers' rules are about: matrices of Linears and of experts."""
    p = owner._parameters.get(leaf)
    if p is None or leaf.endswith("bias"):
        return None
    if p.ndim > 2:
        return "experts" if not isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None
    return "linear" if isinstance(owner, nn.Linear) else None


def _scheme(reader: Reader, tensors: list[Source], module: str, kind: str) -> Scheme | None:
    """The scheme of every tensor of one parameter, by their modules on disk: they have to agree."""
    chosen: dict[Scheme | None, str] = {}
    for s in tensors:
        name = _module_on_disk(reader.split(s.key)[0], kind)
        with readable(reader.name):
            chosen.setdefault(reader.scheme((name, module), kind), name)
    if len(chosen) > 1:
        each = ", ".join(f"{name}: {scheme.format if scheme else 'float'}" for scheme, name in chosen.items())
        raise ValueError(f"{tensors[0].parameter}: its experts are stored in several ways ({each})")
    return next(iter(chosen))


def _module_on_disk(key: str, kind: str) -> str:
    """The Linear that a producer's rules name. Of a fused stack, that of expert 0, as if it were not fused."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.0.{leaf}" if kind == "experts" and leaf != "weight" else module


def _check_experts(model: nn.Module, found: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> None:
    """Both projections of a block have one format."""
    for parameter, scheme in schemes.items():
        module = parameter.rpartition(".")[0]
        for leaf, p in model.get_submodule(module)._parameters.items():
            other = schemes.get(f"{module}.{leaf}")
            if p is None or p.ndim < 3 or f"{module}.{leaf}" not in found:
                continue
            if other is None or other.format != scheme.format:
                has = other.format if other else "float"
                raise ValueError(f"{module}: {parameter} is {scheme.format}, {leaf} {has}; experts have one format")


def _any_of(modules: set[str]) -> str:
    return f"re:(?:{'|'.join(re.escape(m) for m in sorted(modules))})$"


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the model with its parameters on meta: to find refusals on, without the memory of a copy."""
    tables = {m: m._parameters for m in model.modules()}
    empty = {p: nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    try:
        for m, table in tables.items():
            m._parameters = {n: None if p is None else empty[p] for n, p in table.items()}
        return deepcopy(model)
    finally:
        for m, table in tables.items():
            m._parameters = table

"""Ops opened into parts: `experts`, `linear`, the products and their gradients become what parts.py makes of them.

Where a call would run on the Triton backend on a GPU; on a CPU `experts`, `linear` and `grouped_mm` of few rows, into
those of cpu.py. Elsewhere (on a backend that was asked for by name) the op stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor

from moe_ops.backends.base import Problem, arch_of
from moe_ops.ops import experts, grouped_mm, linear

from . import cpu
from .where import kept_whole, opens

_WEIGHTS = ("weight", "gate_up_proj", "down_proj")  # kernels are made for their sizes: none may be a symbol


def opened(op: Any, fn: Callable) -> Callable:
    """`fn`, which implements the op, on parts that are a graph."""
    names = [argument.name for argument in op._schema.arguments]

    def decomposition(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        x = args[0]
        problem = Problem("grouped_mm", x.device.type, arch_of(x.device), x.dtype, given["format"])
        sizes = [size for name in _WEIGHTS if name in given for size in given[name].shape]
        backend = None if any(isinstance(n, SymInt) for n in sizes) else _graph(problem, op, given)
        if backend is None:
            return NotImplemented
        position = names.index("backend")
        if position < len(args):
            return fn(*args[:position], backend, *args[position + 1 :], **kwargs)
        return fn(*args, **kwargs | {"backend": backend})

    return decomposition


def _graph(problem: Problem, op: Any, given: dict[str, Any]) -> str | None:
    """The backend whose parts are a graph for this call."""
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    if opens(problem, given.get("backend", "auto"), *tensors):
        return "inductor"
    name = op._schema.name.rpartition("::")[2]
    return "inductor_cpu" if not kept_whole() and cpu.opens(name, given, problem) else None


_ops = torch.ops.moe_ops
DECOMPOSITIONS = {
    op: opened(op, fn)
    for op, fn in (
        (_ops.experts.default, experts.experts), (_ops.experts_backward.default, experts.experts_backward),
        (_ops.grouped_mm.default, grouped_mm.grouped_mm),
        (_ops.grouped_mm_backward.default, grouped_mm.grouped_mm_backward), (_ops.linear.default, linear.linear),
        (_ops.linear_backward.default, linear.linear_backward),
    )
}  # fmt: skip

"""Ops opened into parts: `experts`, `linear`, the products and their gradients become what parts.py makes of them.

Where a call would run on the Triton backend on a GPU. Elsewhere (on a CPU, on a backend that was asked for by name)
the op stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor

from moe_ops.backends.base import Problem, arch_of
from moe_ops.ops import experts, grouped_mm, linear

from . import parts  # noqa: F401  the backend "inductor"
from .where import opens

_WEIGHTS = ("weight", "gate_up_proj", "down_proj")  # kernels are made for their sizes: none may be a symbol


def opened(op: Any, fn: Callable) -> Callable:
    """`fn`, which implements the op, on parts that are a graph."""
    names = [argument.name for argument in op._schema.arguments]

    def decomposition(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        x = args[0]
        problem = Problem("grouped_mm", x.device.type, arch_of(x.device), x.dtype, given["format"])
        tensors = [t for t in given.values() if isinstance(t, Tensor)]
        sizes = [size for name in _WEIGHTS if name in given for size in given[name].shape]
        if not opens(problem, given.get("backend", "auto"), *tensors) or any(isinstance(n, SymInt) for n in sizes):
            return NotImplemented
        position = names.index("backend")
        if position < len(args):
            return fn(*args[:position], "inductor", *args[position + 1 :], **kwargs)
        return fn(*args, **kwargs | {"backend": "inductor"})

    return decomposition


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

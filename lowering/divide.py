"""moe_ops::divide: a / b in fp32, correctly rounded in generated code too. Inductor's `/` is Triton's: approximate.

A quotient that is off by an ulp moves codes and scales. There is no such op in torch, and the compiler's switch for
exact division (`eager_numerics.division_rounding`) is global. So this op, an instruction of its own once lowered; a
mode that stands it in for `/` lets the formats be traced as they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_ops.ops.library import LIBRARY

from . import _compat

_DIVISIONS = (torch.Tensor.__truediv__, torch.Tensor.div, torch.div, torch.true_divide)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """fp32, broadcast against each other."""
    return a / b


# Not `library.define`: that op would ask for its inputs' strides, and so for memory. This one is an expression.
LIBRARY.define("divide(Tensor a, Tensor b) -> Tensor", tags=(
    torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout, torch.Tag.pointwise))  # fmt: skip
LIBRARY.impl("divide", _divide, "CompositeExplicitAutograd")
torch.library.register_fake("moe_ops::divide", _divide, lib=LIBRARY)


class ExactDivision(TorchFunctionMode):
    """Inside, quotients of two fp32 tensors are moe_ops::divide."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _DIVISIONS and not kwargs and all(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args):
            return torch.ops.moe_ops.divide(*args)
        return func(*args, **(kwargs or {}))


def _lower(a: Any, b: Any) -> Any:
    cuda = a.get_device().type == "cuda"
    return _compat.pointwise(_instruction if cuda else _compat.truediv, a, b, dtype=torch.float32)


def _instruction(a: Any, b: Any) -> Any:
    return _compat.assembly("div.rn.f32 $0, $1, $2;", "=f,f,f", torch.float32, a, b)


LOWERINGS = {torch.ops.moe_ops.divide.default: _lower}

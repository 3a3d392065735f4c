"""The `moe_ops` namespace of torch.library, and how an op is put into it: schema, impl, fake, gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch.autograd import forward_ad

from ..backends import repeat

LIBRARY = torch.library.Library("moe_ops", "DEF")


def define(schema: str, impl: Callable, fake: Callable, repeats: bool = False) -> None:
    """One implementation for every device: it asks `select` for the backend. Inputs keep their strides.

    repeats: what it does depends on what its arguments are like, not on their values; its first is a tensor, its result
    one tensor that is new. A GPU's calls are then repeated (backends/repeat.py).
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    @wraps(impl)
    def run(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:  # torch would drop the tangents: a derivative of 0, in silence
            raise NotImplementedError(f"moe_ops::{name} has no forward-mode derivative")
        if repeats and repeat.applies(args[0]):
            return repeat.call(name, impl, args, kwargs)
        return impl(*args, **kwargs)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")

    def traced(*args: Any, **kwargs: Any) -> Any:
        _register_lowering()
        return fake(*args, **kwargs)

    torch.library.register_fake(f"moe_ops::{name}", traced, lib=LIBRARY)


@cache
def _register_lowering() -> None:
    """Fakes run when a graph is traced: soon enough for the compiler, and no work for those who do not compile."""
    from ..lowering import register

    register()


def gradient(name: str, setup_context: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"moe_ops::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_gradient(name: str) -> None:
    """For an op that is itself a gradient: to differentiate it again is an error, not torch's warning and a guess."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"moe_ops::{name} is itself a gradient: it has no second one")

    gradient(name, lambda ctx, inputs, output, keyword_only_inputs=None: None, backward)


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """op(*args, **kwargs), not by way of autograd where that records nothing: half of what dispatching takes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def needs_grad(ctx: Any, count: int) -> tuple[bool, ...]:
    """`ctx.needs_input_grad` of `count` inputs: it is shorter when a call left the last ones at their defaults."""
    return (*ctx.needs_input_grad, *[False] * count)[:count]

"""The only file that touches names of torch's compiler that have moved, or may. Loaded where needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.compiler.config
from torch import SymInt, Tensor


def get_cache_key_tag() -> str:
    return torch.compiler.config.cache_key_tag


def set_cache_key_tag(tag: str) -> None:
    torch.compiler.config.cache_key_tag = tag


def add_decomposition(op: torch._ops.OpOverload, fn: Callable) -> None:
    """Inductor runs `fn` in place of the op, on fake tensors. Where it returns NotImplemented the op is called.

    An `add_lowering` of the same op comes after this.
    """
    from torch._inductor import decomposition, lowering

    decomposition.decompositions[op] = fn
    if op not in lowering.lowerings:  # Inductor would refuse to call an op that has a decomposition
        lowering.make_fallback(op, warn=False, override_decomp=True)
    clear = getattr(decomposition.fast_random_decomps, "cache_clear", None)
    if clear is not None:  # a copy of the table is made by the first compilation
        clear()


def add_lowering(op: torch._ops.OpOverload, fn: Callable) -> None:
    """Inductor runs `fn` on its own values in place of the op; their types are not promoted."""
    from torch._inductor.lowering import register_lowering

    register_lowering(op, type_promotion_kind=None)(fn)


def pointwise(fn: Callable, *inputs: Any, dtype: torch.dtype) -> Any:
    """Inductor's value of an expression over elements; inputs of different shapes are broadcast."""
    from torch._inductor.lowering import broadcast_tensors, make_pointwise

    return make_pointwise(fn, override_return_dtype=dtype)(*broadcast_tensors(*inputs))


def assembly(text: str, constraints: str, dtype: torch.dtype, *values: Any) -> Any:
    """Inside `pointwise` on CUDA: one PTX instruction."""
    from torch._inductor.virtualized import ops

    return ops.inline_asm_elementwise(*values, asm=text, constraints=constraints, dtype=dtype, is_pure=True, pack=1)


def truediv(a: Any, b: Any) -> Any:
    """Inside `pointwise`."""
    from torch._inductor.virtualized import ops

    return ops.truediv(a, b)


def launch(
    kernel: Any, grid: Sequence[int | SymInt], written: Sequence[str], **arguments: Tensor | int | SymInt
) -> dict[str, Tensor]:
    """A launch of a Triton kernel as part of a graph that is traced. Returns the tensors `written`, as they are then.

    Symbolic numbers are arguments of the graph; Python's are known to the compiler, and so are constexprs.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    given = {name: value for name, value in arguments.items() if isinstance(value, (Tensor, SymInt))}
    known = {name: value for name, value in arguments.items() if name not in given}
    return triton_kernel_wrapper_functional(
        kernel_idx=kernel_side_table.add_kernel(kernel), constant_args_idx=kernel_side_table.add_constant_args(known),
        grid=[(*grid, *(1,) * (3 - len(grid)))], tma_descriptor_metadata={}, kwargs=given,
        tensors_to_clone=list(written),
    )  # fmt: skip


_DERIVED: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()  # by the tracer, then by the node of its graph


def derived(x: Tensor) -> dict:
    """What has been made of the elements of x in the graph that is being traced; views of all of them are the same.

    Graphs of inference are not searched for common expressions. Outside of a trace the dict is a new one.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode, aten = get_proxy_mode(), torch.ops.aten
    slot = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    if mode is None or slot is None:
        return {}
    node: Any = slot.proxy.node
    while node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        node = node.args[0]
    return _DERIVED.setdefault(mode.tracer, {}).setdefault(node, {})

"""The only file that touches names of torch's compiler that are private or may move. It loads what it needs late."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.compiler.config
from torch import SymInt, Tensor

from .codes import Operators

# What the functions below import. A name that is missing is better found before ops are opened than when they compile.
_NAMES = {
    "torch._higher_order_ops.triton_kernel_wrap": ("kernel_side_table", "triton_kernel_wrapper_functional"),
    "torch._inductor": ("config", "decomposition", "lowering"),
    "torch._inductor.ir": ("FixedLayout", "FlexibleLayout", "Reduction"),
    "torch._inductor.lowering": (
        "broadcast_tensors", "fallback_handler", "lowerings", "make_fallback", "make_pointwise", "register_lowering"),
    "torch._inductor.select_algorithm": (
        "ExternKernelChoice", "SymbolicGridFn", "TritonTemplate", "autotune_select_algorithm", "realize_inputs"),
    "torch._inductor.virtualized": ("V", "ops"),
    "torch.fx.experimental.proxy_tensor": ("get_proxy_mode", "get_proxy_slot"),
    "torch.fx.experimental.symbolic_shapes": ("free_unbacked_symbols",),
    "torch.utils._python_dispatch": ("_disable_current_modes",),
    "torch.utils._sympy.functions": ("FloorDiv",),
}  # fmt: skip


def check() -> None:
    """AttributeError or ImportError for a name that this torch lacks."""
    for module, names in _NAMES.items():
        found = importlib.import_module(module)
        for name in names:
            getattr(found, name)


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


def in_joint_graph() -> bool:
    """Whether the graph that is being traced has gradients in it, for AOTAutograd to part in two."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    inputs = () if mode is None else mode.tracer.graph.find_nodes(op="placeholder")
    return any(node.name.startswith("tangents") for node in inputs)


def is_unbacked(t: Tensor) -> bool:
    """Whether a size of t comes out of the graph itself: it has no hint, and nothing can be asked of it."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(t))


def untraced() -> Any:
    """A context inside which tensors are real, and what is done with them is part of no graph."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def hint(size: Any) -> int:
    """What a size is, or was when the graph was traced."""
    return size if isinstance(size, int) else int(size.node.hint)


# ---- inside a lowering: loops of a CPU


def _ops() -> Any:
    from torch._inductor.virtualized import ops

    return ops


def as_int(value: Any) -> Any:
    return _ops().to_dtype(value, torch.int32)


OPERATORS = Operators(
    number=lambda n: _ops().constant(n, torch.float32 if isinstance(n, float) else torch.int32),
    maximum=lambda a, b: _ops().maximum(a, b), right=lambda a, b: _ops().bitwise_right_shift(a, b),
    as_float=lambda a: _ops().to_dtype(a, torch.float32),
    of_bits=lambda a: _ops().to_dtype_bitcast(a, torch.float32, torch.int32),
)  # fmt: skip


def index(value: Any, size: Any) -> Any:
    """A number that was loaded, as an index of what has `size` entries; it must be one."""
    return _ops().indirect_indexing(value, size, check=False, wrap_neg=False)


def floordiv(a: Any, b: int) -> Any:
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(a, b)


def is_symbol(size: Any) -> bool:
    return not getattr(size, "is_Integer", isinstance(size, int))


def viewed(box: Any, dtype: torch.dtype) -> Any:
    """The memory of a box as another type. By a call: what is read as its own type and then cast is not vectorized."""
    return box if box.get_dtype() == dtype else fallback(torch.ops.aten.view.dtype, (box, dtype), {})


def loader(box: Any) -> Callable[[Sequence[Any]], Any]:
    """Reads an element of a box, which is in memory from now on."""
    box.realize()
    return box.make_loader()


def summed(term: Callable, ranges: Sequence[Any], along: Sequence[Any], device: Any) -> Any:
    """fp32 sums of `term(indices, indices along)`."""
    from torch._inductor.ir import Reduction

    found = Reduction.create(
        device=device, dst_dtype=torch.float32, src_dtype=torch.float32, inner_fn=term, ranges=list(ranges),
        reduction_ranges=list(along), reduction_type="sum",
    )  # fmt: skip
    found.realize()
    return found


def concatenate(boxes: list[Any]) -> Any:
    from torch._inductor.lowering import lowerings

    return boxes[0] if len(boxes) == 1 else lowerings[torch.ops.aten.cat.default](boxes, 0)


# ---- inside a lowering


def fake_tensors() -> list[Any]:
    """The tensor arguments of the node that is being lowered, None for those that are absent, as fake tensors."""
    from torch._inductor.virtualized import V

    return [None if a is None else a.meta["val"] for a in V.graph.current_node.args]


def max_autotune() -> bool:
    from torch._inductor import config

    return config.max_autotune or config.max_autotune_gemm


def cpp_wrapper() -> bool:
    from torch._inductor.virtualized import V

    return bool(V.graph.cpp_wrapper)


def realize(boxes: Sequence[Any]) -> list[Any]:
    from torch._inductor.select_algorithm import realize_inputs

    found = realize_inputs(*boxes)
    return [found] if len(boxes) == 1 else list(found)


def laid_out(fake: Tensor, node: Any) -> Tensor:
    """The fake tensor with the strides that the compiler gives it: what was expanded may have been copied."""
    strides = node.get_stride()
    known = all(getattr(s, "is_Integer", isinstance(s, int)) for s in strides)
    return fake.new_empty_strided(fake.shape, [int(s) for s in strides]) if known else fake


def layout(box: Any, like: torch.Tensor) -> Any:
    """Contiguous, of the fake tensor's size and type."""
    from torch._inductor.ir import FixedLayout, FlexibleLayout

    size = [s.node.expr if isinstance(s, torch.SymInt) else s for s in like.shape]
    return FixedLayout(box.get_device(), like.dtype, size, FlexibleLayout.contiguous_strides(size))


def template(name: str, source: str, grid: Callable) -> Any:
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    name = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    known = TritonTemplate.all_templates.get(name)
    return known or TritonTemplate(name=name, grid=SymbolicGridFn(grid), source=source)


def extern_choice(name: str, fn: Callable) -> Any:
    """A Python function as a choice of max_autotune."""
    from torch._inductor.select_algorithm import ExternKernelChoice

    return ExternKernelChoice(fn, name=name, has_out_variant=False)


def autotune(name: str, choices: list[Any], nodes: list[Any], layout: Any, examples: dict[int, Callable]) -> Any:
    from torch._inductor.select_algorithm import autotune_select_algorithm

    found = autotune_select_algorithm(name, choices, nodes, layout, input_gen_fns=examples)
    return found[0] if isinstance(found, tuple) else found  # a tuple since 2.12


def fallback(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def example(values: torch.Tensor, node: Any) -> torch.Tensor:
    """An example of a node to time with."""
    return values.to(node.get_dtype()).to(node.get_device())


def ones(node: Any) -> torch.Tensor:
    from torch._inductor.virtualized import V

    size = [int(V.graph.sizevars.optimization_hint(s)) for s in node.get_size()]
    return torch.ones(size, device=node.get_device()).to(node.get_dtype())

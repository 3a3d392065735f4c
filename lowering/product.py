"""moe_ops::_product: one launch of the grouped product, as Inductor sees it: a Triton template around the eager tile.

R sorted rows, E experts, N outputs, K contraction, P parts of K. Decompositions (parts.py) put the op into a graph with
its activations prepared; every argument of the kernel that is no tensor becomes a constant of the generated one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_ops.activation import Gate
from moe_ops.backends.base import Rows, Weight, arch_of
from moe_ops.backends.triton import launch
from moe_ops.backends.triton_plan import Prepared, Product, plan_of
from moe_ops.formats import FORMATS
from moe_ops.kernels.configs import Config, table
from moe_ops.ops.library import define

from . import _compat, template

TENSORS = ("x", "x_along_k", "x_each", "weight", "weight_scale", "weight_global_scale", "bias", "offsets", "read",
           "write", "row_weights")  # fmt: skip
_REQUIRED = ("x", "weight")
_SCHEMA = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in TENSORS)
_OPTIONS = (
    "*, str format, ScalarType dtype, bool codes, bool transpose, int shards, bool interleaved, int top_k, "
    "str? activation, bool gated, float? alpha, float? beta, float? limit, bool invariant, int parts"
)


def arguments(p: Product, config: Config) -> tuple[list[Tensor | None], dict[str, Any]]:
    """A product as the op takes it."""
    w, gate = p.w, p.gate or Gate(activation="none", gated=False)
    bias = None if p.transpose else w.bias  # a gradient goes past it
    tensors = [p.x.data, p.x.along_k, p.x.each, w.qdata, w.scale, w.global_scale, bias, p.rows.offsets, p.rows.read,
               p.rows.write, p.rows.weights]  # fmt: skip
    options = {
        "format": p.fmt.name, "dtype": p.dtype, "codes": p.codes, "transpose": p.transpose, "shards": w.shards,
        "interleaved": w.interleaved, "top_k": p.rows.top_k, "activation": p.gate and gate.activation,
        "gated": gate.gated, "alpha": gate.alpha, "beta": gate.beta, "limit": gate.limit, "invariant": p.invariant,
        "parts": config.parts,
    }  # fmt: skip
    return tensors, options


def product(tensors: Sequence[Tensor | None], o: dict[str, Any]) -> Product:
    """Inverse of `arguments`."""
    x, along_k, each, qdata, scale, global_scale, bias, offsets, read, write, weights = tensors
    assert x is not None and qdata is not None
    fmt, w = FORMATS[o["format"]], Weight(qdata, scale, global_scale, None, bias, None, o["shards"], o["interleaved"])
    numbers = {name: o[name] for name in ("gated", "alpha", "beta", "limit")}
    gate = None if o["activation"] is None else Gate(activation=o["activation"], **numbers)
    plan = plan_of(fmt, o["dtype"] if o["codes"] else x.dtype, o["codes"], fmt.weight.columns(qdata.shape[2]),
                   arch_of(x.device))  # fmt: skip
    rows = Rows(offsets, read, write, weights, o["top_k"])
    return Product(Prepared(x, along_k, each), w, rows, gate, fmt, plan, o["dtype"], o["codes"], o["transpose"],
                   o["invariant"])  # fmt: skip


def run(*tensors: Tensor | None, **options: Any) -> Tensor:
    """What the generated kernel computes, by the eager one."""
    p = product(tensors, options)
    return launch(p, p.configured(p.config(arch_of(p.w.qdata.device), p.num_rows), options["parts"]))


def _fake(*tensors: Tensor | None, **options: Any) -> Tensor:
    p, parts = product(tensors, options), options["parts"]
    return p.x.data.new_empty(p.size(parts), dtype=p.dtype if parts == 1 else torch.float32)


def _run_present(*tensors: Tensor, present: Sequence[int], **options: Any) -> Tensor:
    """`run` as a choice of max_autotune, which leaves out the tensors that are None."""
    every: list[Tensor | None] = [None] * len(TENSORS)
    for position, tensor in zip(present, tensors, strict=True):
        every[position] = tensor
    return run(*every, **options)


define(f"_product({_SCHEMA}, {_OPTIONS}) -> Tensor", run, _fake)
_EAGER = _compat.extern_choice("moe_ops_product", _run_present)


def lower(*boxes: Any, **options: Any) -> Any:
    """Inductor's lowering: the configuration of the tables, or with max_autotune the fastest of theirs and eager's."""
    fakes = _compat.fake_tensors()
    present = [position for position, box in enumerate(boxes) if box is not None]
    nodes = _compat.realize([boxes[position] for position in present])
    for position, node in zip(present, nodes, strict=True):
        fakes[position] = _compat.laid_out(fakes[position], node)
    p = product(fakes, options)
    names = [name for name, t in p.tensors().items() if t is not None]  # in the order of the op: one may be there twice
    layout = _compat.layout(nodes[0], _fake(*fakes, **options))
    choices: list[Any] = []
    configs = _configs(p, options["parts"])
    called = p.expands(_compat.hint(p.num_rows)) or _wants_arguments(p, configs[0])
    if len(configs) == 1 and called and not _compat.cpp_wrapper():
        return _compat.fallback(torch.ops.moe_ops._product.default, boxes, options)
    for config in configs:
        template.append(choices, p, config, names, nodes, layout)
    if _compat.max_autotune() and not _compat.cpp_wrapper():
        choices.append(_EAGER.bind(nodes, layout, present=present, **options))
    return _compat.autotune("moe_ops_product", choices, nodes, layout, _examples(p, present))


def _wants_arguments(p: Product, config: Config) -> bool:
    """Tall tiles whose sums leave the tensor core every step fill the registers. In generated code sizes are constants,
    and what the compiler makes of them takes more: 1.05 to 1.5 times the time on an H200. For the eager kernel sizes
    are arguments. A linear's product stays in generated code, for what follows it."""
    return p.rows.offsets is not None and p.kind.promoted and config.block_m * config.block_n >= 128 * 128


def _configs(p: Product, parts: int) -> list[Config]:
    """The one that serves best by the tables; all of its table, in so many parts, where they are to be timed."""
    arch = arch_of(p.w.qdata.device)
    best = p.configured(p.config(arch, _compat.hint(p.num_rows)), parts)
    others = table(p.kind, arch).values() if _compat.max_autotune() else ()
    return list(dict.fromkeys([best, *(p.configured(config, parts) for config in others)]))


def _examples(p: Product, present: list[int]) -> dict[int, Callable]:
    """Tensors to time with: indices that are valid, scales that are numbers."""
    r, slots, e = (_compat.hint(n) for n in (p.num_rows, p.x.data.shape[0] * p.rows.top_k, p.w.qdata.shape[0]))
    rows = torch.arange(r)
    indices = {"offsets": torch.arange(e + 1) * r // e, "read": rows % max(slots, 1), "write": rows}
    floats = ("x_along_k", "x_each", "weight_scale", "weight_global_scale")
    examples: dict[int, Callable] = {}
    for index, name in enumerate(TENSORS[position] for position in present):
        if name in indices:  # uniform routing
            examples[index] = partial(_compat.example, indices[name])
        elif name in floats:
            examples[index] = _compat.ones
    return examples


LOWERINGS = {torch.ops.moe_ops._product.default: lower}

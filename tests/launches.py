"""Every launch of a kernel that our tables of configurations lead to, as data: what test_aot.py compiles.

Nothing runs: kernels are replaced by recorders (aot.py), the device by an architecture. Cases of a product are chosen
so that every (plan, gate, tile) of an architecture occurs, and bias, format and an uneven K in pairs with the others.
"""

import itertools
from dataclasses import astuple, dataclass, replace
from functools import cache

import aot
import pairwise
import pytest
import torch

import moe_ops.kernels.activation as activation_kernels
import moe_ops.kernels.arrange as arrange_kernels
import moe_ops.kernels.columns as columns_kernels
import moe_ops.kernels.grouped_mm_transposed as transposed_kernels
import moe_ops.kernels.parts as parts_kernels
import moe_ops.kernels.quantize as quantize_kernels
import moe_ops.kernels.routing as routing_kernels
import moe_ops.kernels.wgrad as wgrad_kernels
from moe_ops.activation import Gate
from moe_ops.backends import triton as backend
from moe_ops.backends import triton_plan, triton_wgrad
from moe_ops.backends.base import Operand, Rows, Weight
from moe_ops.formats import FORMATS
from moe_ops.kernels.configs import Config, Kind, Table, table, tables
from moe_ops.ops.grouped_mm import scale_shape

ARCHS = (80, 89, 90, 100, 120)
EXPERTS, WIDTH, ROWS = 64, 512, 4096


@dataclass(frozen=True)
class Product:
    arch: int
    format: str
    dtype: str
    transpose: bool
    gated: bool
    bias: bool
    k: int
    config: tuple = ()

    def __str__(self):
        flags = [f for f in ("transpose", "gated", "bias") if getattr(self, f)]
        tile = "x".join(map(str, self.config[:5])) + ("swap" if self.config[5] else "")
        return "-".join([f"sm{self.arch}", self.format, self.dtype, *flags, f"k{self.k}", tile])


@dataclass(frozen=True)
class Other:
    """A kernel without a table: what to call, and its arguments."""

    arch: int
    what: str
    dtype: str
    args: tuple = ()

    def __str__(self):
        return "-".join([f"sm{self.arch}", self.what, self.dtype, *map(str, self.args)])


def tensor(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def run_product(p: Product) -> None:
    """The call that a layer would make."""
    fmt, dtype = FORMATS[p.format], getattr(torch, p.dtype)
    codec, act = fmt.weight, fmt.activation
    weight = Weight(tensor((EXPERTS, WIDTH, codec.stored(p.k)), codec.element.storage or dtype), shards=2)
    scale = tensor(scale_shape(fmt, weight), codec.scale_dtype) if fmt.quantized else None
    above = tensor((EXPERTS, 2), torch.float32) if codec.global_scale else None
    bias = tensor((EXPERTS, WIDTH), dtype) if p.bias else None
    weight = Weight(weight.qdata, scale, above, bias=bias, shards=2)
    offsets, index = tensor((EXPERTS + 1,), torch.int32), tensor((ROWS,), torch.int32)
    x = Operand(tensor((ROWS, WIDTH if p.transpose else p.k), dtype))
    if p.transpose:
        rows = Rows(offsets)
    else:
        weights = tensor((ROWS,), torch.float32)
        rows = Rows(offsets, read=index, top_k=2) if p.gated else Rows(offsets, write=index, weights=weights)
        if act is not None:
            scales = tensor((ROWS, -(-p.k // act.block[1]) if act.block[1] else 1), act.scale_dtype)
            above = tensor((ROWS, 1), torch.float32) if act.global_scale else None
            x = Operand(tensor((ROWS, act.stored(p.k)), act.element.storage), scales, above)
    gate = Gate(activation="silu", gated=True) if p.gated else None
    backend.Parts.grouped_mm(x, weight, rows, gate, fmt, out_dtype=dtype, transpose=p.transpose)


def run_other(o: Other) -> None:
    dtype = getattr(torch, o.dtype)
    if o.what == "sort":
        routing_kernels.sort_by_expert(tensor((o.args[0], 1), dtype), o.args[1])
    elif o.what == "wgrad":
        codec, top_k = o.args
        rows, offsets, read = tensor((ROWS, WIDTH), dtype), tensor((EXPERTS + 1,), torch.int32), None
        gathered = tensor((ROWS // top_k, WIDTH), dtype)
        if top_k > 1:
            read = torch.zeros(ROWS, dtype=torch.int32)
        triton_wgrad.grouped_wgrad(rows, gathered, offsets, codec and FORMATS.codec(codec), num_experts=EXPERTS,
                                   out_dtype=dtype, x_read=read, top_k=top_k)  # fmt: skip
    elif o.what == "gate":
        grad, weights = (tensor((64, n), torch.float32) for n in (o.args[1], 1))
        h = tensor((64, 2 * o.args[1]), dtype)
        backend.activation_grad(Gate(activation=o.args[0], gated=True), h, grad, weights)
    elif o.what == "expand":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_plan, "_EXPAND_ABOVE_ROWS", 0)
            patch.setattr(triton_plan, "choose", lambda kind, *_: list(table(kind, o.arch).values())[-1])
            run_product(Product(o.arch, *o.args, o.dtype, True, False, False, 256))
    elif o.what == "combine":
        routing_kernels.combine(tensor((8 * o.args[0], o.args[1]), dtype), o.args[0])
    else:
        codec, width, static = o.args
        scale = tensor((64, 1), torch.float32) if static else None
        backend.quantize(tensor((64, width), dtype), FORMATS.codec(codec), scale)


def record(case, pick=None) -> list:
    """(kernel, arguments, options) of the launches of a case; `pick(kind)` gives the configuration."""
    owners = {
        activation_kernels: ("_gate_grad_kernel",),
        arrange_kernels: ("_arrange_kernel",),
        parts_kernels: ("_add_kernel",),
        transposed_kernels: ("_expand_kernel",),
        backend: ("_grouped_mm_kernel", "_grouped_mm_sized_kernel", "_grouped_mm_transposed_kernel"),
        quantize_kernels: ("_quantize_kernel",),
        columns_kernels: ("_column_amax_kernel", "_quantize_columns_kernel"),
        wgrad_kernels: ("_wgrad_kernel",),
        routing_kernels: ("_sort_kernel", "_count_kernel", "_scan_kernel", "_scatter_kernel", "_combine_kernel"),
    }
    with pytest.MonkeyPatch.context() as patch:
        recorders = []
        for owner, names in owners.items():
            for name in names:
                recorders.append(aot.Recorder(getattr(owner, name)))
                patch.setattr(owner, name, recorders[-1])
        for module in (backend, triton_wgrad):
            patch.setattr(module, "arch_of", lambda device: case.arch)
        if isinstance(case, Product):
            patch.setattr(triton_plan, "choose", lambda kind, *_: (pick or (lambda _: Config(*case.config)))(kind))
            run_product(case)
        else:
            run_other(case)
    return [launch for recorder in recorders for launch in recorder.launches]


@cache
def products(arch: int) -> list[Product]:
    """What to compile: see the top of this file."""
    cases = []
    options = ((False, True),) * 3
    for name, (transpose, gated, bias) in itertools.product(FORMATS, itertools.product(*options)):
        if transpose and (gated or bias):
            continue
        long = [8192] if FORMATS[name].activation is not None else []
        for dtype, k in itertools.product(("bfloat16", "float32"), (256, uneven(name), *long)):
            cases += variants(Product(arch, name, dtype, transpose, gated, bias, k))
    return thin(cases)


def uneven(name: str) -> int:
    """A K that fills no step along it, where the format takes one."""
    return next(k for k in (240, 288, 256) if FORMATS[name].check(WIDTH, k) is None)


def variants(p: Product) -> list[tuple[Product, set]]:
    """One case for each configuration that the product can meet, with what it shows."""
    kinds = []

    def spy(kind: Kind) -> Config:
        kinds.append(kind)
        return next(iter(table(kind, p.arch).values()))

    *_, (kernel, bound, _) = record(p, spy)
    decode = bound["DECODE"].__name__, bound["BITS"], bound["ELEMENT"]
    types = bound.get("X_TYPE"), bound.get("W_TYPE")
    plan = (kernel.__name__, str(bound["MMA"]), decode, types, bound.get("SCALED"), bound.get("PROMOTE"))
    scales = bound["KIND"], bound.get("FOLD"), bound.get("UNIFORM"), bound.get("GROUP_X")
    if kinds[0].mma == "fp32":  # for completeness: models are not served in it
        plan, scales = plan[:2], None
    pairs = pairwise.pairs({"plan": plan, "bias": p.bias, "gated": p.gated, "even_k": p.k % 256 == 0, "scales": scales})
    entries = dict.fromkeys(astuple(config) for config in entries_of(table(kinds[0], p.arch)))
    core = plan if kinds[0].mma == "fp32" else (plan, p.gated)
    return [(Product(*astuple(p)[:-1], tile), pairs | {(core, tile), (tile, p.bias)}) for tile in entries]


def thin(cases: list[tuple[Product, set]]) -> list[Product]:
    """Greedily, the fewest that show everything."""
    missing, chosen = set().union(*(shows for _, shows in cases)), []
    while missing:
        best, shows = max(cases, key=lambda case: len(case[1] & missing))
        chosen.append(best)
        missing -= shows
    return chosen


def listed(arch: int) -> set[tuple]:
    """Every configuration in the tables of an architecture."""
    products = (entries for kind, entries in tables(arch).items() if not kind.wgrad)
    return {astuple(config) for entries in products for config in entries_of(entries)}


def entries_of(entries: Table) -> list[Config]:
    """The configurations of a table as they are used: whole, and in parts of K where that may be."""
    return [replace(c, parts=p, programs=0) for c in entries.values() for p in ((1, c.parts) if c.programs else (1,))]


def others(arch: int) -> list[Other]:
    cases = [Other(arch, "sort", "int64", args) for args in ((64, 128), (4096, 128), (100_000, 384))]
    cases += [Other(arch, "gate", "bfloat16", (name, 2880)) for name in ("swiglu_oai", "gelu")]
    cases += [Other(arch, "sort", "int32", (4096, 8)), Other(arch, "combine", "bfloat16", (8, 2880))]
    for codec in dict.fromkeys(f.activation for f in FORMATS.values() if f.activation is not None):
        cases += [Other(arch, "quantize", "bfloat16", (codec.name, width, False)) for width in (2880, 16384)]
        if codec.scale_dtype != torch.float8_e8m0fnu:
            cases.append(Other(arch, "quantize", "bfloat16", (codec.name, 4096, True)))
    for codec in (None, "e4m3_row", "mxfp8"):
        cases += [Other(arch, "wgrad", "bfloat16", (codec, top_k)) for top_k in (1, 4)]
    weights = {f.weight: name for name, f in FORMATS.items() if f.quantized} if arch == 90 else {None: "mxfp4"}
    cases += [Other(arch, "expand", "bfloat16", (name,)) for name in weights.values()]
    return [*cases, Other(arch, "wgrad", "float32", (None, 1))]


def compile_case(case) -> list[tuple[str, int, int]]:
    """(kernel, bytes of stack, bytes of shared memory) of the case's launches."""
    torch.set_num_threads(1)
    found = []
    for kernel, bound, options in record(case):
        usage = aot.compile_launch(kernel, bound, options, case.arch)
        found.append((kernel.__name__, usage.stack, usage.shared))
    return found

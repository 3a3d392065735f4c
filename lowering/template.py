"""The eager kernels' tiles as Inductor templates: tile, then `store_output` with whatever is fused behind it.

The text is made from the signature of the tile (moe_ops/kernels/grouped_mm.py): tensors that are there by their names,
`None` for the others, and every size, stride and option as a constant under the name that the tile has for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from moe_ops.backends.base import arch_of
from moe_ops.backends.triton_plan import Product
from moe_ops.kernels.configs import Config
from moe_ops.kernels.grouped_mm import product_tile
from moe_ops.kernels.grouped_mm_transposed import transposed_tile

from . import _compat

_TYPES = {tl.bfloat16: "tl.bfloat16", tl.float16: "tl.float16", tl.float32: "tl.float32", tl.int8: "tl.int8",
          tl.uint8: "tl.uint8", tl.float8e4nv: "tl.float8e4nv", torch.bfloat16: "tl.bfloat16",
          torch.float16: "tl.float16", torch.float32: "tl.float32"}  # fmt: skip
# What the compiler lays out itself: these strides are asked of it.
_LAID_OUT = {"stride_xm": ("x_ptr", 0), "stride_xsm": ("xs_ptr", 0), "stride_xsk": ("xs_ptr", 1),
             "stride_xrm": ("xr_ptr", 0)}  # fmt: skip
# Where a launch of the kernel is faster without them (backends/triton_plan.py, `sized`), they are kept from Triton.
_ODD = ("stride_we", "stride_wn", "stride_wse", "stride_wsn", "up_w", "up_ws")


def append(choices: list[Any], p: Product, config: Config, names: list[str], nodes: list[Any], layout: Any) -> None:
    """Offer the product with these tiles. `names`: what the tile calls the nodes."""
    values = p.numbers() | p.constants(config)
    hidden = () if p.sized(config, arch_of(p.w.qdata.device)) else [n for n in _ODD if _odd(values.get(n, 0))]
    written = [f"{n} = {values.pop(n)} + tl.program_id(2)  # which is 0" for n in hidden]
    for name, (tensor, dim) in _LAID_OUT.items():
        if not _is_zero(values.get(name, 0)):
            written.append(f'{name} = {{{{stride("{tensor}", {dim})}}}}')
            del values[name]
    bytes_of = [n for n, t in p.tensors().items() if t is not None and t.dtype == torch.float8_e4m3fn]
    if not p.plan.native:
        written += [f"{n} = {n}.to(tl.pointer_type(tl.uint8), bitcast=True)" for n in bytes_of]
    functions = tuple((f.fn.__module__, f.fn.__name__) for f in values.values() if isinstance(f, triton.JITFunction))
    whole = p.rows.offsets is not None or config.parts > 1 or p.kind.promoted
    pieces = 1 if whole else _pieces(config)
    by_row = isinstance(p.num_rows, int) and p.row_tiles(config, p.num_rows)[1]
    values |= {"ROW_TILES": by_row, "TYPE": p.dtype, "N": p.n, "PARTS": config.parts, "SHORT": values.get("SHORT", 0)}
    error = _template(p.transpose, pieces, tuple(names), tuple(written), functions).maybe_append_choice(
        choices, input_nodes=nodes, layout=layout, num_stages=config.stages, num_warps=config.warps,
        call_sizes=[nodes[names.index(_counted(names))].get_size()[0]], OFFSETS=p.rows.offsets is not None,
        **{name: _literal(value) for name, value in values.items()},
    )  # fmt: skip
    if error is not None:
        raise error


def _counted(names: Sequence[str]) -> str:
    """The tensor with one entry for each row of the product."""
    return "read_ptr" if "read_ptr" in names else "x_ptr"


def _pieces(config: Config) -> int:
    """In how many a tile is stored: what follows a linear needs registers beside those of the sums, of all that is at
    hand at once. With pieces of a sixteenth of a thread's registers erf and a residual fit, and on an H200 they take
    0.94 to 0.99 of the time; sums that leave the tensor core every step take 1.06 to 1.09 of it, and stay whole."""
    registers = config.block_m * config.block_n // (32 * config.warps)
    return max(registers // 16, 1) if registers >= 64 else 1


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and not size


def _odd(size: Any) -> bool:
    """What a launch would not tell Triton of: that is, no multiple of 16."""
    return isinstance(size, int) and size % 16 != 0 and size > 1


def _literal(value: Any) -> Any:
    """As the text of a kernel has it; Inductor writes strings as they are."""
    if isinstance(value, triton.JITFunction):
        return value.fn.__name__
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return _TYPES.get(value, value) if isinstance(value, tl.dtype | torch.dtype) else value


def _grid(num_rows: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, int]:
    tiles = num_rows if meta["ROW_TILES"] else cdiv(num_rows, meta["BLOCK_M"]) + (meta["E"] + 1) * meta["OFFSETS"]
    return tiles * cdiv(meta["N"], meta["BLOCK_N"]), meta["PARTS"], 1


@cache
def _template(transpose: bool, pieces: int, names: tuple, written: tuple, functions: tuple) -> Any:
    """written: lines before the tile, about its arguments; functions: (module, name) of those among its constants."""
    tile = transposed_tile if transpose else product_tile
    result = "acc, to, n, in_m" if transpose else "acc, acc_up, to, n, in_m"
    given = {n: "None" for n in tile.arg_names if n.endswith("_ptr") and n not in names} | {"tile_k": "tile_n"}
    call = f"{result} = {tile.fn.__name__}({', '.join(given.get(name, name) for name in tile.arg_names)})"
    imports = [(tile.fn.__module__, tile.fn.__name__), *functions]
    text = _TEXT.format(
        imports="\n".join(f"from {module} import {name}" for module, name in imports),
        names=", ".join(f'"{name}"' for name in names), counted=_counted(names), written="\n    ".join(written),
        offsets="offsets_ptr" if "offsets_ptr" in names else "None",
        write="tl.load(write_ptr + m, mask=in_m, other=0)" if "write_ptr" in names else "m",
        stores=_stores(pieces), full=call, short=call.replace("BLOCK_M", "SHORT"),
    )  # fmt: skip
    return _compat.template("moe_ops_product", text, _grid)


def _stores(pieces: int) -> str:
    """Of a tile, in so many pieces of its columns, or of parts of K: there the sums of up lie behind those of gate."""
    names, lines = ["acc"], []
    while len(names) < pieces:
        lines += [f"{name}0, {name}1 = halves({name}, SWAP)" for name in names]
        names = [f"{name}{half}" for name in names for half in "01"]
    for q, name in enumerate(names):
        lines += [
            f"n = tile_n * BLOCK_N + {q} * (BLOCK_N // {pieces}) + tl.arange(0, BLOCK_N // {pieces})",
            "idx_n = along_n(n.to(INDEX_DTYPE), SWAP)", "mask = along_m(in_m, SWAP) & along_n(n < N, SWAP)",
            _STORE.format(name=name, columns=f"BLOCK_N // {pieces}"),
        ]  # fmt: skip
    return "\n".join(f"        {line}" for line in lines)


_STORE = """{{% set shape = ("{columns}", rows) if SWAP else (rows, "{columns}") %}}
{{% if PARTS == 1 %}}
        {{{{store_output(("idx_m", "idx_n"), "{name}", "mask", indent_width=8, val_shape=shape)}}}}
{{% else %}}
        {{{{store_output(("part", "idx_m", "idx_n"), "{name}", "mask", indent_width=8, val_shape=shape)}}}}
{{% if GATED %}}
        idx_n = idx_n + N
        {{{{store_output(("part", "idx_m", "idx_n"), "acc_up", "mask", indent_width=8, val_shape=shape)}}}}
{{% endif %}}
{{% endif %}}"""


# The last rows of an expert, if few, are a tile of SHORT rows; rows that no expert owns are zeros.
_TEXT = """
from moe_ops.kernels.tile import along_m, along_n, find_rows, halves, swizzle
{imports}

{{{{def_kernel({names})}}}}
    {written}
    num_rows = {{{{size("{counted}", 0)}}}}
    num_m = num_rows if ROW_TILES else tl.cdiv(num_rows, BLOCK_M) + (E + 1) * OFFSETS
    part = tl.program_id(1) if PARTS > 1 else None
    tile, tile_n = swizzle(tl.program_id(0), num_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, end = find_rows({offsets}, tile, num_rows, E, BLOCK_M, E_BLOCK, ROW_TILES)
    if first >= end:
        return
{{% macro store(rows) %}}
        idx_m = along_m(to.to(INDEX_DTYPE), SWAP)
{stores}
{{% endmacro %}}
{{% if OFFSETS %}}
    if expert >= E:
        m = first + tl.arange(0, BLOCK_M)
        in_m = m < end
        to = {write}
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        acc_up = acc
{{{{store("BLOCK_M")}}}}
{{% endif %}}
    if (expert < E) & (end - first > SHORT):
        {full}
{{{{store("BLOCK_M")}}}}
{{% if SHORT %}}
    if (expert < E) & (end - first <= SHORT):
        {short}
{{{{store("SHORT")}}}}
{{% endif %}}
"""

"""The parts of the layer as a graph for a CPU, where rows are so few that each is a sum over its expert's codes.

`experts` is the same composition (moe_ops/backends/compose.py) of these parts as of a backend's. The sums alone are an
op (rows.py); the rest is plain torch, which Inductor fuses.

T tokens, A experts per token, R sorted rows, M rows of x, E experts, N outputs, K contraction in J units of P codes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_ops import routing
from moe_ops.activation import Gate, deinterleave, run_gate
from moe_ops.backends import compose
from moe_ops.backends.base import Impl, Operand, Problem, Rows, Weight, register, select
from moe_ops.formats import FORMATS, Codec, Format

from . import _compat
from .codes import is_known, unit
from .quantize import rounded, scale_value
from .routing import unpermute
from .rows import Channels, words_of

# Up to how many rows for each expert they are summed one by one: each decodes what it reads.
_ROWS = 4
# A linear's rows share what is decoded, if their number is known.
_LINEAR_ROWS, _LINEAR_ROWS_UNKNOWN = 8, 2
_WEIGHTS = {"experts": ("gate_up_proj", "down_proj"), "grouped_mm": ("weight",), "linear": ("weight",)}
# Scales that Inductor reads with vector instructions around them.
_SCALES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu)


def opens(op: str, given: dict[str, Any], problem: Problem) -> bool:
    """Whether an op with these arguments is opened into the parts below."""
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    if op not in _WEIGHTS or problem.device != "cpu" or any(_compat.is_unbacked(t) for t in tensors):
        return False
    if given.get("transpose") or not _is_own(problem, given):
        return False
    codec = FORMATS[given["format"]].weight
    return all(_fits(codec, given[n], given.get(f"{n}_scale")) for n in _WEIGHTS[op]) and _few(op, given)


def _is_own(problem: Problem, given: dict[str, Any]) -> bool:
    """Whether the CPU's own backend would run it, in an element that codes.py knows."""
    problem = replace(problem, batch_invariant=bool(given.get("batch_invariant")))
    with _compat.untraced():  # both look at every code of an element
        try:
            return select(problem, given.get("backend", "auto")).backend == "torch" and is_known(
                FORMATS[problem.format].weight.element)  # fmt: skip
        except ValueError:
            return False


def _fits(codec: Codec, codes: Tensor, scale: Tensor | None) -> bool:
    if scale is None or scale.dtype not in _SCALES or not codes.is_contiguous() or not scale.is_contiguous():
        return False
    return words_of(codec, codec.columns(codes.shape[-1])) is not None


def _few(op: str, given: dict[str, Any]) -> bool:
    if op == "linear":
        rows = given["x"].numel() // given["x"].shape[-1]
        return bool(0 < rows <= (_LINEAR_ROWS if isinstance(rows, int) else _LINEAR_ROWS_UNKNOWN))
    weight = given["gate_up_proj" if op == "experts" else "weight"]
    read = given["topk_ids"] if op == "experts" else given.get("rows_in")
    rows = given["x"].shape[0] if read is None else read.numel()
    return bool(0 < rows <= _ROWS * weight.shape[0])


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """topk_ids (T, A) -> order (R,), offsets (E + 1,), int32, as routing.sort_by_expert has them."""
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)  # (R,)
    each = torch.arange(num_experts + 1, device=ids.device)
    return torch.argsort(ids, stable=True).int(), (ids[None] < each[:, None]).sum(1).int()


def grouped_mm(
    x: Operand, w: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """As the reference's (moe_ops/backends/reference.py)."""
    assert not transpose and not batch_invariant
    read = None if rows.read is None else (rows.read // rows.top_k).long()
    owner = owned = None
    if rows.offsets is not None:
        found = _owners(rows.offsets, x.data.shape[0] if read is None else read.shape[0])
        owner, owned = found.clamp(max=w.qdata.shape[0] - 1), found[:, None] < w.qdata.shape[0]
    y = _channels(_sums(x, w, read, owner, fmt), w, fmt.weight, owner)
    if w.bias is not None:
        y = y + (w.bias if owner is None else w.bias[owner]).float()
    y = deinterleave(y) if w.interleaved else y
    if gate is not None:
        y = run_gate(gate, y.to(out_dtype)).float()
    if owned is not None:
        y = torch.where(owned, y, 0.0)
    y = y if rows.write is None else unpermute(y, rows.write)
    return (y if rows.weights is None else y * rows.weights[:, None]).to(out_dtype)


def _sums(x: Operand, w: Weight, read: Tensor | None, owner: Tensor | None, fmt: Format) -> Tensor:
    """(R, N) fp32, channels as stored, without the scales that do not change along K."""
    codec, values = fmt.weight, x.data.float() if x.scale is None else _values(x, fmt.activation)  # (M, K)
    words = words_of(codec, values.shape[1])
    assert words is not None and codec.block is not None
    lanes = (values * unit(codec.element)).unflatten(1, (-1, words.planes)).permute(2, 0, 1)  # (P, M, J)
    return torch.ops.moe_ops._rows(
        lanes.contiguous(), read, owner, w.qdata, w.scale if codec.block[1] else None, format=fmt.name,
        shards=w.shards, interleaved=w.interleaved,
    )  # fmt: skip


def _channels(y: Tensor, w: Weight, codec: Codec, owner: Tensor | None) -> Tensor:
    """y (R, N) times the scales of its channels."""
    assert codec.block is not None and w.scale is not None
    each = [] if codec.block[1] else [(w.scale.flatten(1), codec.block[0])]
    each += [] if w.global_scale is None else [(w.global_scale, 0)]
    n = torch.arange(y.shape[1], device=y.device)
    for scale, block in each:  # (E, rows)
        mine = scale if owner is None else scale[owner]
        row = Channels(y.shape[1], block, w.shards, w.interleaved).scale_row(n)
        y = y * (mine if block == 1 else mine[:, row]).float()
    return y


def _values(x: Operand, codec: Codec | None) -> Tensor:
    """fp32 values of codes (M, K) that come with their scales."""
    assert codec is not None and x.scale is not None
    scale = scale_value(x.scale)
    values = codec.decode(x.data)
    if scale.ndim and scale.shape[-1] > 1:
        scale = codec.spread(scale, *values.shape)
    return values * scale if x.global_scale is None else values * scale * x.global_scale


def _owners(offsets: Tensor, rows: Any) -> Tensor:
    """Expert of every sorted row (R,), E for a row that no expert owns."""
    at = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return (offsets[None, 1:] <= at[:, None]).sum(1)


def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> Operand:
    """The numbers that codes of x would stand for (M, K), in fp32."""
    q = rounded(x, codec, scale, torch.float32)
    if q.scale is None:
        return Operand(q.data)
    by_group = q.scale.ndim > 0 and q.scale.shape[-1] > 1
    return Operand(q.data * (codec.spread(q.scale, *q.data.shape) if by_group else q.scale))


class Parts:
    """What `compose` builds the layer from."""

    sort_by_expert = staticmethod(sort_by_expert)
    combine = staticmethod(routing.combine)
    quantize = staticmethod(quantize)
    grouped_mm = staticmethod(grouped_mm)


def _supports(problem: Problem) -> bool | str:
    return problem.device == "cpu" or "runs on the CPU"


for fn in (compose.grouped_mm, compose.experts):
    register(Impl("inductor_cpu", fn.__name__, partial(fn, Parts), _supports))

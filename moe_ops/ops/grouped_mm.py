"""moe_ops::grouped_mm: rows sorted by expert times each expert's matrix. moe_ops::linear: the same with one expert.

R sorted rows, E experts, N outputs, K contraction, stored in codec.stored(K) bytes where codes are packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activation import Gate, resolve_activation
from ..backends.base import FLOATS, Operand, Problem, Rows, Weight, arch_of, select
from ..formats import FORMATS, Codec, Format
from .library import define, gradient, needs_grad, no_gradient
from .quantize import check_static
from .training import check_frozen, check_training, gradient_format

_WEIGHT = (
    "Tensor? weight_scale=None, Tensor? weight_global_scale=None, Tensor? weight_zero_point=None, Tensor? bias=None"
)


def make_gate(
    activation: str, gated: bool, alpha: float | None, beta: float | None, limit: float | None
) -> Gate | None:
    """Arguments of an op as a Gate with presets opened; None for the activation "none"."""
    if activation == "none":
        return None
    name, alpha, beta, limit = resolve_activation(activation, alpha, beta, limit)
    return Gate(activation=name, gated=gated, alpha=alpha, beta=beta, limit=limit)


def check_floats(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float16, bfloat16 or float32, got {x.dtype}")


def _check_codes(x: Operand, fmt: Format, transpose: bool, k: int) -> None:
    """x that comes with a scale."""
    codec = fmt.activation
    assert x.scale is not None
    if codec is None or transpose:
        raise ValueError(f"x_scale needs a format with quantized activations, and no transpose; format {fmt.name!r}")
    if x.data.dtype != codec.element.storage:
        raise ValueError(f"x with a scale must hold {codec.element.storage}, got {x.data.dtype}")
    rows, group = x.data.shape[0], codec.block[1] if codec.block else 0
    shapes: list[tuple[int, ...]] = [(rows, -(-k // group) if group else 1)]
    if not codec.global_scale and codec.scale_dtype.itemsize > 1:  # a static scale, or one for all of x
        shapes = [(), (rows, 1), *shapes]
    if tuple(x.scale.shape) not in shapes:
        *others, last = (str(shape) if shape else "one value" for shape in dict.fromkeys(shapes))
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"x_scale must be {allowed}, got {tuple(x.scale.shape)}")
    _check_scale_dtype(codec, x.scale, "x_scale")
    if (x.global_scale is not None) != codec.global_scale:
        what = f"is missing: it is ({rows}, 1)" if codec.global_scale else "is not used"
        raise ValueError(f"x_global_scale {what}; format {fmt.name!r}")
    if x.global_scale is not None and tuple(x.global_scale.shape) != (rows, 1):
        raise ValueError(f"x_global_scale must be ({rows}, 1), got {tuple(x.global_scale.shape)}")
    if x.global_scale is not None and x.global_scale.dtype != torch.float32:
        raise ValueError(f"x_global_scale must be float32, got {x.global_scale.dtype}")


def _check_scale_dtype(codec: Codec, scale: Tensor, name: str) -> None:
    """A scale of one byte is what the codec says, for a byte has other values as another type."""
    if codec.scale_dtype.itemsize > 1 and scale.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {scale.dtype}")
    if codec.scale_dtype.itemsize == 1 and scale.dtype != codec.scale_dtype:
        hint = ""
        if scale.dtype == torch.uint8:
            kind = "exponents" if codec.scale_dtype == torch.float8_e8m0fnu else "scales"
            hint = f": view uint8 {kind} as {str(codec.scale_dtype).removeprefix('torch.')}"
        raise ValueError(f"{name} must be {codec.scale_dtype}, got {scale.dtype}{hint}")


def check_weight(fmt: Format, w: Weight, name: str = "weight") -> None:
    """ValueError unless codes, scales and bias fit each other and the format."""
    if w.qdata.ndim != 3:
        raise ValueError(f"{name} must be (E, N, K), got {tuple(w.qdata.shape)}")
    storage = fmt.weight.element.storage
    if storage is not None and w.qdata.dtype != storage:
        raise ValueError(f"{name} of format {fmt.name!r} must hold {storage}, got {w.qdata.dtype}")
    if storage is None and w.qdata.dtype not in FLOATS:
        raise ValueError(f"{name} of format {fmt.name!r} must be float16, bfloat16 or float32, got {w.qdata.dtype}")
    if w.shards < 1 or w.qdata.shape[1] % w.shards:
        raise ValueError(f"{name} has {w.qdata.shape[1]} rows per expert: they are not {w.shards} matrices of one size")
    k = fmt.weight.columns(w.qdata.shape[2])
    reason = fmt.check(w.qdata.shape[1] // w.shards, k)
    if fmt.weight.stored(k) != w.qdata.shape[2]:
        reason = f"no number of {fmt.weight.element.bits}-bit codes fills {w.qdata.shape[2]} bytes"
    if reason:
        raise ValueError(f"{name} {tuple(w.qdata.shape)} of format {fmt.name!r}: {reason}")
    if fmt.weight.packed and w.qdata.stride(-1) != 1:
        raise ValueError(f"{name} of format {fmt.name!r} must be contiguous along K, got strides {w.qdata.stride()}")
    _check_scales(fmt, w, name)
    if w.bias is not None and w.bias.shape != w.qdata.shape[:2]:
        raise ValueError(f"the bias of {name} must be {tuple(w.qdata.shape[:2])}, got {tuple(w.bias.shape)}")


def _check_scales(fmt: Format, w: Weight, name: str) -> None:
    for what, t, used in (
        ("scale", w.scale, fmt.quantized), ("global_scale", w.global_scale, fmt.weight.global_scale),
        ("zero_point", w.zero_point, False),
    ):  # fmt: skip
        if (t is not None) != used:
            raise ValueError(f"{name}_{what} {'is missing' if used else 'is not used'}: format {fmt.name!r}")
    if w.scale is not None:
        want = scale_shape(fmt, w)
        if tuple(w.scale.shape) != want:
            raise ValueError(f"{name}_scale of format {fmt.name!r} must be {want}, got {tuple(w.scale.shape)}")
        _check_scale_dtype(fmt.weight, w.scale, f"{name}_scale of format {fmt.name!r}")
    if w.global_scale is not None:
        got, each = w.global_scale, (w.qdata.shape[0], w.shards)
        if tuple(got.shape) != each or got.dtype != torch.float32:
            raise ValueError(f"{name}_global_scale of format {fmt.name!r} must be float32 {each}, one for each matrix;"
                             f" got {got.dtype} {tuple(got.shape)}")  # fmt: skip


def check_input_scale(fmt: Format, scale: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless a static scale of activations, of any shape with one value where `shape` is (), can be used."""
    if scale is None:
        return
    if fmt.activation is None or (scale.shape != shape if shape else scale.numel() != 1):
        want = str(shape) if shape else "one value"
        raise ValueError(f"{name} must be {want} and needs a format with quantized activations; "
                         f"got {tuple(scale.shape)} for {fmt.name!r}")  # fmt: skip
    check_static(fmt.activation)


def scale_shape(fmt: Format, w: Weight) -> tuple[int, ...]:
    """Shape of the scale of (E, S*N, K): (E, S) for whole matrices, else (E, S * ceil(N/BN), ceil(K/BK))."""
    assert fmt.weight.block is not None
    (e, n, stored), (bn, bk) = w.qdata.shape, fmt.weight.block
    if not bn and not bk:
        return e, w.shards
    k = fmt.weight.columns(stored)
    return e, w.shards * (-(-(n // w.shards) // bn) if bn else 1), -(-k // bk) if bk else 1


def check_invariant(fmt: Format, *weights: Weight) -> None:
    if fmt.activation is not None and fmt.activation.block == (0, 0) and any(w.input_scale is None for w in weights):
        raise ValueError(f"format {fmt.name!r} scales activations over the whole batch: it cannot be batch-invariant")


def _rows(x: Tensor, offsets: Tensor, w: Weight, rows_in: Tensor | None, rows_out: Tensor | None,
          row_weights: Tensor | None, top_k: int, columns: int) -> Rows:  # fmt: skip
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x must be (rows, {columns}) for this weight, got {tuple(x.shape)}")
    if offsets.shape != (w.qdata.shape[0] + 1,) or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 ({w.qdata.shape[0] + 1},), got {offsets.dtype} {tuple(offsets.shape)}")
    for name, index in (("rows_in", rows_in), ("rows_out", rows_out)):
        if index is not None and (index.ndim != 1 or index.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name} must be a vector of int32 or int64, got {index.dtype} {tuple(index.shape)}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    num_rows = x.shape[0] if rows_in is None else rows_in.shape[0]
    for name, index in (("rows_out", rows_out), ("row_weights", row_weights)):
        if index is not None and index.shape != (num_rows,):
            raise ValueError(f"{name} must be ({num_rows},), got {tuple(index.shape)}")
    read, write = (None if index is None else index.contiguous() for index in (rows_in, rows_out))
    weights = None if row_weights is None else row_weights.float().contiguous()
    return Rows(offsets.contiguous(), read, write, weights, top_k)


def _problem(op: str, x: Tensor, w: Weight, fmt: Format, gate: Gate | None, batch_invariant: bool = False) -> Problem:
    (e, n, _), k = w.qdata.shape, fmt.weight.columns(w.qdata.shape[2])
    return Problem(op, x.device.type, arch_of(x.device), x.dtype, fmt.name, e, n, k,
                   gate.activation if gate else "none", w.bias is not None, batch_invariant)  # fmt: skip


def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, weight_scale: Tensor | None = None,
    weight_global_scale: Tensor | None = None, weight_zero_point: Tensor | None = None, bias: Tensor | None = None,
    x_scale: Tensor | None = None, x_global_scale: Tensor | None = None, rows_in: Tensor | None = None,
    rows_out: Tensor | None = None, row_weights: Tensor | None = None, weight_master: Tensor | None = None, *,
    format: str, shards: int = 1, transpose: bool = False, top_k: int = 1, activation: str = "none", gated: bool = True,
    interleaved: bool = False, alpha: float | None = None, beta: float | None = None, limit: float | None = None,
    out_dtype: torch.dtype | None = None, grad_format: str | None = None, backend: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """Sorted row i of expert e (offsets[e] <= i < offsets[e + 1]), with r = rows_in[i] // top_k and o = rows_out[i]:

        out[o] = cast(row_weights[o] * act(x[r] . W[e]^T + bias[e]))            (R, N), or (R, N / 2) when gated

    shards: how many matrices lie above each other in a weight, each with scales of its own; a gated product has two.
    Rows that no expert owns give exactly 0. x is quantized as the format says unless x_scale (and x_global_scale, for
    codecs that have one) comes with codes, as moe_ops::quantize gives them: x is then (rows, stored K).
    transpose: out = x . W[e] with x (rows, N), for gradients; x is then not quantized, and bias and gate are refused.
    weight_master, grad_format: as gate_up_proj_master and grad_format of moe_ops::experts.
    Raises ValueError for shapes, dtypes and scales that do not fit the format.
    """
    fmt = FORMATS[format]
    gate = make_gate(activation, gated, alpha, beta, limit)
    shards = 2 if interleaved or (gate is not None and gate.gated) else shards
    w = Weight(weight, weight_scale, weight_global_scale, weight_zero_point, bias, None, shards, interleaved,
               weight_master)  # fmt: skip
    check_weight(fmt, w)
    check_training(fmt, grad_format, w)
    if transpose and (bias is not None or gate is not None):
        raise ValueError("a transposed product takes neither bias nor activation")
    if batch_invariant and x_scale is None and not transpose:
        check_invariant(fmt, w)
    operand, columns = Operand(x, x_scale, x_global_scale), fmt.weight.columns(weight.shape[2])
    if x_scale is None:
        check_floats(x)
        if x_global_scale is not None:
            raise ValueError("x_global_scale comes with codes and their x_scale")
    else:
        _check_codes(operand, fmt, transpose, columns)
        assert fmt.activation is not None
        columns = fmt.activation.stored(columns)
    columns = weight.shape[1] if transpose else columns
    rows = _rows(x, offsets, w, rows_in, rows_out, row_weights, top_k, columns)
    dtype = out_dtype or (x.dtype if x_scale is None else torch.bfloat16)
    impl = select(_problem("grouped_mm", x, w, fmt, gate, batch_invariant), backend)
    return impl.fn(operand, w, rows, gate, fmt, out_dtype=dtype, transpose=transpose, batch_invariant=batch_invariant)


def _grouped_mm_fake(
    x: Tensor, weight: Tensor, offsets: Tensor, weight_scale: Tensor | None = None,
    weight_global_scale: Tensor | None = None, weight_zero_point: Tensor | None = None, bias: Tensor | None = None,
    x_scale: Tensor | None = None, x_global_scale: Tensor | None = None, rows_in: Tensor | None = None,
    rows_out: Tensor | None = None, row_weights: Tensor | None = None, weight_master: Tensor | None = None, *,
    format: str, transpose: bool = False,
    activation: str = "none", gated: bool = True, out_dtype: torch.dtype | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    n = weight.shape[1] // 2 if activation != "none" and gated else weight.shape[1]
    n = FORMATS[format].weight.columns(weight.shape[2]) if transpose else n
    dtype = out_dtype or (x.dtype if x_scale is None else torch.bfloat16)
    return x.new_empty(x.shape[0] if rows_in is None else rows_in.shape[0], n, dtype=dtype)


def grouped_mm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, weight_scale: Tensor | None,
    weight_global_scale: Tensor | None, weight_zero_point: Tensor | None, bias: Tensor | None, x_scale: Tensor | None,
    x_global_scale: Tensor | None, rows_in: Tensor | None, rows_out: Tensor | None, row_weights: Tensor | None,
    weight_master: Tensor | None, format: str, shards: int, top_k: int, activation: str, gated: bool, interleaved: bool,
    alpha: float | None, beta: float | None, limit: float | None, grad_format: str | None, need: list[bool],
    backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, bias, row_weights, in fp32 or x's dtype, and the float weight; empty for those not in `need`."""
    fmt = FORMATS[format]
    gate = make_gate(activation, gated, alpha, beta, limit)
    shards = 2 if interleaved or (gate is not None and gate.gated) else shards
    w = Weight(weight, weight_scale, weight_global_scale, weight_zero_point, bias, None, shards, interleaved,
               weight_master)  # fmt: skip
    rows = Rows(offsets, rows_in, rows_out, None if row_weights is None else row_weights.float(), top_k)
    impl = select(_problem("grouped_mm_backward", grad, w, fmt, gate), backend)
    grads = impl.fn(grad.contiguous(), Operand(x, x_scale, x_global_scale), w, rows, gate, fmt, need=tuple(need),
                    grad_fmt=gradient_format(grad_format))  # fmt: skip
    return tuple(g if n else grad.new_empty(0) for g, n in zip(grads, need, strict=True))


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    need, row_weights, master, format = args[-2] if isinstance(args[-1], str) else args[-1], *args[8:11]
    (e, n), w = weight.shape[:2], weight if master is None else master
    return (
        grad.new_empty(x.shape[0], FORMATS[format].weight.columns(weight.shape[2])) if need[0] else grad.new_empty(0),
        grad.new_empty(e, n, dtype=torch.float32) if need[1] else grad.new_empty(0),
        grad.new_empty(row_weights.shape[0], dtype=torch.float32) if need[2] else grad.new_empty(0),
        grad.new_empty(w.shape, dtype=w.dtype) if need[3] else grad.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: Tensor) -> None:
    check_frozen(keyword_only_inputs["format"], inputs[1], *inputs[3:5])
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, offsets, *optional = ctx.saved_tensors
    o, need = ctx.options, needs_grad(ctx, 13)
    if o["transpose"]:
        raise NotImplementedError("grouped_mm(transpose=True) is itself a gradient: it has no second one")
    wanted = [need[0], need[6], need[11], need[12] if FORMATS[o["format"]].quantized else need[1]]
    gx, gb, gr, gw = torch.ops.moe_ops.grouped_mm_backward(
        grad, x, weight, offsets, *optional, o["format"], o["shards"], o["top_k"], o["activation"], o["gated"],
        o["interleaved"], o["alpha"], o["beta"], o["limit"], o["grad_format"], wanted, o["backend"])  # fmt: skip
    bias, row_weights = optional[3], optional[8]
    return (
        gx.to(x.dtype) if wanted[0] else None, gw if need[1] else None, None, None, None, None,
        gb.to(bias.dtype) if wanted[1] and bias is not None else None, None, None, None, None,
        gr.to(row_weights.dtype) if wanted[2] and row_weights is not None else None, gw if need[12] else None,
    )  # fmt: skip


define(
    f"grouped_mm(Tensor x, Tensor weight, Tensor offsets, {_WEIGHT}, Tensor? x_scale=None, "
    "Tensor? x_global_scale=None, Tensor? rows_in=None, Tensor? rows_out=None, Tensor? row_weights=None, "
    "Tensor? weight_master=None, *, "
    "str format, int shards=1, bool transpose=False, int top_k=1, str activation='none', bool gated=True, "
    "bool interleaved=False, float? alpha=None, float? beta=None, float? limit=None, ScalarType? out_dtype=None, "
    "str? grad_format=None, str backend='auto', bool batch_invariant=False) -> Tensor",
    grouped_mm, _grouped_mm_fake,
)  # fmt: skip
define(
    "grouped_mm_backward(Tensor grad, Tensor x, Tensor weight, Tensor offsets, Tensor? weight_scale, "
    "Tensor? weight_global_scale, Tensor? weight_zero_point, Tensor? bias, Tensor? x_scale, Tensor? x_global_scale, "
    "Tensor? rows_in, Tensor? rows_out, Tensor? row_weights, Tensor? weight_master, str format, int shards, int top_k, "
    "str activation, bool gated, bool interleaved, float? alpha, float? beta, float? limit, str? grad_format, "
    "bool[] need, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor)",
    grouped_mm_backward, _backward_fake,
)  # fmt: skip
gradient("grouped_mm", _setup, _backward)
no_gradient("grouped_mm_backward")

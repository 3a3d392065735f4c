"""moe_ops::grouped_wgrad, moe_ops::quantize_weight: what training adds.

R sorted rows, E experts, N channels, K columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import FLOATS, Problem, Weight, arch_of, select
from ..formats import FORMATS, Codec, Format, QuantizedTensor, empty_weight
from .library import define, no_gradient


def gradient_format(name: str | None) -> Format | None:
    return None if name is None else FORMATS[name]


def multiplies_gradients(fmt: Format) -> bool:
    """Whether gradients can be multiplied in a format: both operands are codes of 8 bits with an exponent."""
    return fmt.activation is not None and _is_fp8(fmt.weight) and _is_fp8(fmt.activation)


def _is_fp8(codec: Codec) -> bool:
    return codec.element.bits == 8 and codec.element.exponent_bits > 0


def check_frozen(format: str, *stored: Tensor | None) -> None:
    """ValueError for codes and scales that ask for a gradient: it would be none, in silence."""
    if FORMATS[format].quantized and any(t is not None and t.requires_grad for t in stored):
        raise ValueError(f"codes of format {format!r} have no gradient: what they were made of may have one, as master")


def check_training(fmt: Format, grad_format: str | None, *weights: Weight) -> None:
    """ValueError for masters that do not fit their codes, and formats in which gradients are not multiplied."""
    for w in weights:
        shape = (*w.qdata.shape[:2], fmt.weight.columns(w.qdata.shape[2]))
        if w.master is not None and (tuple(w.master.shape) != shape or w.master.dtype not in FLOATS):
            raise ValueError(f"a master is the float weight {shape}, got {w.master.dtype} {tuple(w.master.shape)}")
        if w.master is not None and not fmt.quantized:
            raise ValueError(f"weights of format {fmt.name!r} are floats: they need no master")
    if grad_format is None:
        return
    if not multiplies_gradients(FORMATS[grad_format]):
        allowed = ", ".join(name for name in FORMATS if multiplies_gradients(FORMATS[name]))
        raise ValueError(f"gradients are not multiplied in {grad_format!r}; allowed: {allowed}")
    if any(w.master is None for w in weights):
        raise ValueError("grad_format needs masters: the weights are quantized once more, for gradients")


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor | None, grad_rows_in: Tensor | None = None, rows_in: Tensor | None = None,
    *, top_k: int = 1, codec: str | None = None, out_dtype: torch.dtype | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """dW[e] = sum over sorted rows i of expert e of grad[i]^T x[i] (E, N, K), in fp32, one cast to out_dtype or grad's.

    grad (R, N), x (R, K); where rows are gathered, grad[grad_rows_in[i] // top_k] and x[rows_in[i] // top_k]. Without
    offsets all rows are those of one expert. With a codec both are quantized along the rows first: a scale for each of
    its groups, which never join two experts, or for all rows of an expert. Raises ValueError for shapes that do not
    fit, and codecs but those of 8-bit floats.
    """
    if codec is not None and not _is_fp8(FORMATS.codec(codec)):
        raise ValueError(f"gradients are multiplied in codes of 8-bit floats, not in {codec!r}")
    sizes = {(t if read is None else read).shape[0] for t, read in ((grad, grad_rows_in), (x, rows_in))}
    if grad.ndim != 2 or x.ndim != 2 or len(sizes) > 1:
        raise ValueError(f"grad and x must be rows, as many, got {tuple(grad.shape)} and {tuple(x.shape)}")
    if grad.dtype != x.dtype or x.dtype not in FLOATS:
        raise ValueError(f"grad and x must be of one float type, got {grad.dtype} and {x.dtype}")
    if offsets is not None and (offsets.ndim != 1 or offsets.dtype != torch.int32):
        raise ValueError(f"offsets must be int32 (E + 1,), got {offsets.dtype} {tuple(offsets.shape)}")
    problem = Problem("grouped_wgrad", x.device.type, arch_of(x.device), x.dtype, codec or "bf16")
    return select(problem, backend).fn(
        grad, x, offsets, codec and FORMATS.codec(codec), num_experts=_experts(offsets), top_k=top_k,
        out_dtype=out_dtype or grad.dtype, grad_read=grad_rows_in, x_read=rows_in,
    )  # fmt: skip


def _experts(offsets: Tensor | None) -> int:
    return 1 if offsets is None else offsets.shape[0] - 1


def _fake(
    grad: Tensor, x: Tensor, offsets: Tensor | None, *_: Any, out_dtype: torch.dtype | None = None, **__: Any
) -> Tensor:
    return grad.new_empty(_experts(offsets), grad.shape[1], x.shape[1], dtype=out_dtype or grad.dtype)


def quantize_weight(weight: Tensor, codec: str, shards: int = 1, backend: str = "auto") -> tuple[Tensor, ...]:
    """weight (E, N, K), `shards` matrices above each other -> codes, scale and global_scale, (0,) where there is none.

    Shapes and values are those of formats.quantize_weight. Raises ValueError for a weight that the codec cannot store.
    """
    found = FORMATS.codec(codec)
    if weight.ndim != 3 or weight.dtype not in FLOATS:
        raise ValueError(f"weights of experts are floats (E, N, K), got {weight.dtype} {tuple(weight.shape)}")
    if found.block is None:
        raise ValueError(f"{codec!r} is not quantized")
    reason = found.check(weight.shape[1] // shards, weight.shape[2])
    if weight.shape[1] % shards or reason:
        raise ValueError(f"weight {tuple(weight.shape)} in {shards} matrices: {reason or 'they are not of one size'}")
    problem = Problem("quantize_weight", weight.device.type, arch_of(weight.device), weight.dtype, codec)
    return _parts(select(problem, backend).fn(found, weight, shards), weight)


def _parts(q: QuantizedTensor, weight: Tensor) -> tuple[Tensor, ...]:
    assert q.scale is not None
    whole = weight.new_empty(0, dtype=torch.float32) if q.global_scale is None else q.global_scale
    return q.qdata, q.scale, whole


def _quantize_fake(weight: Tensor, codec: str, shards: int = 1, backend: str = "auto") -> tuple[Tensor, ...]:
    e, n, k = weight.shape
    q = empty_weight(FORMATS.codec(codec), e, n // shards, k, shards, dtype=weight.dtype, device="meta")
    return tuple(weight.new_empty(t.shape, dtype=t.dtype) for t in _parts(q, weight))


define(
    "grouped_wgrad(Tensor grad, Tensor x, Tensor? offsets, Tensor? grad_rows_in=None, Tensor? rows_in=None, *, "
    "int top_k=1, str? codec=None, ScalarType? out_dtype=None, str backend='auto') -> Tensor",
    grouped_wgrad, _fake,
)  # fmt: skip
define(
    "quantize_weight(Tensor weight, str codec, int shards=1, str backend='auto') -> (Tensor, Tensor, Tensor)",
    quantize_weight, _quantize_fake,
)  # fmt: skip
no_gradient("grouped_wgrad")
no_gradient("quantize_weight")

"""The definition of every op, in plain PyTorch on any device. Slow on purpose where plain is slower.

R sorted rows, E experts, N output channels, K contraction. On CUDA it reads the offsets on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import routing
from ..activation import Gate, deinterleave, run_gate
from ..formats import Codec, Format, QuantizedTensor, dequantize_weight
from . import compose
from .base import Rows, Weight


def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (..., K) -> codes and scale. A given scale, the codec's shape or one per row (..., 1), makes it static."""
    if scale is not None and scale.shape[-1:] == (1,):
        return codec.element.encode(x.float() / scale), scale
    q = codec.quantize(x if x.ndim > 1 else x[None], scale)
    assert q.scale is not None
    return q.qdata.view(x.shape), q.scale


def grouped_mm(
    x: Tensor, x_scale: Tensor | None, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """out[write(i)] = weights[write(i)] * act(x[read(i)] W[e]^T + bias[e]) for the rows i of each expert e, else 0.

    The product and bias are fp32, one cast to `out_dtype` precedes the activation, one cast ends it.
    """
    n, k = weight.qdata.shape[1:]
    width = k if transpose else n // 2 if gate and gate.gated else n
    num_rows = x.shape[0] if rows.read is None else rows.read.shape[0]
    out = torch.zeros(num_rows, width, dtype=out_dtype, device=x.device)
    bounds = [0, num_rows] if rows.offsets is None else rows.offsets.tolist()
    for e in range(len(bounds) - 1):
        mine = slice(bounds[e], bounds[e + 1])
        if bounds[e] == bounds[e + 1]:
            continue
        xe = _take(x, x_scale, fmt, mine if rows.read is None else rows.read[mine] // rows.top_k)
        we, channel_scale, bias = _expert(weight, fmt, e)
        with torch.autocast(x.device.type, enabled=False):
            y = (xe * channel_scale) @ we if transpose else (xe @ we.T) * channel_scale  # (rows of e, width) fp32
        if bias is not None and not transpose:
            y = y + bias.float()
        if gate is not None:
            y = run_gate(gate, y.to(out_dtype))
        write = mine if rows.write is None else rows.write[mine].long()
        if rows.weights is not None:
            y = y.float() * rows.weights[write].float()[:, None]
        out[write] = y.to(out_dtype)
    return out


def _take(x: Tensor, x_scale: Tensor | None, fmt: Format, index: Tensor | slice) -> Tensor:
    scale = x_scale[index] if x_scale is not None and x_scale.ndim > 1 else x_scale
    return _values(x[index], scale, fmt)


def _values(x: Tensor, scale: Tensor | None, fmt: Format) -> Tensor:
    """fp32 values of activations: codes times scale, or x itself."""
    if scale is None:
        return x.float()
    assert fmt.activation is not None
    if scale.ndim == 0 or scale.shape[-1] == 1:  # one scale per tensor or per row, whatever the codec's block
        return fmt.activation.element.decode(x) * scale
    return fmt.activation.dequantize(QuantizedTensor(x, scale, None, None, fmt.activation))


def _expert(w: Weight, fmt: Format, e: int) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """One expert, gate rows first: matrix (N, K) in fp32, scale (N,) that multiplies its channels, bias (N,).

    A scale that changes along K is in the matrix; one that does not stays out of it, which costs N * K products less.
    """
    codes, bias = w.qdata[e], w.bias[e] if w.bias is not None else None
    scale = w.scale[e] if w.scale is not None else None
    if w.interleaved:
        codes = codes.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        bias = deinterleave(bias) if bias is not None else None
        if scale is not None and fmt.weight.block is not None and fmt.weight.block[0] == 1:
            scale = scale.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    if scale is None:
        return codes.float(), 1.0, bias
    if scale.ndim == 1:  # (S,): one for each matrix
        return fmt.weight.element.decode(codes), scale.float().repeat_interleave(codes.shape[0] // w.shards), bias
    if scale.shape == (codes.shape[0], 1):
        return fmt.weight.element.decode(codes), scale[:, 0].float(), bias
    one = QuantizedTensor(codes[None], scale[None], None, None, fmt.weight)
    return dequantize_weight(one, w.shards)[0], 1.0, bias


class Parts:
    """What `compose` builds the layer from."""

    sort_by_expert = staticmethod(routing.sort_by_expert)
    combine = staticmethod(routing.combine)
    quantize = staticmethod(quantize)
    grouped_mm = staticmethod(grouped_mm)


def _always(problem: object) -> bool:
    return True


compose.register_all("reference", Parts, _always)

"""The definition of every op, in plain PyTorch on any device. Slow on purpose where plain is slower.

R sorted rows, E experts, N output channels, K contraction. On CUDA it reads the offsets on the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import routing
from ..activation import Gate, activation_grad, run_gate
from ..formats import Codec, Format, QuantizedTensor, dequantize_weight, quantize_weight
from . import compose
from .base import Operand, Rows, Weight


def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> Operand:
    """x (M, K) -> codes and scales. A scale that is given, one value or (M, 1), makes it static.

    For a codec with a global scale that is the one given, and the scales of its groups stay dynamic.
    """
    if codec.global_scale:  # every row is a matrix of its own
        given = None if scale is None else scale.float().reshape(-1).expand(x.shape[0])  # (M,)
        q = codec.quantize(x[:, None], global_scale=given)  # (M, 1, K)
        assert q.scale is not None and q.global_scale is not None
        return Operand(q.qdata[:, 0], q.scale[:, 0], q.global_scale[:, None])
    if scale is not None:
        return Operand(codec.element.encode(x.float() / scale), scale)
    q = codec.quantize(x)
    return Operand(q.qdata, q.scale)


def grouped_mm(
    x: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """out[write(i)] = weights[write(i)] * act(x[read(i)] W[e]^T + bias[e]) for the rows i of each expert e, else 0.

    The product and bias are fp32, one cast to `out_dtype` precedes the activation, one cast ends it.
    """
    n, k = weight.qdata.shape[1], fmt.weight.columns(weight.qdata.shape[2])
    width = k if transpose else n // 2 if gate and gate.gated else n
    num_rows = x.data.shape[0] if rows.read is None else rows.read.shape[0]
    out = torch.zeros(num_rows, width, dtype=out_dtype, device=x.data.device)
    bounds = [0, num_rows] if rows.offsets is None else rows.offsets.tolist()
    if x.scale is not None:  # once, and as a type that every device gathers
        x = Operand(x.data, x.scale.float(), x.global_scale)
    for e in range(len(bounds) - 1):
        mine = slice(bounds[e], bounds[e + 1])
        if bounds[e] == bounds[e + 1]:
            continue
        xe = _take(x, fmt.activation, mine if rows.read is None else rows.read[mine] // rows.top_k)
        we, channel_scale, bias = _expert(weight, fmt.weight, e)
        with torch.autocast(x.data.device.type, enabled=False):
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


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor | None, codec: Codec | None, *, num_experts: int, out_dtype: torch.dtype,
    grad_read: Tensor | None = None, x_read: Tensor | None = None, top_k: int = 1,
) -> Tensor:  # fmt: skip
    """dW[e] = sum over the rows i of expert e of grad[i]^T x[i] (E, N, K): fp32, one cast.

    Row i is grad[i] and x[i], or grad[grad_read[i] // top_k], x[x_read[i] // top_k]. With a codec the columns of both
    are quantized first, expert by expert: along its rows, in the codec's groups or all with one scale.
    """
    out = torch.zeros(num_experts, grad.shape[1], x.shape[1], dtype=out_dtype, device=x.device)
    bounds = [0, wgrad_rows(x, grad_read, x_read)] if offsets is None else offsets.tolist()
    along = codec and codec.along_rows()
    for e in range(num_experts):
        mine = slice(bounds[e], bounds[e + 1])
        if bounds[e] == bounds[e + 1]:
            continue
        rows = (t[mine if read is None else read[mine] // top_k] for t, read in ((grad, grad_read), (x, x_read)))
        g, xe = (along.dequantize(along.quantize(t.T)).T if along else t.float() for t in rows)
        with torch.autocast(x.device.type, enabled=False):
            out[e] = (g.T @ xe).to(out_dtype)
    return out


def wgrad_rows(x: Tensor, grad_read: Tensor | None, x_read: Tensor | None) -> int:
    """How many rows a gradient of weights is summed over."""
    return next((t.shape[0] for t in (grad_read, x_read) if t is not None), x.shape[0])


def _take(x: Operand, codec: Codec | None, index: Tensor | slice) -> Tensor:
    """fp32 values of some rows: codes times scales, or the floats themselves."""
    scale, whole = (t[index] if t is not None and t.ndim > 1 else t for t in (x.scale, x.global_scale))
    if scale is None:
        return x.data[index].float()
    assert codec is not None
    values = codec.decode(x.data[index])
    if scale.ndim and scale.shape[-1] > 1:  # else one for the tensor or for each row, whatever the codec's block
        scale = codec.spread(scale, *values.shape)
    values = values * scale
    return values if whole is None else values * whole


def values(x: Operand, codec: Codec) -> Tensor:
    """fp32 values of codes (M, K)."""
    return _take(replace(x, scale=None if x.scale is None else x.scale.float()), codec, slice(None))


def _expert(w: Weight, codec: Codec, e: int) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """One expert, gate rows first: matrix (N, K) in fp32, scale (N,) that multiplies its channels, bias (N,).

    A scale that changes along K is in the matrix; one that does not stays out of it, which costs N * K products less.
    """
    codes, scale, bias, whole = (None if t is None else t[e] for t in (w.qdata, w.scale, w.bias, w.global_scale))
    assert codes is not None
    if w.interleaved:
        codes, bias = _gate_first(codes), None if bias is None else _gate_first(bias)
        if scale is not None and codec.block is not None and codec.block[0] == 1:
            scale = _gate_first(scale)
    if scale is None:
        return codes.float(), 1.0, bias
    rows = codes.shape[0] // w.shards
    channels = 1.0 if whole is None else whole.float().repeat_interleave(rows)  # (S,) -> (N,)
    if scale.ndim == 1:  # (S,): one for each matrix
        return codec.decode(codes), scale.float().repeat_interleave(rows) * channels, bias
    if scale.shape == (codes.shape[0], 1):
        return codec.decode(codes), scale[:, 0].float() * channels, bias
    one = QuantizedTensor(codes[None], scale[None], None, None, codec)
    return dequantize_weight(one, w.shards)[0], channels, bias


def _gate_first(t: Tensor) -> Tensor:
    """Rows (2I, ...) that alternate gate and up -> gate's, then up's."""
    return t.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


class Parts:
    """What `compose` builds the layer from."""

    sort_by_expert = staticmethod(routing.sort_by_expert)
    combine = staticmethod(routing.combine)
    quantize = staticmethod(quantize)
    values = staticmethod(values)
    grouped_mm = staticmethod(grouped_mm)
    activation_grad = staticmethod(activation_grad)
    grouped_wgrad = staticmethod(grouped_wgrad)
    quantize_weight = staticmethod(quantize_weight)


def _always(problem: object) -> bool:
    return True


compose.register_all("reference", Parts, _always)

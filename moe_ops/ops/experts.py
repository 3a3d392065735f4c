"""moe_ops::experts: the layer after the router. T tokens, A experts per token, E experts, H hidden, I intermediate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activation import Gate
from ..backends.base import Weight, select
from ..formats import FORMATS, Format
from .grouped_mm import _problem, check_floats, check_input_scale, check_invariant, check_weight, make_gate
from .library import define, gradient, needs_grad, no_gradient
from .training import check_frozen, check_training, gradient_format

_TENSORS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_proj_scale{0}, Tensor? down_proj_scale{0}, Tensor? gate_up_proj_global_scale{0}, "
    "Tensor? down_proj_global_scale{0}, Tensor? gate_up_proj_zero_point{0}, Tensor? down_proj_zero_point{0}, "
    "Tensor? gate_up_proj_bias{0}, Tensor? down_proj_bias{0}, Tensor? gate_up_proj_input_scale{0}, "
    "Tensor? down_proj_input_scale{0}, Tensor? gate_up_proj_master{0}, Tensor? down_proj_master{0}"
)
_SCALARS = (
    "*, str format, str activation='silu', bool gated=True, bool interleaved=False, float? alpha=None, "
    "float? beta=None, float? limit=None, bool router_weight_on_input=False, str? grad_format=None, str backend='auto'"
)


def _weights(fmt: Format, tensors: tuple, gated: bool, interleaved: bool) -> tuple[Weight, Weight]:
    up, down, s1, s2, g1, g2, z1, z2, b1, b2, i1, i2, m1, m2 = tensors
    w1 = Weight(up, s1, g1, z1, b1, i1, 2 if gated else 1, interleaved and gated, m1)
    w2 = Weight(down, s2, g2, z2, b2, i2, master=m2)
    check_weight(fmt, w1, "gate_up_proj")
    check_weight(fmt, w2, "down_proj")
    want = (up.shape[0], fmt.weight.columns(up.shape[2]), fmt.weight.stored(up.shape[1] // w1.shards))
    if tuple(down.shape) != want:
        axes = "(E, H, I in bytes)" if fmt.weight.packed else "(E, H, I)"
        raise ValueError(f"down_proj must be {want}, {axes}, for a gate_up_proj of {tuple(up.shape)}"
                         f"{'' if gated else ' without gate'}; got {tuple(down.shape)}")  # fmt: skip
    for name, scale in (("gate_up_proj_input_scale", i1), ("down_proj_input_scale", i2)):
        check_input_scale(fmt, scale, (up.shape[0],), name)
    return w1, w2


def _check_tokens(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, hidden: int) -> None:
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be (T, {hidden}), got {tuple(x.shape)}")
    check_floats(x)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_ids and topk_weights must both be ({x.shape[0]}, A), got {tuple(topk_ids.shape)} "
                         f"and {tuple(topk_weights.shape)}")  # fmt: skip
    if topk_ids.is_floating_point() or topk_ids.dtype == torch.bool:
        raise ValueError(f"topk_ids must be integers, got {topk_ids.dtype}")


def experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *tensors: Tensor | None, format: str, activation: str = "silu",
    gated: bool = True, interleaved: bool = False, alpha: float | None = None, beta: float | None = None,
    limit: float | None = None, router_weight_on_input: bool = False, grad_format: str | None = None,
    backend: str = "auto", batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """y[t] = sum over a of w[t, a] * (act(x[t] W1[e]^T + b1[e]) W2[e]^T + b2[e]),  e = topk_ids[t, a]

    x (T, H), topk_ids and topk_weights (T, A), gate_up_proj (E, 2I, H) or (E, I, H) without gate, down_proj (E, H, I).
    Ids outside 0..E-1 add nothing. router_weight_on_input weighs x instead of the result. The order of roundings is the
    one of backends/compose.py. Raises ValueError for shapes, dtypes and scales that do not fit the format.

    Weights that are floats (format "bf16") have gradients; for codes their masters do, the float weights (E, N, K) that
    they were made of: dW[e] = sum over rows of g^T x, as if nothing had been rounded. `grad_format` names the format in
    which gradients are multiplied, with masters quantized for it; None: in floats, with what the codes stand for.
    """
    fmt = FORMATS[format]
    gate = make_gate(activation, gated, alpha, beta, limit) or Gate(activation="none", gated=gated)
    if gate.activation == "none":
        raise ValueError("experts needs an activation; grouped_mm runs without")
    up, down = _weights(fmt, _pad(tensors), gated, interleaved)
    _check_tokens(x, topk_ids, topk_weights, fmt.weight.columns(up.qdata.shape[2]))
    check_training(fmt, grad_format, up, down)
    if batch_invariant:
        check_invariant(fmt, up, down)
    if not topk_ids.numel():
        return torch.zeros_like(x)
    impl = select(_problem("experts", x, up, fmt, gate, batch_invariant), backend)
    return impl.fn(x.contiguous(), topk_ids, topk_weights, up, down, fmt, gate,
                   router_weight_on_input=router_weight_on_input, batch_invariant=batch_invariant)  # fmt: skip


def _pad(tensors: tuple) -> tuple:
    """The tensors after topk_weights, absent ones None."""
    return tensors + (None,) * (14 - len(tensors))


def _fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def experts_backward(
    grad: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *tensors_and_need: Any, format: str,
    activation: str = "silu", gated: bool = True, interleaved: bool = False, alpha: float | None = None,
    beta: float | None = None, limit: float | None = None, router_weight_on_input: bool = False,
    grad_format: str | None = None, backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, topk_weights, both biases (fp32) and both float weights; empty ones for those not in `need`."""
    *tensors, need = tensors_and_need
    fmt = FORMATS[format]
    gate = make_gate(activation, gated, alpha, beta, limit)
    assert gate is not None
    up, down = _weights(fmt, tuple(tensors), gated, interleaved)
    if not topk_ids.numel():
        empty: Any = _backward_fake(grad, x, topk_ids, topk_weights, *tensors_and_need)
        grads: Any = [g.zero_() for g in empty]
    else:
        impl = select(_problem("experts_backward", x, up, fmt, gate), backend)
        grads = impl.fn(grad.contiguous(), x.contiguous(), topk_ids, topk_weights, up, down, fmt, gate,
                        router_weight_on_input=router_weight_on_input, need=tuple(need),
                        grad_fmt=gradient_format(grad_format))  # fmt: skip
    return tuple(g if n else grad.new_empty(0) for g, n in zip(grads, need, strict=True))


def _backward_fake(grad: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *rest: Any, **kwargs: Any) -> tuple:
    (up, down), masters, need = rest[:2], rest[-3:-1], rest[-1]
    weights = [w if master is None else master for w, master in zip((up, down), masters, strict=True)]
    shapes = (x.shape, topk_weights.shape, up.shape[:2], down.shape[:2], *(w.shape for w in weights))
    dtypes = (x.dtype, topk_weights.dtype, torch.float32, torch.float32, *(w.dtype for w in weights))
    each = zip(shapes, dtypes, need, strict=True)
    return tuple(grad.new_empty(s, dtype=d) if n else grad.new_empty(0) for s, d, n in each)


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: Tensor) -> None:
    check_frozen(keyword_only_inputs["format"], *inputs[3:9])
    ctx.save_for_backward(*inputs)
    ctx.options = {k: v for k, v in keyword_only_inputs.items() if k != "batch_invariant"}


# What has a gradient, by its place among the inputs: x, topk_weights, biases, weights, masters.
_X, _ROUTER, _BIASES, _FLOATS, _MASTERS = 0, 2, (11, 12), (3, 4), (15, 16)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    tensors, need = ctx.saved_tensors, needs_grad(ctx, 17)
    places = (_X, _ROUTER, *_BIASES, *(_MASTERS if FORMATS[ctx.options["format"]].quantized else _FLOATS))
    wanted = [need[place] for place in places]
    grads = torch.ops.moe_ops.experts_backward(grad, *tensors, wanted, **ctx.options)
    out: list[Tensor | None] = [None] * len(tensors)
    for place, g, use in zip(places, grads, wanted, strict=True):
        if use:
            out[place] = g.to(tensors[place].dtype)
    return tuple(out)


define(f"experts({_TENSORS.format('=None')}, {_SCALARS}, bool batch_invariant=False) -> Tensor", experts, _fake,
       repeats=True)  # fmt: skip
define(
    f"experts_backward(Tensor grad, {_TENSORS.format('')}, bool[] need, {_SCALARS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    experts_backward, _backward_fake,
)  # fmt: skip
gradient("experts", _setup, _backward)
no_gradient("experts_backward")

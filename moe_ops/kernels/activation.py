"""out = (clamp(u, -limit, limit) + beta) * act(min(g, limit)) in fp32, and its gradient.

act as in moe_ops/activation.py. Numbers that an activation does not have are None: they cost no instruction and no
register. R rows, I intermediate.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import enqueue, power_of_2


@triton.jit
def silu(g, alpha):
    return g * tl.sigmoid(g if alpha is None else alpha * g)


@triton.jit
def gelu(g, alpha):
    return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))


@triton.jit
def gelu_tanh(g, alpha):
    return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))  # (1 + tanh z) / 2 = sigmoid(2 z)


@triton.jit
def relu2(g, alpha):
    r = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return r * r


@triton.jit
def gate(g, u, alpha, beta, limit, ACT: tl.constexpr, GATED: tl.constexpr):
    if limit is not None:
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    if GATED:
        if limit is not None:
            u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        if beta is not None:
            u = u + beta
        return u * ACT(g, alpha)
    else:
        return ACT(g, alpha)


@triton.jit
def silu_slope(g, alpha):
    a = g if alpha is None else alpha * g
    s = tl.sigmoid(a)
    return s + a * s * (1.0 - s)


@triton.jit
def gelu_slope(g, alpha):
    return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)


@triton.jit
def gelu_tanh_slope(g, alpha):
    s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    return s + g * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)


@triton.jit
def relu2_slope(g, alpha):
    return 2.0 * tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gate_grad_kernel(
    h_ptr, d_ptr, weights_ptr, out_ptr, width, alpha, beta, limit,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = i < width, r * (2 * width if GATED else width) + i
    d = tl.load(d_ptr + r * width + i, mask=inside, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        d *= tl.load(weights_ptr + r)
    g = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dg = d
    if GATED:
        u = tl.load(h_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
        du = d * gate(g, 1.0, alpha, None, limit, ACT, False)
        if limit is not None:
            du = tl.where(tl.abs(u) <= limit, du, 0.0)
            u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + at + width, du.to(out_ptr.dtype.element_ty), mask=inside)
        dg *= u if beta is None else u + beta
    if limit is not None:
        dg = tl.where(g <= limit, dg, 0.0)
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, (dg * SLOPE(g, alpha)).to(out_ptr.dtype.element_ty), mask=inside)


def gate_grad(
    h: Tensor, grad: Tensor, weights: Tensor | None, out: Tensor, activation: str, gated: bool, **numbers: Any
) -> None:
    """h (R, 2I), gate's columns first, or (R, I); grad (R, I) of its activation, times weights (R,) -> out, as h."""
    r, i = grad.shape
    block = min(power_of_2(i), 1024)
    enqueue(
        _gate_grad_kernel, (r, -(-i // block)), h, grad, weights, out, i, **numbers, ACT=ACTIVATIONS[activation],
        SLOPE=SLOPES[activation], GATED=gated, BLOCK=block, num_warps=4,
    )  # fmt: skip


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}
SLOPES = {"silu": silu_slope, "gelu": gelu_slope, "gelu_tanh": gelu_tanh_slope, "relu2": relu2_slope}

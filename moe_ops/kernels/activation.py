"""out = (clamp(u, -limit, limit) + beta) * act(min(g, limit)) in fp32; act as in moe_ops/activation.py.

Numbers that an activation does not have are None: they cost no instruction and no register.
"""

import triton
import triton.language as tl


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
    r = tl.maximum(g, 0.0)
    return r * r


@triton.jit
def gate(g, u, alpha, beta, limit, ACT: tl.constexpr, GATED: tl.constexpr):
    if limit is not None:
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if beta is not None:
        u = u + beta
    return u * ACT(g, alpha) if GATED else ACT(g, alpha)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}

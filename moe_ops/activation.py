"""Activations of expert blocks: name -> function, and the name of a module's own gate, found by evaluating it.

One formula covers them all, in fp32, with gate g and up u (elementwise; alpha, beta, limit are optional numbers):

    g' = min(g, limit);   u' = clamp(u, -limit, limit)
    gated:      out = (u' + beta) * act(g')
    not gated:  out = act(g')                    (there is no u)
    silu:       act(g) = g * sigmoid(alpha * g)  (alpha = 1 when absent; the other functions take no alpha)

R rows, I intermediate size. This file imports nothing from the rest of the package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scalar = float | None


@dataclass(frozen=True, kw_only=True)
class Activation:
    """`fn(g, alpha) -> act(g)`, `grad(d, g, alpha) -> d * act'(g)`. A preset is `base` with numbers of its own."""

    name: str
    fn: Callable[[Tensor, Scalar], Tensor]
    grad: Callable[[Tensor, Tensor, Scalar], Tensor]
    base: str
    alpha: Scalar = None
    beta: Scalar = None
    limit: Scalar = None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What `recognise_gate` found: arguments of `apply_activation`."""

    activation: str
    gated: bool
    interleaved: bool = False
    alpha: Scalar = None
    beta: Scalar = None
    limit: Scalar = None


def _silu(g: Tensor, alpha: Scalar) -> Tensor:
    return F.silu(g) if alpha is None else g * torch.sigmoid(alpha * g)


def _silu_grad(d: Tensor, g: Tensor, alpha: Scalar) -> Tensor:
    return torch.ops.aten.silu_backward(d, g if alpha is None else alpha * g)  # act(g) = silu(alpha g) / alpha


def _gelu(g: Tensor, alpha: Scalar) -> Tensor:
    return F.gelu(g)


def _gelu_grad(d: Tensor, g: Tensor, alpha: Scalar) -> Tensor:
    return torch.ops.aten.gelu_backward(d, g)


def _gelu_tanh(g: Tensor, alpha: Scalar) -> Tensor:
    return F.gelu(g, approximate="tanh")


def _gelu_tanh_grad(d: Tensor, g: Tensor, alpha: Scalar) -> Tensor:
    return torch.ops.aten.gelu_backward(d, g, approximate="tanh")


def _relu2(g: Tensor, alpha: Scalar) -> Tensor:
    return torch.square(F.relu(g))


def _relu2_grad(d: Tensor, g: Tensor, alpha: Scalar) -> Tensor:
    return 2 * d * F.relu(g)


_ALL = (
    Activation(name="silu", fn=_silu, grad=_silu_grad, base="silu"),
    Activation(name="gelu", fn=_gelu, grad=_gelu_grad, base="gelu"),
    Activation(name="gelu_tanh", fn=_gelu_tanh, grad=_gelu_tanh_grad, base="gelu_tanh"),
    Activation(name="relu2", fn=_relu2, grad=_relu2_grad, base="relu2"),
    Activation(name="swiglu_oai", fn=_silu, grad=_silu_grad, base="silu", alpha=1.702, beta=1.0, limit=7.0),
)
ACTIVATIONS: dict[str, Activation] = {a.name: a for a in _ALL}
_TAKES_ALPHA = frozenset({"silu"})


def resolve_activation(
    name: str, alpha: Scalar = None, beta: Scalar = None, limit: Scalar = None
) -> tuple[str, Scalar, Scalar, Scalar]:
    """Name of a plain function and its numbers: presets are opened, numbers that were given win over a preset's.

    Raises ValueError for an unknown name (it lists the known ones) and for an alpha that the function does not take.
    """
    found = ACTIVATIONS.get(name)
    if found is None:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    if alpha is not None and found.base not in _TAKES_ALPHA:
        raise ValueError(f"activation {name!r} takes no alpha (got {alpha}); only {', '.join(_TAKES_ALPHA)} does")
    return (
        found.base,
        found.alpha if alpha is None else alpha,
        found.beta if beta is None else beta,
        found.limit if limit is None else limit,
    )


def apply_activation(
    name: str,
    h: Tensor,
    gated: bool = True,
    interleaved: bool = False,
    alpha: Scalar = None,
    beta: Scalar = None,
    limit: Scalar = None,
) -> Tensor:
    """h (R, 2I), or (R, I) without a gate -> (R, I) in h's dtype; computed in fp32, differentiable.

    The columns of h are [gate | up], or gate and up alternating when interleaved. Any leading dims are allowed.
    """
    base, alpha, beta, limit = resolve_activation(name, alpha, beta, limit)
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    if not gated:
        g = x if limit is None else x.clamp(max=limit)
        return ACTIVATIONS[base].fn(g, alpha).to(h.dtype)
    if h.shape[-1] % 2:
        raise ValueError(f"a gated activation needs an even number of columns, got {h.shape[-1]}")
    g, u = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)  # (R, I) each
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if beta is not None:
        u = u + beta
    return (u * ACTIVATIONS[base].fn(g, alpha)).to(h.dtype)


def run_gate(gate: Gate, h: Tensor) -> Tensor:
    """`apply_activation` with the arguments that a Gate holds."""
    return apply_activation(gate.activation, h, gate.gated, gate.interleaved, gate.alpha, gate.beta, gate.limit)


def activation_grad(gate: Gate, h: Tensor, grad: Tensor, weights: Tensor | None = None) -> Tensor:
    """Derivative of `apply_activation`: h (R, 2I) or (R, I), grad of its output (R, I) -> grad of h, in h's dtype.

    weights (R, 1) multiply grad. A clamp passes no gradient outside its limits, as torch's does not.
    """
    base, alpha, beta, limit = resolve_activation(gate.activation, gate.alpha, gate.beta, gate.limit)
    act, x, d = ACTIVATIONS[base], h.float(), grad.float() if weights is None else grad.float() * weights
    if not gate.gated:
        inside = 1.0 if limit is None else (x <= limit).float()
        return (act.grad(d, x if limit is None else x.clamp(max=limit), alpha) * inside).to(h.dtype)
    g, u = (x[..., ::2], x[..., 1::2]) if gate.interleaved else x.chunk(2, dim=-1)  # (R, I) each
    g_inside = u_inside = torch.ones((), device=h.device)
    if limit is not None:
        g_inside, u_inside = (g <= limit).float(), (u.abs() <= limit).float()
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    dg = act.grad(d * (u + (beta or 0.0)), g, alpha) * g_inside
    du = d * act.fn(g, alpha) * u_inside
    both = torch.cat([dg, du], -1)
    return (interleave(both) if gate.interleaved else both).to(h.dtype)


class _Gated(torch.autograd.Function):
    """run_gate; keeps h for its gradient, and none of the fp32 numbers in between."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gate: Gate) -> Tensor:
        ctx.save_for_backward(h)
        ctx.gate = gate
        return run_gate(gate, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return activation_grad(ctx.gate, ctx.saved_tensors[0], grad), None


def apply_gate(gate: Gate, h: Tensor) -> Tensor:
    """`run_gate` in between two products that are trained: h (R, 2I), or (R, I) without a gate -> (R, I)."""
    return _Gated.apply(h, gate)


def interleave(h: Tensor) -> Tensor:
    """Columns [gate | up] (..., 2I) -> gate and up alternating."""
    return h.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def deinterleave(h: Tensor) -> Tensor:
    """Columns with gate and up alternating (..., 2I) -> [gate | up]."""
    return h.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


# ---- recognition

_SATURATED = 1e4  # an `up` this large shows a clamp: no model's limit comes near it


def recognise_gate(module: nn.Module, intermediate_size: int, gated: bool) -> Gate | None:
    """Which entry of ACTIVATIONS `module._apply_gate` computes (`module.act_fn` without a gate); None = none of them.

    The function is evaluated in fp32 on a grid of (g, u) spread over rows and columns, in both column orders, and must
    agree with the formula above everywhere; alpha, beta and limit are read off three evaluations. Nothing depends on
    names. A gate that raises, is random, mixes columns, or has parameters of its own is not recognised.
    """
    call: Any = module._apply_gate if gated else module.act_fn
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.Module) and any(p.requires_grad for p in act.parameters()):
        return None
    device = next((t.device for t in module.parameters() if t.device.type != "meta"), torch.device("cpu"))
    with torch.no_grad():
        for interleaved in (False, True) if gated else (False,):
            probe = _Probe(call, intermediate_size, gated, interleaved, device)
            try:
                found = _fit(probe)
            except Exception:  # a stranger's code, on inputs that it did not choose: unrecognised, not an error
                found = None
            if found is not None:
                return found
    return None


@dataclass(frozen=True)
class _Probe:
    """Evaluates a gate at points (g, u), placed row by row into matrices of the width that the module works on."""

    call: Callable[[Tensor], Tensor]
    intermediate_size: int
    gated: bool
    interleaved: bool
    device: torch.device

    def __call__(self, g: Tensor, u: Tensor) -> Tensor:
        n, i = g.numel(), self.intermediate_size
        rows = -(-n // i)
        pad = (0, rows * i - n)
        gate, up = F.pad(g, pad).view(rows, i), F.pad(u, pad).view(rows, i)  # (rows, I)
        h = torch.cat([gate, up], -1) if self.gated else gate
        h = (interleave(h) if self.interleaved else h).to(self.device)
        out = self.call(h)
        if out.shape != (rows, i):
            raise ValueError(f"the gate maps {tuple(h.shape)} to {tuple(out.shape)}")
        return out.to("cpu", torch.float32).reshape(-1)[:n]

    def at(self, g: float, u: float = 0.0) -> float:
        return float(self(torch.tensor([g], dtype=torch.float32), torch.tensor([u], dtype=torch.float32)))


def _fit(probe: _Probe) -> Gate | None:
    beta, limit, alphas = _numbers(probe) if probe.gated else (None, None, (None,))
    g, u = _grid(limit, probe.gated)
    some = torch.randperm(g.numel(), generator=torch.Generator().manual_seed(0))[: g.numel() // 3]
    got, again = probe(g, u), probe(g[some], u[some])
    if not torch.allclose(got[some], again, rtol=1e-5, atol=1e-5):  # random, or one value reads others
        return None
    for name in (a.name for a in _ALL if a.base == a.name):
        for alpha in alphas if name in _TAKES_ALPHA else (None,):
            numbers = (alpha, beta, limit)
            h = torch.stack([g, u], -1) if probe.gated else g[:, None]
            want = apply_activation(name, h, probe.gated, False, *numbers)[:, 0]
            if torch.allclose(got, want, rtol=2e-5, atol=2e-5):
                layout = {"gated": probe.gated, "interleaved": probe.interleaved}
                return Gate(activation=name, alpha=alpha, beta=beta, limit=limit, **layout)
    return None


def _numbers(probe: _Probe) -> tuple[Scalar, Scalar, tuple[Scalar, ...]]:
    """beta, limit and the candidates for alpha, were the gate (clamp(u) + beta) * act(g)."""
    at_0, at_1 = probe.at(1.0, 0.0), probe.at(1.0, 1.0)
    act = at_1 - at_0  # act(1)
    beta = _round(at_0 / act)
    limit = probe.at(1.0, _SATURATED) / act - beta
    alphas: tuple[Scalar, ...] = (None,)
    if 0.0 < act < 1.0:
        alphas = (None, _round(math.log(act / (1.0 - act))))
    return beta or None, _round(limit) if limit < 0.99 * _SATURATED else None, alphas


def _round(x: float) -> float:
    """Four significant digits when they explain the value: fp32 evaluation of 1.702 reads 1.7019997."""
    short = float(f"{x:.4g}")
    return short if abs(x - short) <= 1e-5 * max(1.0, abs(x)) else x


def _grid(limit: Scalar, gated: bool) -> tuple[Tensor, Tensor]:
    """Points (g, u) on both sides of zero and of the limit."""
    far = [x for s in (30.0, limit or 60.0) for x in (-1.5 * s, -0.9 * s, 0.9 * s, 1.5 * s)]
    g = torch.cat([torch.linspace(-12, 12, 97), torch.tensor(far)])
    u = torch.cat([torch.linspace(-10, 10, 11), torch.tensor(far)]) if gated else torch.zeros(1)
    g, u = torch.meshgrid(g.float(), u.float(), indexing="ij")
    return g.reshape(-1), u.reshape(-1)

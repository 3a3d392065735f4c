"""The float model that a quantized one must train like: plain torch on the values of the codes, in float64 inside, with
quantized activations passing gradients straight through. Nothing of the package computes here.

T tokens, A experts per token, E experts, H hidden, I intermediate, N x K a Linear.
"""

import copy

import oracle
import torch
from torch import nn

import moe_ops
from moe_ops import FORMATS


class TwinLinear(nn.Module):
    """x (..., K) -> (..., N)"""

    def __init__(self, linear, name):
        super().__init__()
        self.codec, self.bias = FORMATS[name].activation, linear.bias
        self.register_buffer("values", oracle.weights_of(linear.weight.detach()[None], FORMATS[name].weight)[0])

    def forward(self, x):
        rows = oracle.quantized(x.flatten(0, -2).double(), self.codec)  # (T, K)
        y = rows @ self.values.T + (0.0 if self.bias is None else self.bias.double())
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class TwinExperts(nn.Module):
    """hidden (T, H), ids and weights (T, A) -> (T, H), slot by slot. Biases are kept gate first."""

    input_scales, gated, numbers = (None, None), True, {}

    def __init__(self, experts, name, activation):
        super().__init__()
        self.fmt, self.activation, self.num_experts = FORMATS[name], activation, experts.num_experts
        turn = (lambda w: w.mT) if experts.is_transposed else (lambda w: w)
        first = (lambda t: t) if experts.is_concatenated else (lambda t: torch.cat([t[:, ::2], t[:, 1::2]], 1))
        stacks = first(turn(experts.gate_up_proj.detach())), turn(experts.down_proj.detach())
        self.values = [oracle.weights_of(w.contiguous(), self.fmt.weight, s) for w, s in zip(stacks, (2, 1))]
        self.hidden = stacks[0].shape[2]
        if experts.has_bias:
            self.gate_up_proj_bias = nn.Parameter(first(experts.gate_up_proj_bias.detach()))
            self.down_proj_bias = nn.Parameter(experts.down_proj_bias.detach().clone())

    up_bias = property(lambda self: getattr(self, "gate_up_proj_bias", None))
    down_bias = property(lambda self: getattr(self, "down_proj_bias", None))

    def weights(self, work):
        return [w.to(work) for w in self.values]

    def forward(self, hidden, ids, weights):
        rows = hidden.reshape(-1, self.hidden)
        return oracle.experts(self, rows, ids, weights).to(hidden.dtype).view(hidden.shape)


def pair(floats, name, activation="silu"):
    """(model quantized, its twin), both with gradients of everything that is not quantized."""
    model, twin = moe_ops.quantize_(copy.deepcopy(floats), name), copy.deepcopy(floats)
    for where, module in model.named_modules():
        if isinstance(module, moe_ops.QuantizedExperts):
            twin.set_submodule(where, TwinExperts(twin.get_submodule(where), name, activation))
        elif isinstance(module, moe_ops.QuantizedLinear):
            twin.set_submodule(where, TwinLinear(twin.get_submodule(where), name))
    return model, twin


def gradients(model):
    """{name: gradient} of what has one; afterwards nothing has."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative(got, want):
    """In norm, of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def assert_same_gradients(got, want, limit):
    """{name: gradient}, twice: of the same parameters, each within `limit` in norm."""
    assert set(got) == set(want) and got
    errors = {name: relative(got[name], want[name]) for name in want if want[name].any()}
    assert max(errors.values()) <= limit, {n: e for n, e in errors.items() if e > limit}

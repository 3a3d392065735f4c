"""Activations against torch's own functions, and recognition of gates that are only known by what they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_ops.activation import (
    ACTIVATIONS,
    Gate,
    apply_activation,
    deinterleave,
    interleave,
    recognise_gate,
    resolve_activation,
)

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) ** 2,
}
I = 24  # noqa: E741  intermediate size


def rows(n=7, width=2 * I):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0)) * 6


def test_every_activation_has_an_oracle():
    assert {a.base for a in ACTIVATIONS.values()} == set(PLAIN)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gated(name, interleaved):
    h = rows()
    g, u = (h[:, ::2], h[:, 1::2]) if interleaved else (h[:, :I], h[:, I:])
    got = apply_activation(name, h, True, interleaved)
    torch.testing.assert_close(got, PLAIN[name](g) * u)
    clamped = apply_activation(name, h, True, interleaved, beta=0.5, limit=3.0)
    torch.testing.assert_close(clamped, PLAIN[name](g.clamp(max=3.0)) * (u.clamp(-3, 3) + 0.5))


@pytest.mark.parametrize("name", PLAIN)
def test_not_gated(name):
    h = rows()
    torch.testing.assert_close(apply_activation(name, h, gated=False), PLAIN[name](h))


def test_swiglu_oai():
    h = rows()
    g, u = h[:, :I].clamp(max=7), h[:, I:].clamp(-7, 7)
    torch.testing.assert_close(apply_activation("swiglu_oai", h), (u + 1) * g * torch.sigmoid(1.702 * g))
    assert resolve_activation("swiglu_oai") == ("silu", 1.702, 1.0, 7.0)
    assert resolve_activation("swiglu_oai", limit=5.0) == ("silu", 1.702, 1.0, 5.0)


def test_is_computed_in_fp32():
    h = rows().bfloat16()
    want = (F.silu(h[:, :I].float()) * h[:, I:].float()).bfloat16()
    assert torch.equal(apply_activation("silu", h), want)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_is_differentiable(name, gated):
    h = (rows(3, 2 * I) / 3 + 0.01).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_activation(name, x, gated), h)


def test_interleave_and_back():
    h = rows()
    assert torch.equal(interleave(h)[:, ::2], h[:, :I]) and torch.equal(interleave(h)[:, 1::2], h[:, I:])
    assert torch.equal(deinterleave(interleave(h)), h)


def test_errors():
    with pytest.raises(ValueError, match="unknown activation 'swish2'; known: silu, gelu"):
        apply_activation("swish2", rows())
    with pytest.raises(ValueError, match="takes no alpha"):
        resolve_activation("gelu", alpha=1.702)
    with pytest.raises(ValueError, match="even number of columns"):
        apply_activation("silu", rows(width=7))


class Gated(nn.Module):
    """An experts module as far as its gate goes."""

    def __init__(self, gate, **numbers):
        super().__init__()
        self.gate, self.__dict__["numbers"] = gate, numbers

    def _apply_gate(self, h):
        return self.gate(h)


def silu_clamped(limit):
    return lambda h: F.silu(h[..., :I].clamp(max=limit)) * h[..., I:].clamp(-limit, limit)


def oai(alpha, limit, layout):
    def gate(h):
        g, u = h.chunk(2, -1) if layout == "concat" else (h[..., ::2], h[..., 1::2])
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return (u + 1) * g * torch.sigmoid(alpha * g)

    return gate


def found(activation, interleaved=False, alpha=None, beta=None, limit=None):
    return Gate(activation=activation, gated=True, interleaved=interleaved, alpha=alpha, beta=beta, limit=limit)


KNOWN = {
    "silu": (lambda h: F.silu(h[..., :I]) * h[..., I:], found("silu")),
    "silu, interleaved": (lambda h: F.silu(h[..., ::2]) * h[..., 1::2], found("silu", True)),
    "silu in bf16 rows": (lambda h: (F.silu(h[..., :I].float()) * h[..., I:].float()).to(h.dtype), found("silu")),
    "silu by hand": (lambda h: h[..., :I] / (1 + torch.exp(-h[..., :I])) * h[..., I:], found("silu")),
    "quick gelu": (lambda h: h[..., :I] * torch.sigmoid(1.702 * h[..., :I]) * h[..., I:], found("silu", alpha=1.702)),
    "gelu": (lambda h: F.gelu(h[..., :I]) * h[..., I:], found("gelu")),
    "gelu tanh": (lambda h: F.gelu(h[..., :I], approximate="tanh") * h[..., I:], found("gelu_tanh")),
    "relu2": (lambda h: F.relu(h[..., :I]) ** 2 * h[..., I:], found("relu2")),
    "limit 10": (silu_clamped(10.0), found("silu", limit=10.0)),
    "limit 7.25": (silu_clamped(7.25), found("silu", limit=7.25)),
    "limit 250": (silu_clamped(250.0), found("silu", limit=250.0)),
    "oai": (oai(1.702, 7.0, "concat"), found("silu", alpha=1.702, beta=1.0, limit=7.0)),
    "oai, interleaved": (oai(1.702, 7.0, "pairs"), found("silu", True, 1.702, 1.0, 7.0)),
    "oai, other numbers": (oai(1.3, 5.5, "pairs"), found("silu", True, 1.3, 1.0, 5.5)),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_gates(case):
    gate, want = KNOWN[case]
    assert recognise_gate(Gated(gate), I, gated=True) == want


UNKNOWN = {
    "up first": lambda h: h[..., :I] * F.silu(h[..., I:]),
    "softcap": lambda h: 5 * torch.tanh(F.silu(h[..., :I]) * h[..., I:] / 5),
    "relu": lambda h: F.relu(h[..., :I]) * h[..., I:],
    "clamped after": lambda h: F.silu(h[..., :I]).clamp(max=7) * h[..., I:].clamp(-7, 7),
    "clamped on one side": lambda h: F.silu(h[..., :I].clamp(max=7)) * h[..., I:].clamp(max=7),
    "mixes columns": lambda h: F.silu(h[..., :I]) * h[..., I:] / h.abs().amax(-1, keepdim=True),
    "mixes rows": lambda h: F.silu(h[..., :I]) * h[..., I:] * (1 + h.mean()),
    "random": lambda h: F.dropout(F.silu(h[..., :I]) * h[..., I:], 0.5),
    "raises": lambda h: h.no_such_attribute,
    "no gate at all": lambda h: h,
    "halves in other order": lambda h: F.silu(h[..., :I].flip(-1)) * h[..., I:],
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_gates(case):
    assert recognise_gate(Gated(UNKNOWN[case]), I, gated=True) is None


@pytest.mark.parametrize("name", PLAIN)
def test_plain_activations(name):
    m = nn.Module()
    m.act_fn = PLAIN[name]
    assert recognise_gate(m, I, gated=False) == Gate(activation=name, gated=False)


def test_each_instance_is_its_own():
    assert recognise_gate(Gated(silu_clamped(3.0)), I, True).limit == 3.0
    assert recognise_gate(Gated(silu_clamped(4.0)), I, True).limit == 4.0


def test_a_trainable_activation_is_called_as_it_is():
    m = Gated(lambda h: F.silu(h[..., :I]) * h[..., I:])
    m.act_fn = nn.PReLU()
    assert recognise_gate(m, I, gated=True) is None

"""Checks a reading against the module itself: both run on a few random rows that meet two experts only.

T tokens, A experts per token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import interleave, run_gate
from .spec import ExpertsSpec

_TOKENS = 6
_EXPERTS = 2
# what the module loses in its own dtype, with room: a wrong gate or a transposed square is off by tens of percent
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_LARGE = 3.0  # where activations bend and clamps are seen


def error_of(spec: ExpertsSpec, module: nn.Module) -> float | None:
    """Relative difference between the reading and the module's own forward; None where there is nothing to compare.

    That is on the meta device, and where weights are all zero or not finite. inf when the forward raises.
    """
    weight = spec.floats(module)[0][1]
    if weight.is_meta or weight.dtype not in _TOLERANCE:
        return None
    with torch.no_grad():
        x, ids, weights = _rows(spec, module, weight)
        want = run(spec, module, x, ids, weights)
        if not bool(torch.isfinite(want).all()) or not bool(want.any()):
            return None
        with evaluating(module):
            return min(_compare(spec, module, args, want) for args in to_calls(spec, x, ids, weights))


def small(spec: ExpertsSpec, module: nn.Module, error: float) -> bool:
    return error <= _TOLERANCE[spec.floats(module)[0][1].dtype]


def run(spec: ExpertsSpec, module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What the reading says: x (T, H), ids and weights (T, A) -> (T, H), or (T, N) of a projection, in fp32."""
    out = x.new_zeros(x.shape[0], spec.matrices[-1][2], dtype=torch.float32)
    for e, token, slot in _met(spec, ids):
        rows = x[token].float()
        y = rows if e >= spec.num_experts else _expert(spec, module, e, rows)
        out.index_add_(0, token, y * weights[token, slot, None].float())
    return out * (1.0 - spec.row_dropout)


def to_calls(spec: ExpertsSpec, x: Tensor, ids: Tensor, weights: Tensor) -> list[tuple]:
    """(T, H), (T, A), (T, A) as arguments of a module that is called in one of the ways of `calls.CALLS`."""
    if spec.call == "mask":
        return [(x, nn.functional.one_hot(ids, spec.num_experts), weights)]
    if spec.call in ("scores", "swapped scores"):
        scores = weights.new_zeros(x.shape[0], spec.num_experts).scatter(1, ids, weights)  # (T, E)
        return [(x, ids, scores) if spec.call == "scores" else (x, scores, ids)]
    if spec.call == "dense":  # every expert gets every row, zero where it is not wanted
        scores = weights.new_zeros(x.shape[0], _EXPERTS).scatter(1, ids, weights)  # (T, 2)
        return [((x[None] * scores.T[:, :, None]).flatten(0, 1),)]
    if spec.call == "sizes":  # sorted rows: the first expert's, then the second's
        sizes = torch.bincount(ids.flatten(), minlength=spec.num_experts)
        return [(x, sizes.tolist()), (x, sizes)]
    return [(x, ids, weights)]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout: what trains goes on training afterwards."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _compare(spec: ExpertsSpec, module: nn.Module, args: tuple, want: Tensor) -> float:
    try:
        got = _own(spec, module, args).reshape(-1, *want.shape).sum(0)
        return float((got.float() - want).norm() / want.norm())
    except Exception:  # a stranger's code, called in a way that it may not expect
        return float("inf")


def _own(spec: ExpertsSpec, module: nn.Module, args: tuple) -> Tensor:
    if spec.call == "dense":
        module = _first_two(spec, module)
    if spec.call != "items":
        return type(module).forward(module, *args)
    x, ids, weights = args
    out = torch.zeros_like(x, dtype=torch.float32)
    for e, token, slot in _met(spec, ids):
        y = x[token] if e >= spec.num_experts else module.get_submodule(spec.keys[e])(x[token])
        out.index_add_(0, token, y.float() * weights[token, slot, None].float())
    return out


def _first_two(spec: ExpertsSpec, module: nn.Module) -> nn.Module:
    """The same module with two experts: one that computes all of them would read all weights."""
    new = module.__class__.__new__(module.__class__)
    counts = {k: _EXPERTS for k, v in vars(module).items() if k.startswith("num_") and v == spec.num_experts}
    new.__dict__.update(module.__dict__, **counts)
    new.__dict__["_parameters"] = {k: nn.Parameter(p[:_EXPERTS], False) for k, p in module.named_parameters()}
    return new


def _rows(spec: ExpertsSpec, module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    e = _EXPERTS if spec.call == "dense" else spec.num_experts
    a, b = (e + spec.identities - 1,) * 2 if spec.identities else (e - 1, 0)
    x = torch.randn(_TOKENS, spec.hidden_size, generator=g, dtype=torch.float32).to(weight.device)
    h = x @ spec.expert(module, spec.up, 0).to(x.dtype).T
    x = (x * min(_LARGE / max(float(h.square().mean().sqrt()), 1e-6), 1e4)).to(weight.dtype)
    if spec.call == "sizes":
        return x, torch.tensor([[0]] * 2 + [[e - 1]] * (_TOKENS - 2)).to(x.device), torch.ones_like(x[:, :1])
    ids = torch.tensor([[0, e - 1], [e - 1, 0], [0, a], [b, e - 1], [e - 1, 0], [0, e - 1]])
    weights = torch.rand(_TOKENS, 2, generator=g, dtype=torch.float32) + 0.25
    if spec.call == "mask":
        ids, weights = ids[:, :1], weights[:, :1]
    if spec.call == "dense":  # weighs the input
        weights = torch.ones_like(weights)
    return x, ids.to(x.device), weights.to(weight)


def _met(spec: ExpertsSpec, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for e in ids.unique().tolist():
        yield e, *torch.where(ids == e)


def _expert(spec: ExpertsSpec, module: nn.Module, e: int, rows: Tensor) -> Tensor:
    dtype = spec.floats(module)[0][1].dtype
    h = rows @ spec.expert(module, spec.up, e).float().T
    if not spec.down:
        return h
    biases = [spec.bias(module, name) for name in (spec.up, spec.down)]
    h = h if biases[0] is None else h + biases[0][e].float()
    if spec.gate is not None:
        h = run_gate(replace(spec.gate, interleaved=False), h)
    else:
        own: Any = spec.own_gate or (module._apply_gate if spec.gated else module.act_fn)
        h = own((interleave(h) if spec.interleaved else h).to(dtype)).float()
    y = h @ spec.expert(module, spec.down, e).float().T
    return y if biases[1] is None else y + biases[1][e].float()

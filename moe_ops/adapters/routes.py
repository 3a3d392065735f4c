"""Routing: what the block around experts does, read by running it with stand-ins for its experts.

The stand-in of expert e writes into column e, so that the output is the matrix of routing weights (T, E): what the
block's own code makes of its router. A rule is accepted when it gives the same matrix from the router's output.

T tokens, A experts per token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .mlps import has_call
from .spec import CannotAdapt, ExpertsSpec
from .standins import DenseExperts, Expert, Seen, Shared, randomised, small_copy, with_children

_BATCH, _LENGTH = 2, 12
_CLOSE = 1e-5


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float32)


def _sigmoid(logits: Tensor) -> Tensor:
    return logits.float().sigmoid()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": _softmax, "sigmoid": _sigmoid, "as they are": torch.clone}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A block: out = experts(x, ids, weights) + the sum of its shared MLPs. Children by name, the router's tensors by
    their position among the `outputs` that it returns.

    ids and weights are the router's tensors `ids` and `weights`; or, without ids, SCORES[`scores`] of its tensor
    `weights`, (T, E), of which the largest `top_k` count: the largest after the child `choose`, where there is one.
    Divided by their sum when `normalised`, times `scale`. `on_input`: they weigh what goes into the experts.
    shared: (child, child whose sigmoid weighs its output, or None). rows: children that are given (T, H) where the
    block is given (..., H). returns: the block's outputs, -1 for its own, else the router's; None for its own alone.
    flat: that is (T, H), not of the shape of the input. trains: in training it does the same.
    """

    experts: str
    router: str
    outputs: int = 0
    weights: int = 0
    ids: int | None = None
    scores: str = "softmax"
    top_k: int = 0
    normalised: bool = False
    choose: str | None = None
    scale: float = 1.0
    on_input: bool = False
    shared: tuple[tuple[str, str | None], ...] = ()
    rows: frozenset[str] = frozenset()
    returns: tuple[int, ...] | None = None
    flat: bool = False
    trains: bool = True

    def route(self, block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """hidden (..., H) -> ids (T, A), weights (T, A), what the router returned."""
        outputs = tensors(getattr(block, self.router)(self.given(block, self.router, hidden)))
        found = outputs[self.weights]
        found = found.reshape(-1, found.shape[-1])
        if self.ids is not None:
            ids, weights = outputs[self.ids].reshape(-1, found.shape[-1]), found
        else:
            scores = SCORES[self.scores](found)  # (T, E)
            chosen = scores if self.choose is None else getattr(block, self.choose)(scores)
            ids = chosen.topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, ids)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights if self.scale == 1.0 else weights * self.scale, outputs

    def given(self, block: nn.Module, child: str, hidden: Tensor) -> Tensor:
        """What a child is called with. A Linear kept in fp32 is given fp32."""
        weight = getattr(getattr(block, child), "weight", None)
        if isinstance(getattr(block, child), nn.Linear) and isinstance(weight, Tensor) and weight.is_floating_point():
            hidden = hidden.to(torch.promote_types(weight.dtype, hidden.dtype))
        return hidden.reshape(-1, hidden.shape[-1]) if child in self.rows else hidden


def tensors(value: Any) -> list[Tensor]:
    """The tensors in what a module returned, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [t for part in parts for t in tensors(part)]


def read_routing(block: nn.Module, key: str, spec: ExpertsSpec) -> Routing:
    """The routing of a block whose child `key` holds experts without a call of their own.

    Raises CannotAdapt with what could not be read.
    """
    name = type(block).__name__
    if not has_call(block) or ("forward" in block.__dict__ and "_hf_hook" not in block.__dict__):
        raise CannotAdapt(f"{name} has no forward of its own that could be read")
    if spec.num_experts + spec.identities > spec.hidden_size:
        raise CannotAdapt(f"{name} has more experts than columns: its routing cannot be read off its output")
    found = _read(_Block(block, key, spec, training=False), name)
    try:
        same = _read(_Block(block, key, spec, training=True), name) == found
    except CannotAdapt:
        same = False
    return replace(found, trains=same)


class _Block:
    """The block with stand-ins, run once without what is beside the experts and once with it."""

    def __init__(self, block: nn.Module, key: str, spec: ExpertsSpec, training: bool) -> None:
        self.key, self.num_experts = key, spec.num_experts + spec.identities
        self.on_input = spec.call == "dense"
        experts = DenseExperts(self.num_experts) if self.on_input else _list(block._modules[key], self.num_experts)
        others = {k: m for k, m in block.named_children() if k != key and any(True for _ in m.parameters())}
        small = {k for k, m in others.items() if self._is_small(m)}
        self.seen = {k: Seen(small_copy(m).train(training)) for k, m in others.items() if k in small}
        self.shared = {k: Seen(Shared(0.0)) for k in others if k not in small}
        self.probe = with_children(block, {key: experts, **self.seen, **self.shared})
        self._own_numbers()
        self.probe.training = training
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(_BATCH, _LENGTH, spec.hidden_size, generator=g, dtype=torch.float32)
        self.x[..., 0] = 1.0
        self.first = self.run()
        self.calls = {k: list(s.calls) for k, s in {**self.seen, **self.shared}.items()}

    def run(self) -> Any:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return self.probe.forward(self.x.clone())
        except Exception as e:  # a stranger's code, run with stand-ins that it may not take
            raise CannotAdapt(f"{type(self.probe).__name__} does not run with other experts: {_line(e)}") from None

    def with_shared(self) -> Any:
        for n, seen in enumerate(self.shared.values()):
            seen.module.__dict__["factor"] = n + 1.0
        return self.run()

    def _is_small(self, m: nn.Module) -> bool:
        """A router, or a gate of shared experts: kept, with random numbers."""
        shapes = [tuple(p.shape) for p in m.parameters()]
        return any(self.num_experts in s for s in shapes) or (isinstance(m, nn.Linear) and m.out_features == 1)

    def _own_numbers(self) -> None:
        own, p32 = nn.Module(), lambda t: torch.zeros(t.shape, dtype=torch.float32)
        for k, p in self.probe._parameters.items():
            if p is not None:
                own.register_parameter(k, nn.Parameter(p32(p), requires_grad=False))
        for k, b in self.probe._buffers.items():
            if b is not None:
                own.register_buffer(k, b.cpu() if not b.is_meta and not b.is_floating_point() else p32(b))
        randomised(own)
        self.probe.__dict__["_parameters"], self.probe.__dict__["_buffers"] = own._parameters, own._buffers


def _read(block: _Block, name: str) -> Routing:
    out, returned = _output(block, name)
    e = block.num_experts
    matrix = out.reshape(-1, out.shape[-1])  # (T, H)
    if matrix[:, e:].abs().max() > _CLOSE or not bool((matrix[:, :e] != 0).any()):
        raise CannotAdapt(f"{name} does more with its experts than to add them up")
    counts = (matrix[:, :e] != 0).sum(-1)
    if int(counts.min()) != int(counts.max()):
        raise CannotAdapt(f"{name} gives tokens different numbers of experts")
    weights = matrix[:, :e].abs().sqrt() if block.on_input else matrix[:, :e]
    base = Routing(experts=block.key, router="", top_k=int(counts[0]), on_input=block.on_input,
                   flat=out.ndim == 2, rows=_rows(block))  # fmt: skip
    for rule in _rules(block, base):
        fitted = _fit(rule, block, weights)
        if fitted is not None:
            return replace(fitted, shared=_shared(block, out, name), returns=_returns(block, fitted, returned, name))
    raise CannotAdapt(f"the routing of {name} is none of those that are known")


def _rules(block: _Block, base: Routing) -> Iterator[Routing]:
    """Every way to make ids and weights of what a child returned."""
    for router in block.seen:
        calls = block.calls[router]
        if len(calls) != 1 or len(calls[0][0]) != 1 or calls[0][1]:
            continue
        outputs = tensors(calls[0][2])
        base = replace(base, router=router, outputs=len(outputs))
        wide = [n for n, t in enumerate(outputs) if t.is_floating_point() and t.shape[-1] == block.num_experts]
        slots = block.x[..., 0].numel() * base.top_k
        top = [n for n, t in enumerate(outputs) if t.ndim and t.shape[-1] == base.top_k and t.numel() == slots]
        for ids, weights in product(top, top):
            if not outputs[ids].is_floating_point() and outputs[weights].is_floating_point():
                yield from (replace(base, ids=ids, weights=weights, normalised=n) for n in (False, True))
        choosers = [None, *(k for k in block.seen if k != router and len(block.calls[k]) == 1)]
        for n, scores, normalised, choose in product(wide, SCORES, (False, True), choosers):
            yield replace(base, weights=n, scores=scores, normalised=normalised, choose=choose)


def _fit(rule: Routing, block: _Block, want: Tensor) -> Routing | None:
    """The rule, with the constant factor that it needs to give the matrix `want` (T, E)."""
    try:
        ids, weights, _ = rule.route(block.probe, block.x)
        got = torch.zeros_like(want).scatter(1, ids, weights.float())
    except Exception:  # shapes that do not fit: another rule
        return None
    if not bool(((got != 0) == (want != 0)).all()):
        return None
    scale = float(want.sum() / got.sum())
    if not torch.allclose(got * scale, want, rtol=1e-4, atol=_CLOSE):
        return None
    return rule if abs(scale - 1.0) < 1e-4 else replace(rule, scale=float(f"{scale:.6g}"))


def _output(block: _Block, name: str) -> tuple[Tensor, list[Tensor] | None]:
    """The block's output without what is beside the experts, and all that it returned if that is more."""
    if isinstance(block.first, Tensor):
        return _shaped(block.first, block, name), None
    returned = tensors(block.first)
    full = [t for t in returned if t.shape[-1] == block.x.shape[-1] and t.numel() == block.x.numel()]
    if not isinstance(block.first, tuple) or len(returned) != len(block.first) or len(full) != 1:
        raise CannotAdapt(f"{name} returns what could not be read")
    return _shaped(full[0], block, name), returned


def _shaped(out: Tensor, block: _Block, name: str) -> Tensor:
    if out.shape != block.x.shape and out.shape != block.x.flatten(0, -2).shape:
        raise CannotAdapt(f"{name} maps {tuple(block.x.shape)} to {tuple(out.shape)}")
    return out


def _returns(block: _Block, rule: Routing, returned: list[Tensor] | None, name: str) -> tuple[int, ...] | None:
    if returned is None:
        return None
    outputs = tensors(block.calls[rule.router][0][2])
    positions = []
    for t in returned:
        same = [n for n, o in enumerate(outputs) if o.shape == t.shape and torch.equal(o, t)]
        if t.numel() == block.x.numel() and t.shape[-1] == block.x.shape[-1]:
            positions.append(-1)
        elif same:
            positions.append(same[0])
        else:
            raise CannotAdapt(f"{name} returns a tensor {tuple(t.shape)} that its router does not")
    return tuple(positions)


def _shared(block: _Block, out: Tensor, name: str) -> tuple[tuple[str, str | None], ...]:
    """Which MLPs are added, each with the child whose sigmoid weighs it; the sum must explain the whole output."""
    if not block.shared:
        return ()
    again = tensors(block.with_shared())
    rest = next(t for t in again if t.numel() == out.numel() and t.shape[-1] == out.shape[-1]).view_as(out) - out
    gates = [None, *(k for k, s in block.seen.items() if getattr(s.module, "out_features", None) == 1)]
    mlps = list(block.shared)
    for chosen in product(gates, repeat=len(mlps)):
        parts = []
        for n, gate in enumerate(chosen):
            y = block.x.flip(-1) * (n + 1.0)
            parts.append(y if gate is None else block.seen[gate].module(block.x).sigmoid() * y)
        if torch.allclose(torch.stack(parts).sum(0).view_as(rest), rest, rtol=1e-4, atol=1e-4):
            return tuple(zip(mlps, chosen, strict=True))
    raise CannotAdapt(f"what {name} does with {', '.join(mlps)} could not be read")


def _rows(block: _Block) -> frozenset[str]:
    first = {k: calls[0][0][0] for k, calls in block.calls.items() if calls and calls[0][0]}
    return frozenset(k for k, x in first.items() if x.ndim == 2)


def _list(experts: nn.Module | None, n: int) -> nn.Module:
    assert experts is not None
    return with_children(experts, {key: Expert(e) for e, key in enumerate(list(experts._modules)[:n])})


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"

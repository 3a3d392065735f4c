"""Stand-ins for children of a module: what its code does with them then shows in its output, without their weights.

T tokens, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """A function, as `activation.recognise_gate` takes it."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.__dict__["act_fn"] = self.__dict__["_apply_gate"] = call


class Columns(nn.Module):
    """For a Linear: columns start..stop of what it is given, or all of it. Writes its name into `log`."""

    def __init__(self, linear: nn.Linear, start: int | None, stop: int | None, name: str = "",
                 log: list[str] | None = None) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.start, self.stop, self.name, self.log = start, stop, name, log
        self.weight, self.bias = torch.empty(0), None  # some code asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(self.name)
        return x[..., self.start : self.stop]


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Expert(nn.Module):
    """Expert e of a list: the square of the rows' first column, in column e. Rows (R, H) -> (R, H)."""

    def __init__(self, e: int) -> None:
        super().__init__()
        self.e = e

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1].square() * nn.functional.one_hot(torch.tensor(self.e), x.shape[-1]).to(x.dtype)


class DenseExperts(nn.Module):
    """All experts at once: the first T rows are the first expert's. (E * T, H) -> (E * T, H)."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> Tensor:
        each = x.reshape(self.num_experts, -1, x.shape[-1])
        column = nn.functional.one_hot(torch.arange(self.num_experts), x.shape[-1])[:, None].to(x.dtype)
        return (each[..., :1].square() * column).view_as(x)


class Shared(nn.Module):
    """For a dense MLP beside the experts: `factor` times its input, backwards."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) * self.factor


class Seen(nn.Module):
    """Runs a module and keeps what it was given and what it returned."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[tuple[tuple, dict, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        self.calls.append((args, kwargs, out))
        return out


def with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A copy of the module, without hooks, that has `children` (by path) in place of its own. Parameters are shared."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ("forward", "_hf_hook", "_old_forward")})
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(module.__dict__[table])
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        new.__dict__[table] = type(module.__dict__[table])()
    for key, child in module._modules.items():
        inside = {k.partition(".")[2]: c for k, c in children.items() if k.startswith(f"{key}.")}
        if key in children:
            new._modules[key] = children[key]
        elif inside and child is not None:
            new._modules[key] = with_children(child, inside)
    return new


def small_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in fp32, in eval mode, without hooks, its numbers replaced by random ones."""
    bare = with_children(module, {})
    new = copy.deepcopy(bare).to_empty(device="cpu") if _on_meta(bare) else copy.deepcopy(bare).cpu()
    return randomised(_without_hooks(new)).float().eval()


def randomised(module: nn.Module) -> nn.Module:
    """In place: numbers that no special case of the code is made for (zero biases, ties)."""
    g = torch.Generator().manual_seed(0)
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point():
            scale = 1.0 / max(t.shape[-1], 1) ** 0.5 if t.ndim > 1 else 0.1
            t.data = torch.randn(t.shape, generator=g, dtype=torch.float32) * scale
    return module


def _without_hooks(module: nn.Module) -> nn.Module:
    for m in module.modules():
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            m.__dict__[table] = type(m.__dict__[table])()
        for key in ("forward", "_hf_hook", "_old_forward"):
            m.__dict__.pop(key, None)
    return module


def _on_meta(module: nn.Module) -> bool:
    return any(t.is_meta for t in [*module.parameters(), *module.buffers()])

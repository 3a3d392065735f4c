"""RoutedBlock: a block whose routing was read, with its forward made anew around experts that take routed rows.

T tokens, A experts per token, H hidden size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from .adapters import Routing
from .experts import QuantizedExperts

_ROUTING = "_moe_ops_routing"  # attributes of the block are its own: it may have one called routing


class RoutedBlock(nn.Module):
    """experts(hidden, ids, weights) + shared MLPs; the router, its hooks and what the block returns are its own."""

    _moe_ops_routing: Routing
    original_class: Any

    def forward(self, hidden_states: Tensor) -> Any:
        """hidden (..., H) -> what the block's own forward returns."""
        r = self._moe_ops_routing
        if self.training and not r.trains:
            raise NotImplementedError(
                f"{self.original_class.__name__} does something else in training than in eval mode (noise, an auxiliary"
                " loss): call .eval() on it, or keep its experts in float (ignore=...)"
            )
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        ids, weights, outputs = r.route(self, hidden_states)
        experts: Any = getattr(self, r.experts)
        out = experts.routed(x, ids, weights, on_input=r.on_input)
        for mlp, gate in r.shared:
            y = getattr(self, mlp)(r.given(self, mlp, hidden_states)).reshape(x.shape)
            if gate is not None:
                y = getattr(self, gate)(r.given(self, gate, hidden_states)).reshape(-1, 1).sigmoid() * y
            out = out + y
        out = out if r.flat else out.view(hidden_states.shape)
        return out if r.returns is None else tuple(out if n == -1 else outputs[n] for n in r.returns)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (self.original_class,), *reduced[2:]


def put(parent: nn.Module, key: str, new: nn.Module, routing: Routing | None) -> None:
    """parent.key = new, and with it, in one step, the class of the parent: routed, or its own again."""
    if isinstance(new, QuantizedExperts) and new.spec.moved:
        parent.__dict__["_is_hf_initialized"] = True  # transformers' initialisers reach for children that are gone
    around = isinstance(parent, RoutedBlock) and parent._moe_ops_routing.experts == key
    if routing is not None and not around:
        _become(parent, _routed_class(_class_of(parent)), key, new, {_ROUTING: routing})
    elif around and not isinstance(new, QuantizedExperts):
        _become(parent, parent.original_class, key, new, {})
    else:
        parent._modules[key] = new


def experts_of(block: RoutedBlock) -> nn.Module | None:
    return block._modules[block._moe_ops_routing.experts]


def _become(parent: nn.Module, cls: Any, key: str, new: nn.Module, added: dict[str, Any]) -> None:
    state = {k: v for k, v in parent.__dict__.items() if k != _ROUTING} | added
    state["_modules"] = {**parent._modules, key: new}
    hook = state.pop("_hf_hook", None)
    if hook is not None:  # accelerate wrapped the forward of the class before
        for key in ("forward", "_old_forward"):
            state.pop(key, None)
    parent.__dict__, parent.__class__ = state, cls
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(parent, hook)


def _class_of(module: nn.Module) -> Any:
    return type(module)


@cache
def _routed_class(original: Any) -> Any:
    return type(f"Routed{original.__name__}", (RoutedBlock, original), {"original_class": original})


def _new(original: Any) -> RoutedBlock:
    cls = _routed_class(original)
    return cls.__new__(cls)

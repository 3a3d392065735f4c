"""The form on disk: our parameters under our names, codes with a last extent of one.

The extent is what makes a reader that does not know us refuse the file: a tensor of codes in the shape of its weight
would be cast to the weight's dtype, without its scales and without a word. transformers raises for a shape that is not
the parameter's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import PARTS, QuantizedModule

_LOADED_AS = "_moe_ops_loaded_as"


def state(model: nn.Module) -> dict[str, Tensor]:
    """state_dict of a model as it is saved. Views: nothing is copied."""
    found = model.state_dict()
    for name, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, QuantizedModule):
            for weight in m.weight_names():
                key = f"{name}.{weight}" if name else weight
                found[key] = found[key].unsqueeze(-1)
    return found


Shapes = dict[str, tuple[torch.dtype, torch.Size]]


def cut_as_loaded(m: Any, part: Callable[[str, Tensor], Tensor], want: Shapes) -> None:
    """Have a module that `open_` has changed keep only a part of each parameter of codes that a loader puts there.

    part: of a parameter's name and the whole; `want` is changed to what then is expected. `close_` ends it.
    """
    cls: Any = type(m)

    def cut(key: str, whole: Tensor) -> Tensor:
        return part(key, whole.squeeze(-1)).unsqueeze(-1) if key in m.weight_names() else part(key, whole)

    def keep(self: Any, key: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and is_code(self, key):
            marked = loaded(value)
            value = nn.Parameter(cut(key, value.detach()), requires_grad=False)
            value._is_hf_initialized = marked
        cls.__setattr__(self, key, value)

    for key, (dtype, shape) in want.items():
        if is_code(m, key):
            want[key] = dtype, cut(key, torch.empty(shape, dtype=dtype, device="meta")).shape
    m.__class__ = type(cls.__name__, (cls,), {"__setattr__": keep, _LOADED_AS: cls})


def open_(m: QuantizedModule) -> None:
    """Put codes of a module that is on meta into the shape that they have on disk."""
    for weight in m.weight_names():
        codes = m._parameters[weight]
        assert codes is not None
        m._parameters[weight] = nn.Parameter(codes.detach().unsqueeze(-1), requires_grad=False)


def close_(m: QuantizedModule, name: str, want: Shapes) -> list[str]:
    """Undo `open_` after a loader has put its own parameters there. What is missing or is no such tensor, by name."""
    wrong = []
    m.__class__ = getattr(m, _LOADED_AS, type(m))
    for key, (dtype, shape) in want.items():
        p, full = m._parameters.get(key), f"{name}.{key}" if name else key
        if p is None or not loaded(p):
            wrong.append(f"{full} is missing")
        elif p.shape != shape or (is_code(m, key) and p.dtype != dtype):
            wrong.append(f"{full} must be {dtype} {tuple(shape)}, got {p.dtype} {tuple(p.shape)}")
        elif is_code(m, key):
            t = p.detach().squeeze(-1) if key in m.weight_names() else p.detach()
            m._parameters[key] = nn.Parameter(t, requires_grad=False)
    m._mark()
    return wrong


def expected(m: QuantizedModule) -> Shapes:
    """Type and shape of every parameter, on disk, of a module that `open_` has changed."""
    return {key: (p.dtype, p.shape) for key, p in m._parameters.items() if p is not None}


def loaded(p: Tensor) -> bool:
    """transformers marks what it read; what it did not find it allocates, and would initialise."""
    return not p.is_meta and getattr(p, "_is_hf_initialized", False)


def is_code(m: QuantizedModule, key: str) -> bool:
    """A parameter that holds codes or scales, and not a bias."""
    return key in {n for name in m.weight_names() for n in (name, *(f"{name}_{part}" for part in PARTS))}

"""The form on disk: our parameters under our names, codes with a last extent of one.

The extent is what makes a reader that does not know us refuse the file: a tensor of codes in the shape of its weight
would be cast to the weight's dtype, without its scales and without a word. transformers raises for a shape that is not
the parameter's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..storage import PARTS, QuantizedModule


def state(model: nn.Module) -> dict[str, Tensor]:
    """state_dict of a model as it is saved. Views: nothing is copied."""
    found = model.state_dict()
    for name, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, QuantizedModule):
            for weight in m.weight_names():
                key = f"{name}.{weight}" if name else weight
                found[key] = found[key].unsqueeze(-1)
    return found


def open_(m: QuantizedModule) -> None:
    """Put codes of a module that is on meta into the shape that they have on disk."""
    for weight in m.weight_names():
        codes = m._parameters[weight]
        assert codes is not None
        m._parameters[weight] = nn.Parameter(codes.detach().unsqueeze(-1), requires_grad=False)


def close_(m: QuantizedModule, name: str, want: dict[str, tuple[torch.dtype, torch.Size]]) -> list[str]:
    """Undo `open_` after a loader has put its own parameters there. What is missing or is no such tensor, by name."""
    wrong = []
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


def expected(m: QuantizedModule) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and shape of every parameter, on disk, of a module that `open_` has changed."""
    return {key: (p.dtype, p.shape) for key, p in m._parameters.items() if p is not None}


def loaded(p: Tensor) -> bool:
    """transformers marks what it read; what it did not find it allocates, and would initialise."""
    return not p.is_meta and getattr(p, "_is_hf_initialized", False)


def is_code(m: QuantizedModule, key: str) -> bool:
    """A parameter that holds codes or scales, and not a bias."""
    return key in {n for name in m.weight_names() for n in (name, *(f"{name}_{part}" for part in PARTS))}

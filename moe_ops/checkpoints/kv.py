"""Scales of a KV cache: k = code * k_scale, v = code * v_scale, one pair for each attention module.

Sources of the names: Quark (`k_proj.output_scale`), ModelOpt (`k_proj.k_scale`), compressed-tensors and vLLM
(`k_scale`, `attn.k_scale`), and the old `kv_scale` for both.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .names import Names

ATTRIBUTE = "moe_ops_kv_scales"
_USED = {
    ".k_proj.output_scale": "k", ".k_proj.k_scale": "k", ".k_scale": "k",
    ".v_proj.output_scale": "v", ".v_proj.v_scale": "v", ".v_scale": "v", ".kv_scale": "kv",
}  # fmt: skip
_UNUSED = (".q_proj.output_scale", ".q_proj.q_scale", ".q_scale", ".prob_output_scale")  # of fp8 attention
_INNER = ".attn"  # a module of its own for the kernel, in some engines


def kv_scales(model: nn.Module) -> dict[str, tuple[float, float]]:
    """{name of an attention module: (scale of keys, scale of values)} as its checkpoint has them; empty without any.

    A scale is what codes are multiplied by. Raises ValueError for one that is not finite or not positive, or that
    belongs to no module of the model.
    """
    found = {}
    names = {name for name, _ in model.named_modules()}
    for name, pair in (getattr(model, ATTRIBUTE, None) or {}).items():
        if name not in names:
            raise ValueError(f"the model has KV scales for {name!r}, which is none of its modules")
        found[name] = checked(name, pair)
    return found


def checked(where: Any, pair: Any) -> tuple[float, float]:
    """A pair of scales as numbers. Raises ValueError for anything else than two finite ones above 0."""
    try:
        k, v = (float(scale) for scale in pair)
    except (TypeError, ValueError):
        raise ValueError(f"KV scales are two numbers, those of {where} are {pair!r}") from None
    if not all(math.isfinite(scale) and scale > 0 for scale in (k, v)):
        raise ValueError(f"KV scales are finite and positive, those of {where} are {(k, v)}")
    return k, v


def kv_keys(keys: Iterable[str]) -> set[str]:
    """Keys that hold scales of a KV cache, used here or not."""
    return {key for key in keys if _ending(key) is not None}


def read_kv_scales(keys: Iterable[str], get: Callable[[str], Tensor], names: Names, model: nn.Module) -> dict:
    """Values of `kv_keys`. Only one of k and v: it holds for both. Raises ValueError for a scale that is not > 0."""
    found: dict[str, dict[str, float]] = {}
    unused = []
    modules = {name for name, _ in model.named_modules()}
    for key in sorted(keys):
        ending = _ending(key)
        if ending is None or ending in _UNUSED:
            unused.append(key)
            continue
        value = get(key)
        scale = float(value.float().reshape(())) if value.numel() == 1 else math.nan
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"{key} must be one finite number above 0, got {value.tolist()}")
        attention = _attention(key[: -len(ending)], names, modules)
        if attention is None:
            raise ValueError(f"nothing in the model takes {key}: there is no such attention module")
        for which in _USED[ending]:
            if found.setdefault(attention, {}).setdefault(which, scale) != scale:
                raise ValueError(f"{key} says {scale}, another key says {found[attention][which]} for {attention}")
    if unused:
        warnings.warn(f"scales of fp8 attention are not used: {', '.join(unused[:4])}, ...", stacklevel=2)
    return {a: (s.get("k", s.get("v", 1.0)), s.get("v", s.get("k", 1.0))) for a, s in found.items()}


def _ending(key: str) -> str | None:
    found = [ending for ending in (*_USED, *_UNUSED) if key.endswith(ending)]
    return max(found, key=len, default=None)


def _attention(stem: str, names: Names, modules: set[str]) -> str | None:
    """The module in memory: by where its key projection is, else by its own name."""
    for name in (stem, stem.removesuffix(_INNER)):
        located = names.locate(f"{name}.k_proj.weight")
        if located:
            return located[0][0].rpartition(".k_proj.")[0] or name
        if name in modules:
            return name
    return None

"""PEFT's side of the package: LoRA on quantized Linears and experts, with PEFT's own configs, files and calls.

`import moe_ops` calls `install`, which imports nothing of PEFT: our layers are offered to it when it is imported, or at
once if it is there already.

Letters in this package: E experts, S shards (gate and up), N rows and K columns of a stored matrix (S*N, K), R sorted
rows, T tokens, r rank.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

from torch import nn

from ..huggingface import after_import, before

__all__ = ["adopt", "install"]
OLDEST = (0, 21)
_OURS = "_moe_ops_wrapped"


def install() -> None:
    """Have PEFT's LoRA take quantized modules, now or when it is imported."""
    after_import("peft.tuners.lora.model", _register)


def too_old() -> str | None:
    """Why the installed PEFT cannot be used here, None if it can."""
    found = metadata.version("peft")
    if tuple(int(part) for part in found.split(".")[:2]) >= OLDEST:
        return None
    needed = ".".join(map(str, OLDEST))
    return f"PEFT {found} is older than {needed}: LoRA on quantized experts, and merging into codes, need {needed}"


def _register() -> None:
    """PEFT chooses a layer in one static method: ours come before its own choices. Again after a reload, once."""
    if reason := too_old():
        warnings.warn(reason, stacklevel=2)
        return
    model: Any = sys.modules["peft.tuners.lora.model"].LoraModel

    def create(original: Any) -> Any:
        def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
            from .layers import dispatch

            mine = dispatch(target, adapter_name, config=lora_config, **kwargs)
            return original(lora_config, adapter_name, target, **kwargs) if mine is None else mine

        return _create_new_module

    model._create_new_module = staticmethod(_wrapped(model._create_new_module, create))
    tuner: Any = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    before(tuner, "inject_adapter", _check_added)
    for name in ("merge_adapter", "_unload_and_optionally_merge"):
        setattr(tuner, name, _wrapped(getattr(tuner, name), _reporting))


def _check_added(*args: Any, **kwargs: Any) -> None:
    from .methods import check_added

    check_added(*args, **kwargs)


def _reporting(original: Any) -> Any:
    """One warning for all modules that a call merges."""

    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .merge import report
        from .methods import check_merged

        if kwargs.get("merge", True):  # else they are only unloaded
            check_merged(self.model)
        with report():
            return original(self, *args, **kwargs)

    return merge


def _wrapped(original: Any, make: Callable[[Any], Any]) -> Any:
    original = getattr(original, _OURS, original)
    new = functools.wraps(original)(make(original))
    setattr(new, _OURS, original)
    return new


def adopt(model: nn.Module) -> None:
    """After `quantize_` or `dequantize_`: PEFT's layers around modules that were replaced become ours, or its own."""
    if "peft.tuners.lora.layer" in sys.modules and not too_old():
        from .layers import adopt_layer

        for module in model.modules():
            adopt_layer(module)

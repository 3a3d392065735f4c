"""Quantized Mixture-of-Experts for plain PyTorch: `moe_ops.quantize_(model, "fp8")`, then `torch.compile(model)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import huggingface as _huggingface
from . import ops as _ops  # registers torch.ops.moe_ops.*
from . import peft as _peft
from .backends import use_backend
from .experts import QuantizedExperts
from .formats import FORMATS, Codec, Element, Format
from .linear import QuantizedLinear
from .quantize import LISTENERS as _LISTENERS
from .quantize import dequantize_, quantize_
from .summary import Summary, summary

if TYPE_CHECKING:
    from .checkpoints.load import load_quantized
    from .huggingface import MoeOpsConfig
    from .quality import compare

__version__ = "0.1.0"
__all__ = [
    "FORMATS", "Codec", "Element", "Format", "MoeOpsConfig", "QuantizedExperts", "QuantizedLinear", "Summary",
    "compare", "dequantize_", "load_quantized", "quantize_", "summary", "use_backend",
]  # fmt: skip
_LISTENERS[:] = [_huggingface.attach, _peft.adopt]
_huggingface.install()
_peft.install()
del _ops


# name -> the module that has it, imported when it is asked for
_LAZY = {"compare": ".quality", "load_quantized": ".checkpoints.load"}
_MODULES = ("kv_cache", "quality", "sharding", "training", "tuning")  # imported when asked for: one needs transformers


def __getattr__(name: str) -> Any:
    if name == "MoeOpsConfig":  # transformers is imported when it is asked for
        return _huggingface.config_class()
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What transformers, Trainer and PEFT look for on a quantized model: set by `quantize_`, removed by `dequantize_`.

Imports transformers only where a model of it was given.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..storage import QuantizedModule

_BEFORE = "_moe_ops_weight_conversions"


def attach(model: nn.Module) -> None:
    """Bring what a model says about itself in line with the modules that it has now."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    from . import too_old

    if too_old():
        return
    inside: set[int] = set()
    for m in model.modules():
        if id(m) in inside or not isinstance(m, library.PreTrainedModel):
            continue
        inside |= {id(child) for child in m.modules()}
        if any(isinstance(child, QuantizedModule) for child in m.modules()):
            _say_quantized(m)
        else:
            _say_float(m)


def _say_quantized(model: Any) -> None:
    from .config import MoeOpsConfig
    from .quantizer import MoeOpsQuantizer

    found = getattr(model, "hf_quantizer", None)
    if isinstance(found, MoeOpsQuantizer):
        found.quantization_config.refresh(model)
    elif found is not None:  # another library's, for what was left to it
        return
    else:
        model.hf_quantizer = MoeOpsQuantizer(MoeOpsConfig.of(model), pre_quantized=False)
    config = model.hf_quantizer.quantization_config
    model.config.quantization_config = model.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    for config in _configs(model):
        config._is_quantized = True
    keep_names(model)


def _say_float(model: Any) -> None:
    from .quantizer import MoeOpsQuantizer

    if not isinstance(getattr(model, "hf_quantizer", None), MoeOpsQuantizer):
        return
    for name in ("hf_quantizer", "quantization_config", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for config in _configs(model):
        for name in ("quantization_config", "_is_quantized"):
            config.__dict__.pop(name, None)
    if _BEFORE in model.__dict__:
        model._weight_conversions = model.__dict__.pop(_BEFORE)


def keep_names(model: Any) -> None:
    """Save under the names that parameters have: what undoes the conversions of a float checkpoint cannot split codes.

    `dequantize_` brings the conversions back.
    """
    model.__dict__.setdefault(_BEFORE, model.__dict__.get("_weight_conversions"))
    model._weight_conversions = []


def _configs(model: Any) -> list[Any]:
    library: Any = sys.modules["transformers.modeling_utils"]
    return [m.config for m in model.modules() if isinstance(m, library.PreTrainedModel)]

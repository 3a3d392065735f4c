"""PEFT's other methods on quantized modules: which may be put there, and that only LoRA is merged.

Their layers are PEFT's own. Some call the layer below them, and work; others take its weight, which is codes: some of
those fail with torch's words, others go on with numbers that mean nothing.
"""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..linear import QuantizedLinear
from ..streaming import streams
from .layers import Linear, ParamWrapper

# Their outputs and gradients on quantized Linears are those on the float model (PEFT 0.21).
CALL_THE_LAYER = frozenset({
    "BEFT", "BOFT", "FOURIERFT", "IA3", "LILY", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PVERA", "RANDLORA", "ROAD",
    "VERA", "WAVEFT",
})  # fmt: skip


def check_added(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Before PEFT puts an adapter on a model: ValueError for a method that would take codes for weights."""
    config = tuner.peft_config[adapter_name]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method in CALL_THE_LAYER or getattr(config, "target_modules", None) is None:
        return
    everything = config.target_modules == "all-linear"
    for name, m in streams(model):
        aimed = everything or tuner._check_target_module_exists(copy.copy(config), name)
        if m.quantization.quantized and isinstance(m, QuantizedLinear) and aimed:
            raise ValueError(
                f"{name} is quantized, and PEFT's {method} works on the numbers of a weight: use LORA, or keep what it"
                " aims at in float (ignore= of quantize_)"
            )


def check_merged(model: nn.Module) -> None:
    """ValueError for layers other than LoRA's on quantized modules: they would add to codes."""
    for name, m in model.named_modules():
        if not isinstance(m, BaseTunerLayer) or isinstance(m, Linear | ParamWrapper):
            continue
        base = dict(streams(m.get_base_layer())).get("")
        if base is not None and base.quantization.quantized:
            raise ValueError(
                f"{name}: {type(m).__module__}.{type(m).__name__} cannot be merged, its weight is stored in"
                f" {base.format!r}: only LoRA is merged into codes. unload, or dequantize_ before"
            )

"""Hugging Face's fine-grained FP8 (DeepSeek, Qwen, GLM, MiniMax): `weight_scale_inv`, a multiplier in spite
of its name.

Its tiles are those of the config, partial at the edges; nothing is derived from the grid of scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import Codec
from .reader import CODES, INPUT_SCALE, SCALE, Part, Reader, Scheme, pair

_WEIGHTS = {(128, 128): "fp8_block", (1, 32): "mxfp8", None: "fp8_tensor"}
_ACTIVATIONS = {"dynamic": None, "static": "fp8_tensor"}  # None: what goes with the weights
_EXPERTS = {"fp8": None, "fp4": "mxfp4/fp8_block"}  # None: as every other layer
_FMTS = ("e4m3", "float8_e4m3fn")
_SCALES = ("float", "ue8m0", "float32", None)


def _container(t: Tensor, codec: Codec) -> Tensor:
    """Two fp4 codes to a byte travel as int8."""
    return t.view(torch.uint8) if codec.packed and t.dtype == torch.int8 else t


class FineGrained(Reader):
    name = "fine-grained fp8"
    methods = ("fp8", "mxfp8")
    parts: ClassVar = {
        ".weight_scale_inv": Part(SCALE), "_scale_inv": Part(SCALE), ".activation_scale": Part(INPUT_SCALE),
        "_activation_scale": Part(INPUT_SCALE), ".weight": Part(CODES, _container),
    }  # fmt: skip

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        size = config.get("weight_block_size")
        block = tuple(size) if size else None
        if config.get("fmt", "e4m3") not in _FMTS:
            raise self.refuse("fmt", config["fmt"], _FMTS)
        if block not in _WEIGHTS:
            raise self.refuse("weight_block_size", size, [list(b) for b in _WEIGHTS if b])
        activation = config.get("activation_scheme", "dynamic")
        if activation not in _ACTIVATIONS:
            raise self.refuse("activation_scheme", activation, _ACTIVATIONS)
        experts = config.get("expert_dtype", "fp8")
        if experts not in _EXPERTS:
            raise self.refuse("expert_dtype", experts, _EXPERTS)
        if config.get("scale_fmt") not in _SCALES:
            raise self.refuse("scale_fmt", config["scale_fmt"], _SCALES)
        if config.get("modules_to_convert"):
            raise self.refuse("modules_to_convert", config["modules_to_convert"])
        static = activation == "static"
        weight = _WEIGHTS[block]
        linear = Scheme(pair(weight, "fp8_tensor") if static else weight, static, exponents=True)
        self._schemes = {
            "linear": linear, "experts": Scheme(_EXPERTS[experts] or linear.format, static, exponents=True)
        }  # fmt: skip

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        listed = self.config.get("modules_to_not_convert") or self.config.get("ignored_layers") or ()
        return None if excluded(names, listed) else self._schemes[kind]


def excluded(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """transformers' rule: a pattern is a prefix or a regular expression up to a dot, or a suffix, of a name."""
    return any(
        re.match(rf"(?:{p})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(p) for name in names for p in patterns
    )

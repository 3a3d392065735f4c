"""compressed-tensors (llm-compressor): groups of targets, each with arguments of weights and of input activations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import FORMATS, Codec
from .reader import CODES, GLOBAL_SCALE, INPUT_SCALE, SCALE, Part, Reader, Scheme, pair, reciprocal, to_bytes

# (type, bits, strategy, group size or block) -> format.
_WEIGHTS = {
    ("float", 8, "tensor", None): "fp8_tensor", ("float", 8, "channel", None): "fp8",
    ("float", 8, "block", (128, 128)): "fp8_block", ("float", 8, "group", 32): "mxfp8",
    ("float", 6, "group", 32): "mxfp6_e2m3", ("float", 4, "group", 32): "mxfp4",
    ("float", 4, "tensor_group", 16): "nvfp4", ("int", 8, "channel", None): "int8",
}  # fmt: skip
_INT4 = ("int", 4, "group")  # of any size that a format is registered for
# (type, bits, strategy, group size, dynamic) -> (what a format calls such activations, a scale is in the file).
_ACTIVATIONS = {
    ("float", 8, "tensor", None, False): ("fp8_tensor", True),
    ("float", 8, "tensor", None, True): ("fp8_tensor", False),
    ("float", 8, "token", None, True): ("fp8", False), ("float", 8, "group", 128, True): ("fp8_block", False),
    ("float", 8, "group", 32, True): ("mxfp8", False), ("float", 6, "group", 32, True): ("mxfp6_e2m3", False),
    ("float", 4, "group", 32, True): ("mxfp4", False), ("float", 4, "tensor_group", 16, "local"): ("nvfp4", True),
    ("int", 8, "token", None, True): ("int8", False),
}  # fmt: skip
_FORMATS = (
    "float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
_CACHE = (("float", 8, "tensor", None), False)
_STATUS = ("compressed", "frozen", None)
_ORDERS = (None, "weight", "static")  # of calibration only: nothing of it is in the file


def _codes(t: Tensor, codec: Codec) -> Tensor:
    """int32 words hold codes of 4 bits as they are stored here, or integers of 8 bits with an offset of 128."""
    if t.dtype != torch.int32 or codec.packed:
        return to_bytes(t, codec)
    return (to_bytes(t, codec) ^ 0x80).view(torch.int8)


class CompressedTensors(Reader):
    name = "compressed-tensors"
    methods = ("compressed-tensors",)
    parts: ClassVar = {
        ".weight": Part(CODES), ".weight_packed": Part(CODES, _codes), ".weight_scale": Part(SCALE),
        ".weight_global_scale": Part(GLOBAL_SCALE, reciprocal), ".input_scale": Part(INPUT_SCALE),
        ".input_global_scale": Part(INPUT_SCALE, reciprocal),
    }  # fmt: skip
    ignored = (".weight_shape",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        sparse = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense":
            raise self.refuse("sparsity_config.format", sparse, ["dense"])
        if (config.get("transform_config") or {}).get("config_groups"):
            raise self.refuse("transform_config", config["transform_config"])
        if config.get("quantization_status") not in _STATUS:
            raise self.refuse("quantization_status", config["quantization_status"], _STATUS[:-1])
        cache = config.get("kv_cache_scheme")
        if cache and (self._key("kv_cache_scheme", "cache", cache), cache.get("dynamic", False)) != _CACHE:
            raise self.refuse("kv_cache_scheme", cache)
        self._groups: list[tuple[Sequence[str], Scheme]] = []
        for name, group in (config.get("config_groups") or {}).items():
            self._groups.append((group.get("targets") or (), self._scheme(name, group)))
        if not self._groups:
            raise self.refuse("config_groups", config.get("config_groups"))

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        """Exact targets, then regular expressions, then classes: of a matrix, always Linear."""
        name = names[0]
        if any(_matches(pattern, name) for pattern in self.config.get("ignore") or ()):
            return None
        for test in (str.__eq__, _regex, lambda target, _: target == "Linear"):
            for targets, scheme in self._groups:
                if any(test(target, name) for target in targets):
                    return scheme
        return None

    def _scheme(self, name: str, group: Mapping[str, Any]) -> Scheme:
        stored = group.get("format") or self.config.get("format")
        if stored not in _FORMATS:
            raise self.refuse(f"{name}: format", stored, _FORMATS)
        if group.get("output_activations"):
            raise self.refuse(f"{name}: output_activations", group["output_activations"])
        weights = group.get("weights")
        if not weights:
            raise self.refuse(f"{name}: weights", weights)
        if weights.get("actorder") not in _ORDERS:
            raise self.refuse(f"{name}: weights.actorder", weights["actorder"], _ORDERS)
        if weights.get("dynamic"):
            raise self.refuse(f"{name}: weights.dynamic", weights["dynamic"], [False])
        key = self._key(name, "weights", weights)
        weight = f"int4_g{key[3]}" if key[:3] == _INT4 else _WEIGHTS.get(key, "")
        if weight not in FORMATS:
            integers = [(*_INT4, int(f.removeprefix("int4_g"))) for f in FORMATS if f.startswith("int4_g")]
            raise self.refuse(f"{name}: weights", key, [*_WEIGHTS, *integers])
        inputs = group.get("input_activations")
        if not inputs:
            return Scheme(pair(weight, None))
        key = (*self._key(name, "input_activations", inputs), inputs.get("dynamic", False))
        if key not in _ACTIVATIONS:
            raise self.refuse(f"{name}: input_activations", key, _ACTIVATIONS)
        activation, static = _ACTIVATIONS[key]
        return Scheme(pair(weight, activation), static)

    def _key(self, name: str, what: str, args: Mapping[str, Any]) -> tuple:
        if args.get("symmetric", True) is not True:
            raise self.refuse(f"{name}: {what}.symmetric", args["symmetric"], [True])
        group, block = args.get("group_size"), args.get("block_structure")
        strategy = args.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
        size = tuple(block) if strategy == "block" and block else group if "group" in strategy else None
        return args.get("type", "int"), args.get("num_bits", 8), strategy, size


def _regex(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _matches(pattern: str, name: str) -> bool:
    return pattern == name or pattern == "Linear" or _regex(pattern, name)

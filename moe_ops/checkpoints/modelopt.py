"""NVIDIA ModelOpt: an algorithm for all layers, or one for each, in config.json or in hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from .reader import CODES, GLOBAL_SCALE, INPUT_SCALE, SCALE, Part, Reader, Scheme, settings

_SIDE_FILE = "hf_quant_config.json"
_ALGORITHMS = {
    "FP8": Scheme("fp8_tensor", static=True), "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8"),
    "NVFP4": Scheme("nvfp4", static=True), "MXFP8": Scheme("mxfp8"),
}  # fmt: skip
_GROUPS = {"NVFP4": (16, None), "MXFP8": (32, None)}
_MIXED = "MIXED_PRECISION"
_KV = ("FP8", None)


class ModelOpt(Reader):
    name = "ModelOpt"
    methods = ("modelopt",)
    transposes = True  # its export quantizes along K, and then gives each stack the orientation that it had
    parts: ClassVar = {
        ".weight": Part(CODES), ".weight_scale": Part(SCALE), ".weight_scale_2": Part(GLOBAL_SCALE),
        ".input_scale": Part(INPUT_SCALE), "_weight_scale": Part(SCALE), "_weight_scale_2": Part(GLOBAL_SCALE),
        "_input_scale": Part(INPUT_SCALE),
    }  # fmt: skip

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._excluded = (*(config.get("ignore") or ()), *(config.get("exclude_modules") or ()))
        algorithm = config.get("quant_algo")
        self._layers = config.get("quantized_layers") or {} if algorithm == _MIXED else None
        self._all = None if algorithm == _MIXED else self._algorithm(config)
        for layer in (self._layers or {}).values():
            self._algorithm(layer)
        kv = config.get("kv_cache_quant_algo")
        if kv not in _KV:
            raise self.refuse("kv_cache_quant_algo", kv, _KV)

    @classmethod
    def find(cls, config: Mapping[str, Any], side: Callable[[str], Mapping[str, Any] | None]) -> Mapping | None:
        found = settings(config)
        if found:
            return found if found.get("quant_method") in cls.methods else None
        beside = side(_SIDE_FILE) or {}
        producer = (beside.get("producer") or {}).get("name")
        return beside.get("quantization") if producer in cls.methods else None

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        name = names[0]
        if any(_excludes(pattern, name) for pattern in self._excluded):
            return None
        if self._layers is None:
            return self._all
        for layer in (name, name.rpartition(".experts.")[0] + ".experts"):
            if layer in self._layers:
                return self._algorithm(self._layers[layer])
        return None

    def _algorithm(self, settings: Mapping[str, Any]) -> Scheme:
        algorithm, size = settings.get("quant_algo"), settings.get("group_size")
        if algorithm not in _ALGORITHMS:
            raise self.refuse("quant_algo", algorithm, [*_ALGORITHMS, _MIXED])
        if size not in _GROUPS.get(algorithm, (size,)):
            raise self.refuse(f"{algorithm}: group_size", size, _GROUPS[algorithm])
        return _ALGORITHMS[algorithm]


def _excludes(pattern: str, name: str) -> bool:
    """A glob, or a module's name, which covers what is under it."""
    return fnmatchcase(name, pattern) or name == pattern or name.startswith(f"{pattern}.")

"""AMD Quark: a tensor spec for weights and one for activations, by layer pattern, by layer type, or for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from ..formats import Codec
from .reader import CODES, INPUT_SCALE, SCALE, Part, Reader, Scheme, pair

_PER_TENSOR, _PER_CHANNEL, _PER_GROUP = "per_tensor", "per_channel", "per_group"
# (dtype, qscheme, group size) -> format. Groups share an exponent.
_WEIGHTS = {
    ("fp4", _PER_GROUP, 32): "mxfp4", ("fp6_e2m3", _PER_GROUP, 32): "mxfp6_e2m3",
    ("fp6_e3m2", _PER_GROUP, 32): "mxfp6_e3m2", ("fp8_e4m3", _PER_GROUP, 32): "mxfp8",
    ("fp8_e4m3", _PER_CHANNEL, None): "fp8", ("fp8_e4m3", _PER_TENSOR, None): "fp8_tensor",
    ("int8", _PER_CHANNEL, None): "int8",
}  # fmt: skip
# (dtype, qscheme, group size, dynamic) -> what a format calls such activations.
_ACTIVATIONS = {(*key, True): name for key, name in _WEIGHTS.items()} | {
    ("fp8_e4m3", _PER_TENSOR, None, False): "fp8_tensor", ("fp8_e4m3", "per_token", None, True): "fp8",
}  # fmt: skip
_CACHE = ("fp8_e4m3", _PER_TENSOR)  # what the outputs of a key or value projection may be


def _flat(t: Tensor, codec: Codec) -> Tensor:
    return t.flatten(-2)


class Quark(Reader):
    name = "Quark"
    methods = ("quark",)
    parts: ClassVar = {
        ".weight": Part(CODES), ".weight_scale": Part(SCALE), ".input_scale": Part(INPUT_SCALE),
        "_blocks": Part(CODES, _flat), "_scales": Part(SCALE), "_input_scale": Part(INPUT_SCALE),
    }  # fmt: skip

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        export = config.get("export") or {}
        if export.get("weight_format", "real_quantized") != "real_quantized":
            raise self.refuse("weight_format", export["weight_format"], ["real_quantized"])
        if config.get("softmax_quant_spec"):
            raise self.refuse("softmax_quant_spec", config["softmax_quant_spec"])
        self._kv = tuple(export.get("kv_cache_group") or ())

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        """Patterns are of names on disk, the first of `names`."""
        name = names[0]
        if any(_matches(pattern, name) for pattern in self.config.get("exclude") or ()):
            return None
        pattern, chosen = self._config(name)
        if not chosen or not chosen.get("weight"):
            return None
        if chosen.get("bias"):
            raise self.refuse(f"{name}: bias", chosen["bias"])
        outputs = chosen.get("output_tensors")
        if outputs and (pattern not in self._kv or (outputs.get("dtype"), outputs.get("qscheme")) != _CACHE):
            raise self.refuse(f"{name}: output_tensors", outputs)
        weight = self._spec(name, "weight", chosen["weight"], _WEIGHTS, dynamic=False)
        inputs = chosen.get("input_tensors")
        if not inputs:
            return Scheme(pair(weight, None))
        static = not inputs.get("is_dynamic") if isinstance(inputs, Mapping) else False
        return Scheme(pair(weight, self._spec(name, "input_tensors", inputs, _ACTIVATIONS)), static)

    def _config(self, name: str) -> tuple[str | None, Mapping[str, Any] | None]:
        """The first layer pattern that matches, else the layer's type, else what holds for all."""
        for pattern, chosen in (self.config.get("layer_quant_config") or {}).items():
            if _matches(pattern, name):
                return pattern, chosen
        types = self.config.get("layer_type_quant_config") or {}
        for kind in ("Linear", "nn.Linear", "<class 'torch.nn.modules.linear.Linear'>"):
            if kind in types:
                return None, types[kind]
        return None, self.config.get("global_quant_config")

    def _spec(self, name: str, what: str, spec: Any, known: Mapping, dynamic: bool | None = None) -> str:
        if not isinstance(spec, Mapping):
            raise self.refuse(f"{name}: two-stage {what}", spec)
        grouped = spec.get("qscheme") == _PER_GROUP
        key: tuple = (spec.get("dtype"), spec.get("qscheme"), spec.get("group_size") if grouped else None)
        if dynamic is None:
            key = (*key, bool(spec.get("is_dynamic")))
        elif bool(spec.get("is_dynamic")) != dynamic:
            raise self.refuse(f"{name}: {what}.is_dynamic", spec.get("is_dynamic"))
        if key not in known:
            raise self.refuse(f"{name}: {what}", key, known)
        wrong = {
            "scale_format": grouped and spec.get("scale_format") != "e8m0", "symmetric": spec.get("symmetric") is False,
            "mx_element_dtype": spec.get("mx_element_dtype") is not None, "is_scale_quant": spec.get("is_scale_quant"),
        }  # fmt: skip
        for field, bad in wrong.items():
            if bad:
                raise self.refuse(f"{name}: {what}.{field}", spec.get(field))
        return known[key]


def _matches(pattern: str, name: str) -> bool:
    """A glob, or without one the name itself or its last components."""
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")

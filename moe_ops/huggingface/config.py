"""MoeOpsConfig: what `from_pretrained` is given, and what config.json of a quantized checkpoint says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..backends.base import check_backend
from ..checkpoints.kv import checked, kv_scales
from ..formats import FORMATS, Format
from ..rules import parse
from ..storage import QuantizedModule
from ..streaming import streams

Given = str | Format | Mapping[str, str | Format | None]


class MoeOpsConfig(QuantizationConfigMixin):
    """Quantizes a model while it is loaded: from_pretrained(path, quantization_config=MoeOpsConfig("fp8")).

    format, ignore, strict, backend: as in `quantize_`; the loaded model is the one that it would have made.

    In a saved checkpoint `modules` says which module is stored in which format, `input_scales` which parameters have a
    static input scale and of what shape, `kv_scales` the scales of a KV cache by attention module, `dtype` what is not
    quantized; `version` is that of this layout of the file.
    Raises ValueError for what `quantize_` refuses of its arguments, and for a checkpoint that a later version wrote.
    """

    METHOD = "moe_ops"
    VERSION = 1

    def __init__(
        self, format: Given = "fp8", ignore: str | Iterable[str] = (), strict: bool = True, backend: str | None = None,
        *, version: int = VERSION, modules: Mapping[str, str] | None = None,
        input_scales: Mapping[str, list[int]] | None = None, dtype: str | None = None,
        kv_scales: Mapping[str, Iterable[float]] | None = None, quant_method: str = METHOD, **unknown: Any,
    ) -> None:  # fmt: skip
        if not isinstance(version, int) or version > self.VERSION:
            raise ValueError(
                f"this checkpoint has version {version!r} of the moe_ops layout, this moe_ops reads up to"
                f" {self.VERSION}: install a newer one"
            )
        if unknown or quant_method != self.METHOD:
            raise ValueError(f"MoeOpsConfig takes format, ignore, strict and backend, not {', '.join(unknown)}")
        if backend is not None:
            check_backend(backend)
        for key, value in (("modules", modules), ("input_scales", input_scales), ("kv_scales", kv_scales)):
            if not isinstance(value, Mapping | None):
                raise ValueError(f"{key} maps names of modules and parameters, got {value!r}")
        ignore = (ignore,) if isinstance(ignore, str) else ignore
        parse(format, ignore)
        for name, stored in (modules or {}).items():
            FORMATS.resolve(stored)
            if not isinstance(name, str):
                raise ValueError(f"modules maps module names to formats, got {name!r}")
        self.quant_method, self.version = quant_method, version
        self.format = _names(format)
        self.ignore, self.strict, self.backend = list(ignore), bool(strict), backend
        self.modules = dict(modules or {})
        self.input_scales = {key: _shape(key, shape) for key, shape in (input_scales or {}).items()}
        self.kv_scales = {name: list(checked(name, pair)) for name, pair in (kv_scales or {}).items()}
        self.dtype = dtype

    @classmethod
    def of(cls, model: nn.Module) -> MoeOpsConfig:
        """What a model holds now."""
        mine = [m for _, m in streams(model)]
        formats = {m.format for m in mine}
        new = cls(formats.pop() if len(formats) == 1 else {name: m.format for name, m in streams(model)})
        new.refresh(model)
        return new

    def to_dict(self) -> dict[str, Any]:
        """For config.json. Without scales it says nothing of them: earlier versions read such checkpoints."""
        said = super().to_dict()
        return said if self.kv_scales else {key: value for key, value in said.items() if key != "kv_scales"}

    def refresh(self, model: nn.Module) -> None:
        """Describe the modules of the model as they are now."""
        self.modules = {name: m.format for name, m in streams(model)}
        self.input_scales = {f"{name}.{key}": shape for name, m in streams(model) for key, shape in _input_scales(m)}
        self.kv_scales = {name: list(pair) for name, pair in kv_scales(model).items()}
        dtypes = {m.float_dtype for _, m in streams(model)}
        self.dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
        backends = {m.backend for _, m in streams(model)}
        self.backend = backends.pop() if len(backends) == 1 else None


def _names(format: Given) -> str | dict[str, str | None]:
    if isinstance(format, Mapping):
        return {pattern: None if f is None else FORMATS.resolve(f).name for pattern, f in format.items()}
    return FORMATS.resolve(format).name


def _shape(key: str, shape: Any) -> list[int]:
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"input_scales maps parameters to shapes, {key} to {shape!r}")
    return list(shape)


def _input_scales(m: QuantizedModule) -> list[tuple[str, list[int]]]:
    scales = [(f"{weight}_input_scale", m.part(weight, "input_scale")) for weight in m.weight_names()]
    return [(key, list(t.shape)) for key, t in scales if t is not None]

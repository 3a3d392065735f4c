"""What a reader of one producer's checkpoints says: which layers are quantized how, and what its tensors mean.

A reader moves nothing itself. It names, for each tensor on disk, the canonical part that the tensor holds, and the
exact change of representation that leads there: codes and scales are never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import FORMATS, Codec

CODES, SCALE, GLOBAL_SCALE, INPUT_SCALE = "", "scale", "global_scale", "input_scale"


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored. static: its activations need an `input_scale` from the file.

    exponents: scales of a fp32 codec may be stored as bytes b that mean 2^(b - 127).
    """

    format: str
    static: bool = False
    exponents: bool = False


@dataclass(frozen=True)
class Part:
    """Part of a quantized weight: its name, and how the stored tensor becomes the canonical one."""

    name: str
    convert: Callable[[Tensor, Codec], Tensor] = lambda t, codec: t


def reciprocal(t: Tensor, codec: Codec) -> Tensor:
    """Stored as 1 / g (compressed-tensors); the fp32 number nearest to g."""
    return t.float().reciprocal()


class Reader:
    """One producer. Subclasses fill in the class attributes and `scheme`, and check their config in `__init__`."""

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]  # what config.json may call it
    # Endings of keys: ".x" belongs to a Linear (its weight is `.weight`), "_x" to a fused parameter.
    parts: ClassVar[Mapping[str, Part]]
    ignored: ClassVar[tuple[str, ...]] = ()  # endings of keys that say nothing the shapes do not say
    transposes: ClassVar[bool] = False  # stacks of experts lie (K, N) where the float model has them so

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    def find(cls, config: Mapping[str, Any], side: Callable[[str], Mapping[str, Any] | None]) -> Mapping | None:
        """The producer's settings, from config.json or, through `side`, another file, if the checkpoint is his."""
        found = settings(config)
        return found if found and found.get("quant_method") in cls.methods else None

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        """How a matrix is stored, None for float. names: of its module on disk and in memory; kind: experts, linear.

        Raises ValueError, with the value, for settings that no rule here explains.
        """
        raise NotImplementedError

    def split(self, key: str) -> tuple[str, str]:
        """A key -> (the key that a float checkpoint would have, name of the part)."""
        for ending in sorted(self.parts, key=len, reverse=True):
            if key.endswith(ending):
                return key[: -len(ending)] + (".weight" if ending[0] == "." else ""), self.parts[ending].name
        return key, CODES

    def convert(self, key: str, t: Tensor, codec: Codec) -> Tensor:
        """What is stored under the key -> the part of a weight that `codec` describes."""
        for ending in sorted(self.parts, key=len, reverse=True):
            if key.endswith(ending):
                return self.parts[ending].convert(t, codec)
        return t

    def refuse(self, what: str, value: Any, known: Iterable[Any] = ()) -> ValueError:
        """The error for a setting that is not known."""
        allowed = ", ".join(str(k) for k in known)
        return ValueError(f"{self.name}: {what} {value!r} is not supported{f'; known: {allowed}' if allowed else ''}")


@contextmanager
def readable(producer: str) -> Iterator[None]:
    """ValueError for settings of another type than a reader expects."""
    try:
        yield
    except (TypeError, AttributeError, KeyError) as e:
        raise ValueError(f"{producer}: the settings in the checkpoint cannot be read: {e}") from e


def settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization settings of a config.json, at the top or of its text model; None for a float checkpoint."""
    for place in (config, config.get("text_config") or {}):
        for name in ("quantization_config", "compression_config"):
            if place.get(name):
                return place[name]
    return None


def pair(weight: str, activation: str | None) -> str:
    """Name of the format with these two; the bare name where that means the same."""
    bare, wanted = FORMATS[weight], FORMATS[f"{weight}/{activation or 'bf16'}"]
    return weight if bare.activation == wanted.activation else wanted.name


def to_bytes(t: Tensor, codec: Codec) -> Tensor:
    """int32 words of packed codes (..., W) -> their bytes, lowest first (..., 4W); other tensors as they are."""
    if t.dtype != torch.int32:
        return t
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=t.device)
    return ((t[..., None] >> shifts) & 0xFF).to(torch.uint8).flatten(-2)

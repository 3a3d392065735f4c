"""Checkpoints of any producer -> canonical quantized tensors. One file per producer, one entry each in `READERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .compressed_tensors import CompressedTensors
from .finegrained import FineGrained
from .modelopt import ModelOpt
from .openai import OpenAI
from .quark import Quark
from .reader import Part, Reader, Scheme, readable, settings

READERS: list[type[Reader]] = [OpenAI, Quark, FineGrained, CompressedTensors, ModelOpt]


def find_reader(config: Mapping[str, Any], side: Callable[[str], Mapping[str, Any] | None]) -> Reader:
    """The reader of a checkpoint, by its config.json and, through `side`, the producers' own files beside it.

    Raises ValueError for a float checkpoint, an unknown producer, and settings that its reader does not know.
    """
    with readable("config.json"):
        for reader in READERS:
            found = reader.find(config, side)
            if found is not None:
                return reader(found)
        given = settings(config)
    known = ", ".join(reader.name for reader in READERS)
    if given is None:
        raise ValueError(
            "this checkpoint is not quantized (config.json has no quantization_config): load it with"
            " from_pretrained(path, quantization_config=MoeOpsConfig(...)), or load it and call quantize_"
        )
    raise ValueError(f"quantization method {given.get('quant_method')!r} is not supported; known: {known}")


__all__ = ["READERS", "Part", "Reader", "Scheme", "find_reader"]

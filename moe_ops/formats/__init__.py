"""Formats are data. To add one made of known elements, register it in its family's file."""

from . import full, fp8, integer, mx, nvidia  # isort: skip  (the order of the list)
from .base import (
    FORMATS,
    Codec,
    Element,
    Format,
    QuantizedTensor,
    UnknownFormat,
    dequantize_weight,
    empty_weight,
    quantize_weight,
    write_matrix,
)  # fmt: skip
from .minifloat import minifloat

__all__ = [
    "FORMATS", "Codec", "Element", "Format", "QuantizedTensor", "UnknownFormat", "dequantize_weight", "empty_weight",
    "minifloat", "quantize_weight", "write_matrix",
]  # fmt: skip
del fp8, full, integer, mx, nvidia

"""What the Triton kernels compute, and why not where they do not."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import FORMATS, Codec, scales
from ..formats.fp8 import E4M3
from ..formats.full import BF16
from ..formats.integer import INT4, INT8
from ..formats.minifloat import decode_minifloat
from .base import FLOATS, Problem, interpreted


def supports(problem: Problem) -> bool | str:
    if problem.device == "cpu" and not interpreted():
        return "needs a GPU, or TRITON_INTERPRET=1 for its interpreter"
    if problem.device not in ("cpu", "cuda"):
        return f"has no kernels for {problem.device}"
    if problem.device == "cuda" and problem.arch < 80:
        return f"needs sm_80 or newer, this is sm_{problem.arch}"
    codecs = codecs_of(problem)
    if problem.dtype not in FLOATS and all(problem.dtype != codec.element.storage for codec in codecs):
        return f"takes bfloat16, float16 or float32, not {problem.dtype}"
    if problem.n * problem.k >= 1 << 31:
        return f"addresses 2^31 numbers of a matrix, not {problem.n} x {problem.k}"
    if problem.op == "grouped_wgrad" and (reason := _missing_along_rows(codecs[0])):
        return reason
    missing = [reason for codec in codecs if (reason := _missing(codec, problem.op == "quantize"))]
    return "; ".join(missing) if missing else True


def _missing(codec: Codec, encodes: bool) -> str | None:
    """What a codec has that no kernel reads, or writes, if that is asked for."""
    element, group = codec.element, codec.block[1] if codec.block else 0
    if element not in _ELEMENTS and getattr(element.decode, "func", None) is not decode_minifloat:
        return f"has no decoder of {element.name}"
    if element.bits not in (4, 6, 8, 16):
        return f"reads codes of 4, 6 or 8 bits, not of {element.bits} ({element.name})"
    if group % 128 and (group < 8 or group & (group - 1)):
        return f"groups of {group} columns are neither a power of two nor a multiple of 128"
    if codec.block is not None and codec.scale_dtype not in _SCALES:
        return f"reads no scales of {codec.scale_dtype}"
    if encodes and _RULES.get(codec.scale_rule) != (codec.scale_dtype, codec.global_scale):
        return f"has no kernel that finds the scales of {codec.name}"
    return None


def _missing_along_rows(codec: Codec) -> str | None:
    group = codec.block[1] if codec.block else 0
    return f"sums rows in groups that divide 128, not of {group}" if group and 128 % group else None


# What kernels compute, by identity: another rule or element of the same name is another one.
_ELEMENTS = (BF16, E4M3, INT8, INT4)
_SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn)
_RULES: dict[Any, tuple[torch.dtype, bool]] = {
    scales.amax_over_max: (torch.float32, False), scales.ratio: (torch.float8_e4m3fn, True),
    **dict.fromkeys((scales.rceil, scales.even, scales.floor), (torch.float8_e8m0fnu, False)),
}  # fmt: skip


def codecs_of(problem: Problem) -> list[Codec]:
    """How the tensors of a problem are stored."""
    if problem.op in ("quantize", "grouped_wgrad"):
        return [FORMATS.codec(problem.format)]
    if problem.op == "quantize_weight":  # what no kernel stores, torch does
        return []
    fmt = FORMATS[problem.format]
    return [codec for codec in (fmt.weight, fmt.activation) if codec is not None]

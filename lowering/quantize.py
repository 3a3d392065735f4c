"""moe_ops::quantize as plain torch that Inductor fuses with what makes x: the formats' own code, laid out for it.

M rows, K columns in G groups of columns that share a scale. Shared exponents (e8m0) stay bytes: Inductor does no
arithmetic on their type. A byte of packed codes is written as an expression of the columns that it holds parts of, and
the groups' maxima are taken over the same bytes: both are loops of one shape, which is what makes them one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_ops.backends import reference
from moe_ops.backends.base import Operand, Problem, arch_of
from moe_ops.formats import FORMATS, Codec
from moe_ops.formats.minifloat import decode_minifloat

from . import _compat
from .divide import ExactDivision
from .where import opens

_SHARED = torch.float8_e8m0fnu


class _Bytes(ExactDivision):
    """Inside, shared exponents stay the bytes that they are made of, too."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.view and args[1:] == (_SHARED,):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> Operand:
    """x (M, K) -> codes and scales, to the bit those of `reference.quantize`; shared exponents as uint8.

    A scale that is given, one value or (M, 1), makes it static; it is the global one where the codec has that.
    Those who quantize the same x in one graph get the same tensors: they are not to be written to, nor returned twice.
    """
    if scale is not None or not isinstance(x.shape[-1], int):
        return _quantize(x, codec, scale)
    known, key = _compat.derived(x), ("quantize", codec.name, x.shape[-1])
    if key not in known:
        known[key] = _quantize(x, codec, None)
    return known[key]


def _quantize(x: Tensor, codec: Codec, scale: Tensor | None) -> Operand:
    with _Bytes():
        if not _grouped(codec) or (scale is not None and not codec.global_scale):
            return _whole(x, codec, scale)
        lanes = _lanes(x, codec)
        stored, spread, whole = _scales(lanes, x, codec, scale)
        return Operand(_pack(_codes(lanes, spread, codec), codec, x.shape[-1]), stored, whole)


def rounded(x: Tensor, codec: Codec, scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Operand:
    """x (M, K) -> the numbers that its codes stand for, and the scales that are still to be multiplied with.

    For products of decoded numbers. Scales of groups below 128 columns, and shared exponents, are in the numbers (M, K)
    of `dtype`: e8m0 and e4m3 exactly. What is left is `scale`, () or (M, 1) or (M, G), or None where nothing is.
    """
    with _Bytes():
        if not _grouped(codec) or (scale is not None and not codec.global_scale):
            q = _whole(x, codec, scale)
            return Operand(decoded(q.data, codec).to(dtype), q.scale)
        lanes = [_groups(x, codec)]
        stored, spread, whole = _scales(lanes, x, codec, scale)
        numbers = decoded(_codes(lanes, spread, codec)[0], codec)
        if not folds(codec):
            return Operand(_columns(numbers, x.shape[-1]).to(dtype), stored)
        values = scale_value(stored)[..., None, None]
        return Operand(_columns(numbers * values, x.shape[-1]).to(dtype), whole)


def folds(codec: Codec) -> bool:
    """Whether the scales along K are in the numbers of `rounded`."""
    return _grouped(codec) and (codec.block[1] % 128 != 0 or codec.scale_dtype.itemsize == 1)  # type: ignore[index]


def _grouped(codec: Codec) -> bool:
    return codec.block is not None and codec.block[1] > 0


def _whole(x: Tensor, codec: Codec, scale: Tensor | None) -> Operand:
    """Scales of whole rows, or one for all: found row by row, so that only the rows' maxima wait for each other."""
    if scale is None and codec.block == (0, 0) and x.shape[0]:
        scale = codec.scale_of(x.float().abs().amax(-1).amax())
    return reference.quantize(x, codec, scale)


def _groups(x: Tensor, codec: Codec) -> Tensor:
    """x (M, K) -> (M, G, words, codes of a word) fp32, a last group filled up with zeros."""
    assert codec.block is not None
    group, word = codec.block[1], math.lcm(codec.element.bits, 8) // codec.element.bits
    xf = x.float()
    if x.shape[-1] % group:
        xf = pad(xf, (0, -x.shape[-1] % group))
    return xf.unflatten(-1, (-1, group // word, word))


def _lanes(x: Tensor, codec: Codec) -> list[Tensor]:
    """Columns with bits in each stored byte, (M, G, words, bytes of a word) each: itself, or two that share it."""
    groups = _groups(x, codec)
    word, size = groups.shape[-1], groups.shape[-1] * codec.element.bits // 8
    return [groups] if word == 1 else [groups[..., :size], groups[..., word - size :]]


def _scales(lanes: list[Tensor], x: Tensor, codec: Codec, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales as they are stored (M, G), what x is divided by (M, G, 1, 1), and the global scale (M, 1)."""
    whole = None
    if codec.global_scale:  # every row is a matrix of its own
        whole = codec.global_of(x.float()[:, None]) if given is None else given.float().reshape(-1).expand(x.shape[0])
    amax = _maximum([lane.abs() for lane in lanes]).amax((-2, -1))  # (M, G)
    assert codec.scale_rule is not None
    shared = codec.scale_dtype == _SHARED
    stored = codec.scale_rule(amax, codec.element) if shared else codec.scale_of(amax[:, None], whole)[:, 0]
    value = scale_value(stored)
    value = value if whole is None else value * whole[:, None]
    return stored, value[..., None, None], None if whole is None else whole[:, None]


def _maximum(lanes: list[Tensor]) -> Tensor:
    return lanes[0] if len(lanes) == 1 else torch.maximum(*lanes)


def scale_value(stored: Tensor) -> Tensor:
    """A stored scale as fp32. Bytes are shared exponents: 2^(b - 127), 255 NaN."""
    if stored.dtype == _SHARED:
        stored = stored.view(torch.uint8)
    if stored.dtype != torch.uint8:
        return stored.float()
    bits = torch.where(stored == 255, 0x7FC00000, (stored.int() << 23).clamp(min=0x400000))
    return bits.view(torch.float32)


def _codes(lanes: list[Tensor], spread: Tensor, codec: Codec) -> list[Tensor]:
    return [codec.element.encode(torch.where(spread == 0, 0.0, lane / spread)) for lane in lanes]


def _pack(codes: list[Tensor], codec: Codec, k: int) -> Tensor:
    """Codes of the lanes -> bytes (M, stored K), as formats/packing.py lays them out."""
    if len(codes) == 1:
        return _columns(codes[0], k)
    bits, (low, high) = codec.element.bits, codes
    j = torch.arange(low.shape[-1], dtype=torch.int32, device=low.device)  # byte of a word: ends code j, begins j + 1
    packed = (low.int() >> (8 - bits) * j) | (high.int() << bits - (8 - bits) * j)
    return (packed & 255).to(torch.uint8).flatten(1)


def _columns(t: Tensor, k: int) -> Tensor:
    """(M, G, words, 1) -> (M, K)."""
    return t.flatten(1)[:, :k]


def decoded(codes: Tensor, codec: Codec) -> Tensor:
    """Codes one by one -> fp32. Minifloats by their bits: a table would be another kernel's."""
    e = codec.element
    if not (isinstance(e.decode, partial) and e.decode.func is decode_minifloat):
        return e.decode(codes)
    c, sign = codes.int(), 1 << (e.bits - 1)
    bits = ((c & sign) << (32 - e.bits)) | ((c & (sign - 1)) << (23 - e.mantissa_bits))
    return bits.view(torch.float32) * 2.0 ** (127 - e.bias)  # exact, subnormals included


def _quantize_op(x: Tensor, scale: Tensor | None, codec: str, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    if not opens(Problem("quantize", x.device.type, arch_of(x.device), x.dtype, codec), backend):
        return NotImplemented
    found, lead = FORMATS.codec(codec), x.shape[:-1]
    rows = x.reshape(math.prod(lead), x.shape[-1])  # (M, K)
    q = _quantize(rows, found, None if scale is None else scale.reshape(-1, 1))
    codes, none = q.data.view(*lead, q.data.shape[-1]), x.new_empty(0, dtype=torch.float32)
    if scale is not None and not found.global_scale:
        return codes, scale.clone(), none
    stored = q.scale
    assert stored is not None
    stored = stored.view(*lead, stored.shape[-1]) if stored.ndim else stored
    stored = stored.view(_SHARED) if found.scale_dtype == _SHARED else stored
    if q.global_scale is None:
        return codes, stored, none
    return codes, stored, q.global_scale.clone(memory_format=torch.contiguous_format).view(*lead, 1)


DECOMPOSITIONS = {torch.ops.moe_ops.quantize.default: _quantize_op}

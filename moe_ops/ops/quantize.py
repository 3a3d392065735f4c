"""moe_ops::quantize: activations to codes and scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.base import FLOATS, Problem, arch_of, select
from ..formats import FORMATS, Codec
from .library import define


def _codec(name: str, x: Tensor) -> Codec:
    codec = FORMATS.codec(name)
    if codec.block is None:
        raise ValueError(f"codec {name!r} stores tensors as they are: there is nothing to quantize")
    if x.dtype not in FLOATS:
        raise ValueError(f"quantize takes float16, bfloat16 or float32, got {x.dtype}")
    if not x.ndim:
        raise ValueError("quantize takes rows (..., K), got a single number")
    return codec


def quantize(x: Tensor, scale: Tensor | None, codec: str, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x (..., K) -> codes (..., K), scale. scale = amax / max per block of the codec, fp32; codes = encode(x / scale).

    A scale that is given, one (...,) for all or one per row (..., 1), is used as it is: static quantization. Row scales
    come out as (..., 1), group scales as (..., ceil(K / group)), a scale for the whole tensor as ().
    """
    found, rows = _codec(codec, x), x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if scale is not None and scale.numel() != 1 and scale.shape != (*x.shape[:-1], 1):
        raise ValueError(f"scale must be one value or {(*x.shape[:-1], 1)}, one per row; got {tuple(scale.shape)}")
    impl = select(Problem("quantize", x.device.type, arch_of(x.device), x.dtype, codec), backend)
    if scale is not None:
        return impl.fn(rows, found, scale.reshape(-1, 1))[0].view(x.shape), scale.clone()
    q, s = impl.fn(rows, found)
    return q.view(x.shape), s.view(*x.shape[:-1], s.shape[-1]) if s.ndim else s


def _quantize_fake(x: Tensor, scale: Tensor | None, codec: str, backend: str = "auto") -> tuple[Tensor, Tensor]:
    found = _codec(codec, x)
    q = x.new_empty(x.shape, dtype=found.element.storage)
    if scale is not None:
        return q, torch.empty_like(scale)
    assert found.block is not None
    bn, bk = found.block
    if not bn:
        return q, x.new_empty((), dtype=found.scale_dtype)
    return q, x.new_empty(*x.shape[:-1], -(-x.shape[-1] // bk) if bk else 1, dtype=found.scale_dtype)


define("quantize(Tensor x, Tensor? scale, str codec, str backend='auto') -> (Tensor, Tensor)", quantize, _quantize_fake)

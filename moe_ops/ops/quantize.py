"""moe_ops::quantize: activations to codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import Problem, arch_of, select
from ..formats import FORMATS, Codec
from .library import define


def _codec(name: str, x: Tensor) -> Codec:
    codec = FORMATS.codec(name)
    if codec.block is None:
        raise ValueError(f"codec {name!r} stores tensors as they are: there is nothing to quantize")
    if not x.is_floating_point() or x.element_size() < 2:
        raise ValueError(f"quantize takes float16, bfloat16 or float32, got {x.dtype}")
    return codec


def quantize(x: Tensor, scale: Tensor | None, codec: str, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x (..., K) -> codes (..., K), scale. scale = amax / max per block of the codec, fp32; codes = encode(x / scale).

    A scale that is given, one (...,) for all or one per row (..., 1), is used as it is: static quantization. Row scales
    come out as (..., 1), group scales as (..., ceil(K / group)), a scale for the whole tensor as ().
    """
    found = _codec(codec, x)
    problem = Problem("quantize", x.device.type, arch_of(x.device), x.dtype, codec)
    q, s = select(problem, backend).fn(x.reshape(-1, x.shape[-1]), found, scale)
    return q.view(x.shape), s.clone() if s is scale else s.view(*x.shape[:-1], -1) if s.ndim else s


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

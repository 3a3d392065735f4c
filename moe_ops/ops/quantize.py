"""moe_ops::quantize: activations to codes and scales. K columns, stored in codec.stored(K) bytes where packed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.base import FLOATS, Problem, arch_of, select
from ..formats import FORMATS, Codec
from .library import define


def _codec(name: str, x: Tensor, scale: Tensor | None) -> Codec:
    """The codec, once what is to be quantized, and a scale that is given, have been checked."""
    codec = FORMATS.codec(name)
    if codec.block is None:
        raise ValueError(f"codec {name!r} stores tensors as they are: there is nothing to quantize")
    if codec.block[0] > 1:
        raise ValueError(f"codec {name!r} has blocks of {codec.block[0]} rows: activations take 1 or a whole matrix")
    if x.dtype not in FLOATS:
        raise ValueError(f"quantize takes float16, bfloat16 or float32, got {x.dtype}")
    if not x.ndim:
        raise ValueError("quantize takes rows (..., K), got a single number")
    if reason := codec.check(1, x.shape[-1]):
        raise ValueError(f"x {tuple(x.shape)}: {reason}")
    if scale is not None:
        check_static(codec)
        if scale.shape != (*x.shape[:-1], 1) and scale.numel() != 1:
            raise ValueError(f"scale must be one value or {(*x.shape[:-1], 1)}, one per row; got {tuple(scale.shape)}")
    return codec


def check_static(codec: Codec) -> None:
    """ValueError for a codec that has no scale which could be known beforehand."""
    if not codec.global_scale and (codec.packed or codec.scale_dtype.itemsize == 1):
        raise ValueError(f"activations in {codec.name!r} take no static scale: each group has its own, from its values")


def quantize(x: Tensor, scale: Tensor | None, codec: str, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """x (..., K) -> codes (..., stored K), scale, global_scale. codes = encode(x / (scale * global_scale)).

    scale = amax / max per block of the codec, by its rule: (..., 1) for rows, (..., ceil(K / group)) for groups, () for
    the whole tensor. global_scale is (..., 1), every row a matrix of its own; (0,) for codecs without.
    A scale that is given, one value for all or (..., 1), is used as it is: static quantization. For a codec with a
    global scale it is that one. Raises ValueError for shapes and static scales that the codec does not take.
    """
    found, lead = _codec(codec, x, scale), x.shape[:-1]
    rows = x.reshape(math.prod(lead), x.shape[-1])  # (M, K)
    impl = select(Problem("quantize", x.device.type, arch_of(x.device), x.dtype, codec), backend)
    q = impl.fn(rows, found, None if scale is None else scale.reshape(-1, 1))
    codes = q.data.view(*lead, q.data.shape[-1])
    if scale is not None and not found.global_scale:
        return codes, scale.clone(), x.new_empty(0, dtype=torch.float32)
    block_scale = q.scale.view(*lead, q.scale.shape[-1]) if q.scale.ndim else q.scale
    if not found.global_scale:
        return codes, block_scale, x.new_empty(0, dtype=torch.float32)
    return codes, block_scale, q.global_scale.clone(memory_format=torch.contiguous_format).view(*lead, 1)


def _quantize_fake(x: Tensor, scale: Tensor | None, codec: str, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    found, lead, k = _codec(codec, x, scale), x.shape[:-1], x.shape[-1]
    codes = x.new_empty(*lead, found.stored(k), dtype=found.element.storage)
    whole = x.new_empty(*((*lead, 1) if found.global_scale else (0,)), dtype=torch.float32)
    if scale is not None and not found.global_scale:
        return codes, torch.empty_like(scale), whole
    assert found.block is not None
    bn, bk = found.block
    shape = (*lead, -(-k // bk) if bk else 1) if bn else ()
    return codes, x.new_empty(shape, dtype=found.scale_dtype), whole


define(
    "quantize(Tensor x, Tensor? scale, str codec, str backend='auto') -> (Tensor, Tensor, Tensor)",
    quantize, _quantize_fake,
)  # fmt: skip

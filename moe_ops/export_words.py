"""Formats in the words of compressed-tensors: arguments of a group of its config, and how codes are laid out.

By what a codec is, so that a format made of the same parts is spelled without an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import Codec, Format

_E8M0, _E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn

# What a codec is called. Keys: float or integer, bits, bits of the mantissa, type of the scale, block, global scale.
Key = tuple[bool, int, int, torch.dtype, tuple[int, int], bool]


@dataclass(frozen=True)
class _Words:
    """`args` of a group of the config; `format` with and without quantized activations; how codes are laid out."""

    args: dict[str, Any]
    formats: tuple[str | None, str | None] = (None, None)
    pack: Callable[[Tensor], Tensor] | None = None


def _words32(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32)


def _key(codec: Codec) -> Key | None:
    e = codec.element
    return None if codec.block is None else (
        e.exponent_bits > 0, e.bits, e.mantissa_bits, codec.scale_dtype, codec.block, codec.global_scale)  # fmt: skip


def _args(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def _mx(bits: int, packed: bool) -> _Words:
    name = f"mxfp{bits}-{'pack-' if packed else ''}quantized"
    args = _args("float", bits, "group", group_size=32, scale_dtype="torch.uint8")
    return _Words(args, (name, name), (lambda t: t) if packed else None)


_FLOAT8 = ("float-quantized", "naive-quantized")
_NVFP = _args("float", 4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_WEIGHTS: dict[Key, _Words] = {
    (True, 8, 3, torch.float32, (0, 0), False): _Words(_args("float", 8, "tensor"), _FLOAT8),
    (True, 8, 3, torch.float32, (1, 0), False): _Words(_args("float", 8, "channel"), _FLOAT8),
    (True, 8, 3, torch.float32, (128, 128), False):
        _Words(_args("float", 8, "block", block_structure=[128, 128]), _FLOAT8),
    (True, 8, 3, _E8M0, (1, 32), False): _mx(8, packed=False),
    (True, 6, 3, _E8M0, (1, 32), False): _mx(6, packed=True),
    (True, 4, 1, _E8M0, (1, 32), False): _mx(4, packed=True),
    (True, 4, 1, _E4M3, (1, 16), True): _Words(_NVFP, (f"nvfp{4}-pack-quantized",) * 2, lambda t: t),
    (False, 8, 7, torch.float32, (1, 0), False):
        _Words(_args("int", 8, "channel"), ("int-quantized", "pack-quantized")),
    **{(False, 4, 3, torch.bfloat16, (1, group), False):
        _Words(_args("int", 4, "group", group_size=group), (None, "pack-quantized"), _words32) for group in (32, 128)},
}  # fmt: skip
_ACTIVATIONS: dict[Key, dict[str, Any]] = {
    (True, 8, 3, torch.float32, (0, 0), False): _args("float", 8, "tensor"),
    (True, 8, 3, torch.float32, (1, 0), False): _args("float", 8, "token"),
    (True, 8, 3, torch.float32, (1, 128), False): _args("float", 8, "group", group_size=128),
    (True, 8, 3, _E8M0, (1, 32), False): _args("float", 8, "group", group_size=32, scale_dtype="torch.uint8"),
    (True, 4, 1, _E8M0, (1, 32), False): _args("float", 4, "group", group_size=32, scale_dtype="torch.uint8"),
    (True, 4, 1, _E4M3, (1, 16), True): _NVFP,
    (False, 8, 7, torch.float32, (1, 0), False): _args("int", 8, "token"),
}  # fmt: skip


@dataclass(frozen=True)
class Spelled:
    """A format in the words of compressed-tensors."""

    weights: dict[str, Any]
    activations: dict[str, Any] | None
    format: str
    pack: Callable[[Tensor], Tensor] | None


def spell(fmt: Format, static: bool = False) -> Spelled | None:
    """None for what the layout cannot say. static: activations have an input scale."""
    key = _key(fmt.weight)
    words = _WEIGHTS.get(key) if key else None
    act_key = _key(fmt.activation) if fmt.activation is not None else None
    given = _ACTIVATIONS.get(act_key) if act_key else None
    if words is None or (fmt.activation is not None and (given is None or words.args["type"] != given["type"])):
        return None
    name = words.formats[0 if given else 1]
    if name is None or (given is _NVFP and (not static or words.args is not _NVFP)):
        return None  # its global scale of activations is always a static one
    pack = words.pack
    if words.args["type"] == "int" and name == "pack-quantized" and pack is None:
        pack = lambda t: _words32(t.view(torch.uint8) ^ 0x80)  # noqa: E731
    dynamic: bool | str = "local" if given is _NVFP else not static
    activations = None if given is None else {**given, "dynamic": dynamic}
    return Spelled({**words.args, "dynamic": False}, activations, name, pack)

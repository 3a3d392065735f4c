"""An fp8 key-value cache for transformers' generate, and the scales that checkpoints bring for it.

    cache = Fp8Cache.for_model(model)                          # or max_cache_len=4096: static, for torch.compile
    model.generate(**inputs, past_key_values=cache)

Keys and values are stored as code = e4m3(clamp(x / scale, +-448)) and read as code * scale, in the dtype that came in:
half the memory of bf16. B batch, H heads of keys, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache, cache_utils

from .checkpoints.kv import checked, kv_scales
from .formats.fp8 import E4M3

__all__ = ["Fp8Cache", "kv_scales"]
_SCALE_BYTES = 4  # of a scale in fp32, behind the codes that it belongs to
_UPDATES = [
    getattr(cache_utils, name).update
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
]


class Fp8Cache(Cache):
    """A transformers cache whose attention layers store e4m3; states of linear attention stay as they are.

    config: of the model. scales: {layer index: (scale of keys, scale of values)}, 1.0 where absent. max_cache_len:
    static tensors of that many positions, else they grow. dynamic: each head's key and value of each position gets a
    scale of its own, max |x| / 448, in 4 bytes beside its D codes; `scales` must then be empty.

    Everything that transformers' layers do, growing, sliding windows, beams, crop, reset, is done by themselves, on
    bytes: a layer's `keys` and `values` are uint8 (B, H, S, D), or D + 4 when dynamic. Raises ValueError for encoder-
    decoder models, layers that store in a way of their own, scales of layers that do not exist or have no keys.
    """

    def __init__(
        self, config: Any, scales: Mapping[int, tuple[float, float]] | None = None, *,
        max_cache_len: int | None = None, dynamic: bool = False,
    ) -> None:  # fmt: skip
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("Fp8Cache is for decoders: models with an encoder read their cache past its interface")
        if dynamic and scales:
            raise ValueError("dynamic scales replace the given ones: pass one or the other")
        plain = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
        kinds: list[Any] = [type(layer) for layer in plain.layers]
        given = {i: checked(f"layer {i}", pair) for i, pair in (scales or {}).items()}
        if wrong := [i for i in given if not 0 <= i < len(kinds) or not _has_keys(kinds[i])]:
            raise ValueError(f"KV scales for layers {wrong}: of {len(kinds)} layers, these have no keys and values")
        layers = [
            _fp8_layer(layer, None if dynamic else given.get(i, (1.0, 1.0))) if _has_keys(kinds[i]) else layer
            for i, layer in enumerate(plain.layers)
        ]
        super().__init__(layers=layers)

    @classmethod
    def for_model(cls, model: Any, *, max_cache_len: int | None = None, dynamic: bool = False) -> Fp8Cache:
        """A cache with the scales of the model's checkpoint (`kv_scales`), unless they are dynamic."""
        scales = {} if dynamic else {_layer_index(model, name): pair for name, pair in kv_scales(model).items()}
        return cls(model.config, scales, max_cache_len=max_cache_len, dynamic=dynamic)


def _layer_index(model: nn.Module, name: str) -> int:
    index = getattr(model.get_submodule(name), "layer_idx", None)
    if not isinstance(index, int):
        raise ValueError(f"{name} has KV scales but no layer_idx, which says what layer of the cache it writes to")
    return index


def _has_keys(kind: Any) -> bool:
    """Whether a layer stores keys and values as one of the four that are known here."""
    if not issubclass(kind, cache_utils.CacheLayerMixin):
        return False
    if kind.update not in _UPDATES:
        raise ValueError(f"{kind.__name__} stores keys and values in a way of its own: no fp8 cache for this model")
    return True


def _fp8_layer(layer: Any, scales: tuple[float, float] | None) -> Any:
    original: Any = type(layer)
    kind = _fp8_class(original)
    new = kind.__new__(kind)
    new.__dict__ |= {**layer.__dict__, "fp8_scales": scales}
    return new


@cache
def _fp8_class(kind: Any) -> Any:
    # _layer_type: with the base's, transformers would take this class for every model's layers of that type
    return type(f"Fp8{kind.__name__}", (_Fp8Layer, kind), {"_layer_type": None})


class _Fp8Layer:
    """Before a transformers layer in the order of bases: hands it codes, and hands out what they stand for."""

    fp8_scales: tuple[float, float] | None
    is_initialized: bool
    device: torch.device

    def lazy_initialization(self, *states: Tensor, **linear: Any) -> None:
        if linear:  # a layer that is also one of linear attention sets its states up
            return super().lazy_initialization(**linear)  # type: ignore[misc]
        extra = 0 if self.fp8_scales else _SCALE_BYTES
        room = (t.new_empty((*t.shape[:-1], t.shape[-1] + extra), dtype=torch.uint8) for t in states)
        super().lazy_initialization(*room)  # type: ignore[misc]
        # As tensors: by a number torch multiplies by its reciprocal on CUDA.
        given = self.fp8_scales or (None, None)
        self._fp8_scales = [None if s is None else torch.tensor(s, device=states[0].device) for s in given]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New (B, H, new S, D) -> all that attention reads, codes decoded: in prefill too, as if read back later."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        codes = (_encode(t, scale) for t, scale in zip(new, self._fp8_scales, strict=True))
        stored = super().update(*codes, *args, **kwargs)  # type: ignore[misc]
        k, v = (_decode(c, s, t.dtype) for c, s, t in zip(stored, self._fp8_scales, new, strict=True))
        return k, v


def _encode(x: Tensor, scale: Tensor | None) -> Tensor:
    """(B, H, S, D) -> bytes (B, H, S, D), or with the bytes of a scale for each (B, H, S) behind them."""
    xf = x.float()
    if scale is not None:
        return E4M3.encode(xf / scale).view(torch.uint8)
    own = _row_scale(xf)
    return torch.cat([E4M3.encode(xf / own).view(torch.uint8), own.view(torch.uint8)], -1)


def _row_scale(x: Tensor) -> Tensor:
    amax = x.abs().amax(-1, keepdim=True)
    scale = amax / amax.new_full((), E4M3.max)
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # (B, H, S, 1)


def _decode(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        scale = codes[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
        codes = codes[..., :-_SCALE_BYTES]
    return (E4M3.decode(codes.view(torch.float8_e4m3fn)) * scale).to(dtype)

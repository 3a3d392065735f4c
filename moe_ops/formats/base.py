"""Quantization as data: Element (one stored number), Codec (how a tensor is stored), Format (what `quantize_` takes).

Letters: N output channels, K contraction, BN and BK block sizes, S shards (gate and up are two), E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True)
class Element:
    """One stored number.

    `encode` maps finite fp32 values to codes (nearest, ties to even, saturating at `max`); `decode` maps codes to fp32.
    `storage` is the dtype of the codes in memory; None means that the tensor keeps its own floating dtype.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    storage: torch.dtype | None
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class QuantizedTensor:
    """Plain tensors: value = decode(qdata) * scale (* global_scale), each scale spread over its block of `codec`."""

    qdata: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    global_scale: Tensor | None
    codec: Codec


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How a tensor (..., N, K) is stored: elements in blocks of BN x BK that share one scale.

        scale = scale_rule(max |x| over the block, element);  code = encode(x / scale);  x ~ decode(code) * scale

    `block` = (BN, BK), 0 for a whole axis, None for no scale at all. The scale has shape (..., ceil(N/BN), ceil(K/BK)),
    extent 1 along a whole axis; one scale for the whole matrix has shape (...,). Blocks may be partial at the edges.
    """

    name: str
    element: Element
    block: tuple[int, int] | None = None
    scale_dtype: torch.dtype = torch.float32
    scale_rule: Callable[[Tensor, Element], Tensor] | None = None
    global_scale: bool = False

    def check(self, n: int, k: int) -> str | None:
        """Why an (n, k) matrix cannot be stored, or None. Packed codes and their groups fill whole bytes along K."""
        group = self.block[1] if self.block else 0
        if self.element.bits < 8 and k % max(group, 8):
            return f"{self.name} packs {self.element.bits}-bit codes in groups of {group}: {k} is not a multiple of it"
        return None

    def quantize(self, x: Tensor, scale: Tensor | None = None) -> QuantizedTensor:
        """x (..., N, K), any float dtype, computed in fp32. `scale` (the codec's scale shape) skips the max: static."""
        if self.block is None:
            return QuantizedTensor(x, None, None, None, self)
        xf = x.float()
        if scale is None:
            assert self.scale_rule is not None
            scale = self.scale_rule(self._amax(xf), self.element).to(self.scale_dtype)
        spread = self.spread(scale.float(), x.shape[-2], x.shape[-1])
        return QuantizedTensor(self.element.encode(xf / spread), scale, None, None, self)

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., N, K) in `dtype`: one fp32 product, one cast."""
        if self.block is None or q.scale is None:
            return q.qdata.to(dtype)
        values = self.element.decode(q.qdata)
        return (values * self.spread(q.scale.float(), values.shape[-2], values.shape[-1])).to(dtype)

    def spread(self, scale: Tensor, n: int, k: int) -> Tensor:
        """Scale of every element, as a tensor that broadcasts against (..., n, k)."""
        assert self.block is not None
        bn, bk = self.block
        if not bn and not bk:
            return scale[..., None, None]  # (..., 1, 1)
        wide = scale[..., :, None, :, None].expand(*scale.shape[:-1], max(bn, 1), scale.shape[-1], max(bk, 1))
        return wide.flatten(-4, -3).flatten(-2, -1)[..., :n, :k]  # extents of 1 stay: they broadcast

    def _amax(self, x: Tensor) -> Tensor:
        """Largest magnitude of each block, in the shape of the scale; NaN in a block gives NaN."""
        assert self.block is not None
        n, k = x.shape[-2:]
        bn, bk = self.block[0] or max(n, 1), self.block[1] or max(k, 1)
        if not n or not k:
            return x.new_zeros((*x.shape[:-2], *(() if self.block == (0, 0) else (-(-n // bn), -(-k // bk)))))
        x = pad(x.abs(), (0, -k % bk, 0, -n % bn))
        amax = x.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bn)).amax((-3, -1))  # (..., N/BN, K/BK)
        return amax[..., 0, 0] if self.block == (0, 0) else amax


@dataclass(frozen=True)
class Format:
    """A weight codec and, unless activations stay in float, one for them. `name` is `weight` or `weight/activation`."""

    name: str
    weight: Codec
    activation: Codec | None = None

    @property
    def quantized(self) -> bool:
        return self.weight.block is not None

    def check(self, n: int, k: int) -> str | None:
        """Why a weight (n, k), or an activation row of k, cannot take this format; None if it can."""
        return self.weight.check(n, k) or (self.activation.check(1, k) if self.activation else None)


class UnknownFormat(ValueError, KeyError):
    """The name is neither a registered format nor a pair of them."""

    def __str__(self) -> str:
        return str(self.args[0])


class Formats(Mapping[str, Format]):
    """Name -> Format. Pairs `weight/activation` are composed on look-up; iteration gives the listed names."""

    def __init__(self) -> None:
        self._listed: dict[str, Format] = {}
        self._activations: dict[str, Codec | None] = {}
        self._codecs: dict[str, Codec] = {}

    def register(self, fmt: Format, *, as_activation: Codec | None = None) -> None:
        """Add a format. `as_activation` is what its name means to the right of a slash (default: fmt.activation)."""
        if fmt.name in self._listed:
            raise ValueError(f"format {fmt.name!r} is registered already")
        codecs = [codec for codec in (fmt.weight, fmt.activation, as_activation) if codec is not None]
        for codec in codecs:
            if self._codecs.get(codec.name, codec) != codec:
                raise ValueError(f"another codec is registered as {codec.name!r}")
        self._codecs.update((codec.name, codec) for codec in codecs)
        self._listed[fmt.name] = fmt
        self._activations[fmt.name] = as_activation or fmt.activation

    def list_pair(self, name: str) -> None:
        """Let iteration give a pair too, so that every test over the formats covers it."""
        self._listed[name] = self[name]

    def codec(self, name: str) -> Codec:
        if name not in self._codecs:
            raise ValueError(f"unknown codec {name!r}; known: {', '.join(self._codecs)}")
        return self._codecs[name]

    def resolve(self, format: str | Format) -> Format:
        """A name or a registered Format -> the Format. Modules keep the name only, so it must lead back to the same."""
        if not isinstance(format, str | Format):
            raise ValueError(f"a format is a name or a Format, got {format!r}")
        found = self[format.name if isinstance(format, Format) else format]
        if isinstance(format, Format) and found != format:
            raise ValueError(f"another format is registered as {format.name!r}: give yours a name of its own")
        return found

    def __getitem__(self, name: str) -> Format:
        if name in self._listed:
            return self._listed[name]
        weight, slash, activation = name.partition("/") if isinstance(name, str) else ("", "", "")
        if not slash or weight not in self._listed or activation not in self._activations:
            known = ", ".join(self._listed)
            raise UnknownFormat(f"unknown format {name!r}; known: {known}, or any pair weight/activation of them")
        if not self._listed[weight].quantized and self._activations[activation] is not None:
            raise UnknownFormat(f"format {name!r}: weights that stay in float take no quantized activations")
        return Format(name, self._listed[weight].weight, self._activations[activation])

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


FORMATS = Formats()


def quantize_weight(codec: Codec, weight: Tensor, shards: int = 1) -> QuantizedTensor:
    """weight (E, S*N, K) -> codes and scales of S matrices per expert, quantized expert by expert (bounded memory).

    No block straddles a shard: scale (E, S) for one scale per matrix, else (E, S * ceil(N/BN), ceil(K/BK)).
    """
    if codec.block is None:
        return codec.quantize(weight)
    parts = [codec.quantize(w.unflatten(0, (shards, -1))) for w in weight]  # each (S, N, K)
    qdata = torch.stack([p.qdata.flatten(0, 1) for p in parts])
    scales = [p.scale for p in parts if p.scale is not None]
    scale = torch.stack([s if s.ndim == 1 else s.flatten(0, 1) for s in scales])
    return QuantizedTensor(qdata, scale, None, None, codec)


def dequantize_weight(q: QuantizedTensor, shards: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_weight`: (E, S*N, K) in `dtype`."""
    if q.scale is None:
        return q.qdata.to(dtype)
    scale = q.scale if q.scale.ndim == 2 else q.scale.unflatten(1, (shards, -1))  # (E, S) or (E, S, N/BN, K/BK)
    split = QuantizedTensor(q.qdata.unflatten(1, (shards, -1)), scale, None, None, q.codec)
    return q.codec.dequantize(split, dtype).flatten(1, 2)

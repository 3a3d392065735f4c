"""Quantization as data: Element (one stored number), Codec (how a tensor is stored), Format (what `quantize_` takes).

Letters: N output channels, K contraction, BN and BK block sizes, S shards (gate and up are two), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packing import pack, unpack


@dataclass(frozen=True, kw_only=True)
class Element:
    """One stored number.

    `encode` maps finite fp32 values to codes, one each (nearest, ties to even, saturating); `decode` maps codes to
    fp32. `max` is what the largest magnitude of a block is divided by. `storage` is the dtype of the codes in memory,
    packed if they have less than 8 bits; None means that the tensor keeps its own floating dtype.
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
    """Plain tensors: value = decode(qdata) * scale (* global_scale), each scale spread over its block of `codec`.

    qdata (..., N, K), or (..., N, K * bits / 8) bytes of packed codes; global_scale (...,), one for each matrix.
    """

    qdata: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    global_scale: Tensor | None
    codec: Codec

    def expert(self, e: int) -> QuantizedTensor:
        """One of a stack of experts (E, S*N, K), as a stack of one. Views."""
        parts = (self.scale, self.zero_point, self.global_scale)
        scale, zero_point, global_scale = (None if t is None else t[e : e + 1] for t in parts)
        return QuantizedTensor(self.qdata[e : e + 1], scale, zero_point, global_scale, self.codec)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How a tensor (..., N, K) is stored: elements in blocks of BN x BK that share one scale.

        scale = scale_rule(max |x| over the block, element);  code = encode(x / scale);  x ~ decode(code) * scale

    `block` = (BN, BK), 0 for a whole axis, None for no scale at all. The scale has shape (..., ceil(N/BN), ceil(K/BK)),
    extent 1 along a whole axis; one scale for the whole matrix has shape (...,). Blocks may be partial at the edges.
    With a `global_scale` g = max |x| / (element.max * max of scale_dtype), one fp32 number for each matrix, the scale
    that is stored is scale_rule(...) / g, and what codes are multiplied by is the product of both.
    """

    name: str
    element: Element
    block: tuple[int, int] | None = None
    scale_dtype: torch.dtype = torch.float32
    scale_rule: Callable[[Tensor, Element], Tensor] | None = None
    global_scale: bool = False

    @property
    def packed(self) -> bool:
        return self.element.bits < 8

    def refined(self, unit: int) -> Codec:
        """The codec whose blocks also end at every multiple of `unit`: it stores the same numbers, scales repeated."""
        whole, _, before = self.name.partition("@")
        unit = math.gcd(unit, int(before or 0))
        bn, bk = (math.gcd(extent, unit) if extent else 0 for extent in self.block or (0, 0))
        block = self.block and (bn, bk)
        return self if block == self.block else replace(self, name=f"{whole}@{unit}", block=block)

    def along_rows(self) -> Codec:
        """What stores columns whose contraction is rows: a scale for every group of them, or for all."""
        assert self.block is not None and not self.packed
        return replace(self, name=f"{self.name}|rows", block=(1, self.block[1]))

    def stored(self, k: int) -> int:
        """Extent of K as it is stored."""
        return k * self.element.bits // 8 if self.packed else k

    def columns(self, stored: int) -> int:
        """Inverse of `stored`."""
        return stored * 8 // self.element.bits if self.packed else stored

    def check(self, n: int, k: int) -> str | None:
        """Why an (n, k) matrix cannot be stored, or None. Packed codes and their groups fill whole bytes along K."""
        group = math.lcm(self.block[1] if self.block and self.block[1] else 1, 8)
        if self.packed and k % group:
            return f"{self.name} packs {self.element.bits}-bit codes in groups of {group}: {k} is not a multiple of it"
        return None

    def quantize(self, x: Tensor, scale: Tensor | None = None, global_scale: Tensor | None = None) -> QuantizedTensor:
        """x (..., N, K), any float dtype, computed in fp32. Scales that are given are used as they are: static."""
        if self.block is None:
            return QuantizedTensor(x, None, None, None, self)
        xf = x.float()
        if self.global_scale and global_scale is None:
            global_scale = self.global_of(xf)
        if scale is None:
            scale = self.scale_of(self._amax(xf), global_scale)
        spread = self.spread(scale.float(), x.shape[-2], x.shape[-1])
        if global_scale is not None:
            spread = spread * global_scale[..., None, None]
        # Zero where a group's scale rounded to it, and where a mode that flushes subnormals makes it of 2^-127.
        codes = self.element.encode(torch.where(spread == 0, 0.0, xf / spread))
        return QuantizedTensor(self._pack(codes), scale, None, global_scale, self)

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., N, K) in `dtype`: fp32 products, one cast."""
        if self.block is None or q.scale is None:
            return q.qdata.to(dtype)
        values = self.decode(q.qdata)
        values = values * self.spread(q.scale.float(), values.shape[-2], values.shape[-1])
        return (values if q.global_scale is None else values * q.global_scale[..., None, None]).to(dtype)

    def decode(self, qdata: Tensor) -> Tensor:
        """Codes as they are stored -> their values (..., K) in fp32, without any scale."""
        return self.element.decode(unpack(qdata, self.element.bits) if self.packed else qdata)

    def _pack(self, codes: Tensor) -> Tensor:
        return pack(codes, self.element.bits) if self.packed else codes

    def global_of(self, x: Tensor) -> Tensor:
        """amax / (element.max * the largest scale) of each matrix; 1 for zeros."""
        amax = x.abs().amax((-2, -1)) if x.shape[-2] and x.shape[-1] else x.new_zeros(x.shape[:-2])
        g = amax / amax.new_full((), self.element.max * torch.finfo(self.scale_dtype).max)
        return torch.where(g == 0, torch.ones_like(g), g)

    def scale_of(self, amax: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """Scales of blocks with these largest magnitudes (..., N/BN, K/BK), in their shape."""
        assert self.scale_rule is not None
        scale = self.scale_rule(amax, self.element)
        if global_scale is not None:  # the cast rounds to the nearest; the clamp keeps what it does beyond the largest
            scale = (scale / global_scale[..., None, None]).clamp(max=torch.finfo(self.scale_dtype).max)
        return scale.to(self.scale_dtype)

    def spread(self, scale: Tensor, n: int, k: int) -> Tensor:
        """Scale of every element, as a tensor that broadcasts against (..., n, k)."""
        assert self.block is not None
        bn, bk = self.block
        if not bn and not bk:
            return scale[..., None, None]  # (..., 1, 1)
        if self.block == (1, 0):
            return scale
        wide = scale[..., :, None, :, None].expand(*scale.shape[:-1], max(bn, 1), scale.shape[-1], max(bk, 1))
        return wide.flatten(-4, -3).flatten(-2, -1)[..., :n, :k]  # extents of 1 stay: they broadcast

    def _amax(self, x: Tensor) -> Tensor:
        """Largest magnitude of each block, in the shape of the scale; NaN in a block gives NaN."""
        assert self.block is not None
        n, k = x.shape[-2:]
        bn, bk = self.block[0] or max(n, 1), self.block[1] or max(k, 1)
        if not n or not k:
            return x.new_zeros((*x.shape[:-2], *(() if self.block == (0, 0) else (-(-n // bn), -(-k // bk)))))
        if self.block[0] == 1:  # the same in fewer steps, which are what few rows take their time for
            x = x.abs() if not k % bk else pad(x.abs(), (0, -k % bk))
            return x.unflatten(-1, (-1, bk)).amax(-1)
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

    def refined(self, unit: int) -> Format:
        """The same with `weight.refined(unit)`, under a name that `FORMATS` composes."""
        weight, (whole, slash, activation) = self.weight.refined(unit), self.name.partition("/")
        name = f"{whole.partition('@')[0]}@{weight.name.partition('@')[2]}{slash}{activation}"
        return self if weight is self.weight else Format(name, weight, self.activation)

    def check(self, n: int, k: int) -> str | None:
        """Why a weight (n, k), or an activation row of k, cannot take this format; None if it can."""
        return self.weight.check(n, k) or (self.activation.check(1, k) if self.activation else None)


class UnknownFormat(ValueError, KeyError):
    """The name is neither a registered format nor a pair of them."""

    def __str__(self) -> str:
        return str(self.args[0])


class Formats(Mapping[str, Format]):
    """Name -> Format. Pairs `weight/activation` are composed on look-up; iteration gives the listed names.

    So is `weight@unit`, whose blocks also end at multiples of `unit`: what a slice of a block needs (sharding.py).
    """

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
        if as_activation or fmt.activation or not fmt.quantized:
            self._activations[fmt.name] = as_activation or fmt.activation

    def list_pair(self, name: str) -> None:
        """Let iteration give a pair too, so that every test over the formats covers it."""
        self._listed[name] = self[name]

    def codec(self, name: str) -> Codec:
        if name not in self._codecs:
            raise ValueError(f"unknown codec {name!r}; known: {', '.join(self._codecs)}")
        return self._codecs[name]

    def codecs(self) -> list[Codec]:
        """Every codec of a registered format, and of what its name means as an activation."""
        return list(self._codecs.values())

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
        whole, at, unit = weight.partition("@")
        if at and whole in self._listed and unit.isdecimal() and int(unit):
            return self[f"{whole}{slash}{activation}"].refined(int(unit))
        if not slash or weight not in self._listed or activation not in self._activations:
            if weight in self._listed and activation in self._listed and "/" not in activation:
                raise UnknownFormat(f"format {name!r}: {activation} is for weights only, it takes no activations")
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

    No block straddles a shard: scale (E, S) for one scale per matrix, else (E, S * ceil(N/BN), ceil(K/BK));
    global_scale (E, S).
    """
    if codec.block is None:
        return codec.quantize(weight)
    parts = [codec.quantize(w.unflatten(0, (shards, -1))) for w in weight]  # each (S, N, K)
    qdata = _stacked([p.qdata.flatten(0, 1) for p in parts])
    scale = _stacked([p.scale if p.scale.ndim == 1 else p.scale.flatten(0, 1) for p in parts if p.scale is not None])
    global_scales = [p.global_scale for p in parts if p.global_scale is not None]
    return QuantizedTensor(qdata, scale, None, _stacked(global_scales) if global_scales else None, codec)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """torch.stack, for types that autocast does not know too."""
    out = tensors[0].new_empty(len(tensors), *tensors[0].shape)
    for to, t in zip(out, tensors, strict=True):
        to.copy_(t)
    return out


def empty_weight(
    codec: Codec, num_experts: int, n: int, k: int, shards: int = 1, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Uninitialised storage of what `quantize_weight` gives for a weight (E, S*N, K) of `dtype`; n = N, one shard's."""
    one = quantize_weight(codec, torch.empty(1, shards * n, k, dtype=dtype, device="meta"), shards)

    def empty(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.empty(num_experts, *t.shape[1:], dtype=t.dtype, device=device)

    qdata = empty(one.qdata)
    assert qdata is not None
    return QuantizedTensor(qdata, empty(one.scale), empty(one.zero_point), empty(one.global_scale), codec)


def write_matrix(q: QuantizedTensor, expert: int, shard: int, matrix: QuantizedTensor, shards: int = 1) -> None:
    """Store one quantized matrix (N, K) in place: its codes and scales, where `quantize_weight` would have put them."""
    for part in ("qdata", "scale", "zero_point", "global_scale"):
        whole, mine = getattr(q, part), getattr(matrix, part)
        if whole is not None:
            to = whole[expert].unflatten(0, (shards, -1))[shard]
            to.copy_(mine.view(to.shape))


def dequantize_weight(q: QuantizedTensor, shards: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_weight`: (E, S*N, K) in `dtype`."""
    if q.scale is None:
        return q.qdata.to(dtype)
    scale = q.scale if q.scale.ndim == 2 else q.scale.unflatten(1, (shards, -1))  # (E, S) or (E, S, N/BN, K/BK)
    split = QuantizedTensor(q.qdata.unflatten(1, (shards, -1)), scale, None, q.global_scale, q.codec)
    return q.codec.dequantize(split, dtype).flatten(1, 2)

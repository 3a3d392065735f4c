"""Tensors as they are on disk -> their place in a weight in memory, exactly, or a ValueError that names the tensor.

E experts, S shards (gate and up), N rows of one shard, K contraction. A Linear is one expert with one shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import deinterleave
from ..formats import Codec
from .names import Source
from .reader import CODES, Scheme

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def put(whole: Tensor, value: Tensor, source: Source, shards: int, interleaved: bool, matrix: bool) -> None:
    """Copy one tensor into `whole`: (E, S*N, K) for codes and scales of blocks (`matrix`), (E, S) for single numbers.

    interleaved: where a tensor holds gate and up, their rows alternate. All or one expert, all or one shard.
    """
    place = whole if source.expert is None else whole[source.expert]
    if not matrix:
        if source.shard is not None:
            place = place[..., source.shard]
        elif value.numel() == 1:  # one number for several matrices
            value = value.reshape(()).expand(place.shape)
        elif value.numel() * shards == place.numel():  # one for a matrix that is two here
            value = value.reshape(*place.shape[:-1], 1).expand(place.shape)
    elif source.shard is not None:
        place = place.unflatten(-2, (shards, -1)).select(-3, source.shard)
    elif shards > 1 and interleaved:
        value = deinterleave(fitted(value, place, source).transpose(-1, -2)).transpose(-1, -2)
    place.copy_(fitted(value, place, source))


def fitted(value: Tensor, place: Tensor, source: Source) -> Tensor:
    """The value in the shape of its place. Extents of 1 may be there or not; nothing else may differ."""
    if [n for n in value.shape if n != 1] != [n for n in place.shape if n != 1]:
        raise ValueError(f"{source.key} is {tuple(value.shape)}, {source.place} takes {tuple(place.shape)}")
    return value.reshape(place.shape)


def as_stored(value: Tensor, want: torch.dtype, source: Source, scheme: Scheme, codec: Codec) -> Tensor:
    """The value in the type that it is stored in here. Bytes are viewed, numbers cast where that keeps them."""
    given = value.dtype
    if given == want:
        return value
    if source.part == CODES:
        if given == torch.uint8 and want.itemsize == 1 and not codec.packed and want != torch.int8:
            return value.view(want)
    elif want == torch.float8_e8m0fnu and given == torch.uint8:
        return value.view(want)
    elif want == torch.float32 and (given in FLOATS or given == torch.float8_e8m0fnu):
        return value.float()
    elif want == torch.float32 and given == torch.uint8 and scheme.exponents:
        return value.view(torch.float8_e8m0fnu).float()
    elif want in FLOATS and given in FLOATS:
        cast = value.to(want)
        if cast.is_meta or torch.equal(cast.to(torch.float64), value.to(torch.float64)):
            return cast
        raise ValueError(f"{source.key} is {given}, and its values are not numbers of {want} ({scheme.format})")
    raise ValueError(f"{source.key} is {given}, {source.place} of format {scheme.format!r} takes {want}")


def check_values(value: Tensor, source: Source) -> None:
    """Scales that are numbers have to be finite; those of activations and of whole matrices above zero."""
    if value.is_meta or value.dtype not in FLOATS:
        return
    single = source.part.endswith(("global_scale", "input_scale"))
    if not bool(torch.isfinite(value).all()) or (single and not bool((value > 0).all())):
        raise ValueError(f"{source.key} holds numbers that cannot be a {source.part}: not finite, or not above 0")


def check_float(value: Tensor, whole: Tensor, source: Source) -> None:
    """Codes must not be cast to numbers."""
    if value.dtype not in FLOATS and value.dtype != whole.dtype:
        raise ValueError(f"{source.key} is {value.dtype}: codes, of a layer that the config leaves in float")


def put_float(whole: Tensor, value: Tensor, source: Source, *, rows: int, interleaved: bool, shards: int) -> None:
    """Copy one float tensor into a parameter whose own layout is not canonical.

    rows: the dimension of an expert's rows in `whole`, from the end (-1 if it is stored transposed, or is a bias).
    interleaved: rows of gate and up alternate in `whole`. A matrix of a single expert's Linear (`source.unfused`) is
    (N, K) whatever the layout in memory; others come in that layout.
    """
    check_float(value, whole, source)
    place = whole if source.expert is None else whole[source.expert]
    if source.shard is not None and interleaved:
        place = place.unflatten(rows, (-1, shards)).select(rows, source.shard)
    elif source.shard is not None:
        place = place.unflatten(rows, (shards, -1)).select(rows - 1, source.shard)
    if source.unfused and rows == -1 and place.ndim == 2:
        place = place.transpose(-1, -2)
    place.copy_(fitted(value, place, source))

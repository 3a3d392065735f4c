"""Fills modules with tensors of a checkpoint, one tensor at a time; on meta it checks the same, and reads nothing.

E experts, S shards (gate and up), N rows of one shard, K contraction. A Linear's weight is one expert with one shard.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..activation import deinterleave
from ..adapters import CannotAdapt, ExpertsSpec, read
from ..experts import QuantizedExperts
from ..formats import FORMATS, QuantizedTensor, dequantize_weight, empty_weight
from ..storage import QuantizedModule
from .names import Source, merge
from .place import as_stored, check_float, check_values, fitted, put, put_float
from .reader import CODES, GLOBAL_SCALE, INPUT_SCALE, SCALE, Reader, Scheme


@dataclass
class Filler:
    """get: a key -> the tensor. device: where parameters are made that are on meta; others are written in place."""

    reader: Reader
    get: Callable[[str], Tensor]
    device: torch.device

    def fill(self, model: nn.Module, parameter: str, tensors: list[Source], scheme: Scheme | None) -> Tensor | None:
        """Fill one parameter, or persistent buffer, of a model.

        Returns what takes the place of a float parameter that was on meta; quantized weights and what is stored beside
        them are replaced here. Raises ValueError, with the tensor's name, for what does not fit.
        """
        module, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(module)
        if scheme is None:
            return self._float(model, owner, leaf, tensors)
        if not isinstance(owner, QuantizedModule):
            return self._dequantized(owner, leaf, tensors, scheme)
        old = owner._get(leaf)
        scale, whole = (None if t is None else self._room(t) for t in (old.scale, old.global_scale))
        new = replace(old, qdata=self._room(old.qdata), scale=scale, global_scale=whole)
        if isinstance(owner, QuantizedExperts):
            spec = owner.spec
            shards = spec.shards if leaf == spec.up else 1
            turned = self.reader.transposes and spec.transposed
            input_scale = self._quantized(new, tensors, scheme, shards, spec.interleaved, turned)
        else:
            input_scale = self._quantized(_one_expert(new), [replace(s, expert=0) for s in tensors], scheme, 1, False)
            input_scale = None if input_scale is None else input_scale[0]
        self._store(owner, leaf, new, input_scale)
        return None

    def _quantized(
        self, q: QuantizedTensor, tensors: list[Source], scheme: Scheme, shards: int, interleaved: bool,
        turned: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Every tensor to its place in `q`, of E experts; returns static scales of their activations (E,).

        turned: stacks of all experts are (E, K, N) on disk.
        """
        whole = {CODES: q.qdata, SCALE: q.scale, GLOBAL_SCALE: q.global_scale}
        _check_complete(tensors, {part for part, t in whole.items() if t is not None}, scheme)
        block = q.codec.block or (0, 0)
        inputs = torch.zeros(q.qdata.shape[0], device=self.device) if scheme.static else None
        for s in tensors:
            if s.conversion is not None:
                raise ValueError(f"{s.key}: {s.parameter} is converted while it is loaded, which codes cannot be")
            value = self.reader.convert(s.key, self.get(s.key), q.codec).to(self.device)
            to = inputs if s.part == INPUT_SCALE else whole[s.part]
            assert to is not None
            value = as_stored(value, to.dtype, s, scheme, q.codec)
            check_values(value, s)
            matrix = s.part == CODES or (s.part == SCALE and block != (0, 0))
            if s.part == INPUT_SCALE:
                _largest(to, value, s)
                continue
            if turned and matrix and s.expert is None and value.ndim == 3:
                value = value.transpose(-1, -2)
            if interleaved and shards > 1 and s.shard is None and matrix and s.part == SCALE and block[0] != 1:
                raise ValueError(f"{s.key}: rows of gate and up alternate within the blocks of {scheme.format}")
            put(to, value, s, shards, interleaved, matrix)
        return None if inputs is None else _calibrated(inputs, tensors[0].parameter)

    def _dequantized(self, owner: nn.Module, leaf: str, tensors: list[Source], scheme: Scheme) -> Tensor:
        """A matrix that stays in float here (a head, a router, an odd shape) although the checkpoint has codes."""
        p = owner._parameters[leaf]
        assert p is not None
        if not isinstance(owner, nn.Linear):
            raise ValueError(f"{tensors[0].key}: {type(owner).__name__} cannot hold {scheme.format}")
        q = empty_weight(FORMATS[scheme.format].weight, 1, *p.shape, device=self.device)
        self._quantized(q, [replace(s, expert=0) for s in tensors], scheme, 1, False)
        value = self._room(p.detach())
        value.copy_(dequantize_weight(q, 1, value.dtype)[0])
        return value

    def _float(self, model: nn.Module, owner: nn.Module, leaf: str, tensors: list[Source]) -> Tensor:
        old = getattr(owner, leaf)
        value = self._room(old.detach())
        if tensors[0].conversion is not None:
            merged = merge(model, tensors, self.get)
            check_float(merged, value, tensors[0])
            value.copy_(fitted(merged, value, tensors[0]))
            return value
        quantized = owner.spec if isinstance(owner, QuantizedExperts) else None  # what is float in them are biases
        spec = _spec(owner) if quantized is None and value.ndim > 1 else None
        rows = -1 if value.ndim < 3 or (spec is not None and spec.transposed) else -2
        for s in tensors:
            t = self.get(s.key).to(self.device)
            if quantized is not None and quantized.interleaved and s.shard is None and leaf == f"{quantized.up}_bias":
                t = deinterleave(t)
            put_float(value, t, s, rows=rows, interleaved=spec is not None and spec.interleaved, shards=2)
        return value

    def _room(self, t: Tensor) -> Tensor:
        """What to write into: the tensor itself, unless it is on meta, or nothing is to be written."""
        return torch.empty_like(t, device=self.device) if t.is_meta or self.device.type == "meta" else t

    def _store(self, owner: QuantizedModule, leaf: str, q: QuantizedTensor, input_scale: Tensor | None) -> None:
        for name, t in ((leaf, q.qdata), (f"{leaf}_scale", q.scale), (f"{leaf}_global_scale", q.global_scale)):
            old = owner._parameters.get(name)
            if t is not None and (old is None or old.is_meta):
                owner._parameters[name] = nn.Parameter(t, requires_grad=False)
        old = owner._parameters.get(f"{leaf}_input_scale")
        if input_scale is not None and old is not None and not old.is_meta:
            old.detach().copy_(input_scale)
        else:
            new = None if input_scale is None else nn.Parameter(input_scale.clone(), requires_grad=False)
            owner._parameters[f"{leaf}_input_scale"] = new
        owner._mark()


def _one_expert(q: QuantizedTensor) -> QuantizedTensor:
    """Views of a Linear's weight as (1, N, K), with single numbers as (1, 1)."""
    scale, whole = (None if t is None else t.reshape(1, 1) if t.ndim == 0 else t[None]
                    for t in (q.scale, q.global_scale))  # fmt: skip
    return replace(q, qdata=q.qdata[None], scale=scale, global_scale=whole)


def _check_complete(tensors: list[Source], needed: set[str], scheme: Scheme) -> None:
    """Each matrix has all its parts, and no part that its format does not have."""
    places: dict[str, set] = {}
    for s in tensors:
        if s.part not in needed and not (s.part == INPUT_SCALE and scheme.static):
            raise ValueError(f"{s.key}: {s.parameter} of format {scheme.format!r} has no {s.part}")
        places.setdefault(s.part, set()).add((s.expert, s.shard))
    for part in sorted(needed):
        lost = places[CODES] - places.get(part, set())
        if lost:
            s = next(s for s in tensors if s.part == CODES and (s.expert, s.shard) in lost)
            raise ValueError(f"no tensor in the checkpoint for {s.place} {part}, beside {s.key}")
    if scheme.static and INPUT_SCALE not in places:
        raise ValueError(f"no tensor in the checkpoint for {tensors[0].parameter} input_scale ({scheme.format})")


def _largest(inputs: Tensor, value: Tensor, s: Source) -> None:
    """inputs (E,), at least `value`: one number, or for a stack of experts one for each of them or of their shards."""
    place = inputs if s.expert is None else inputs[s.expert]
    if value.numel() > 1:
        if s.expert is not None or value.numel() % len(inputs) or value.shape[0] != len(inputs):
            raise ValueError(f"{s.key} is {tuple(value.shape)}, {s.place} takes one number for an expert")
        value = value.reshape(len(inputs), -1).amax(1)
    else:
        value = value.reshape(())
    place.copy_(torch.maximum(place, value))


def _calibrated(inputs: Tensor, parameter: str) -> Tensor:
    """Experts that no calibration reached get the largest of the other scales."""
    if not inputs.is_meta and bool((inputs == 0).any()):
        lost = (inputs == 0).nonzero().flatten().tolist()
        warnings.warn(f"{parameter}: experts {lost} have no input_scale, they get the largest of the others'",
                      stacklevel=2)  # fmt: skip
        inputs = torch.where(inputs == 0, inputs.amax(), inputs)
    return inputs


def _spec(owner: nn.Module) -> ExpertsSpec | None:
    try:
        return read(owner)
    except CannotAdapt:
        return None

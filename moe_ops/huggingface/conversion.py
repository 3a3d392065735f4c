"""Steps of transformers' loader that quantize what they are given, one expert at a time.

E experts, S shards (gate and up), N rows and K columns of one matrix.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from ..streaming import Stream


class QuantizeTensor(ConversionOps):
    """A tensor that is stored as the model holds it: a Linear's weight, or all experts in one."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> QuantizeTensor:
        return self

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, missing_keys: Any = None, **kwargs: Any) -> dict:
        left = {}
        for key, found in input_dict.items():
            target = self.quantizer.target(key)
            if target is None:
                left[key] = found
                continue
            stream, weight = target
            try:  # the loader would log what is raised here, and end with an error that does not say what it was
                if not self.quantizer.problems:
                    stream.take_whole(weight, found[0] if isinstance(found, list) else found)
            except ValueError as e:
                self.quantizer.problems.append(str(e))
            if missing_keys is not None:
                missing_keys.discard(key)
        return left


class StreamingConverter(WeightConverter):
    """A converter that reads, converts and quantizes expert after expert where its target is a quantized weight.

    The converters that merge experts stack a whole layer in float first. Their steps act on each expert by itself, so
    that they are run on lists of one.
    """

    __slots__ = ()

    @torch.no_grad()
    def convert(self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None,
                loading_info: Any = None) -> dict:  # fmt: skip
        target = None if hf_quantizer is None else hf_quantizer.target(layer_name)
        missing = set() if loading_info is None else loading_info.missing_keys
        context = {"model": model, "config": config, "missing_keys": missing, "full_layer_name": layer_name}
        counts = {pattern: len(found) for pattern, found in self.collected_tensors.items()}
        if target is None or len(self.target_patterns) > 1:
            return self._convert_whole(context, hf_quantizer, loading_info)
        stream, weight = target
        experts, stored = stream.experts(weight), stream.experts_stored(weight)
        absent = [p for p in self.source_patterns if p not in counts]
        if experts is not None and not absent and set(counts.values()) == {stored} and stored != 1:
            for e in filter(stream.wants, range(experts)):
                self._take(stream, weight, e, {p: self.collected_tensors[p][e] for p in counts}, context)
        elif not absent and set(counts.values()) == {1}:
            self._take_stacked(stream, weight, context)
        else:
            raise ValueError(self._incomplete(stream.label(weight), stored, counts, absent))
        self.collected_tensors.clear()
        missing.discard(layer_name)
        return {}

    def _convert_whole(self, context: dict, quantizer: Any, loading_info: Any) -> dict:
        """As transformers does it, whole layers at a time, for steps with several targets; then quantize."""
        done = super().convert(context["full_layer_name"], context["model"], context["config"], None, loading_info)
        if quantizer is None:
            return done
        return QuantizeTensor(quantizer).convert(done, missing_keys=context["missing_keys"])

    def _take(self, stream: Stream, weight: str, e: int, found: dict[str, Any], context: dict) -> None:
        if self._one_matrix_each(stream, weight):
            for s, pattern in enumerate(self.source_patterns):
                matrix = _read(found.pop(pattern))
                _check_matrix(stream, weight, e, matrix)
                stream.write(weight, e, s, matrix)
            return
        stream.take(weight, e, self._run({p: [_read(t)] for p, t in found.items()}, context)[0])

    def _take_stacked(self, stream: Stream, weight: str, context: dict) -> None:
        """One stored tensor for each source: all experts of it, whose steps are run on one after the other."""
        whole = {p: _read(found.pop()) for p, found in self.collected_tensors.items()}
        experts, stored = stream.experts(weight), stream.experts_stored(weight)
        if experts is None or any(t.ndim < 3 or t.shape[0] != stored for t in whole.values()):
            stream.take_whole(weight, self._run({p: [t] for p, t in whole.items()}, context))
            return
        for e in filter(stream.wants, range(experts)):
            parts = {p: [t[e : e + 1]] for p, t in whole.items()}
            shape = stream.float_shape(weight)[1:]
            as_stored = next(iter(parts.values()))[0][0]
            # A step that transposes only what does not fit the parameter compares all of it: do as it would.
            if any(getattr(op, "check_dims", False) for op in self.operations) and as_stored.shape == shape:
                stream.take(weight, e, as_stored)
            else:
                stream.take(weight, e, self._run(parts, context)[0])

    def _run(self, found: dict[str, Any], context: dict) -> Tensor:
        for op in self.operations:
            patterns = {"source_patterns": self.source_patterns, "target_patterns": self.target_patterns}
            found = op.convert(found, **patterns, **context)
        (result,) = found.values()
        return result[0] if isinstance(result, list) else result

    def _one_matrix_each(self, stream: Stream, weight: str) -> bool:
        """Each source is one shard's matrix, and the steps do no more than to stack them."""
        first, *rest = self.operations
        shards = stream.module.layouts()[weight].shards
        joined = not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)
        stacks = isinstance(first, MergeModulelist) and first.dim == 0 and joined
        return stacks and stream.module.as_stored(weight) and len(self.source_patterns) == shards

    def _incomplete(self, label: str, stored: int | None, counts: dict[str, int], absent: list[str]) -> str:
        got = ", ".join(f"{n} of {p}" for p, n in counts.items())
        lost = f" and none of {', '.join(absent)}" if absent else ""
        return f"{label}: the checkpoint has {got}{lost}, the model has {stored} experts"


def streaming(conversions: list) -> list:
    """The same conversions, with those that compute replaced."""
    for found in conversions:
        if type(found) is WeightConverter:  # its layout is the same; a subclass may convert in its own way
            found.__class__ = StreamingConverter
    return conversions


def _check_matrix(stream: Stream, weight: str, e: int, matrix: Tensor) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"{stream.label(weight, e)}: a matrix for each expert is expected, got {tuple(matrix.shape)}")


def _read(found: Any) -> Tensor:
    """What the loader has put in line: a call that reads, or a future of one."""
    if isinstance(found, Future):
        return found.result()
    return found() if callable(found) and not isinstance(found, Tensor) else found

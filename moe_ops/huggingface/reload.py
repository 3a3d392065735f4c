"""Loads a checkpoint into a model that is quantized already, into the storage that it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.kv import ATTRIBUTE
from ..experts import QuantizedExperts
from ..storage import QuantizedModule
from ..streaming import Stream, streams
from . import disk, sources, too_old
from .config import MoeOpsConfig


class _Streams:
    """What converters ask: which parameters are quantized, and by what."""

    def __init__(self, model: nn.Module) -> None:
        self.problems: list[str] = []
        self.each = [Stream(m, name) for name, m in streams(model)]
        self._by_name = {s.label(weight): (s, weight) for s in self.each for weight in s.module.weight_names()}

    def target(self, name: str) -> tuple[Stream, str] | None:
        return self._by_name.get(name)

    def experts_of(self) -> dict[str, int | None]:
        return {name: s.experts_stored(weight) for name, (s, weight) in self._by_name.items()}


@torch.no_grad()
def reload_(model: Any, path: str | Path) -> Any:
    """Load the weights of a checkpoint folder into a quantized transformers model, in place; returns the model.

    Float weights are quantized to the format of each module as they are read, as from_pretrained does; a checkpoint
    that was saved quantized is copied. Every tensor keeps its storage, so that CUDA graphs that read it stay valid.
    Raises ValueError, before anything is changed, for a folder without safetensors files, weights that are not there,
    shapes, types and formats that do not fit; and while it reads, for weights that are not finite: the model then holds
    both old and new weights, load again.
    """
    if reason := too_old():
        raise ValueError(reason)
    if not any(True for _ in streams(model)):
        raise ValueError("the model is not quantized: load_state_dict loads in place")
    if meta := [name for name, t in model.state_dict().items() if t.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device or offloaded: there is no storage to load into")
    stored = sources.headers(_files(Path(path)))
    said = _said(Path(path))
    if said is None:
        _load_floats(model, stored)
    else:
        _load_codes(model, stored, said)
    return model


def _files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists():
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not single.exists():
        raise ValueError(f"{path} has neither model.safetensors nor its index")
    return [single]


def _said(path: Path) -> MoeOpsConfig | None:
    """The quantization that config.json tells of."""
    file = path / "config.json"
    said = json.loads(file.read_text()).get("quantization_config") if file.exists() else None
    if said is not None and said.get("quant_method") != MoeOpsConfig.METHOD:
        method = said.get("quant_method")
        raise ValueError(f"{path} is quantized by {method!r}: float checkpoints are loaded, and our own")
    return None if said is None else MoeOpsConfig(**said)


def _load_floats(model: Any, stored: Mapping[str, sources.Stored]) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    from .conversion import streaming

    into = _Streams(model)
    experts_of, state = into.experts_of(), model.state_dict()
    found = sources.trace(model, stored, streaming(get_model_conversion_mapping(model)))
    files = sources.Files(stored)
    codes = {f"{name}.{key}" for name, m in streams(model) for key in m._parameters if disk.is_code(m, key)}
    needed = [key for key in state if key not in codes and key not in model.all_tied_weights_keys]
    problems = sources.check_floats(found, stored, experts_of, needed)
    for name, (converter, keys) in found.items():
        (first, *_), *_ = keys.values()
        if converter is None and name not in codes and stored[first].shape != tuple(state[name].shape):
            problems.append(f"{first} must be {tuple(state[name].shape)}, got {stored[first].shape}")
    _raise(problems)
    done: set[int] = set()
    for name, source in found.items():
        if id(source.keys) not in done and (name in experts_of or name not in codes):
            done.add(id(source.keys))
            for target, tensor in _convert(model, name, source, files, into, state[name].device).items():
                _copy(model, state, target, tensor)
    _raise(into.problems)
    for stream in into.each:
        stream.finish()


def _convert(
    model: Any, name: str, source: sources.Sources, files: sources.Files, into: _Streams, device: Any
) -> dict[str, Any]:
    """Quantizes what is to be quantized, and returns the rest."""
    from .conversion import QuantizeTensor

    if source.converter is None:
        ((key, *_),) = source.keys.values()
        return QuantizeTensor(into).convert({name: files.read(key, device)})
    converter = deepcopy(source.converter)
    for pattern, keys in source.keys.items():
        converter.collected_tensors[pattern] = [partial(files.read, key, device) for key in keys]
    return converter.convert(name, model=model, config=model.config, hf_quantizer=into)


def _copy(model: nn.Module, state: Mapping[str, Tensor], name: str, found: Any) -> None:
    found = found[0] if isinstance(found, list) else found
    module, _, key = name.rpartition(".")
    owner = model.get_submodule(module)
    if isinstance(owner, QuantizedExperts):  # a bias, in the order of the float model
        found = owner.spec.canonical_bias(key.removesuffix("_bias"), found)
    if state[name].shape != found.shape:
        raise ValueError(f"{name} must be {tuple(state[name].shape)}, got {tuple(found.shape)}")
    state[name].copy_(found)


def _load_codes(model: Any, stored: Mapping[str, sources.Stored], said: MoeOpsConfig) -> None:
    mine: dict[str, QuantizedModule] = dict(streams(model))
    problems = [
        f"{name} is {m.format} in the model and {said.modules.get(name, 'not quantized')} in the checkpoint"
        for name, m in mine.items()
        if said.modules.get(name) != m.format
    ]
    problems += [f"{name} is quantized in the checkpoint only" for name in said.modules if name not in mine]
    _raise(problems)
    state, found = disk.state(model), sources.trace(model, stored, [])
    tied = model.all_tied_weights_keys
    want = {key: (t.dtype, t.shape) for key, t in state.items() if key not in tied or key in found}
    codes = [f"{name}.{key}" for name, m in mine.items() for key in m._parameters if disk.is_code(m, key)]
    _raise(sources.check_codes(found, stored, want, codes, want))
    files = sources.Files(stored)
    for name in want:
        ((key, *_),) = found[name].keys.values()
        state[name].copy_(files.read(key, state[name].device))
    setattr(model, ATTRIBUTE, {name: tuple(pair) for name, pair in said.kv_scales.items()})


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(["this checkpoint cannot be loaded into this model:", *problems[:10]]))

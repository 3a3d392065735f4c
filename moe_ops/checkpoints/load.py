"""`load_quantized`: any producer's checkpoint into a model, quantized as it is stored.

First everything is checked on meta (names, the producer's rules, types and shapes from the files' headers), then
tensors are read one at a time. What is held beside the quantized model is one tensor of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import QuantizedModule
from ..summary import _LEFT, remember_left
from ..targets import check_not_compiled
from . import find_reader
from .files import Checkpoint
from .fill import Filler
from .kv import ATTRIBUTE, kv_keys, read_kv_scales
from .names import Names, sources
from .reader import Reader, settings
from .schemes import ALWAYS_FLOAT, Layout, layout, meta_twin

_META = torch.device("meta")
_OWN = "moe_ops"  # what save_pretrained of a quantized model writes: transformers' loader reads it


@torch.no_grad()
def load_quantized(
    path: str | Path, *, model: nn.Module | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """The model of a checkpoint of OpenAI, Quark, HF fine-grained fp8, compressed-tensors or ModelOpt, in eval mode.

    Codes and scales are those of the file: nothing is quantized again, and `.dequantize()` gives what the producer's
    own tool gives. Layers that the producer left in float stay so. A Linear that is always left in float here (an
    output head, say) is dequantized.

    path: a folder with config.json and model.safetensors, or shards and their index. model: what to load into; it may
    be on meta, float or already quantized to the same formats (then its storage is kept); without one it is built
    from config.json. device: of parameters that are made here (default: the model's own, else the CPU).

    Raises ValueError, with the tensor's name, for files that are truncated or corrupt, tensors and experts that are
    missing or that nothing takes, wrong shapes and types, a scheme that is not known, a float checkpoint. All of these
    but unreadable bytes are found before `model` is changed; a model that could not be filled is left on meta.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.json("config.json")
    if config is None:
        raise ValueError(f"{checkpoint.path} has no config.json")
    if (settings(config) or {}).get("quant_method") == _OWN:
        return _saved_here(checkpoint, model, device)
    reader = find_reader(config, checkpoint.json)
    if model is not None:
        check_not_compiled(model)
        device = device or next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    place = torch.device(device or "cpu")
    if model is None:
        model = twin = _build(checkpoint)
    else:
        twin = meta_twin(model)
    found = _found(twin, checkpoint, reader)
    found.prepare_(twin)
    _check(twin, found, checkpoint, reader)
    kv = read_kv_scales(kv_keys(checkpoint), checkpoint.get, Names(twin), twin)
    if twin is not model:
        _to_meta(model, found)
        found.prepare_(model)
    try:
        _fill(model, found, Filler(reader, checkpoint.get, place))
        _finish(model, place)
    except BaseException:
        _abandon(model)
        raise
    setattr(model, ATTRIBUTE, kv)
    return model.eval()


def _saved_here(checkpoint: Checkpoint, model: nn.Module | None, device: Any) -> nn.Module:
    import transformers

    if model is not None:
        raise ValueError(f"{checkpoint.path} was saved by moe_ops: load it without a model, or use reload_")
    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    return cls.from_pretrained(checkpoint.path, device_map=device).eval()


def _build(checkpoint: Checkpoint) -> nn.Module:
    """The float model of config.json: parameters on meta, buffers computed."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
    dtype = config.dtype or _float_dtype(checkpoint)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    with init_empty_weights(include_buffers=False):
        if cls is not None:
            model = cls._from_config(config, dtype=dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (checkpoint.path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.path)
    for name, kept in model._get_dtype_plan(dtype).items():  # what from_pretrained keeps in fp32
        _cast(model, name, kept)
    return model


def _float_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """For a config that does not say: the type of the first float matrix."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    return next((e.dtype for e in checkpoint.entries.values() if e.dtype in floats and len(e.shape) > 1), floats[0])


def _cast(model: nn.Module, fragment: str, dtype: torch.dtype) -> None:
    pattern = re.compile(rf"(^|\.){fragment.replace('*', '.*')}(\.|$)")
    for name, p in model.named_parameters():
        if pattern.search(name):
            p.data = p.data.to(dtype)


def _found(model: nn.Module, checkpoint: Checkpoint, reader: Reader) -> Layout:
    ignored = kv_keys(checkpoint) | {key for key in checkpoint if key.endswith(reader.ignored or ("\0",))}
    found = sources(model, [key for key in checkpoint if key not in ignored], reader.split)
    return layout(model, checkpoint, reader, found)


def _check(twin: nn.Module, found: Layout, checkpoint: Checkpoint, reader: Reader) -> None:
    """The whole load with tensors that have a type and a shape only."""

    def header(key: str) -> Tensor:
        entry = checkpoint.entries[key]
        return torch.empty(entry.shape, dtype=entry.dtype, device=_META)

    filler = Filler(reader, header, _META)
    for parameter, tensors in found.found.items():
        try:
            filler.fill(twin, parameter, tensors, found.schemes.get(parameter))
        except (RuntimeError, IndexError) as e:  # of a shape, in what the producer's or transformers' rules do with it
            shapes = ", ".join(f"{s.key} {checkpoint.entries[s.key].shape}" for s in tensors[:4])
            raise ValueError(f"{parameter} cannot be made from {shapes}: {e}") from e


def _to_meta(model: nn.Module, found: Layout) -> None:
    """Float weights that quantized modules take the place of."""
    for parameter in found.schemes:
        module, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(module)
        if not isinstance(owner, QuantizedModule):
            p = owner._parameters[leaf]
            assert p is not None
            owner._parameters[leaf] = nn.Parameter(p.detach().to(_META), p.requires_grad)


def _fill(model: nn.Module, found: Layout, filler: Filler) -> None:
    dequantized: dict[str, str] = {}
    for parameter, tensors in found.found.items():
        scheme = found.schemes.get(parameter)
        new = filler.fill(model, parameter, tensors, scheme)
        if new is None:
            continue
        _replace(model, parameter, new)
        if scheme is not None:
            dequantized[parameter.rpartition(".")[0]] = f"stored as {scheme.format}, dequantized"
    rows = model.__dict__.get(_LEFT, ())
    notes = {r.name: r.note if r.note in ALWAYS_FLOAT else "float in the checkpoint" for r in rows} | dequantized
    remember_left(model, [replace(r, note=notes[r.name]) for r in rows])


def _replace(model: nn.Module, parameter: str, new: Tensor) -> None:
    """Under every name that the parameter has."""
    module, _, leaf = parameter.rpartition(".")
    old = model.get_submodule(module)._parameters.get(leaf)
    if old is None:  # a buffer
        model.get_submodule(module)._buffers[leaf] = new
    elif old.is_meta:
        made = nn.Parameter(new, requires_grad=old.requires_grad)
        for m in model.modules():
            m._parameters |= {name: made for name, p in m._parameters.items() if p is old}


def _finish(model: nn.Module, device: torch.device) -> None:
    """Ties weights, gives buffers that no checkpoint holds their values, and checks that nothing is left on meta."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    lost = [(m, key) for _, m, key, b in _buffers(model) if b.is_meta]
    if lost:
        _compute(model)
    for _, m, key, b in list(_buffers(model)):
        m._buffers[key] = b.to(device)
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(f"no values for {', '.join(empty[:8])}: build the model with its buffers off meta")


def _compute(model: nn.Module) -> None:
    """Buffers on meta, from a second model of the same config whose parameters only are on meta."""
    build: Any = getattr(type(model), "_from_config", None)
    if build is None or not hasattr(model, "config"):
        return
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        other = build(model.config)
    values: Mapping[str, Tensor] = {f"{name}.{key}": b for name, _, key, b in _buffers(other)}
    for name, m, key, b in list(_buffers(model)):
        if b.is_meta and f"{name}.{key}" in values:
            m._buffers[key] = values[f"{name}.{key}"]


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for name, m in model.named_modules():
        for key, b in m._buffers.items():
            if b is not None:
                yield name, m, key, b


def _abandon(model: nn.Module) -> None:
    """A model that is filled in part must not run."""
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None and not p.is_meta:
                m._parameters[name] = nn.Parameter(torch.empty_like(p, device=_META), requires_grad=p.requires_grad)

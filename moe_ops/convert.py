"""A float checkpoint folder -> the quantized one that `quantize_` and save_pretrained would write, without the model.

Weights are read one tensor at a time, quantized into the storage of one weight (all experts of a projection), and
written to their place in the shards. config.json comes last: a folder that was interrupted does not load, and the same
command finishes it.

E experts, S shards of a weight (gate and up).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.files import Checkpoint
from .checkpoints.names import Source, merge, sources
from .experts import QuantizedExperts
from .formats import FORMATS, Format
from .huggingface import disk
from .quantize import skeleton_
from .storage import PARTS, QuantizedModule
from .streaming import Stream
from .tensor_files import Journal, TensorFile, nbytes, write_text

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_SPARE = 64 << 20  # bytes that a disk keeps free


def convert(
    source: str | Path, target: str | Path, format: str | Format | Mapping[str, str | Format | None] = "fp8", *,
    ignore: str | Iterable[str] = (), strict: bool = True, max_shard_size: str | int = "5GB",
    trust_remote_code: bool = False, progress: bool | None = None,
) -> None:  # fmt: skip
    """Quantize the checkpoint in the folder `source` into the new folder `target`.

    format, ignore, strict: as for `quantize_`. max_shard_size: as for save_pretrained. trust_remote_code: run the
    model's own code from the folder. progress: show a bar (needs tqdm); by default on a terminal.

    All but the values of weights is checked before anything is written. Interrupted, by whatever, a call with the same
    arguments goes on: shards that are whole are verified and kept. Raises ValueError, naming what is wrong: a
    checkpoint that is damaged, does not fit its model or is quantized already, what `quantize_` refuses, a `target`
    that holds something else or was begun with other options, a disk without room.
    """
    source, target = Path(source), Path(target)
    ignore = [ignore] if isinstance(ignore, str) else list(ignore)
    checkpoint = Checkpoint(source)
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source itself")
    default = next((e.dtype for e in checkpoint.entries.values() if e.dtype.is_floating_point), None)
    float_model, model = (build(source, default, trust_remote_code) for _ in range(2))
    skeleton_(model, format, ignore=ignore, strict=strict)
    work = _plan(checkpoint, float_model, model, max_shard_size)
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    journal = Journal(target, {
        "format": _spelled(format), "ignore": ignore, "max_shard_size": str(max_shard_size), "strict": strict,
        "source": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
    })  # fmt: skip
    done = {name for name in work.shards if journal.has(target / name)}
    _check_space(target, sum(sum(map(nbytes, work.like(name).values())) for name in work.shards if name not in done))
    target.mkdir(parents=True, exist_ok=True)
    journal.write()
    _write_shards(work, target, journal, done, progress)
    _write_sides(source, target)
    if len(work.shards) > 1:
        write_text(target / _INDEX, json.dumps(work.index, indent=2, sort_keys=True) + "\n")
    _write_config(model, target)
    journal.remove()


def build(folder: Path, default: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The model that a folder's config.json describes, on meta, in the types that from_pretrained would give it.

    default: the dtype where the config names none. Raises ValueError for a folder of no float checkpoint.
    """
    import transformers

    if not (folder / _CONFIG).exists():
        raise ValueError(f"{folder} holds no {_CONFIG}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{folder / _CONFIG} cannot be read: {_first_line(e)}") from e
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", found)
        raise ValueError(f"{folder} is quantized already ({method}): only float checkpoints are converted")
    names = getattr(config, "architectures", None) or ()
    kind = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    dtype = getattr(config, "dtype", None) or default or torch.float32
    with torch.device("meta"):
        if kind is not None:
            model = kind._from_config(config, dtype=dtype)
        else:
            auto = transformers.AutoModelForCausalLM
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    plan = model._get_dtype_plan(dtype)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        wanted = [kept for glob, kept in plan.items() if re.search(glob.replace("*", ".*"), name)]
        if wanted and t.is_floating_point():
            t.data = t.data.to(wanted[0])
    return model


@dataclass(frozen=True)
class Unit:
    """What is made in one go: a parameter as it stays, or a quantized weight with its scales. `keys` are on disk."""

    parameter: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    checkpoint: Checkpoint
    float_model: nn.Module
    model: nn.Module
    found: dict[str, list[Source]]
    floats: dict[str, Tensor]
    state: dict[str, Tensor]
    units: list[Unit]
    shards: dict[str, list[str]]
    index: dict[str, Any]

    def like(self, shard: str) -> dict[str, Tensor]:
        return {key: self.state[key] for key in self.shards[shard]}


def _plan(checkpoint: Checkpoint, float_model: Any, model: Any, max_shard_size: str | int) -> Work:
    """Every tensor of the result with its shape and shard, and what it is made of. Reads headers only."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import dot_natural_key
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    found = sources(float_model, checkpoint)
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    state = {key: t for key, t in disk.state(model).items() if key not in unsaved}
    state = remove_tied_weights_from_state_dict(state, model)
    state = {key: state[key] for key in sorted(state, key=dot_natural_key)}
    owners = {
        f"{name}.{weight}{part}": f"{name}.{weight}"
        for name, m in model.named_modules()
        if isinstance(m, QuantizedModule)
        for weight in m.weight_names()
        for part in ("", *(f"_{p}" for p in PARTS))
    }
    units: dict[str, list[str]] = {}
    for key in state:
        units.setdefault(owners.get(key, key), []).append(key)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    aliases = {**tied, **{other: one for one, other in tied.items()}}
    for parameter in units:
        if parameter not in found and aliases.get(parameter) in found:
            found[parameter] = found[aliases[parameter]]
        lost = [name for names in _float_names(model, parameter) for name in names if name not in found]
        if lost:
            raise ValueError(f"{lost[0]}, of which {parameter} is made, is no parameter of the float model")
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    index = {"metadata": {"total_parameters": model.num_parameters(), **split.metadata},
             "weight_map": split.tensor_to_filename}  # fmt: skip
    floats = float_model.state_dict()
    return Work(checkpoint, float_model, model, found, floats, state,
                [Unit(p, tuple(keys)) for p, keys in units.items()], split.filename_to_tensors, index)  # fmt: skip


def _check_space(target: Path, needed: int) -> None:
    folder = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if needed + _SPARE > free:
        raise ValueError(f"{target} needs {needed / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free")


def _spelled(format: Any) -> Any:
    if isinstance(format, Mapping):
        return {pattern: None if f is None else FORMATS.resolve(f).name for pattern, f in format.items()}
    return FORMATS.resolve(format).name


def _first_line(e: Exception) -> str:
    return str(e).strip().partition("\n")[0]


@torch.no_grad()
def _write_shards(work: Work, target: Path, journal: Journal, done: set[str], progress: bool | None) -> None:
    where = {key: shard for shard, keys in work.shards.items() for key in keys}
    open_: dict[str, TensorFile] = {}
    units = [u for u in work.units if any(where[key] not in done for key in u.keys)]
    try:
        for unit in _with_progress(units, work.state, progress):
            for key, t in _make(work, unit.parameter).items():
                shard = where[key]
                if shard in done:
                    continue
                if shard not in open_:
                    open_[shard] = TensorFile(target / shard, work.like(shard))
                open_[shard].write(key, t)
                if not open_[shard].missing:
                    open_.pop(shard).finish()
                    journal.add(target / shard)
    finally:
        for file in open_.values():
            file.abandon()


def _float_names(model: nn.Module, parameter: str) -> list[list[str]]:
    """Float parameters that a stored one is made of: for each part of its rows one, or one for each expert."""
    name, _, leaf = parameter.rpartition(".")
    m, weight = model.get_submodule(name), leaf.removesuffix("_bias")
    if not (isinstance(m, QuantizedExperts) and m.spec.moved and weight in m.weight_names()):
        return [[parameter]]
    paths = m.spec.paths(weight)
    if weight != leaf:
        paths = tuple(path.removesuffix("weight") + "bias" for path in paths)
    return [[f"{name}.{path.format(key)}" for key in m.spec.keys or ("",)] if "{}" in path else [f"{name}.{path}"]
            for path in paths]  # fmt: skip


def _make(work: Work, parameter: str) -> dict[str, Tensor]:
    """What is stored for a parameter: {key: tensor}."""
    name, _, leaf = parameter.rpartition(".")
    m, parts = work.model.get_submodule(name), _float_names(work.model, parameter)
    if not (isinstance(m, QuantizedModule) and leaf in m.weight_names()):
        if len(parts[0]) > 1 or len(parts) > 1:  # biases, of Linears on their own
            return {parameter: torch.cat([torch.stack([_float(work, n) for n in names]) for names in parts], -1)}
        value = _float(work, parts[0][0])
        if isinstance(m, QuantizedExperts) and leaf.endswith("_bias"):
            value = m.spec.canonical_bias(leaf.removesuffix("_bias"), value)
        return {parameter: value}
    stream = Stream(m, name)
    stream.pending = {leaf: stream.pending[leaf]}
    if isinstance(m, QuantizedExperts) and m.spec.moved:
        _take_moved(stream, leaf, parts, work)
    else:
        for s in work.found[parameter]:
            _take(stream, leaf, s, work)
            if s.conversion is not None:  # all of them at once
                break
    stream.finish()
    q = m._get(leaf)
    m.empty_weight(leaf, "meta")
    made = {"": q.qdata.unsqueeze(-1), "_scale": q.scale, "_global_scale": q.global_scale, "_zero_point": q.zero_point}
    return {f"{parameter}{part}": t for part, t in made.items() if t is not None}


def _take_moved(stream: Stream, weight: str, parts: list[list[str]], work: Work) -> None:
    """Quantize a weight that the float model holds under other names: spec.paths, in `parts`."""
    m, layout = stream.module, stream.module.layouts()[weight]
    assert isinstance(m, QuantizedExperts)
    for part, names in enumerate(parts):
        for i, name in enumerate(names):
            t = _float(work, name)
            if len(names) == 1:  # a stack
                t = t.unflatten(0, (-1, t.shape[0] // m.spec.num_experts)) if m.spec.flat else t
            for e, one in enumerate(t[: m.spec.num_experts] if len(names) == 1 else t[None], i):
                w = m.spec.canonical(weight, one)  # (N, K), or (S*N, K)
                for s, matrix in enumerate(w.unflatten(0, (-1, layout.n))):
                    stream.write(weight, e, part + s, matrix)


def _take(stream: Stream, weight: str, s: Source, work: Work) -> None:
    """Quantize one tensor of the checkpoint into its place."""
    if s.conversion is not None:
        tensors = work.found[s.parameter]
        stream.take_whole(weight, merge(work.float_model, tensors, work.checkpoint.get))
        return
    experts = stream.module.layouts()[weight].experts
    if s.expert is not None and experts is not None and s.expert >= experts:
        return  # rows of an identity expert, without meaning
    t = work.checkpoint.get(s.key)
    if s.shard is not None and not stream.module.as_stored(weight):
        raise ValueError(f"{s.key}: a matrix of gate or up alone, for {s.parameter}, which is stored transposed")
    if s.expert is None and s.shard is None:
        stream.take_whole(weight, t)
    elif s.shard is None:
        assert s.expert is not None
        stream.take(weight, s.expert, t.mT if _unfused(stream.module, s) else t)
    elif s.expert is None:
        for e, one in enumerate(t[:experts]):
            stream.write(weight, e, s.shard, one)
    else:
        stream.write(weight, s.expert, s.shard, t)


def _unfused(module: QuantizedModule, s: Source) -> bool:
    """The matrix of a Linear, for a weight that is transposed in memory."""
    return bool(getattr(s, "unfused", False)) and isinstance(module, QuantizedExperts) and module.spec.transposed


def _float(work: Work, parameter: str) -> Tensor:
    """A float parameter, in the dtype that the model has it in."""
    tensors, like = work.found[parameter], work.floats[parameter]
    if tensors[0].conversion is not None:
        value = merge(work.float_model, tensors, work.checkpoint.get)
    elif tensors[0].expert is None and tensors[0].shard is None:
        value = work.checkpoint.get(tensors[0].key)
    else:
        value = torch.empty(like.shape, dtype=like.dtype)
        for s in tensors:
            t, place = work.checkpoint.get(s.key), value if s.expert is None else value[s.expert]
            if s.shard is not None:
                dim = 0 if s.expert is not None else 1
                place = place.chunk(2, dim)[s.shard]
            if t.shape != place.shape:
                raise ValueError(f"{s.key} must be {tuple(place.shape)}, got {tuple(t.shape)}")
            place.copy_(t)
    if value.shape != like.shape:
        raise ValueError(f"{tensors[0].key} must be {tuple(like.shape)}, got {tuple(value.shape)}")
    return value.to(like.dtype)


def _with_progress(units: list[Unit], state: Mapping[str, Tensor], show: bool | None) -> Iterator[Unit]:
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from units
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise ValueError("progress=True needs tqdm") from None
    total = sum(nbytes(state[key]) for u in units for key in u.keys)
    with tqdm(total=total, desc="convert", unit="B", unit_scale=True) as bar:
        for unit in units:
            yield unit
            bar.update(sum(nbytes(state[key]) for key in unit.keys))


def _write_sides(source: Path, target: Path) -> None:
    """Tokenizer, generation config, licence, the model's own code: files beside the weights, as they are."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != _CONFIG and not file.name.endswith(_WEIGHTS) and file.name[0] != ".":
            shutil.copyfile(file, target / file.name)


def _write_config(model: Any, target: Path) -> None:
    """config.json as save_pretrained writes it."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        write_text(target / _CONFIG, (Path(folder) / _CONFIG).read_text(encoding="utf-8"))

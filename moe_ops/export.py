"""Quantized models in the layout of compressed-tensors, which serving engines read.

Every matrix becomes a Linear under the name that it has in the model family's own checkpoints, experts one by one;
families whose checkpoints hold experts in stacks get `experts.N.gate_proj`, as llm-compressor names them. Codes are not
changed. What the layout calls differently: global scales are reciprocals, codes of 4-bit integers are int32 words, and
8-bit integers without quantized activations are such words too, with an offset of 128.

E experts, S shards (gate and up), N rows and K columns of one matrix.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.kv import ATTRIBUTE
from .checkpoints.names import Names, sources
from .experts import QuantizedExperts
from .export_words import Spelled, spell
from .formats import FORMATS, QuantizedTensor
from .storage import QuantizedModule
from .tensor_files import TensorFile, write_text

_SHARDS = ("gate_proj", "up_proj")
_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def export_compressed_tensors(model: nn.Module, path: str | Path, *, max_shard_size: str | int = "5GB") -> None:
    """Write a quantized transformers model into the new folder `path`.

    Raises ValueError, before anything is written, for a model that is not transformers' or holds nothing quantized, for
    a folder that is not empty, for formats that the layout has no words for (it lists those that it has), and for
    families whose experts have no names one by one. Warns
    where gate and up have unequal global scales: compressed-tensors reads them, engines that fuse both keep one.
    """
    path = Path(path)
    mine = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if not mine or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is no transformers model with quantized modules")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty")
    groups = _groups(mine)
    work = _Names(model)
    made = _config(model, mine, groups, work)
    _write(model, mine, groups, work, path, max_shard_size)
    for kept in ("generation_config",):
        if (found := getattr(model, kept, None)) is not None:
            found.save_pretrained(path)
    write_text(path / "config.json", made)


def export(source: str | Path, target: str | Path) -> None:
    """`export_compressed_tensors` of a checkpoint folder of ours, tokenizer included."""
    import transformers

    from .convert import _write_sides

    source, target = Path(source), Path(target)
    if not (source / "config.json").exists():
        raise ValueError(f"{source} holds no config.json")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") != "moe_ops":
        raise ValueError(f"{source} was not written by moe_ops: only its checkpoints are exported")
    kind = getattr(transformers, (config.get("architectures") or [""])[0], transformers.AutoModelForCausalLM)
    export_compressed_tensors(kind.from_pretrained(source), target)
    _write_sides(source, target)


Group = tuple[str, bool]  # a format's name, and whether its activations are static


def _group(m: QuantizedModule) -> Group:
    return m.format, any(m.part(weight, "input_scale") is not None for weight in m.weight_names())


def _groups(mine: dict[str, QuantizedModule]) -> dict[Group, Spelled]:
    """How each kind of module is spelled. Raises ValueError for those that cannot be."""
    used = dict.fromkeys(_group(m) for m in mine.values())
    found = {group: spell(FORMATS[group[0]], group[1]) for group in used}
    lost = [f"{name} without static input scales" if spell(FORMATS[name], static=True) else name
            for (name, _), spelled in found.items() if spelled is None]  # fmt: skip
    if lost:
        known = ", ".join(name for name, f in FORMATS.items() if spell(f))
        static = ", ".join(name for name, f in FORMATS.items() if not spell(f) and spell(f, static=True))
        raise ValueError(
            f"compressed-tensors has no words for {' and '.join(lost)}. It has for {known}; with static input scales"
            f" also for {static}"
        )
    return {group: spelled for group, spelled in found.items() if spelled is not None}


class _Names:
    """Parameters in memory -> names in the family's own checkpoints."""

    def __init__(self, model: Any) -> None:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        config = copy.deepcopy(model.config)
        for name in ("quantization_config", "_is_quantized"):
            config.__dict__.pop(name, None)
        kind = getattr(type(model), "original_class", None) or type(model)
        with torch.device("meta"):
            self.float_model = kind._from_config(config, dtype=next(_quantized(model)).float_dtype)
        self._revert = revert_weight_conversion
        state = remove_tied_weights_from_state_dict(self.float_model.state_dict(), self.float_model)
        unsaved = self.float_model._keys_to_ignore_on_save or ()
        self.parameters = [name for name in state if name not in unsaved]
        original = revert_weight_conversion(self.float_model, {name: state[name] for name in self.parameters})
        self.found = sources(self.float_model, original)

    def owner(self, parameter: str, mine: dict[str, QuantizedModule]) -> str | None:
        """The quantized experts whose float module has the parameter; None for what is no weight or bias of experts."""
        for name, m in mine.items():
            if not isinstance(m, QuantizedExperts) or not parameter.startswith(f"{name}."):
                continue
            weights = {f"{name}.{each}" for each, _ in m.spec.floats(self.float_model.get_submodule(name))}
            if parameter in weights or (m.spec.has_bias and parameter.endswith("bias")):
                return name
        return None

    def linears(self, module: str, weight: str, m: QuantizedModule) -> list[tuple[str, int | None, int]]:
        """(name of a Linear on disk, expert, shard) of every matrix of a weight."""
        if not isinstance(m, QuantizedExperts):
            return [(self.found[f"{module}.{weight}"][0].key.removesuffix(".weight"), None, 0)]
        shards = m.spec.shards if weight == m.spec.up else 1
        if m.spec.keys:  # Linears in the float model, too
            paths = [f"{module}.{path}" for path in m.spec.paths(weight)]
            return [(self.found[path.format(key)][0].key.removesuffix(".weight"), e, s)
                    for e, key in enumerate(m.spec.keys) for s, path in enumerate(paths)]  # fmt: skip
        tensors = [] if m.spec.moved else self.found[f"{module}.{weight}"]
        tensors = [s for s in tensors if s.expert is None or s.expert < m.spec.num_experts]
        if tensors and all(s.expert is not None and (s.shard is not None or shards == 1) for s in tensors):
            return [(s.key.removesuffix(".weight"), s.expert, s.shard or 0) for s in tensors]
        names = _SHARDS if shards == 2 else (weight,)
        if not Names(self.float_model).locate(f"{module}.0.{names[0]}.weight"):
            raise ValueError(
                f"{module}.{weight}: the checkpoints of this family hold experts in stacks of their own, readers know"
                " no names for single ones; quantize all but the experts, or use save_pretrained"
            )
        return [(f"{module}.{e}.{names[s]}", e, s) for e in range(m.spec.num_experts) for s in range(shards)]

    def float(self, parameter: str, t: Tensor) -> dict[str, Tensor]:
        """A parameter that is not quantized, as the family's checkpoints have it."""
        return self._revert(self.float_model, {parameter: t})


def _quantized(model: nn.Module) -> Iterator[QuantizedModule]:
    return (m for m in model.modules() if isinstance(m, QuantizedModule))


def _config(model: Any, mine: dict[str, QuantizedModule], groups: dict[Group, Spelled], work: _Names) -> str:
    """config.json: one group for each way to store, its targets, and the Linears that are float."""
    kv = getattr(model, ATTRIBUTE, None)
    spelled = {
        f"group_{i}": {"targets": _targets(group, mine, work) if len(groups) > 1 else ["Linear"], "weights": s.weights,
                       "input_activations": s.activations, "output_activations": None, "format": s.format}
        for i, (group, s) in enumerate(groups.items())
    }  # fmt: skip
    formats = {s.format for s in groups.values()}
    work.float_model.config.quantization_config = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": spelled,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision", "ignore": _ignored(model, mine, work),
        "kv_cache_scheme": _KV if kv else None, "global_compression_ratio": None,
    }  # fmt: skip
    config = work.float_model.config
    config.architectures, config.dtype = [type(work.float_model).__name__], next(_quantized(model)).float_dtype
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_text(encoding="utf-8")


def _targets(group: Group, mine: dict[str, QuantizedModule], work: _Names) -> list[str]:
    """Linears by name; of experts a pattern for all of a block's."""
    found: dict[str, None] = {}
    for name, m in mine.items():
        for weight in m.weight_names() if _group(m) == group else ():
            for linear, expert, _ in work.linears(name, weight, m):
                block, _, leaf = linear.rpartition(".")
                one = rf"re:{re.escape(block.rpartition('.')[0])}\.\d+\.{re.escape(leaf)}$"
                found[linear if expert is None else one] = None
    return list(found)


def _ignored(model: Any, mine: dict[str, QuantizedModule], work: _Names) -> list[str]:
    """Names on disk of matrices that stay float; embeddings are no Linears."""
    found: dict[str, None] = {}
    for parameter in work.parameters:
        module = parameter.rpartition(".")[0]
        if module in mine or work.owner(parameter, mine) or isinstance(model.get_submodule(module), nn.Embedding):
            continue
        for key, t in work.float(parameter, _get(model, parameter).to("meta")).items():
            if t.ndim == 2 and key.endswith(".weight"):
                found[key.removesuffix(".weight")] = None
            elif t.ndim > 2:  # a stack, of what might be Linears
                owner, _, leaf = key.rpartition(".")
                found[rf"re:{re.escape(owner)}\.(\d+\.)?{re.escape(leaf)}$"] = None
    tied = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in mine]
    return list(found | dict.fromkeys(n for n in tied if f"{n}.weight" not in work.parameters))


def _matrix(q: QuantizedTensor, expert: int, shard: int, shards: int) -> QuantizedTensor:
    """One Linear (N, K) of a weight: codes, scale and global scale."""
    qdata = q.qdata[expert].unflatten(0, (shards, -1))[shard]
    scale = None if q.scale is None else q.scale[expert].unflatten(0, (shards, -1))[shard]
    scale = scale[0] if scale is not None and scale.ndim == 1 else scale
    whole = None if q.global_scale is None else q.global_scale[expert, shard]
    return QuantizedTensor(qdata, scale, None, whole, q.codec)


def _tensors(q: QuantizedTensor, spelled: Spelled) -> Iterator[tuple[str, Tensor]]:
    """Endings and tensors of one Linear."""
    if spelled.pack is None:
        yield "weight", q.qdata
    else:
        yield "weight_packed", spelled.pack(q.qdata)
    if spelled.format == "pack-quantized":
        yield "weight_shape", torch.tensor([q.qdata.shape[0], q.codec.columns(q.qdata.shape[1])])
    assert q.scale is not None
    scale = q.scale if q.scale.ndim else q.scale.reshape(1)
    yield "weight_scale", scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    if q.global_scale is not None:
        yield "weight_global_scale", q.global_scale.reshape(1).reciprocal()


def _inputs(m: QuantizedModule, weight: str, expert: int | None) -> Iterator[tuple[str, Tensor]]:
    scale = m.part(weight, "input_scale")
    if scale is None:
        return
    one = (scale if expert is None else scale[expert]).detach().float().reshape(1)
    codec = m.quantization.activation
    if codec is not None and codec.global_scale:
        yield "input_global_scale", one.reciprocal()
    else:
        yield "input_scale", one


def _all(
    model: nn.Module, mine: dict[str, QuantizedModule], groups: dict[Group, Spelled], work: _Names
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, in the order of the model; one weight at a time is taken apart."""
    done: set[str] = set()
    for parameter in work.parameters:
        module, _, leaf = parameter.rpartition(".")
        owner = work.owner(parameter, mine)
        m = mine.get(module if owner is None else owner)
        if owner is not None:
            assert isinstance(m, QuantizedExperts)
            yield from () if owner in done else _experts(owner, m, groups[_group(m)], work)
            done.add(owner)
        elif m is not None and leaf in m.weight_names():
            for name, _, _ in work.linears(module, leaf, m):
                for end, t in (*_tensors(m._get(leaf), groups[_group(m)]), *_inputs(m, leaf, None)):
                    yield f"{name}.{end}", t
        else:
            yield from work.float(parameter, _get(model, parameter)).items()
    for name, scales in (getattr(model, ATTRIBUTE, None) or {}).items():
        for end, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            yield f"{name}.{end}", torch.tensor([float(scale)])


def _experts(module: str, m: QuantizedExperts, spelled: Spelled, work: _Names) -> Iterator[tuple[str, Tensor]]:
    """Linears of a block's experts, one by one."""
    for weight, shards, _, _ in m.spec.matrices:
        q, bias = m._get(weight), m._parameters.get(f"{weight}_bias")
        _check_globals(f"{module}.{weight}", q)
        for name, expert, shard in work.linears(module, weight, m):
            assert expert is not None
            for end, t in (*_tensors(_matrix(q, expert, shard, shards), spelled), *_inputs(m, weight, expert)):
                yield f"{name}.{end}", t
            if bias is not None:
                yield f"{name}.bias", bias.detach()[expert].unflatten(0, (shards, -1))[shard]


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    p = owner._parameters.get(leaf)
    t = owner._buffers[leaf] if p is None else p
    assert t is not None
    return t.detach()


def _check_globals(parameter: str, q: QuantizedTensor) -> None:
    g = q.global_scale
    if g is not None and g.ndim == 2 and g.shape[1] == 2 and bool((g[:, 0] != g[:, 1]).any()):
        warnings.warn(
            f"{parameter}: gate and up have global scales of their own, engines that fuse them keep only one",
            stacklevel=5,
        )


def _write(model: Any, mine: dict, groups: dict, work: _Names, path: Path, max_shard_size: str | int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        like = {key: t.to("meta") for key, t in _all(model, mine, groups, work)}
    split = split_torch_state_dict_into_shards(
        like, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    where = {key: file for file, keys in split.filename_to_tensors.items() for key in keys}
    path.mkdir(parents=True, exist_ok=True)
    open_: dict[str, TensorFile] = {}
    try:
        for key, t in _all(model, mine, groups, work):
            file = where[key]
            if file not in open_:
                open_[file] = TensorFile(path / file, {k: like[k] for k in split.filename_to_tensors[file]})
            open_[file].write(key, t)
            if not open_[file].missing:
                open_.pop(file).finish()
    finally:
        for left in open_.values():
            left.abandon()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(path / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")

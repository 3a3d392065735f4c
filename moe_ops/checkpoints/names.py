"""Which tensors on disk make up which parameter in memory: the same rules as transformers' own loading.

A key is renamed, and perhaps converted, by the mapping that transformers keeps for the model. Stacking experts and
concatenating gate and up, which that mapping spells as operations, becomes an address (expert, shard), so that tensors
can be stored one by one; any other operation is kept, to be run by `merge`.

E experts, S shards (gate and up).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..storage import PARTS, QuantizedModule

_SHOWN = 8
# What producers call the matrices of one expert in files: (parameter in memory, shard), the first that the model has.
_PROJECTIONS: dict[str, tuple[tuple[str, int | None], ...]] = {
    "gate_proj": (("gate_up_proj", 0),), "w1": (("gate_up_proj", 0), ("up_proj", None)),
    "up_proj": (("gate_up_proj", 1), ("up_proj", None)), "w3": (("gate_up_proj", 1),),
    "gate_up_proj": (("gate_up_proj", None),),
    "down_proj": (("down_proj", None),), "w2": (("down_proj", None),),
}  # fmt: skip
_LEAVES = {"weight": "", "bias": "_bias"}
_ONE_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<leaf>\w+)")
_NEVER_LOADED = r"rotary_emb\.inv_freq$"  # old checkpoints hold it; models compute it

Split = Callable[[str], tuple[str, str]]
Place = tuple[str, "int | None", "int | None", "Conversion | None", bool]  # of a Source: parameter, expert, ...


@dataclass(frozen=True)
class Conversion:
    """Operations of transformers that lead from `pattern`'s tensors to the parameter `target`."""

    converter: Any
    pattern: str
    target: str


@dataclass(frozen=True)
class Source:
    """One tensor on disk, and where it belongs.

    `expert` None: the stack of all experts, or no experts at all. `shard`: 0 gate, 1 up, None for all rows. `part`: the
    parameter itself (""), or what a codec stores beside it ("scale", ...). `conversion`: what else has to be done.
    `unfused`: the matrix of one expert's Linear (out, in), whatever the layout in memory; others come in that layout.
    """

    key: str
    parameter: str
    expert: int | None = None
    shard: int | None = None
    part: str = ""
    conversion: Conversion | None = None
    unfused: bool = False

    @property
    def place(self) -> str:
        """The parameter's name with what part of it this is, for messages."""
        expert = "" if self.expert is None else f"[{self.expert}]"
        shard = "" if self.shard is None else (" (gate)", " (up)")[self.shard]
        return f"{self.parameter}{expert}{shard}{f' {self.part}' if self.part else ''}"


def whole(key: str) -> tuple[str, str]:
    """The `split` of a float checkpoint: every key names a parameter."""
    return key, ""


def sources(model: nn.Module, keys: Iterable[str], split: Split = whole) -> dict[str, list[Source]]:
    """Parameter (or persistent buffer) in memory -> the tensors on disk that it is made of, in the order of experts.

    model: float or already quantized, it may be on meta. split: a key -> the key that the parameter has in a float
    checkpoint, and the part ("" for the parameter itself). Raises ValueError for keys that nothing takes, for missing
    experts and parameters, for two tensors with one place; each is named.
    """
    names = Names(model)
    found: dict[str, list[Source]] = {}
    unexpected = []
    for key in sorted(keys, key=_natural):
        float_key, part = split(key)
        located = names.locate(float_key)
        for parameter, expert, shard, conversion, unfused in located:
            source = Source(key, parameter, expert, shard, part, conversion, unfused)
            found.setdefault(parameter, []).append(source)
        if not located and not names.ignores(float_key):
            unexpected.append(key)
    problems = _listed("nothing in the model takes", unexpected)
    for parameter, tensors in found.items():
        tensors.sort(key=lambda s: (s.part, -1 if s.expert is None else s.expert, -1 if s.shard is None else s.shard))
        problems += _duplicates(tensors)
        problems += _incomplete(names.memory[parameter], parameter, [s for s in tensors if not s.part])
    problems += _listed("no tensor in the checkpoint for", names.missing(found))
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n" + "\n".join(problems))
    return found


def merge(model: nn.Module, tensors: list[Source], get: Callable[[str], Tensor]) -> Tensor:
    """A float parameter whose sources carry a conversion: run transformers' operations on its tensors."""
    first = tensors[0].conversion
    assert first is not None
    converter = copy.deepcopy(first.converter)
    for s in tensors:
        assert s.conversion is not None
        converter.add_tensor(first.target, s.key, s.conversion.pattern, get(s.key))
    made = converter.convert(first.target, model=model, config=getattr(model, "config", None))
    if tensors[0].parameter not in made:
        raise ValueError(f"{tensors[0].parameter}: cannot be made from {', '.join(s.key for s in tensors)}")
    value = made[tensors[0].parameter]
    return value[0] if isinstance(value, list) else value


class Names:
    """The model's side: names in memory, and transformers' mapping to them."""

    def __init__(self, model: nn.Module) -> None:
        self.memory = _memory(model)
        self._tied = _tied(model)
        self._prefix = getattr(model, "base_model_prefix", None)
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        if self._prefix is not None and hasattr(model, "config"):
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter

            mapping: Any = get_model_conversion_mapping(model)
            self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
            self._renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._unexpected = [re.compile(p) for p in (*ignored, _NEVER_LOADED)]
        self._absent = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]

    def locate(self, key: str) -> list[Place]:
        """Every place that a float checkpoint's key has; [] for none."""
        renamed, pattern = self._rename(key, self._converters)
        if renamed in self.memory:
            return [(renamed, None, None, None, False)] if pattern is None else self._converted(key, renamed, pattern)
        if key in self.memory:
            return [(key, None, None, None, False)]
        plain = self._rename(key, [])[0]
        return [(plain, None, None, None, False)] if plain in self.memory else self._one_expert(plain)

    def ignores(self, key: str) -> bool:
        return any(p.search(key) for p in self._unexpected)

    def missing(self, found: Mapping[str, Any]) -> list[str]:
        """Names in memory that no tensor was found for, under none of their tied names."""
        have = {alias for name in found for alias in self._tied.get(name, (name,))}
        return [n for n in self.memory if n not in have and not any(p.search(n) for p in self._absent)]

    def _rename(self, key: str, converters: list[Any]) -> tuple[str, str | None]:
        if self._prefix is None:
            return key, None
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(key, self._renamings, converters, self._prefix or None, self.memory)

    def _converted(self, key: str, renamed: str, pattern: str) -> list[Place]:
        converter = next(c for c in reversed(self._converters) if pattern in c.source_patterns)
        operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        shard = converter.source_patterns.index(pattern) if len(converter.source_patterns) > 1 else None
        stacks, joins = ("MergeModulelist", 0) in operations, ("Concatenate", 1) in operations
        if stacks + joins == len(operations) and joins == (shard is not None) and self.memory[renamed].ndim == 3:
            expert = _expert(pattern, self._rename(key, [])[0]) if stacks else None
            return [(renamed, expert, shard, None, False)]
        names = [renamed.replace(converter.target_patterns[0], target, 1) for target in converter.target_patterns]
        return [(n, None, None, Conversion(converter, pattern, renamed), False) for n in names if n in self.memory]

    def _one_expert(self, key: str) -> list[Place]:
        """By structure, for producers that unfuse experts which the model's own checkpoints hold fused."""
        m = _ONE_EXPERT.fullmatch(key)
        for name, shard in _PROJECTIONS.get(m["projection"], ()) if m else ():
            assert m is not None
            parameter = f"{m['module']}.{name}{_LEAVES.get(m['leaf'], '?')}"
            if parameter in self.memory:
                return [(parameter, int(m["expert"]), shard, None, True)]
        return []


def _expert(pattern: str, key: str) -> int:
    head, _, tail = pattern.rpartition("*.")
    found = re.search(head.replace("*.", r".*\.") + r"(?P<expert>\d+)\." + tail, key)
    if found is None or found["expert"] not in key.split("."):
        raise ValueError(f"{key}: no number of an expert where {pattern!r} has it")
    return int(found["expert"])


def _memory(model: nn.Module) -> dict[str, Tensor]:
    """Names of parameters and persistent buffers; of a quantized weight only the codes, as the weight's name."""
    parts = {
        f"{prefix}.{name}_{part}" if prefix else f"{name}_{part}"
        for prefix, m in model.named_modules()
        if isinstance(m, QuantizedModule)
        for name in m.weight_names()
        for part in PARTS
    }
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in parts and isinstance(t, Tensor)}


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name -> all names of the same tensor, whether it is shared already or will be by `tie_weights`."""
    groups: dict[int, set[str]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(t), set()).add(name)
    by_name = {name: group for group in groups.values() for name in group}
    for target, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in by_name and origin in by_name:
            together = by_name[target] | by_name[origin]
            by_name |= dict.fromkeys(together, together)
    return {name: tuple(group) for name, group in by_name.items()}


def _duplicates(tensors: list[Source]) -> Iterator[str]:
    """Two tensors for one place; the shards of an expert beside the whole of it are that, too."""
    seen: dict[tuple, str] = {}
    for s in tensors:
        if s.conversion is not None:
            continue
        for shard in (0, 1) if s.shard is None else (s.shard,):
            other = seen.setdefault((s.part, s.expert, shard), s.key)
            if other != s.key:
                yield f"{s.place} is given twice: {other} and {s.key}"
                break


def _incomplete(parameter: Tensor, name: str, tensors: list[Source]) -> Iterator[str]:
    """Experts that are absent, beyond the last one, or stored both one by one and as a stack."""
    experts = {s.expert for s in tensors}
    shards = {s.shard for s in tensors}
    if None in shards and len(shards) > 1:
        yield f"{name}: some experts hold gate and up as one matrix, others as two"
        return
    wanted = (None,) if shards in ({None}, set()) else (0, 1)
    if not experts or experts == {None}:
        if tensors and any((None, s) not in {(t.expert, t.shard) for t in tensors} for s in wanted):
            yield f"{name}: gate and up are two tensors on disk, and one of them is missing"
        return
    if None in experts:
        yield f"{name}: experts are stored one by one and as a stack"
        return
    have = {(s.expert, s.shard) for s in tensors}
    yield from _listed("no tensor in the checkpoint for", [
        Source("", name, e, s).place for e in range(parameter.shape[0]) for s in wanted if (e, s) not in have
    ])  # fmt: skip
    beyond = [s.key for s in tensors if s.expert is not None and s.expert >= parameter.shape[0]]
    yield from _listed(f"{name} has {parameter.shape[0]} experts, which leaves no place for", beyond)


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what} {', '.join(names[:_SHOWN])}{more}"] if names else []


def _natural(key: str) -> list[Any]:
    """Numbers by their value: transformers' order, which some of its renamings depend on."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in key.split(".")]

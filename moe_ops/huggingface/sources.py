"""What checkpoint files hold, and whether a model can be loaded from it: known before any weight is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..tensor_files import cut_off

_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor in a file: its type, as safetensors spells it, and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Sources(NamedTuple):
    """Where a parameter comes from: keys of the checkpoint by the pattern of the converter that takes them, if any."""

    converter: Any
    keys: dict[str, list[str]]

    def all(self) -> list[str]:
        return [key for many in self.keys.values() for key in many]


def headers(files: Iterable[str | Path]) -> dict[str, Stored]:
    """Every tensor of the files. Raises ValueError for a file that is cut off or no safetensors file."""
    found = {}
    for file in map(str, files):
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 - no mapping
                    part = f.get_slice(key)
                    found[key] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as e:
            lost = cut_off(file)
            raise ValueError(f"{file} cannot be read{f', {lost}' if lost else ''}: {e}") from None
    return found


def trace(model: Any, keys: Iterable[str], given: list) -> dict[str, Sources]:
    """Which parameter each key is loaded into, by transformers' own rules; keys that lead nowhere are left out."""
    conversions: list[Any] = deepcopy(given)  # they remember what they have matched
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Sources] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            converter: Any = None if pattern is None else by_pattern[pattern]
            source = found.setdefault(name, Sources(converter, defaultdict(list)))
            source.keys[pattern or key].append(key)
            for other in () if converter is None else converter.target_patterns[1:]:
                found.setdefault(name.replace(converter.target_patterns[0], other), source)
    return found


def check_floats(
    found: Mapping[str, Sources], stored: Mapping[str, Stored], experts_of: Mapping[str, int | None],
    needed: Iterable[str], others: Iterable[str] = (),
) -> list[str]:  # fmt: skip
    """Why a float checkpoint cannot be quantized: weights and experts that are not there, codes of another tool.

    experts_of: the number of experts of each weight that will be quantized; needed: others that must be there;
    others: parameters that stay in float, which codes without a scale must not be cast to.
    """
    problems = [f"{name}: the checkpoint lacks it" for name in (*experts_of, *needed) if name not in found]
    problems += [text for name in others for text in _codes(found[name], stored)]
    for name, experts in experts_of.items():
        if name not in found:
            continue
        converter, keys = found[name]
        problems += _codes(found[name], stored)
        if converter is None or len(converter.target_patterns) > 1:
            continue
        lost = [p for p in converter.source_patterns if p not in keys]
        problems += [f"{name}: the checkpoint has no {p} for it" for p in lost]
        for pattern, many in keys.items():
            if (experts is not None and len(many) not in (1, experts)) or (experts != 1 and _differ(keys)):
                problems += _absent(name, pattern, many, experts)
    return problems


def _codes(source: Sources, stored: Mapping[str, Stored]) -> list[str]:
    codes = [key for key in source.all() if stored[key].dtype not in _FLOATS]
    return [f"{key} is {stored[key].dtype}: codes of another tool, only float is read" for key in codes[:1]]


def _differ(keys: Mapping[str, list[str]]) -> bool:
    return len({len(many) for many in keys.values()}) > 1


def _absent(name: str, pattern: str, keys: list[str], experts: int | None) -> list[str]:
    """The experts whose key is not there. The number that differs between the keys is the expert's."""
    numbers = [re.findall(r"\d+", key) for key in keys]
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers if len(n) > i}) > 1]
    if experts is None or len(keys) == experts:
        return []
    if len(varying) != 1:
        return [f"{name}: the checkpoint has {len(keys)} tensors {pattern}, the model has {experts} experts"]
    there = {int(n[varying[0]]) for n in numbers}
    at = [m.span() for m in re.finditer(r"\d+", keys[0])][varying[0]]
    lost = [f"{keys[0][: at[0]]}{e}{keys[0][at[1] :]}" for e in range(experts) if e not in there]
    more = [key for key, n in zip(keys, numbers, strict=True) if int(n[varying[0]]) >= experts]
    return [f"{key}: the checkpoint lacks it" for key in lost] + [f"{key}: no such expert in the model" for key in more]


def check_codes(
    found: Mapping[str, Sources], stored: Mapping[str, Stored], expected: Mapping[str, tuple[torch.dtype, torch.Size]],
    codes: Iterable[str], needed: Iterable[str],
) -> list[str]:  # fmt: skip
    """Why a checkpoint of ours cannot be loaded. `codes` must have the type that is expected, too."""
    problems, codes = [], set(codes)
    needed = codes.union(needed)
    for name, (dtype, shape) in expected.items():
        keys = found[name].all() if name in found else []
        if not keys:
            problems += [f"{name}: the checkpoint lacks it"] if name in needed else []
            continue
        have = stored[keys[0]]
        cast = dtype.is_floating_point and dtype.itemsize > 1 and have.dtype not in _FLOATS  # codes without a scale
        if have.shape != tuple(shape) or cast or (name in codes and have.dtype != spelling(dtype)):
            want = f"{spelling(dtype)} {tuple(shape)}"
            problems.append(f"{keys[0]} must be {want}, the checkpoint has {have.dtype} {have.shape}")
    return problems


def spelling(dtype: torch.dtype) -> str:
    """A type as safetensors spells it."""
    return _SPELLED[dtype]


_SPELLED = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


class Files:
    """Tensors of checkpoint files, read one by one; each file is opened once."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self._open: dict[str, Any] = {}

    def read(self, key: str, device: torch.device | str) -> Tensor:
        file = self.stored[key].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(key).to(device)

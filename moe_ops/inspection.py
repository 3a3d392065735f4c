"""What a checkpoint folder holds: who made it, which layers are stored how, how big it is, and what is wrong with it.

Reads config files and the headers of tensor files, no tensor. E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints import find_reader
from .checkpoints.kv import kv_keys
from .checkpoints.reader import CODES, Reader, settings
from .formats import FORMATS
from .storage import PARTS
from .summary import _size
from .tensor_files import JOURNAL

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
OURS = "moe_ops"
_PART = re.compile(rf"_({'|'.join(PARTS)})$")  # of a weight of ours
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPERT = re.compile(r"(?P<block>.*\bexperts)\.(?P<expert>\d+)\.(?P<rest>.+)")
_STACK = re.compile(r"\bexperts\.[^.]+$")


@dataclass(frozen=True)
class Row:
    """Tensors whose names differ only in numbers, which `name` has as ranges. `scheme` is a format or a dtype."""

    name: str
    tensors: int
    scheme: str
    dtypes: tuple[str, ...]
    bytes: int


@dataclass
class Report:
    """`str()` is a table, `data()` plain values. `problems` says what keeps the folder from being loaded."""

    path: str
    producer: str = "float"
    architecture: str = ""
    rows: list[Row] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    experts: int = 0
    shards: list[str] = field(default_factory=list)
    kv_scales: int = 0
    problems: list[str] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        facts = [("producer", self.producer), ("architecture", self.architecture or "-"), ("size", _size(self.bytes)),
                 ("tensors", f"{self.tensors} in {len(self.shards)} files"), ("experts", str(self.experts or "-")),
                 ("KV scales", str(self.kv_scales or "-"))]  # fmt: skip
        lines = [self.path, *(f"  {name:<13} {value}" for name, value in facts), ""]
        cells = [("tensors", "", "stored as", "types", "size")]
        cells += [(r.name, f"x {r.tensors}" if r.tensors > 1 else "", r.scheme, " ".join(r.dtypes), _size(r.bytes))
                  for r in self.rows]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = [c.ljust(w) for c, w in zip(row, widths, strict=True)]
            padded[1], padded[4] = row[1].rjust(widths[1]), row[4].rjust(widths[4])
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, "", *(f"problem: {p}" for p in self.problems)]).rstrip()


@dataclass(frozen=True)
class Stored:
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def inspect(path: str | Path) -> Report:
    """Reads what it can, the rest goes into `problems`. Raises ValueError for what is no checkpoint folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    report = Report(str(folder))
    config = _json(folder / "config.json", report) or {}
    stored = _headers(folder, report)
    if not stored and not config and not (folder / JOURNAL).exists():
        raise ValueError(f"{folder} holds neither config.json nor safetensors files")
    if not config:
        report.problems.append("config.json is missing: the folder does not load")
    report.architecture = ", ".join(config.get("architectures") or [])
    if (folder / JOURNAL).exists():
        report.problems.append("it is being written, or that was interrupted: the same command finishes it")
    reader = _reader(config, folder, report)
    report.tensors, report.bytes = len(stored), sum(s.bytes for s in stored.values())
    kv = kv_keys(stored)
    in_config = ((settings(config) or {}).get("kv_scales") or {}) if report.producer == OURS else {}
    report.kv_scales = len(kv) + 2 * len(in_config)  # of keys and of values
    report.experts = _experts(stored, report)
    ours = ((settings(config) or {}).get("modules") or {}) if report.producer == OURS else None
    for module in ours or ():
        if not any(key.startswith(f"{module}.") for key in stored):
            report.problems.append(f"{module} is said to be quantized, and no tensor of it is there")
    known = dict.fromkeys(kv, "KV scale")
    schemes = {key: known.get(key) or _scheme(key, s, reader, ours, report) for key, s in stored.items()}
    report.rows = _collapse(stored, schemes, {key: _owner(key, reader, ours) for key in stored})
    return report


def _json(file: Path, report: Report) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        report.problems.append(f"{file.name} is not JSON: {e}")
        return None
    if not isinstance(content, dict):
        report.problems.append(f"{file.name} holds {type(content).__name__}, not an object")
        return None
    return content


def _headers(folder: Path, report: Report) -> dict[str, Stored]:
    """Every tensor of every file; the index is compared with what is there."""
    index = _json(folder / _INDEX, report) if not (folder / _SINGLE).exists() else None
    where: Any = (index or {}).get("weight_map") or {}
    names = sorted(set(where.values()))
    if not where and (folder / _SINGLE).exists():
        names = [_SINGLE]
    elif not where:
        names = sorted(f.name for f in folder.glob("*.safetensors"))
        report.problems.append(f"the folder holds neither {_SINGLE} nor {_INDEX}")
    stored: dict[str, Stored] = {}
    for name in names:
        report.shards.append(name)
        try:
            found = read_header(folder / name)
        except ValueError as e:
            report.problems.append(str(e))
            continue
        report.problems += [f"{key} is in {stored[key].file} and in {name}" for key in found if key in stored]
        stored |= found
    readable = {s.file for s in stored.values()}
    report.problems += [
        f"{key} is not in {name}, where {_INDEX} places it"
        for key, name in where.items()
        if name in readable and (key not in stored or stored[key].file != name)
    ]
    return stored


def read_header(file: Path) -> dict[str, Stored]:
    """{name: tensor} of a safetensors file. Raises ValueError, naming what is cut off, for one that is not whole."""
    if not file.exists():
        raise ValueError(f"{file.name} is missing")
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{file.name} is truncated or no safetensors file: {size} bytes, header of {length}")
        try:
            header = json.loads(f.read(length))
            found = {
                key: Stored(file.name, t["dtype"], tuple(t["shape"]), t["data_offsets"][1] - t["data_offsets"][0])
                for key, t in header.items()
                if key != "__metadata__"
            }
            end = max((t["data_offsets"][1] for key, t in header.items() if key != "__metadata__"), default=0)
            cut = [key for key in found if header[key]["data_offsets"][1] > size - 8 - length]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{file.name} has a corrupt header: {e}") from None
    if cut:
        raise ValueError(f"{file.name} is truncated: {cut[0]} and {len(cut) - 1} more tensors are cut off")
    if size != 8 + length + end:
        raise ValueError(f"{file.name} has {size - 8 - length - end} bytes behind its last tensor")
    return found


def _reader(config: Mapping[str, Any], folder: Path, report: Report) -> Reader | None:
    """The producer's rules; None for float checkpoints, ours, and unknown ones, which are a problem."""
    given = settings(config)
    side = {f.name: f for f in folder.glob("*.json")}
    if given is not None and given.get("quant_method") == OURS:
        report.producer = OURS
        return None
    if given is None and "hf_quant_config.json" not in side:
        return None
    try:
        reader = find_reader(config, lambda name: _json(side[name], report) if name in side else None)
    except ValueError as e:
        report.producer = str((given or {}).get("quant_method", "unknown"))
        report.problems.append(str(e))
        return None
    report.producer = reader.name
    return reader


def _scheme(key: str, s: Stored, reader: Reader | None, ours: Mapping[str, Any] | None, report: Report) -> str:
    """The format that a tensor belongs to, or its type where it is float."""
    if ours is not None:
        module, _, leaf = key.rpartition(".")
        return str(ours[module]) if module in ours and not leaf.endswith("bias") else s.dtype
    if reader is None:
        return s.dtype
    float_key, made = reader.split(key)
    module, _, leaf = float_key.rpartition(".")
    if leaf.endswith("bias") or (made == CODES and len(s.shape) < 2) or "norm" in module.rpartition(".")[2]:
        return s.dtype
    kind = "experts" if _EXPERT.match(key) or _STACK.search(float_key) else "linear"
    name = f"{module}.0.{leaf}" if kind == "experts" and leaf != "weight" else module
    try:
        found = reader.scheme((name, module), kind)
    except ValueError as e:
        if str(e) not in report.problems:
            report.problems.append(str(e))
        return "unknown"
    if found is None or (made == CODES and s.dtype in _FLOATS):
        return s.dtype
    return found.format + (", static" if found.static and FORMATS[found.format].activation else "")


def _experts(stored: Mapping[str, Stored], report: Report) -> int:
    """The largest number of experts of a block; experts that lack a tensor which others have are problems."""
    blocks: dict[str, dict[str, set[int]]] = {}
    for key in stored:
        if m := _EXPERT.fullmatch(key):
            blocks.setdefault(m["block"], {}).setdefault(m["rest"], set()).add(int(m["expert"]))
    number = {block: 1 + max(map(max, tensors.values())) for block, tensors in blocks.items()}
    for block, tensors in blocks.items():
        for rest, experts in tensors.items():
            lost = sorted(set(range(number[block])) - experts)
            if lost and not rest.endswith("input_scale"):  # experts that no calibration reached have none
                report.problems.append(f"{block}.{lost[0]}.{rest} is missing{_more(len(lost) - 1)}")
    stacks = [s.shape[0] for key, s in stored.items() if _STACK.search(key) and len(s.shape) > 1]
    return max([*stacks, *number.values()], default=0)


def _more(n: int) -> str:
    return f", and {n} more of its kind" if n else ""


def _owner(key: str, reader: Reader | None, ours: Mapping[str, Any] | None) -> str:
    """The weight that a tensor is, or is a part of."""
    if reader is not None:
        return reader.split(key)[0]
    return _PART.sub("", key) if ours and key.rpartition(".")[0] in ours else key


def _collapse(stored: Mapping[str, Stored], schemes: Mapping[str, str], owners: Mapping[str, str]) -> list[Row]:
    """Rows in the order of names; numbers become ranges, and parts of a weight share its row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in sorted(stored, key=_natural):
        groups.setdefault((_NUMBER.sub("*", owners[key]), schemes[key]), []).append(key)
    rows = []
    for (pattern, scheme), keys in groups.items():
        numbers = zip(*([int(n) for n in _NUMBER.findall(owners[key])] for key in keys), strict=True)
        name = pattern
        for column in numbers:
            name = name.replace("*", _ranges(set(column)), 1)
        dtypes = tuple(dict.fromkeys(stored[key].dtype for key in keys))
        rows.append(Row(name, len(keys), scheme, dtypes, sum(stored[key].bytes for key in keys)))
    return rows


def _natural(key: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in key.split(".")]


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> {0-2,5}."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return texts[0] if len(texts) == 1 and "-" not in texts[0] else "{" + ",".join(texts) + "}"

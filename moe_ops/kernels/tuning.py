"""Tile configurations that a user has timed, before those of the tables: files of examples/benchmark.py --tune.

A file is JSON: {"moe_ops_tuning": 1, "provenance": {...}, "entries": [...]}. An entry is what a product asks the tables
with (`arch`, `kind`, `experts`, `channels`, `k`, `rows` of all experts together) and its `config`; what else it says
(`us`, `rule_us`, `candidates`, ...) is for readers, as the provenance is. R rows, E experts, N channels, K contraction.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from .configs import Config, Kind

VERSION = 1
VARIABLE = "MOE_OPS_TUNING"  # paths, as in PATH
_REACH = 2.0  # a configuration serves from half to twice the rows that it was timed with


@dataclass(frozen=True)
class Product:
    """What a configuration was timed for. `rows` R of E experts: both how many are touched, and their rows."""

    arch: int
    kind: Kind
    experts: int
    channels: int
    k: int
    rows: int


Entries = dict[Product, Config]
_tuned: dict[tuple, dict[int, Config]] = {}  # what a product asks with, but for its rows -> rows -> configuration


def tuned(kind: Kind, arch: int, experts: int, rows: int, channels: int, k: int) -> Config | None:
    """The configuration that was timed with the nearest number of rows, where one was within a factor of two."""
    found = _tuned.get((arch, kind, experts, channels, k))
    if not found or rows < 1:
        return None
    ratio, config = min(((max(r / rows, rows / r), c) for r, c in found.items()), key=lambda pair: pair[0])
    return config if ratio <= _REACH else None


def add(entries: Entries) -> None:
    """From now on these, and what was there before for other products."""
    for p, config in entries.items():
        _tuned.setdefault((p.arch, p.kind, p.experts, p.channels, p.k), {})[p.rows] = config


def forget() -> None:
    _tuned.clear()


def digest() -> str:
    """Of all that is tuned, "" for nothing: code that was generated with other configurations is other code."""
    if not _tuned:
        return ""
    lines = sorted(repr((key, sorted(by_rows.items()))) for key, by_rows in _tuned.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


@cache
def from_environment() -> None:
    """Add what the files named by MOE_OPS_TUNING hold, once. ValueError as `read`."""
    for path in os.environ.get(VARIABLE, "").split(os.pathsep):
        if path:
            add(read(path))


def read(path: str | Path) -> Entries:
    """ValueError, with what was got and what is allowed, unless the whole file holds configurations."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"tuning file {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"tuning file {str(path)!r} is no JSON: {error}") from error
    version = content.get("moe_ops_tuning") if isinstance(content, dict) else None
    if version != VERSION or not isinstance(content.get("entries"), list):
        raise ValueError(f'tuning file {str(path)!r} must be {{"moe_ops_tuning": {VERSION}, "entries": [...]}}, as '
                         f"examples/benchmark.py --tune writes it; got version {version!r}")  # fmt: skip
    entries: Entries = {}
    for number, entry in enumerate(content["entries"]):
        try:
            product, config = _entry(entry)
            if product in entries:
                raise ValueError("an earlier one is for the same product")
        except ValueError as error:
            raise ValueError(f"tuning file {str(path)!r}, entry {number}: {error}") from None
        entries[product] = config
    return entries


def written(entries: Entries, provenance: Mapping[str, Any], about: Mapping[Product, Mapping[str, Any]]) -> str:
    """The text of a file; `about` is what else to say of an entry."""
    listed = [asdict(p) | {"config": asdict(c)} | dict(about.get(p, {})) for p, c in entries.items()]
    lines = ",\n".join(json.dumps(entry) for entry in listed)
    head = f'"moe_ops_tuning": {VERSION},\n"provenance": {json.dumps(dict(provenance))}'
    return f'{{{head},\n"entries": [\n{lines}\n]}}\n'


def _entry(entry: Any) -> tuple[Product, Config]:
    if not isinstance(entry, dict):
        raise ValueError(f"must be an object, got {entry!r}")
    kind, config = _made(Kind, entry.get("kind"), "kind"), _made(Config, entry.get("config"), "config")
    sizes = {name: entry.get(name) for name in ("arch", "experts", "channels", "k", "rows")}
    for name, size in sizes.items():
        if type(size) is not int or size < (name != "arch"):  # 0: Triton's interpreter
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    _check(kind, config)
    return Product(kind=kind, **sizes), config  # type: ignore[arg-type]


def _made(cls: type, values: Any, name: str) -> Any:
    """A dataclass of strings, booleans and integers from its fields."""
    types: dict[str, Any] = {f.name: {"str": str, "bool": bool, "int": int}[str(f.type)] for f in fields(cls)}
    if not isinstance(values, dict) or set(values) != set(types):
        raise ValueError(f"{name} must have exactly {', '.join(types)}, got {values!r}")
    for field, value in values.items():
        if type(value) is not types[field]:
            raise ValueError(f"{name}.{field} must be {types[field].__name__}, got {value!r}")
    return cls(**values)


def _check(kind: Kind, c: Config) -> None:
    """What the kernels can be built with at all; that it fits the memory of a multiprocessor, only a launch shows."""
    allowed = {
        "block_m": _powers(8 if c.swap else 16, 256), "block_n": _powers(16, 256), "block_k": _powers(16, 512),
        "warps": _powers(1, 16), "stages": range(1, 17), "group_m": range(1, 65), "short": (0, *_powers(8, 128)),
        "parts": _powers(1, 32), "programs": (0,),
    }  # fmt: skip
    if kind.decoded == 4:
        allowed["block_k"] = (128,)  # words of eight codes
    for name, values in allowed.items():
        if getattr(c, name) not in values:
            raise ValueError(f"config.{name} must be one of {', '.join(map(str, values))}, got {getattr(c, name)}")
    if c.short >= c.block_m:
        raise ValueError(f"config.short must be less than block_m {c.block_m}, got {c.short}")


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(1 << n for n in range(first.bit_length() - 1, last.bit_length()))

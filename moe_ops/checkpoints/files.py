"""A checkpoint folder: which tensors it holds, in which files, read one at a time."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tensor_files import cut_off

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What a file's header says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes, from the beginning of the file


class Checkpoint:
    """model.safetensors, or the shards that model.safetensors.index.json names, in any order.

    Opening reads every header. Raises ValueError, with the file's name and the tensor's where there is one, for files
    that are missing, truncated or corrupt, and for an index that promises tensors which its files do not hold, or the
    other way round.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder")
        self.entries: dict[str, Entry] = {}
        index = self.path / _INDEX
        if (self.path / _SINGLE).exists():
            self._read_header(self.path / _SINGLE)
        elif index.exists():
            self._read_index(index)
        else:
            raise ValueError(f"{self.path} holds neither {_SINGLE} nor {_INDEX}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own: pages mapped from files would add up."""
        entry = self.entries[key]
        data = torch.empty(math.prod(entry.shape) * entry.dtype.itemsize, dtype=torch.uint8)
        try:
            with entry.file.open("rb", buffering=0) as file:
                file.seek(entry.start)
                read = _fill(file, memoryview(data.numpy()))  # type: ignore[arg-type]
        except OSError as e:
            raise ValueError(f"{key} cannot be read from {entry.file}: {e}") from e
        if read != data.numel():
            raise ValueError(f"{key} is cut off: {entry.file} has been truncated since it was opened")
        return data.view(entry.dtype).reshape(entry.shape)

    def json(self, name: str) -> dict[str, Any] | None:
        """A side file's content, None if there is none."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ValueError(f"{file} is not JSON: {e}") from e
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds {type(content).__name__}, not an object")
        return content

    def _read_header(self, file: Path) -> None:
        from safetensors import safe_open

        try:
            with safe_open(file, framework="pt", device="cpu") as checked:  # sizes, offsets, types, overlaps
                keys = list(checked.keys())
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
        except Exception as e:  # the library's own types, and those of Python
            raise ValueError(f"{file} is truncated or corrupt: {cut_off(file) or e}") from e
        for key in keys:
            dtype, shape = header[key]["dtype"], tuple(header[key]["shape"])
            if dtype not in _DTYPES:
                raise ValueError(f"{key} in {file} has the type {dtype}; known: {', '.join(_DTYPES)}")
            if key in self.entries:
                raise ValueError(f"{key} is in {self.entries[key].file.name} and in {file.name}")
            self.entries[key] = Entry(file, _DTYPES[dtype], shape, 8 + size + header[key]["data_offsets"][0])

    def _read_index(self, index: Path) -> None:
        content = self.json(_INDEX)
        where = content.get("weight_map") if content else None
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{index} has no weight_map of tensors to files")
        for name in dict.fromkeys(where.values()):
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which is not in the folder")
            if not (self.path / name).exists():
                lost = next(key for key, file in where.items() if file == name)
                raise ValueError(f"{self.path / name} is missing: {index.name} places {lost} in it")
            self._read_header(self.path / name)
        for key, name in where.items():
            if key not in self.entries or self.entries[key].file.name != name:
                raise ValueError(f"{key} is not in {self.path / name}, where {index.name} places it")
        extra = [key for key in self.entries if key not in where]
        if extra:
            raise ValueError(f"{extra[0]} is in {self.entries[extra[0]].file}, but not in {index.name}")


def _fill(file: io.RawIOBase, into: memoryview) -> int:
    """Bytes read: all of `into`, unless the file ends. One call reads at most 2 GB."""
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            break
        done += count
    return done

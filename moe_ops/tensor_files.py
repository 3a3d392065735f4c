"""Checkpoint folders written piece by piece, such that an interrupt leaves nothing that loads, and nothing to redo.

A safetensors file is 8 bytes of header size, a JSON header with the place of every tensor, and the tensors. Shapes are
known before any value is: the header is written first, and tensors in any order, each when it is there. The file has a
name of its own until it is whole and on the disk.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

JOURNAL = ".moe_ops_journal.json"
_PARTIAL = ".partial"
_CHUNK = 1 << 24
# In the order that the safetensors library stores them in: wide types first, so that all are aligned.
_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: i for i, dtype in enumerate(_NAMES)}


def cut_off(file: str | Path) -> str | None:
    """What lies behind the end of a safetensors file, for a message; None if nothing does, or it cannot be told."""
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            entries = json.loads(f.read(length))
        held = Path(file).stat().st_size - 8 - length
        ends = sorted((e["data_offsets"][1], key) for key, e in entries.items() if key != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, OverflowError):
        return None
    lost = [key for end, key in ends if end > held]
    return f"{lost[0]} and {len(lost) - 1} more tensors are cut off" if lost else None


def nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


class TensorFile:
    """One safetensors file being written. `like`: name -> tensor of the shape and dtype, it may be on meta."""

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        self.path, self._partial = path, path.with_name(path.name + _PARTIAL)
        self.missing = set(like)
        header, self._places, end = layout(like)
        self._data = len(header)
        self._file = open(self._partial, "wb")  # noqa: SIM115  (closed by `finish`)
        self._file.write(header)
        self._file.truncate(self._data + end)

    def write(self, name: str, t: Tensor) -> None:
        start, dtype, shape = self._places[name]
        assert (t.dtype, tuple(t.shape)) == (dtype, shape), f"{name}: {t.dtype} {tuple(t.shape)} for {dtype} {shape}"
        self._file.seek(self._data + start)
        data = t.detach().to("cpu").contiguous().flatten().view(torch.uint8)
        self._file.write(data.numpy().data)
        self.missing.discard(name)

    def finish(self) -> None:
        """The file is on the disk before it has its name."""
        assert not self.missing, f"never written: {sorted(self.missing)[:3]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rename(self._partial, self.path)

    def abandon(self) -> None:
        self._file.close()


def layout(like: Mapping[str, Tensor]) -> tuple[bytes, dict[str, tuple[int, torch.dtype, tuple[int, ...]]], int]:
    """Header with its size in front, {name: (offset, dtype, shape)}, bytes of data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, t in sorted(like.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + nbytes(t)]}
        places[name] = (end, t.dtype, tuple(t.shape))
        end += nbytes(t)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places, end


def rename(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    if os.name != "posix":
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """A file that is there wholly or as it was."""
    partial = path.with_name(path.name + _PARTIAL)
    with open(partial, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    rename(partial, path)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


class Journal:
    """In the folder while it is being written: what it is made of, and the sizes and checksums of its whole files."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """Raises ValueError for a folder that holds anything else than the beginning of just this."""
        self._path, self._options = folder / JOURNAL, json.loads(json.dumps(options))
        self._done: dict[str, list[int]] = {}
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not self._path.exists():
            raise ValueError(f"{folder} is not empty, and not the beginning of this: give another folder")
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            given, self._done = found["options"], dict(found["done"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._path} is damaged: delete {folder} and begin anew") from None
        differ = [name for name in {**given, **self._options} if given.get(name) != self._options.get(name)]
        if differ:
            was = ", ".join(f"{name} {given.get(name)!r}, now {self._options.get(name)!r}" for name in differ)
            raise ValueError(f"{folder} was begun with other options ({was}): give the same, or another folder")

    def has(self, path: Path) -> bool:
        """Whether the file was finished and is still what it was."""
        size, crc = self._done.get(path.name, (-1, -1))
        return path.exists() and path.stat().st_size == size and checksum(path) == crc

    def add(self, path: Path) -> None:
        self._done[path.name] = [path.stat().st_size, checksum(path)]
        self.write()

    def write(self) -> None:
        write_text(self._path, json.dumps({"options": self._options, "done": self._done}))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

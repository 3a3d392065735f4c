"""What became of a model's modules: data, and a table of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from .backends.base import resolve
from .blocks import RoutedBlock, experts_of
from .experts import QuantizedExperts
from .linear import QuantizedLinear
from .storage import QuantizedModule

_LEFT = "_moe_ops_left"
OPENED = "experts' Linears"  # kind of a row that stands for Linears which have rows of their own


@dataclass(frozen=True)
class Row:
    """One module. `format` is None where it stays float, and `note` says why. Bytes are of weights and scales."""

    name: str
    kind: str
    format: str | None
    backend: str | None
    bytes_before: int
    bytes_after: int
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """`rows` is the data, in the order of the modules; `str()` a table where layers that fared alike share a line."""

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        return sum(r.bytes_before for r in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(r.bytes_after for r in self.rows)

    def __str__(self) -> str:
        lines: dict[tuple, list[Row]] = {}
        for r in self.rows:
            key = (re.sub(r"\d+", "*", r.name), r.kind, r.format, r.backend, r.note)
            lines.setdefault(key, []).append(r)
        cells = [("modules", "", "kind", "format", "backend", "before", "after", "note")]
        for (name, kind, fmt, backend, note), rows in lines.items():
            before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
            shown = name if len(rows) > 1 else rows[0].name
            count = f"x {len(rows)}" if len(rows) > 1 else ""
            texts = (fmt or "-", backend or "-", _size(before), _size(after), note)
            cells.append((shown or "(the model)", count, kind, *texts))
        cells.append(("total", "", "", "", "", _size(self.bytes_before), _size(self.bytes_after), ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = {1, 5, 6}
        padded = [
            [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            for row in cells
        ]
        return "\n".join("  ".join(row).rstrip() for row in padded)


def summary(model: nn.Module) -> Summary:
    """What `quantize_` did to the model: a row for every quantized module, and for what was left, with the reason."""
    left: dict[str, Row] = {r.name: r for r in model.__dict__.get(_LEFT, ())}
    rows = []
    routed = {id(experts_of(m)) for m in model.modules() if isinstance(m, RoutedBlock)}
    for name, m in model.named_modules():
        if isinstance(m, QuantizedModule):
            kind = "experts" if isinstance(m, QuantizedExperts) else "linear"
            note = _note(m, routed)
            backend = m.backend or resolve(None)[0]
            rows.append(Row(name, kind, m.format, backend, _float_bytes(m), m.bytes_stored(), note))
        elif name in left:
            size = 0 if left[name].kind == OPENED else sum(p.numel() * p.element_size() for p in m.parameters())
            rows.append(replace(left[name], bytes_before=size, bytes_after=size))
    return Summary(tuple(rows))


def _note(m: QuantizedModule, routed: set[int]) -> str:
    if m.trained is not None:
        gradients = f", gradients in {m.trained.gradients}" if m.trained.gradients else ""
        return f"trained: quantized to {m.trained.format} at each step{gradients}"
    if not isinstance(m, QuantizedExperts):
        return ""
    dense = "every expert runs on every row: the block's routing was not read"
    unchecked = "read from shapes alone: there was nothing to compare with"
    notes = {dense: m.spec.call == "dense" and id(m) not in routed, unchecked: not m.spec.checked}
    return "; ".join(text for text, applies in notes.items() if applies)


def remember_left(model: nn.Module, rows: list[Row]) -> None:
    """Keep, on the root module, what was left and why."""
    model.__dict__[_LEFT] = tuple(rows)


def forget_left(model: nn.Module) -> None:
    model.__dict__.pop(_LEFT, None)


def _float_bytes(m: QuantizedModule) -> int:
    if isinstance(m, QuantizedExperts):
        numel = m.spec.num_experts * sum(s * n * k for _, s, n, k in m.spec.matrices)
    else:
        assert isinstance(m, QuantizedLinear)
        numel = m.in_features * m.out_features
    return numel * m.float_dtype.itemsize


def _size(n: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"

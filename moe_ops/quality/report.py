"""QualityReport, what `compare` found, and Comparison, several of them beside each other. Data, and tables of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Cells = list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """One experts module. None where it could not be measured.

    error: |difference| / |reference| of its output on the reference's inputs, ids and weights; stream_error: of what
    leaves its decoder layer, as it comes; flips: share of tokens whose set of experts differs.
    """

    name: str
    error: float | None
    stream_error: float | None
    flips: float | None

    @property
    def snr_db(self) -> float | None:
        """-20 log10(error): inf for equal outputs."""
        return _decibel(self.error)

    @property
    def stream_snr_db(self) -> float | None:
        return _decibel(self.stream_error)

    def as_dict(self) -> dict[str, Any]:
        return _finite(asdict(self) | {"snr_db": self.snr_db, "stream_snr_db": self.stream_snr_db})


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """A token where the two models disagree most.

    Token `position` (`token_id`) of row `row` of batch `batch`; `sequence` counts rows through all batches. kl in nats.
    context_ids: the last tokens that were read when it was predicted; top-1s: what each model expected.
    """

    kl: float
    batch: int
    row: int
    sequence: int
    position: int
    token_id: int
    context_ids: tuple[int, ...]
    reference_top1: int
    model_top1: int


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """Losses and kl in nats, means over `tokens`, those that are predicted, of `tokens_read`. `str()` is a table.

    rows: a LayerQuality for each experts module. kl_histogram: (upper edge, tokens). Sizes: bytes of all parameters
    and buffers, None for a function.
    """

    tokens: int
    tokens_read: int
    num_bytes: int | None
    reference_loss: float
    loss: float
    kl: float
    kl_p99: float
    top1_agreement: float
    reference_size: int | None
    size: int | None
    rows: tuple[LayerQuality, ...]
    worst: tuple[WorstToken, ...]
    kl_histogram: tuple[tuple[float, int], ...]
    notes: tuple[str, ...] = ()

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def reference_bits_per_token(self) -> float:
        return self.reference_loss / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """bits per token * tokens read / bytes: as if the first token of each sequence cost what the others do."""
        return self.num_bytes and self.bits_per_token * self.tokens_read / self.num_bytes

    @property
    def reference_bits_per_byte(self) -> float | None:
        return self.num_bytes and self.reference_bits_per_token * self.tokens_read / self.num_bytes

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float:
        return _exp(self.reference_loss)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: an infinite number is None there (of equal outputs, whose error is 0)."""
        derived = ("bits_per_token", "bits_per_byte", "perplexity")
        both = {name: getattr(self, name) for d in derived for name in (d, f"reference_{d}")}
        rows = {"rows": [row.as_dict() for row in self.rows]}
        return _finite(asdict(self) | both) | rows

    def plot(self, folder: str | Path) -> list[Path]:
        """Writes PNG files: error by layer, routing flips by layer, histogram of KL. Needs matplotlib."""
        return Comparison({"model": self}).plot(folder)

    def html(self, path: str | Path, decode: Callable[[list[int]], str] | None = None) -> Path:
        """Writes one page, its plots in it. decode: token ids -> text, for the worst tokens. Needs matplotlib."""
        return Comparison({"model": self}).html(path, decode)

    def cells(self) -> Cells:
        """Reference and model, measure by measure."""
        bytes_ = [("bits per byte", self.reference_bits_per_byte, self.bits_per_byte)] if self.num_bytes else []
        table: Cells = [("", "reference", "model", "change")]
        for name, before, after in [
            *bytes_, ("bits per token", self.reference_bits_per_token, self.bits_per_token),
            ("loss (nats per token)", self.reference_loss, self.loss),
            ("perplexity", self.reference_perplexity, self.perplexity),
        ]:  # fmt: skip
            assert before is not None and after is not None
            table.append((name, f"{before:.4f}", f"{after:.4f}", _change(before, after)))
        table.append(("KL(reference || model), nats", "", f"{self.kl:.3g}", ""))
        table.append(("  99th percentile", "", f"{self.kl_p99:.3g}", ""))
        table.append(("top-1 agreement", "", f"{self.top1_agreement:.2%}", ""))
        sizes = ["-" if s is None else f"{s:,}" for s in (self.reference_size, self.size)]
        table.append(("bytes", *sizes, _change(self.reference_size, self.size)))
        return table

    def layer_cells(self) -> Cells:
        table: Cells = [("layer", "experts' SNR, same input", "residual stream's SNR", "router flips")]
        for row in self.rows:
            decibels = (_text(x, "{:.1f} dB") for x in (row.snr_db, row.stream_snr_db))
            table.append((row.name or "(the model)", *decibels, _text(row.flips, "{:.2%}")))
        return table

    def worst_cells(self, decode: Callable[[list[int]], str] | None = None) -> Cells:
        def shown(*ids: int) -> str:
            return repr(decode(list(ids))) if decode else " ".join(map(str, ids))

        table: Cells = [("KL", "sequence", "position", "context", "token", "reference's top-1", "model's top-1")]
        for w in self.worst:
            ids = shown(w.token_id), shown(w.reference_top1), shown(w.model_top1)
            table.append((f"{w.kl:.3g}", str(w.sequence), str(w.position), shown(*w.context_ids), *ids))
        return table

    def __str__(self) -> str:
        parts = [aligned(self.cells())] + ([aligned(self.layer_cells())] if self.rows else []) + list(self.notes)
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Comparison:
    """{name of a format: its report}, against one reference. `str()` is a table of size and quality."""

    reports: Mapping[str, QualityReport]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each format, without its layers."""
        drop = ("rows", "worst", "kl_histogram", "notes")
        return [
            {"format": name} | {k: v for k, v in report.as_dict().items() if k not in drop}
            for name, report in self.reports.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        return {name: report.as_dict() for name, report in self.reports.items()}

    def plot(self, folder: str | Path) -> list[Path]:
        """Writes PNG files: error and routing flips by layer, histogram of KL, and size against quality."""
        from .plots import save

        return save(self, Path(folder))

    def html(self, path: str | Path, decode: Callable[[list[int]], str] | None = None) -> Path:
        """Writes one page, its plots in it. decode: token ids -> text, for the worst tokens."""
        from .page import write

        return write(self, Path(path), decode)

    def cells(self) -> Cells:
        """A line for the reference, and one for each format."""
        first = next(iter(self.reports.values()))
        unit = "bits per byte" if first.num_bytes else "bits per token"
        table: Cells = [("format", unit, "change", "KL", "KL p99", "top-1", "worst layer", "flips", "bytes")]
        before = first.reference_bits_per_byte or first.reference_bits_per_token
        size = _text(first.reference_size, "{:,}")
        table.append(("reference", f"{before:.4f}", "", "", "", "", "", "", size))
        for name, r in self.reports.items():
            after = r.bits_per_byte or r.bits_per_token
            decibels = [row.snr_db for row in r.rows if row.snr_db is not None]
            flips = [row.flips for row in r.rows if row.flips is not None]
            table.append((
                name, f"{after:.4f}", _change(before, after), f"{r.kl:.3g}", f"{r.kl_p99:.3g}",
                f"{r.top1_agreement:.2%}", _text(min(decibels, default=None), "{:.1f} dB"),
                _text(sum(flips) / len(flips) if flips else None, "{:.2%}"), _text(r.size, "{:,}"),
            ))  # fmt: skip
        return table

    def __str__(self) -> str:
        return aligned(self.cells())


def combine(reports: Mapping[str, QualityReport]) -> Comparison:
    """{name of a format: its report} -> format against size and quality.

    Raises ValueError for no reports, and for reports of other tokens or of another reference.
    """
    if not reports:
        raise ValueError("there are no reports to combine")
    first_name, first = next(iter(reports.items()))
    for name, r in reports.items():
        if (r.tokens, r.tokens_read, r.num_bytes) != (first.tokens, first.tokens_read, first.num_bytes):
            raise ValueError(f"{name} was measured on {r.tokens} tokens of {r.num_bytes} bytes, {first_name} on"
                             f" {first.tokens} of {first.num_bytes}")  # fmt: skip
        if not math.isclose(r.reference_loss, first.reference_loss, rel_tol=1e-4):
            raise ValueError(f"{name} was measured against a reference with loss {r.reference_loss:.4f}, {first_name}"
                             f" against one with {first.reference_loss:.4f}")  # fmt: skip
    return Comparison(dict(reports))


def aligned(cells: Cells) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
             for row in cells]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _decibel(error: float | None) -> float | None:
    if error is None:
        return None
    return -20 * math.log10(error) if 0 < error < math.inf else math.inf if error == 0 else -math.inf


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _text(value: Any, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _change(before: float | None, after: float | None) -> str:
    return "-" if not before or after is None else f"{after / before - 1:+.2%}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Plots of a Comparison: error and routing flips by layer, histogram of KL, format against size and quality."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import Comparison, LayerQuality

_COLOURS = ("#2f6db5", "#d9772b", "#3d9455", "#b8405e", "#7a5bb0", "#8a6d3b", "#2a9d9d", "#666666")


def figure_class() -> Any:
    """Raises ImportError without matplotlib, and says how to get it."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no state, no window
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'quantized-moe-ops[plots]'") from None
    return Figure


def images(comparison: Comparison) -> dict[str, bytes]:
    """{name: PNG} of the plots that there is data for. Raises ImportError without matplotlib."""
    made, new_figure = {}, figure_class()
    for name, draw in PLOTS.items():
        figure = new_figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes, comparison):
            continue
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        made[name] = file.getvalue()
    return made


def save(comparison: Comparison, folder: Path) -> list[Path]:
    found = images(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in found.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(data)
    return paths


def _by_layer(axes: Any, comparison: Comparison, value: Callable[[LayerQuality], float | None], **style: Any) -> bool:
    drawn = False
    for n, (name, report) in enumerate(comparison.reports.items()):
        points = [(i, y) for i, row in enumerate(report.rows) if (y := value(row)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=_COLOURS[n % len(_COLOURS)], marker=".",
                      **{"label": name, **style})  # fmt: skip
            drawn = True
    rows = next(iter(comparison.reports.values())).rows
    axes.set_xlabel("experts, in the model's order" if len(rows) > 1 else "experts")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return drawn


def _errors(axes: Any, comparison: Comparison) -> bool:
    """A logarithm of 0 has no place: equal outputs are not drawn."""
    drawn = _by_layer(axes, comparison, lambda row: row.error or None)
    streams = _by_layer(axes, comparison, lambda row: row.stream_error or None, linestyle=":", label=None)
    if drawn or streams:
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    axes.set_ylabel("relative error")
    axes.set_title("Error by layer: experts on the same input; dotted, the residual stream as it comes", fontsize=10)
    return drawn or streams


def _flips(axes: Any, comparison: Comparison) -> bool:
    drawn = _by_layer(axes, comparison, lambda row: None if row.flips is None else 100 * row.flips)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("% of tokens")
    axes.set_title("Routing flips by layer: tokens that chose another set of experts", fontsize=10)
    if drawn:
        axes.legend(fontsize="small")
    return drawn


def _histogram(axes: Any, comparison: Comparison) -> bool:
    for n, (name, report) in enumerate(comparison.reports.items()):
        edges, counts = zip(*report.kl_histogram, strict=True)
        shares = [100 * c / report.tokens for c in counts]
        axes.step(edges, shares, where="pre", label=name, color=_COLOURS[n % len(_COLOURS)])
        axes.axvline(report.kl or edges[0], color=_COLOURS[n % len(_COLOURS)], linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("nats, bins of a quarter of an octave")
    axes.set_ylabel("% of tokens")
    axes.set_title("KL(reference || model) of each token; dashed, the mean", fontsize=10)
    axes.legend(fontsize="small")
    return True


def _sizes(axes: Any, comparison: Comparison) -> bool:
    """More than one format, or it would be one point."""
    sized = {name: r for name, r in comparison.reports.items() if r.size is not None}
    if len(sized) < 2:
        return False
    for n, (name, r) in enumerate(sized.items()):
        assert r.size is not None
        point = (r.size / 1e6, r.bits_per_byte or r.bits_per_token)
        axes.scatter(*point, color=_COLOURS[n % len(_COLOURS)], zorder=3)
        axes.annotate(name, point, textcoords="offset points", xytext=(6, 4), fontsize=9)
    first = next(iter(sized.values()))
    axes.axhline(first.reference_bits_per_byte or first.reference_bits_per_token, color="black", linewidth=0.8,
                 linestyle="--", label="reference")  # fmt: skip
    axes.margins(0.15)
    axes.legend(fontsize="small")
    axes.set_xlabel("MB of parameters and buffers")
    axes.set_ylabel("bits per byte" if first.num_bytes else "bits per token")
    axes.set_title("Format against size and quality (lower left is better)", fontsize=10)
    return True


PLOTS: dict[str, Callable[[Any, Comparison], bool]] = {
    "size_and_quality": _sizes,
    "error_by_layer": _errors,
    "router_flips": _flips,
    "kl_histogram": _histogram,
}

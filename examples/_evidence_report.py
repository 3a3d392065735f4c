"""What evidence.py found, as markdown and as plots: both read what is in its JSON, and nothing else."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_ops.quality.plots import figure_class

FULL = "bf16"
COLOURS = ("#222222", "#2f6db5", "#d9772b", "#3d9455", "#b8405e", "#7a5bb0", "#8a6d3b", "#2a9d9d", "#8c8c8c", "#c9a227",
           "#d66fb0", "#6b8fd6")  # fmt: skip
MARKERS = "os^Dvp*XP<>h"

QUALITY = ("format", "bits per byte", "change", "KL, nats", "top-1", "router flips", "bytes")
WIDTHS = (21, 13, 8, 9, 8, 12, 13)
TRAINING = ("precision", "last tenth, bits per byte", "change", "held-out text", "change")
LORA = ("weights", "held-out before", "held-out after", "change", "last tenth, bits per token", "change")


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], widths: Sequence[int] | None = None) -> list[str]:
    lines = list(lines)
    widths = widths or [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [row(head, widths), rule, *(row(line, widths) for line in lines)]


def change(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.2%}"


def mean_flips(report: dict[str, Any]) -> float | None:
    """Share of tokens with other experts, mean over layers."""
    flips = [layer["flips"] for layer in report["rows"] if layer["flips"] is not None]
    return sum(flips) / len(flips) if flips else None


def last_tenth(values: Sequence[float]) -> float:
    """A loss that is not of one window only."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def quality_lines(formats: dict[str, dict[str, Any]], head: bool = True) -> list[str]:
    """evidence.py prints one as soon as it is found: widths do not depend on the others."""
    lines = []
    for name, r in formats.items():
        flips = mean_flips(r)
        lines.append((
            name, f"{r['bits_per_byte']:.4f}", change(r["bits_per_byte"], r["reference_bits_per_byte"]),
            f"{r['kl']:.2e}", f"{r['top1_agreement']:.2%}", "-" if flips is None else f"{flips:.2%}",
            f"{r['quantizable_bytes']:,}",
        ))  # fmt: skip
    return table(QUALITY, lines, WIDTHS)[0 if head else 2 :]


def _quality(found: dict[str, Any]) -> list[str]:
    first = next(iter(found["formats"].values()))
    refused = [f"{name}: {why}" for name, why in found["refused"].items()]
    return [
        f"Against the model in {FULL}, as transformers runs it: {first['reference_bits_per_byte']:.4f} bits per byte on"
        f" {found['num_bytes']:,} bytes, {found['reference_bytes']:,} bytes of weights that formats are for.",
        "", *quality_lines(found["formats"]), *(["", *refused] if refused else []),
    ]  # fmt: skip


def _training(found: dict[str, Any]) -> list[str]:
    ends = {name: (last_tenth(c["bits_per_byte"]), c["held_out_bits_per_byte"]) for name, c in found.items()}
    base_name, base = next(iter(ends.items()))
    first = found[base_name]
    lines = [
        (name, f"{loss:.4f}", change(loss, base[0]), f"{held:.4f}", change(held, base[1]))
        for name, (loss, held) in ends.items()
    ]
    return [
        f"A small model, {first['steps']} steps of {first['batch']} windows of {first['window']} bytes, seed"
        f" {first['seed']}, the same windows for each; changes are against {base_name}.", "", *table(TRAINING, lines),
    ]  # fmt: skip


def _lora(found: dict[str, Any]) -> list[str]:
    base = found[FULL]
    lines = [
        (
            name, f"{f['held_out_bits_per_byte_before']:.4f}", f"{f['held_out_bits_per_byte']:.4f}",
            change(f["held_out_bits_per_byte"], base["held_out_bits_per_byte"]),
            f"{last_tenth(f['bits_per_token']):.4f}",
            change(last_tenth(f["bits_per_token"]), last_tenth(base["bits_per_token"])),
        )
        for name, f in found.items()
    ]  # fmt: skip
    return [
        f"LoRA on {' and '.join(base['targets'])}, {base['trained_parameters']:,} parameters, over weights in each"
        f" format, {len(base['bits_per_token'])} steps on another text than the model's; changes are against {FULL}.",
        "", *table(LORA, lines),
    ]  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    parts = []
    for part, (title, text, _) in PARTS.items():
        if part in found:
            run = found[part]["run"]
            where = f"{run['device']}, torch {run['torch']}, transformers {run['transformers']}, {run['seconds']:.0f} s"
            parts += [f"## {title}", "", *text(found[part]["results"]), "", f"({where})", ""]
    return "\n".join(parts)


# Plots


def plot(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes PNG files of the parts that are there. Raises ImportError without matplotlib."""
    paths = []
    for part, (_, _, drawings) in PARTS.items():
        for name, draw in drawings.items() if part in found else ():
            figure = figure_class()(dpi=110, layout="constrained")
            draw(figure, found[part]["results"])
            for axes in figure.axes:
                axes.grid(alpha=0.25, linewidth=0.6)
                axes.spines[["top", "right"]].set_visible(False)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def _draw_formats(figure: Any, found: dict[str, Any]) -> None:
    """A line for each format, a panel for each measure."""
    formats = found["formats"]
    figure.set_size_inches(11, 1.3 + 0.24 * len(formats))
    panels: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("change of bits per byte, %", lambda r: 100 * (r["bits_per_byte"] / r["reference_bits_per_byte"] - 1)),
        ("KL(bf16 || format), nats per token", lambda r: r["kl"] or None),
        ("router flips, % of tokens", lambda r: None if (f := mean_flips(r)) is None else 100 * f),
        ("MB of quantizable weights", lambda r: r["quantizable_bytes"] / 1e6),
    ]
    rows = range(len(formats))
    for n, (axes, (label, value)) in enumerate(zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True)):
        values = [value(report) for report in formats.values()]
        if n == len(panels) - 1:
            axes.barh(rows, values, height=0.6, color="#9db8d9")
        else:
            points = [(x, y) for y, x in enumerate(values) if x is not None]
            axes.scatter(*(zip(*points, strict=True) if points else ((), ())), color=COLOURS[1], s=24, zorder=3)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
    figure.axes[0].axvline(0, color="black", linewidth=0.8)
    figure.axes[1].set_xscale("log")
    figure.axes[0].set_yticks(rows, formats)
    figure.axes[0].set_ylim(len(formats) - 0.4, -0.6)
    figure.axes[2].set_xlim(left=0)
    figure.suptitle("What each format costs the model, against bf16", fontsize=11)


def _draw_layers(figure: Any, found: dict[str, Any]) -> None:
    """Formats with a name of their own: pairs would hide each other."""
    shown = {name: r for name, r in found["formats"].items() if "/" not in name and name != FULL} or found["formats"]
    figure.set_size_inches(11, 4.4)
    left, right = figure.subplots(1, 2)
    for n, (name, report) in enumerate(shown.items()):
        style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 5}
        layers = list(enumerate(report["rows"]))
        for axes, key, factor in ((left, "error", 1), (right, "flips", 100)):
            points = [(i, factor * layer[key]) for i, layer in layers if layer[key]]
            axes.plot(*(zip(*points, strict=True) if points else ((), ())), linewidth=1.2, label=name, **style)
    left.set_yscale("log")
    left.set_ylabel("|difference| / |output| of the experts, same input")
    right.set_ylabel("% of tokens that chose other experts")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle("Error and other routes, by layer", fontsize=11)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values, of fewer at the start."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _width(curves: dict[str, list[float]]) -> int:
    """Steps to smooth over: a tenth of them, at most 20."""
    return max(1, min(20, min(map(len, curves.values())) // 10))


def _draw_curves(axes: Any, curves: dict[str, list[float]], unit: str) -> None:
    """Thin, each step; thick, smoothed. The steep start is left out of the scale."""
    width, smoothed = _width(curves), []
    for n, (name, values) in enumerate(curves.items()):
        steps, colour = range(1, len(values) + 1), COLOURS[n % len(COLOURS)]
        smoothed.append(smooth(values, width))
        axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.2)
        axes.plot(steps, smoothed[-1], color=colour, linewidth=1.4, label=name)
    lowest, highest = min(map(min, smoothed)), max(line[len(line) // 10] for line in smoothed)
    axes.set_ylim(lowest - 0.15 * (highest - lowest), highest + 0.25 * (highest - lowest))
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_title(f"training loss; thick, mean of {width} steps", fontsize=10)
    axes.legend(fontsize=9)


def _draw_training(figure: Any, found: dict[str, Any]) -> None:
    curves = {name: curve["bits_per_byte"] for name, curve in found.items()}
    figure.set_size_inches(11, 4.4)
    left, right = figure.subplots(1, 2)
    _draw_curves(left, curves, "bits per byte")
    width = _width(curves)
    (base_name, base), *others = ((name, smooth(values, width)) for name, values in curves.items())
    right.axhline(0, color=COLOURS[0], linewidth=1.4)
    for n, (name, values) in enumerate(others, 1):
        differences = [100 * (a / b - 1) for a, b in zip(values, base, strict=False)]
        right.plot(range(1, len(differences) + 1), differences, color=COLOURS[n % len(COLOURS)], label=name)
    right.set_xlabel("step")
    right.set_ylabel(f"% above {base_name}, mean of {width} steps")
    right.set_title(f"difference from {base_name}", fontsize=10)
    figure.suptitle("A small model trained from one seed, on the same windows", fontsize=11)


def _draw_lora(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(11, 4.4)
    left, right = figure.subplots(1, 2)
    _draw_curves(left, {name: f["bits_per_token"] for name, f in found.items()}, "bits per token")
    base = found[FULL]["held_out_bits_per_byte"]
    for n, f in enumerate(found.values()):
        ends = [100 * (f[key] / base - 1) for key in ("held_out_bits_per_byte_before", "held_out_bits_per_byte")]
        right.barh(n, ends[1], height=0.55, color=COLOURS[n % len(COLOURS)])
        right.annotate(f" {ends[1]:+.2f} %, before {ends[0]:+.1f} %", (max(ends[1], 0), n), va="center", fontsize=8)
    right.axvspan(-1, 1, color="#3d9455", alpha=0.12, label="within 1 %")
    right.set_yticks(range(len(found)), found)
    right.invert_yaxis()
    right.set_xlim(left=min(-1.2, right.get_xlim()[0]), right=max(2.2, 1.7 * right.get_xlim()[1]))
    right.set_xlabel(f"% above LoRA on {FULL}, held-out text")
    right.set_title("after fine-tuning", fontsize=10)
    right.legend(fontsize=9, loc="lower right")
    figure.suptitle("LoRA over quantized weights, fine-tuned on another text", fontsize=11)


Drawings = dict[str, Callable[[Any, dict[str, Any]], None]]
PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]], Drawings]] = {
    "quality": ("Quality of each format", _quality, {"quality": _draw_formats, "quality_by_layer": _draw_layers}),
    "training": ("Training", _training, {"training": _draw_training}),
    "lora": ("LoRA over quantized weights", _lora, {"lora": _draw_lora}),
}

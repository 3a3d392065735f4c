"""What the benchmark measured, as a table: our layer, its floors, its error, the best peer here, the best shipped."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from _bench_timing import Ceilings, Floors

ANCHORS = Path(__file__).with_name("anchors_h200.json")
LIMIT = 1.5  # cells farther behind the best shipped peer are named below the table
OWN = ("op", "compiled")


@dataclass
class Cell:
    """One format, shape and token count: every layer's {"us", "error"}, or {"failed": reason}, by label."""

    format: str
    shape: str
    tokens: int
    experts_touched: float
    floors: Floors
    tolerance: float
    layers: dict[str, dict] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.format} {self.shape} M={self.tokens}"

    def us(self, label: str) -> float | None:
        return self.layers.get(label, {}).get("us")

    def best_peer(self) -> tuple[float, str] | None:
        """The fastest correct peer of this run."""
        rows = ((r, label) for label, r in self.layers.items() if label not in OWN and "us" in r)
        return min(((r["us"], label) for r, label in rows if r["error"] <= self.tolerance), default=None)

    def wrong(self) -> list[str]:
        """Our layers that failed or are off by more than the tolerance; NaN is off."""
        return [
            label
            for label in OWN
            if label in self.layers and not self.layers[label].get("error", math.nan) <= self.tolerance
        ]


@dataclass(frozen=True)
class Shipped:
    """The best shipped peer of a cell, and how many floors it took, each with the ceilings of its own run."""

    us: float
    roofline: float
    stream: float
    peer: str


def shipped_peers() -> dict[tuple[str, str, int], Shipped]:
    cells = json.loads(ANCHORS.read_text())["cells"]
    return {
        (format, shape, int(tokens)): Shipped(*row)
        for format, shapes in cells.items()
        for shape, rows in shapes.items()
        for tokens, row in rows.items()
    }


def ratios(cell: Cell, shipped: Shipped | None, label: str = "op") -> dict[str, float] | None:
    """Ours over the best shipped, below 1 where we are faster: multiples of either floor, and plain microseconds."""
    us = cell.us(label)
    if us is None or shipped is None:
        return None
    floors = cell.floors
    return {
        "stream": us / floors.stream / shipped.stream,
        "roofline": us / floors.roofline / shipped.roofline,
        "us": us / shipped.us,
    }


def ceilings_line(ceilings: Ceilings) -> str:
    table = "  ".join(f"{mb:g}: {us:.2f}" for mb, us in ceilings.stream_us.items())
    return (
        f"ceilings: copy {ceilings.copy_gbs:.0f} GB/s, streaming read {ceilings.read_gbs:.0f} GB/s, "
        f"bf16 {ceilings.bf16_tflops:.4g} TFLOP/s, fp8 {ceilings.fp8_tflops:.4g} TFLOP/s\n"
        f"cold read of MB, us: {table}"
    )


def _row(cell: Cell, shipped: Shipped | None) -> str:
    op, compiled, floors = cell.layers.get("op", {}), cell.us("compiled"), cell.floors
    us = op.get("us")
    ratio = ratios(cell, shipped)
    peer = cell.best_peer()
    times = (
        f"{us:9.1f} {us / floors.roofline:6.2f} {us / floors.stream:6.2f} {op['error']:7.4f}"
        if us
        else f"{'failed':>9}" + " " * 22
    )
    return " ".join(
        (
            f"{cell.format:10} {cell.shape:4} {cell.tokens:5}",
            times,
            f"{compiled:9.1f}" if compiled else f"{'-':>9}",
            f"{peer[0]:9.1f} {peer[1]:6}" if peer else f"{'-':>9} {'':6}",
            f"{shipped.us:9.1f}" if shipped else f"{'-':>9}",
            f"{ratio['stream']:5.2f}" if ratio else f"{'-':>5}",
            "WRONG" if cell.wrong() else "",
        )
    ).rstrip()


def summary_lines(cells: Iterable[Cell], shipped: Mapping[tuple[str, str, int], Shipped], label: str) -> list[str]:
    """Worst cell, geometric mean and cells beyond the limit, of one of our layers against the best shipped peers."""
    rated = []
    for cell in cells:
        ratio = ratios(cell, shipped.get((cell.format, cell.shape, cell.tokens)), label)
        if ratio:
            rated.append((ratio, cell))
    if not rated:
        return []
    lines = []
    for key, what in (
        ("stream", "multiples of the streaming floor"),
        ("roofline", "of the roofline"),
        ("us", "plain us"),
    ):
        worst, cell = max(((r[key], c) for r, c in rated), key=lambda pair: pair[0])
        mean = math.exp(sum(math.log(r[key]) for r, _ in rated) / len(rated))
        lines.append(
            f"{label} vs best shipped, {what}: worst {worst:.2f} at {cell}, "
            f"geometric mean {mean:.2f} over {len(rated)} cells"
        )
    beyond = [f"{c} {r['stream']:.2f}" for r, c in rated if r["stream"] > LIMIT]
    lines.append(f"{label}: {len(beyond)} cells beyond {LIMIT}" + (": " + ", ".join(beyond) if beyond else ""))
    return lines


def print_table(cells: list[Cell], title: str, legend: str, compare: bool) -> int:
    """Prints one row per cell and the summary; returns how many cells are wrong."""
    shipped = shipped_peers() if compare else {}
    print(
        f"\n{title}\nxroof, xstrm: multiples of the two floors; vs: xstrm over that of the best shipped peer; {legend}"
    )
    print(
        f"{'format':10} {'':4} {'M':>5} {'op us':>9} {'xroof':>6} {'xstrm':>6} {'error':>7} {'compiled':>9} "
        f"{'peer us':>9} {'':6} {'shipped':>9} {'vs':>5}"
    )
    for cell in cells:
        print(_row(cell, shipped.get((cell.format, cell.shape, cell.tokens))))
    wrong = [(str(cell), cell.wrong()) for cell in cells if cell.wrong()]
    for label in OWN:
        for line in summary_lines(cells, shipped, label):
            print(line)
    if wrong:
        print("failed or wrong: " + "; ".join(f"{cell} ({', '.join(labels)})" for cell, labels in wrong))
    return len(wrong)


SPREAD = ((32, 1.015), (512, 1.025), (math.inf, 1.08))  # up to so many tokens, a ratio beyond this is a loss


def markdown(cells: list[Cell], title: str, ceilings: Ceilings) -> str:
    """Every cell beside its best peer, shipped (with the ceilings of its own run) or of this run; means and losses."""
    shipped, lines = shipped_peers(), [f"{title}\n", *(f"{each}  " for each in ceilings_line(ceilings).split("\n")), ""]
    ratios_of: dict[str, list[float]] = {}
    lost: list[str] = []
    rows = ["| format | shape | M | us | x floor | best peer | x floor | ratio |", "|---|---|---|---|---|---|---|---|"]
    for cell in cells:
        us = cell.us("op")
        if us is None or cell.wrong():
            rows.append(f"| {cell.format} | {cell.shape} | {cell.tokens} | wrong or failed | | | | |")
            continue
        mine, peer = us / cell.floors.stream, _best(cell, shipped.get((cell.format, cell.shape, cell.tokens)))
        ours = f"| {cell.format} | {cell.shape} | {cell.tokens} | {us:.1f} | {mine:.2f} |"
        if peer is None:
            rows.append(f"{ours} - | | |")
            continue
        ratio = mine / peer[0]
        ratios_of.setdefault(cell.format, []).append(ratio)
        loss = ratio > next(limit for tokens, limit in SPREAD if cell.tokens <= tokens)
        lost += [f"{cell} {ratio:.2f}"] * loss
        rows.append(f"{ours} {peer[1]} | {peer[0]:.2f} | {'**' * loss}{ratio:.2f}{'**' * loss} |")
    means = [f"{name} {math.exp(-sum(map(math.log, each)) / len(each)):.2f} x" for name, each in ratios_of.items()]
    lines.append(f"Geometric mean of the speed over the best peer's: {', '.join(means) or '-'}.  ")
    lines.append(f"Slower than the best peer beyond the spread, {len(lost)}: {', '.join(lost) or 'none'}.\n")
    return "\n".join((*lines, *rows)) + "\n"


def _best(cell: Cell, shipped: Shipped | None) -> tuple[float, str] | None:
    """The smallest multiple of the streaming floor, and whose it is."""
    found = [(shipped.stream, shipped.peer)] if shipped is not None else []
    peer = cell.best_peer()
    if peer is not None:
        found.append((peer[0] / cell.floors.stream, f"{peer[1]} (this run)"))
    return min(found, default=None)

"""One self-contained HTML page of a Comparison: its tables, and its plots as images within."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path

from .plots import images
from .report import Cells, Comparison

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: pre; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; display: block; margin: 1rem 0; }
.note { color: #666; }
"""


def write(comparison: Comparison, path: Path, decode: Callable[[list[int]], str] | None) -> Path:
    """Raises ImportError without matplotlib, before the file is made."""
    pictures = [
        f'<img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in images(comparison).items()
    ]
    several = len(comparison.reports) > 1
    body = ["<h1>Quality against the reference</h1>"]
    body += ([_table(comparison.cells())] if several else []) + pictures
    for name, report in comparison.reports.items():
        body += ([f"<h2>{escape(name)}</h2>"] if several else []) + [_table(report.cells())]
        body += [_table(report.layer_cells())] if report.rows else []
        body += [f'<p class="note">{escape(note)}</p>' for note in report.notes]
        if report.worst:
            body += ["<h3>Tokens with the largest KL</h3>", _table(report.worst_cells(decode))]
    head = f'<meta charset="utf-8"><title>Quality</title><style>{_STYLE}</style>'
    page = f"<!doctype html>\n<html><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    path.write_text(page, encoding="utf-8")
    return path


def _table(cells: Cells) -> str:
    rows = ["".join(f"<th>{escape(c)}</th>" for c in cells[0])]
    rows += ["".join(f"<td>{escape(c)}</td>" for c in row) for row in cells[1:]]
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>"

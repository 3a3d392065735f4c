"""python -m moe_ops compare: a local checkpoint against copies of it in several formats, or quantized ones on disk."""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.load import load_quantized
from ..formats import FORMATS, Format
from ..quantize import quantize_
from ..rules import parse
from ..targets import plan
from . import text
from .measure import compare
from .plots import figure_class
from .report import Comparison, combine


def run(args: argparse.Namespace) -> Comparison:
    """Prints the table; writes what --html and --json ask for. Mistakes raise ValueError before a model runs."""
    given = _formats(args.formats)
    if args.html:
        figure_class()
    for path in filter(None, (args.html, args.json)):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no such folder")
    words = text.read_text(args.text, args.bytes)
    if args.quiet or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reference, tokenizer = _load(args.model, device)
    windows, num_bytes = text.cut(words, tokenizer, args.window)
    _check(reference, given)
    reports = {}
    for name, source in given.items():
        if not args.quiet and sys.stderr.isatty():
            print(f"{name} ...", file=sys.stderr)
        model = _quantized(reference, source, device)
        reports[name] = compare(reference, model, windows.split(text.BATCH), num_bytes=num_bytes,
                                progress=False if args.quiet else None)  # fmt: skip
        del model
    found = combine(reports)
    if args.json:
        Path(args.json).write_text(json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n")
    if args.html:
        found.html(args.html, tokenizer.decode)
    print("\n\n".join([str(found), *(str(r) for r in reports.values() if len(reports) == 1)]))
    return found


def _formats(given: str) -> dict[str, Format | Path]:
    """{name in the table: format, or the folder of a model that is quantized already}."""
    found: dict[str, Format | Path] = {}
    for word in filter(None, map(str.strip, given.split(","))):
        source = Path(word) if Path(word, "config.json").is_file() else FORMATS.resolve(word)
        name = source.resolve().name if isinstance(source, Path) else source.name
        if name in found:
            raise ValueError(f"--formats {given}: {name} is there twice")
        found[name] = source
    if not found:
        raise ValueError("--formats is empty: give names of formats, or folders, with commas between")
    return found


def _load(path: str, device: Any) -> tuple[nn.Module, text.Bytes | text.Tokenizer]:
    try:
        return text.load_float(path, device)
    except (RuntimeError, AssertionError) as e:  # a device that is not there
        raise ValueError(f"cannot use device {str(device)!r}: {str(e).splitlines()[0]}") from None


def _check(reference: nn.Module, given: dict[str, Format | Path]) -> None:
    """What a format cannot take is known before the first of them is measured."""
    for name, source in given.items():
        problems = plan(reference, parse(source, ()), strict=True).problems if isinstance(source, Format) else []
        if problems:
            raise ValueError(f"{name}: {problems[0]}")


def _quantized(reference: nn.Module, source: Format | Path, device: Any) -> nn.Module:
    if isinstance(source, Path):
        return load_quantized(source, device=device)
    return quantize_(deepcopy(reference), source, progress=False)

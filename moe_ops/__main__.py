"""python -m moe_ops convert | inspect | export | compare: checkpoint folders, from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m moe_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    p = commands.add_parser("convert", help="quantize a float checkpoint on disk, a tensor at a time")
    p.add_argument("source", metavar="SRC", help="folder of a float checkpoint")
    p.add_argument("target", metavar="DST", help="folder to write; interrupted, the same command goes on")
    p.add_argument("--format", action="append", metavar="NAME|PATTERN=NAME", help="a format, or patterns of modules"
                   " with theirs ('experts=int8' 'linear=none'); default fp8")  # fmt: skip
    p.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                   help="name, glob or re:... of what stays in float")
    p.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="as for save_pretrained (default 5GB)")
    p.add_argument("--no-strict", action="store_true", help="leave experts that cannot be quantized in float")
    p.add_argument("--trust-remote-code", action="store_true", help="run the model's own code from SRC")
    p.add_argument("--quiet", action="store_true", help="no progress bar")

    p = commands.add_parser("inspect", help="what a checkpoint holds; exit code 1 if something is wrong with it")
    p.add_argument("path", metavar="PATH")
    p.add_argument("--json", action="store_true", help="as JSON")

    p = commands.add_parser("export", help="a checkpoint of ours in the layout of compressed-tensors, for engines")
    p.add_argument("source", metavar="SRC", help="folder that save_pretrained or convert wrote")
    p.add_argument("target", metavar="DST", help="new folder")

    p = commands.add_parser("compare", help="what formats cost a model: loss, KL, routing and layers, on a text")
    p.add_argument("model", metavar="MODEL", help="folder of a float checkpoint of a language model")
    p.add_argument("--formats", default="fp8", metavar="NAME,...",
                   help="formats, or folders of quantized models, with commas between (default fp8)")
    p.add_argument("--text", required=True, metavar="FILE", help="text to measure on")
    p.add_argument("--bytes", type=int, default=1 << 17, metavar="N", help="how much of it (default %(default)s)")
    p.add_argument("--window", type=int, default=512, metavar="N", help="tokens that are read together (%(default)s)")
    p.add_argument("--html", metavar="OUT", help="write a page with plots, layers and the worst tokens")
    p.add_argument("--json", metavar="OUT", help="write everything as JSON")
    p.add_argument("--device", metavar="NAME", help="where both models run (default: cuda, where there is one)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _format(given: list[str] | None) -> str | dict[str, str | None]:
    given = given or ["fp8"]
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    chosen: dict[str, str | None] = {}
    for text in given:
        pattern, equals, name = text.rpartition("=")
        if not equals:
            raise ValueError(f"--format {text}: beside others, each is PATTERN=NAME")
        chosen[pattern] = None if name == "none" else name
    return chosen


def _run(args: argparse.Namespace) -> int:
    if args.command == "inspect":
        from .inspection import inspect

        report = inspect(args.path)
        print(json.dumps(report.data(), indent=2) if args.json else report)
        return 1 if report.problems else 0
    if args.command == "export":
        from .export import export

        export(args.source, args.target)
        return 0
    if args.command == "compare":
        from .quality.command import run

        run(args)
        return 0
    from .convert import convert

    convert(args.source, args.target, _format(args.format), ignore=args.ignore, strict=not args.no_strict,
            max_shard_size=args.max_shard_size, trust_remote_code=args.trust_remote_code,
            progress=False if args.quiet else None)  # fmt: skip
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on stderr; `inspect` gives 1 for a checkpoint with problems."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (ValueError, OSError, ImportError) as e:
        print(f"python -m moe_ops {args.command}: {'; '.join(str(e).split(chr(10)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m moe_ops {args.command}: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())

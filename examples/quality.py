"""Bits per byte of a whole model in every format, as a markdown table: its lines are printed as they are found.

    python examples/quality.py --model PATH --text FILE     a local checkpoint (a language model with experts)
    python examples/quality.py                              trains quickstart.py's model first, on its corpus

Change is against bf16, which is not quantized; bytes are those of the modules that formats are for, with their scales.
"""

import argparse
from copy import deepcopy

from quickstart import add_options, fail, model_and_text
from torch import Tensor, nn
from tqdm import tqdm

import moe_ops
from moe_ops.quality.text import bits_per_byte

FULL = "bf16"  # not quantized, in the checkpoint's own dtype: what the others are compared with
WIDTHS = (23, 13, 8, 14)


def line(*cells: str) -> str:
    name, *numbers = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return "| " + " | ".join([name.strip().ljust(WIDTHS[0]), *numbers]) + " |"


def measure(model: nn.Module, name: str, windows: Tensor, num_bytes: int) -> tuple[float, moe_ops.Summary]:
    quantized = moe_ops.quantize_(deepcopy(model), name, progress=False)
    return bits_per_byte(quantized, windows, num_bytes), moe_ops.summary(quantized)


def quantizable(summary: moe_ops.Summary) -> set[str]:
    """Of a model in FULL: experts, and the linear layers that only this format leaves as they are."""
    return {r.name for r in summary.rows if r.kind == "experts" or r.note == f"{FULL} is not quantized"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, num_bytes=1 << 17)
    parser.add_argument("--formats", nargs="+", default=list(moe_ops.FORMATS), metavar="NAME", help="only these")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        names = [FULL, *(moe_ops.FORMATS[name].name for name in args.formats if name != FULL)]
    except ValueError as error:
        fail(error)
    model, _, _, windows, num_bytes = model_and_text(args)

    tqdm.write(line("format", "bits per byte", "change", "bytes"))
    tqdm.write("|" + "|".join("-" * (width + 2) for width in WIDTHS) + "|")
    for name in tqdm(names, "formats"):
        try:
            bits, summary = measure(model, name, windows, num_bytes)
        except ValueError as error:  # the experts do not fit it
            if name == FULL:
                fail(error)
            tqdm.write(line(name, "-", "-", "-") + " " + " ".join(str(error).split()))
            continue
        if name == FULL:
            full, counted = bits, quantizable(summary)
        size = sum(row.bytes_after for row in summary.rows if row.name in counted)
        tqdm.write(line(name, f"{bits:.4f}", f"{bits / full - 1:+.2%}", f"{size:,}"))


if __name__ == "__main__":
    main()

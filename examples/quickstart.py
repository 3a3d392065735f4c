"""Trains a small Mixture-of-Experts on public-domain text, quantizes it, compiles it, and prints what came of it.

    python examples/quickstart.py                                           trains (minutes), then fp8
    python examples/quickstart.py --model PATH --format NAME --text FILE    a local checkpoint instead, without training

B windows, S tokens in each.
"""

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from train_small_moe import DEVICE, byte_ids, cast_, fail, fit, small_model, split, texts
from transformers.utils import logging

import moe_ops
from moe_ops.quality.text import WINDOW, Bytes, Tokenizer, bits_per_byte, cut, load_float, read_text  # noqa: F401

STEPS = 4000


def corpus() -> tuple[bytes, bytes]:
    """Training and held-out text: annual messages to Congress, 1790 to now, and the King James Bible."""
    return split(texts())


def load(path: str) -> tuple[nn.Module, Bytes | Tokenizer]:
    return load_float(path, DEVICE)


def train(text: bytes, seconds: float) -> nn.Module:
    """A small byte-level Qwen3-MoE, trained for STEPS steps or as far as the time goes."""
    model = small_model()
    fit(model, byte_ids(text), steps=STEPS, seconds=seconds)
    return cast_(model.eval(), torch.bfloat16)


def model_and_text(args: argparse.Namespace) -> tuple[nn.Module, Bytes | Tokenizer, bytes, Tensor, int]:
    """What the options of `add_options` ask for; last the text in windows (B, S), and the bytes that are in them."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        text = read_text(args.text, args.bytes) if args.text else corpus()[1][: args.bytes]
        model, tokenizer = load(args.model) if args.model else (train(corpus()[0], args.seconds), Bytes())
        windows, num_bytes = cut(text, tokenizer)
    except ValueError as error:
        fail(error)
    return model, tokenizer, text, windows, num_bytes


# Measurements


@torch.no_grad()
def time_per_token(model: Callable, ids: Tensor, rounds: int = 5) -> str:
    """Median time of a forward pass over ids (1, S), per token; the first pass, which compiles, does not count."""
    ids, times = ids.to(DEVICE), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model(ids).logits[0, -1, 0].item()  # waits for the GPU
        times.append(time.perf_counter() - start)
    return f"{sorted(times[1:])[rounds // 2] / ids.numel() * 1e6:.1f} us"


def experts_size(model: nn.Module, which: str) -> int:
    return sum(getattr(row, which) for row in moe_ops.summary(model).rows if row.kind == "experts")


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Bytes | Tokenizer, prompt: bytes, new_tokens: int) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt)], device=DEVICE)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_k=20
    )
    return tokenizer.decode(out[0].tolist())


def no_compiler() -> str | None:
    """Why torch.compile cannot work here: it builds C++ for a CPU, and C launchers of the kernels for a GPU."""
    names = [os.environ.get("CXX"), "g++", "clang++"] if DEVICE == "cpu" else [os.environ.get("CC"), "gcc", "clang"]
    found = any(shutil.which(name) for name in names if name)
    return None if found else f"there is no {'C++' if DEVICE == 'cpu' else 'C'} compiler ({names[1]} or {names[2]})"


def measure(model: nn.Module, windows: Tensor, num_bytes: int) -> list[str]:
    """Bits per byte, and time per token eager and compiled."""
    bits = bits_per_byte(model, windows, num_bytes)
    eager = time_per_token(model, windows[:1])
    if no_compiler():
        return [f"{bits:.4f}", eager, "-"]
    torch._dynamo.reset()  # forget the model as it was before
    return [f"{bits:.4f}", eager, time_per_token(torch.compile(model), windows[:1])]


def print_table(names: tuple[str, str], before: list[str], after: list[str]) -> None:
    labels = ["", "bits per byte, held-out text", "size of the experts", "time per token, eager", "  compiled"]
    for label, *cells in zip(labels, [names[0], *before], [names[1], *after], strict=True):
        print(f"{label:30}" + "".join(f"{cell:>14}" for cell in cells))


def add_options(parser: argparse.ArgumentParser, num_bytes: int) -> None:
    parser.add_argument("--model", metavar="PATH", help="a local checkpoint, instead of training a model")
    parser.add_argument("--text", metavar="FILE", help="text to measure on, instead of held-out text of the corpus")
    parser.add_argument("--bytes", type=int, default=num_bytes, metavar="N", help="how much of it (%(default)s)")
    parser.add_argument("--seconds", type=float, default=110, metavar="N", help="train for so long (%(default)s)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, num_bytes=1 << 15)
    parser.add_argument("--format", default="fp8", metavar="NAME", help="one of moe_ops.FORMATS (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=200, metavar="N", help="of sampled text (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", "Dynamo detected")  # a cached function of transformers
    try:
        name = moe_ops.FORMATS[args.format].name
    except ValueError as error:
        fail(error)
    model, tokenizer, text, windows, num_bytes = model_and_text(args)

    float_name = str(model.dtype).removeprefix("torch.")
    before = measure(model, windows, num_bytes)
    try:
        moe_ops.quantize_(model, name)
    except ValueError as error:
        fail(error)
    after = measure(model, windows, num_bytes)
    sizes = [f"{experts_size(model, which) / 1e6:.2f} MB" for which in ("bytes_before", "bytes_after")]

    print_table((float_name, name), [before[0], sizes[0], *before[1:]], [after[0], sizes[1], *after[1:]])
    if reason := no_compiler():
        print(f"No compiled figures: {reason}.")
    print(f"\nA sample from the {name} model:\n{sample(model, tokenizer, text[:64], args.new_tokens)}")


if __name__ == "__main__":
    main()

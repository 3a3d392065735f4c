"""From a local checkpoint and a text to a model and windows of tokens, and bits per byte of one model alone.

B windows, S tokens in each, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WINDOW = 512
BATCH = 8  # windows that are run at once


class Bytes:
    """The tokenizer of a model whose vocabulary is the 256 bytes."""

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Tokenizer:
    """The checkpoint's own tokenizer, from and to the same types."""

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer

        self.inner = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def encode(self, text: bytes) -> list[int]:
        return self.inner(text.decode(errors="replace"), add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def read_text(path: str | Path, limit: int | None = None) -> bytes:
    """The first `limit` bytes of a file. Raises ValueError for one that cannot be read, or is empty."""
    try:
        with open(path, "rb") as file:
            text = file.read(-1 if limit is None else limit)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(text) < 2:
        raise ValueError(f"{path} is empty")
    return text


def load_float(path: str | Path, device: Any = None) -> tuple[nn.Module, Bytes | Tokenizer]:
    """A language model in eval mode, in the dtype of its files, and its tokenizer. Raises ValueError for bad ones."""
    if not Path(path, "config.json").is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no config.json")
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        vocab = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config().vocab_size
        tokenizer = Bytes() if vocab == 256 and not list(Path(path).glob("tokenizer*")) else Tokenizer(path)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged file makes the loaders raise
        raise ValueError(f"cannot load {path}: {type(error).__name__}: {error}") from None
    if info["missing_keys"]:
        raise ValueError(f"cannot load {path}: it lacks {sorted(info['missing_keys'])[0]}")
    return model.to(device).eval(), tokenizer


def cut(text: bytes, tokenizer: Bytes | Tokenizer, window: int = WINDOW) -> tuple[Tensor, int]:
    """Windows (B, S), and the number of bytes that are in them. Raises ValueError for a text shorter than one."""
    if window < 2:
        raise ValueError(f"a window must have at least 2 tokens, got {window}")
    ids = tokenizer.encode(text)
    if len(ids) < window:
        raise ValueError(f"the text has {len(ids)} tokens; one window takes {window}")
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    return windows, round(len(text) * windows.numel() / len(ids))


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor, num_bytes: int) -> float:
    """windows (B, S): mean bits of all tokens but the first of each window, times tokens per byte."""
    from tqdm import tqdm

    nats, device = 0.0, next(model.parameters()).device
    for ids in tqdm(windows.split(BATCH), "held-out text", leave=False):
        logits = model(ids.to(device)).logits[:, :-1].float()  # (B, S - 1, V)
        nats += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="sum").item()
    return nats / math.log(2) / windows[:, 1:].numel() * windows.numel() / num_bytes

"""compare(): two models on the same text, one batch at a time.

B sequences, S tokens in each, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.evaluate import evaluating
from .batches import Batch, checked
from .layers import LayerSums
from .report import QualityReport
from .sums import TokenSums


@torch.no_grad()
def compare(
    reference: nn.Module | Callable[..., Any], model: nn.Module, batches: Iterable[Any], *,
    num_bytes: int | None = None, worst: int = 10, progress: bool | None = None,
) -> QualityReport:  # fmt: skip
    """What the model loses against the reference, on the same batches. Both run in eval mode, one after the other.

    reference: a model, which may be on another device; or a function that is called as one, with batches as they are,
        and gives logits: then nothing is known of layers. Of a compiled model, what was compiled is run, eagerly.
    batches: token ids (B, S), or dicts of what a Hugging Face model takes: input_ids, and maybe attention_mask (padding
        does not count), labels (-100 does not count) and more. Any iterable; only sums are kept.
    num_bytes: of the text that is in the batches; for bits per byte = bits per token * tokens / bytes.
    worst: how many of the tokens with the largest KL to keep. progress: show a bar (needs tqdm); default on a terminal.

    Loss, KL(reference || model) and top-1 agreement are over the tokens that are predicted: all but the first of each
    sequence. KL's 99th percentile is from a histogram of 64 bins to an octave: within 0.55 %, of bounded size.
    For each layer with experts: the error of the model's experts on the reference's inputs, ids and weights; the error
    of what leaves the decoder layer, as it comes; and flips, the share of tokens that chose another set of experts.

    Raises ValueError for no batches, batches without tokens, of other shapes or with unknown token ids (in a list:
    before anything runs), different vocabularies or experts, and logits that are not finite.
    """
    reference, model = _eager(reference), _eager(model)
    _check_arguments(reference, model, num_bytes, worst)
    layers, tokens, read = LayerSums(reference, model), TokenSums(worst), 0
    config = getattr(model, "config", None)
    encoder = bool(getattr(config, "is_encoder_decoder", False))
    found = checked(batches, encoder, _vocabulary(model))
    with evaluating(reference) if isinstance(reference, nn.Module) else nullcontext(), evaluating(model):
        for batch in _with_progress(found, batches, progress):
            with layers.of_reference(batch.mask):
                want = _logits(reference, batch, "reference")
            with layers.of_model(batch.mask):
                got = _logits(model, batch, "model")
            if want.shape != got.shape:
                raise ValueError(f"logits of the reference are {tuple(want.shape)}, of the model {tuple(got.shape)}")
            tokens.add(batch, want, got)
            read += batch.tokens
    rows, notes = layers.report()
    return QualityReport(
        tokens=tokens.tokens, tokens_read=read, num_bytes=num_bytes, reference_loss=tokens.reference_nats /
        tokens.tokens, loss=tokens.nats / tokens.tokens, kl=tokens.kl / tokens.tokens, kl_p99=tokens.quantile(0.99),
        top1_agreement=tokens.agreed / tokens.tokens, reference_size=_size(reference), size=_size(model),
        rows=rows, worst=tuple(tokens.worst), kl_histogram=tokens.histogram(), notes=notes,
    )  # fmt: skip


def _eager(model: Any) -> Any:
    return model._modules.get("_orig_mod", model) if isinstance(model, nn.Module) else model


def _check_arguments(reference: Any, model: Any, num_bytes: int | None, worst: int) -> None:
    if not callable(reference):
        raise ValueError(f"the reference must be a model or a function, got {type(reference).__name__}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be an nn.Module, got {type(model).__name__}")
    if num_bytes is not None and num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, got {num_bytes}")
    if worst < 0:
        raise ValueError(f"worst must be at least 0, got {worst}")
    sizes = _vocabulary(reference), _vocabulary(model)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(f"the vocabulary of the reference has {sizes[0]} tokens, the model's {sizes[1]}")


def _vocabulary(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _logits(model: Any, batch: Batch, which: str) -> Tensor:
    """(B, S, V)"""
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    if isinstance(batch.given, Tensor):
        out = model(batch.given.to(device))  # None: where it is
    else:
        out = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.given.items()})
    if not isinstance(out, Tensor):
        out = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
    rows, positions = batch.targets.shape
    if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != (rows, positions + batch.shift):
        got = tuple(out.shape) if isinstance(out, Tensor) else "none"
        raise ValueError(f"the {which} must give logits (B, S, V) of a language model; in batch {batch.index} with"
                         f" input_ids {tuple(batch.ids.shape)} it gave {got}")  # fmt: skip
    largest = int(batch.targets[batch.counted].max())
    if largest >= out.shape[-1]:
        raise ValueError(f"batch {batch.index} has token id {largest}, the {which} gives {out.shape[-1]} logits")
    return out


def _size(model: Any) -> int | None:
    """Bytes of parameters and buffers, each once."""
    if not isinstance(model, nn.Module):
        return None
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _with_progress(found: Iterator[Batch], batches: Iterable[Any], show: bool | None) -> Iterable[Batch]:
    if show is False or (show is None and not sys.stderr.isatty()):
        return found
    try:
        from tqdm import tqdm
    except ImportError:
        if show:
            raise ValueError("progress=True needs tqdm") from None
        return found
    total = len(batches) if isinstance(batches, Sized) else None
    return tqdm(found, desc="compare", unit="batch", total=total, leave=False)

"""Batches as users have them, checked: token ids, or what a Hugging Face model takes.

B sequences, S tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a label that does not count


@dataclass(frozen=True)
class Batch:
    """targets, counted (B, S'): the token that each position of the logits predicts, and whether it counts.

    index: of the batch; first: sequences in the batches before. given: the user's, without labels that nobody needs.
    shift: 1 where the logits of a position predict the next token, 0 in a model with an encoder.
    """

    index: int
    first: int
    given: Tensor | dict[str, Any]
    ids: Tensor
    mask: Tensor | None
    targets: Tensor
    counted: Tensor
    shift: int

    @property
    def tokens(self) -> int:
        """All that were read, without padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def read(self, row: int) -> list[int]:
        return self.ids[row].tolist()


def checked(batches: Iterable[Any], encoder: bool, vocabulary: int | None) -> Iterator[Batch]:
    """Each as a Batch. A list is checked as a whole before its first batch is handed out, a stream one by one."""
    if isinstance(batches, Tensor | str | Mapping) or not isinstance(batches, Iterable):
        raise ValueError(f"batches must be an iterable of batches, got one {_describe(batches)}: put it into a list")
    if isinstance(batches, Sequence):
        for _ in _each(batches, encoder, vocabulary):
            pass
    return _each(batches, encoder, vocabulary)


def _each(batches: Iterable[Any], encoder: bool, vocabulary: int | None) -> Iterator[Batch]:
    first, index = 0, -1
    for index, given in enumerate(batches):
        batch = _batch(index, first, given, encoder, vocabulary)
        first += batch.ids.shape[0]
        yield batch
    if index < 0:
        raise ValueError("there are no batches")


def _batch(index: int, first: int, given: Any, encoder: bool, vocabulary: int | None) -> Batch:
    inputs = given if isinstance(given, Mapping) else {"input_ids": given}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"batch {index} must be token ids (B, T), or a dict with such input_ids, got {_describe(ids)}")
    if not ids.numel():
        raise ValueError(f"batch {index} has no tokens: its input_ids are {tuple(ids.shape)}")
    if vocabulary is not None and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise ValueError(f"batch {index} has token ids {int(ids.min())} to {int(ids.max())}, the models have"
                         f" 0 to {vocabulary - 1}")  # fmt: skip
    ids, mask = ids.cpu().long(), _mask(index, ids, inputs.get("attention_mask"))
    targets, counted = _targets(index, ids, mask, inputs.get("labels"), encoder)
    if not bool(counted.any()):
        raise ValueError(f"batch {index} has no token to predict: its input_ids are {tuple(ids.shape)}, and the first"
                         " token of a sequence, padding, and labels of -100 do not count")  # fmt: skip
    if vocabulary is not None and not bool(((targets >= 0) & (targets < vocabulary))[counted].all()):
        raise ValueError(f"batch {index} has labels outside 0 to {vocabulary - 1} that are not {IGNORED}")
    if isinstance(given, Mapping):
        given = {k: v for k, v in given.items() if k != "labels" or encoder}
    return Batch(index, first, given, ids, mask, targets, counted, 0 if encoder else 1)


def _mask(index: int, ids: Tensor, mask: Any) -> Tensor | None:
    if mask is None or mask.ndim != 2:  # one of pairs of tokens says nothing of padding
        return None
    if mask.shape != ids.shape:
        raise ValueError(f"batch {index}: attention_mask {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    return mask.cpu().bool()


def _targets(
    index: int, ids: Tensor, mask: Tensor | None, labels: Tensor | None, encoder: bool
) -> tuple[Tensor, Tensor]:
    """(B, S) for a model with an encoder, of which the labels are what is predicted; else (B, S - 1)."""
    if encoder:
        if labels is None or labels.ndim != 2 or labels.shape[0] != ids.shape[0]:
            raise ValueError(f"batch {index}: a model with an encoder needs labels (B, T), got {_describe(labels)}")
        return labels.cpu().long(), labels.cpu() != IGNORED
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(f"batch {index}: labels {tuple(labels.shape)}, input_ids {tuple(ids.shape)}")
    targets = (ids if labels is None else labels.cpu().long())[:, 1:]
    counted = targets != IGNORED
    return targets, counted if mask is None else counted & mask[:, 1:] & mask[:, :-1]


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

"""Sums over predicted tokens, all that is kept of their logits: losses, KL, agreement, a histogram, the worst tokens.

N predicted tokens, V vocabulary, B sequences of a batch, S tokens in each.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .batches import Batch
from .report import WorstToken

_CHUNK = 1 << 27  # bytes of one float64 copy of logits
_OCTAVES = (-40, 10)  # nats, as powers of two; less counts as zero
_FINE = 64  # bins in an octave: a quantile is within 2^(1/128), 0.55 %
_COARSE = 4  # of the histogram in reports
_BINS = (_OCTAVES[1] - _OCTAVES[0]) * _FINE + 2  # and those below and above


class TokenSums:
    """`add` one batch after the other; memory does not depend on how many."""

    def __init__(self, worst: int, context: int = 16) -> None:
        self.tokens = self.agreed = 0
        self.nats = self.reference_nats = self.kl = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.worst: list[WorstToken] = []
        self._keep, self._context = worst, context

    def add(self, batch: Batch, reference: Tensor, model: Tensor) -> None:
        """reference, model (B, S, V): logits. Raises ValueError where one that counts is NaN or +inf."""
        rows, positions = batch.counted.nonzero(as_tuple=True)  # (N,) each
        step = max(1, _CHUNK // (8 * model.shape[-1]))
        for r, p in zip(rows.split(step), positions.split(step), strict=True):
            both: list[Tensor] = []
            for which, logits in (("reference", reference), ("model", model)):
                chosen = logits[r.to(logits.device), p.to(logits.device)].to(model.device)  # (N, V)
                _check_finite(chosen, which, batch, r, p)
                # KL of good formats is small beside the logs that it is a difference of; mps has no float64
                both.append(chosen.to(torch.float32 if model.device.type == "mps" else torch.float64))
            self._add(batch, both[0], both[1], r, p)

    def quantile(self, q: float) -> float:
        """Of KL, as numpy's method "inverted_cdf" has it, within 0.55 %."""
        rank = max(1, math.ceil(q * self.tokens))
        bin = int((self.counts.cumsum(0) < rank).sum())
        return 0.0 if bin == 0 else math.inf if bin == _BINS - 1 else 2.0 ** ((bin - 0.5) / _FINE + _OCTAVES[0])

    def histogram(self) -> tuple[tuple[float, int], ...]:
        """(upper edge in nats, tokens) of bins, four to an octave, from the first to the last that is not empty."""
        inner = self.counts[1:-1].view(-1, _FINE // _COARSE).sum(1).tolist()
        edges = [2.0 ** (_OCTAVES[0] + n / _COARSE) for n in range(len(inner) + 1)]
        counts = [int(self.counts[0]), *inner[:-1], inner[-1] + int(self.counts[-1])]
        filled = [n for n, count in enumerate(counts) if count]
        return tuple(zip(edges, counts, strict=True))[filled[0] : filled[-1] + 1]

    def _add(self, batch: Batch, reference: Tensor, model: Tensor, rows: Tensor, positions: Tensor) -> None:
        targets = batch.targets[rows, positions].to(model.device)  # (N,)
        log_p, log_q = reference.log_softmax(-1), model.log_softmax(-1)  # (N, V)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp(min=0)  # (N,)
        tops = reference.argmax(-1), model.argmax(-1)
        self.tokens += len(targets)
        agreed = tops[0] == tops[1]
        losses = [cross_entropy(log, targets, reduction="sum") for log in (log_p, log_q)]
        sums = torch.stack([*losses, kl.sum(), agreed.sum().to(kl.dtype)]).tolist()  # one wait for the device
        self.reference_nats, self.nats, self.kl = self.reference_nats + sums[0], self.nats + sums[1], self.kl + sums[2]
        self.agreed += int(sums[3])
        bins = ((kl.log2() - _OCTAVES[0]) * _FINE).floor().clamp(-1, _BINS - 2) + 1
        self.counts += bins.long().bincount(minlength=_BINS).cpu()
        worst, found = kl.topk(min(self._keep, len(kl)))
        where = (found.to(t.device).long() for t in (rows, positions))
        lists = [t[at].tolist() for t, at in zip((rows, positions), where, strict=True)]
        for row, position, *rest in zip(*lists, worst.tolist(), *(t[found].tolist() for t in tops), strict=True):
            self._note(batch, row, position, *rest)
        self.worst = heapq.nlargest(self._keep, self.worst, key=lambda w: (w.kl, -w.sequence, -w.position))

    def _note(self, batch: Batch, row: int, position: int, kl: float, reference_top: int, model_top: int) -> None:
        read = batch.read(row)  # what was read before the token: all of it in an encoder, else up to here
        known = read[: position + 1] if batch.shift else read
        self.worst.append(WorstToken(
            kl=kl, batch=batch.index, row=row, sequence=batch.first + row, position=position + batch.shift,
            token_id=int(batch.targets[row, position]), context_ids=tuple(known[-self._context :]),
            reference_top1=reference_top, model_top1=model_top,
        ))  # fmt: skip


def _check_finite(logits: Tensor, which: str, batch: Batch, rows: Tensor, positions: Tensor) -> None:
    bad = (logits.isnan() | logits.isposinf()).any(-1)  # -inf is a token that cannot come
    if bool(bad.any()):
        n = int(bad.int().argmax())
        raise ValueError(
            f"the logits of the {which} are not finite in batch {batch.index} (first in row {int(rows[n])}, position"
            f" {int(positions[n])}; {int(bad.sum())} of {len(bad)} tokens)"
        )

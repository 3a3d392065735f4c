"""OpenAI's GPT-OSS: MXFP4 experts as `_blocks` (E, N, K/32, 16) and `_scales` (E, N, K/32).

Rows are output features; in the first projection those of gate and up alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..formats import Codec
from .finegrained import excluded
from .reader import CODES, SCALE, Part, Reader, Scheme


def _flat(t: Tensor, codec: Codec) -> Tensor:
    return t.flatten(-2)


class OpenAI(Reader):
    name = "OpenAI mxfp4"
    methods = ("mxfp4",)
    parts: ClassVar = {"_blocks": Part(CODES, _flat), "_scales": Part(SCALE)}

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        skipped = excluded(names, self.config.get("modules_to_not_convert") or ())
        return Scheme("mxfp4") if kind == "experts" and not skipped else None

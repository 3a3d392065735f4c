"""Where ops are opened: on CUDA, where our own kernels would run. Elsewhere they stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_ops.backends.base import Problem, select
from moe_ops.backends.triton_supports import codecs_of

from . import _compat

_kept_whole = 0  # how many of `whole` are entered


def opens(problem: Problem, backend: str, *rows: Tensor) -> bool:
    """False, too, where no backend runs the problem: the op itself says so when it is called.

    And where nothing is known of how many `rows` there are: tiles and graphs are chosen by that.
    """
    if problem.device != "cuda" or _kept_whole or any(_compat.is_unbacked(t) for t in rows):
        return False
    try:
        return select(problem, backend).backend == "triton" and _has_types(problem)
    except ValueError:
        return False


def _has_types(problem: Problem) -> bool:
    """Whether generated code can name what is stored. Where Triton has no e4m3, our kernels alone read it, as bytes."""
    from moe_ops.backends.triton_plan import has_fp8  # here, for this loads Triton

    types = [t for codec in codecs_of(problem) for t in (codec.element.storage, codec.scale_dtype)]
    return has_fp8(problem.arch) or torch.float8_e4m3fn not in types


def kept_whole() -> bool:
    return _kept_whole > 0


@contextmanager
def whole() -> Iterator[None]:
    """Inside, graphs that are compiled call our ops as they are: to compare, or to find who is at fault."""
    from . import cache

    global _kept_whole
    _kept_whole += 1
    cache.register()
    try:
        yield
    finally:
        _kept_whole -= 1
        cache.register()

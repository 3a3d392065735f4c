"""Where ops are opened: on CUDA, where our own kernels would run. Elsewhere they stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_ops.backends.base import Problem, select

_kept_whole = 0  # how many of `whole` are entered


def opens(problem: Problem, backend: str = "auto") -> bool:
    """False, too, where no backend runs the problem: the op itself says so when it is called."""
    if problem.device != "cuda" or _kept_whole:
        return False
    try:
        return select(problem, backend).backend == "triton"
    except ValueError:
        return False


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

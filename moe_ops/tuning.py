"""load_tuning: tile configurations that were timed for one's own shapes, on one's own device."""

from __future__ import annotations

import sys
from pathlib import Path

from .backends import repeat
from .kernels import tuning


def load_tuning(path: str | Path) -> int:
    """Use the configurations of a file that `examples/benchmark.py --tune FILE` wrote; how many it holds.

    They serve products of the same device architecture, kind, experts, channels and contraction, from half to twice
    the rows that they were timed with, before the tables that come with the package; of several files, the last that
    knows a product counts. The environment variable MOE_OPS_TUNING names files that are loaded by themselves. Numbers
    may change by the order in which they are added; with batch_invariant=True nothing changes. What is compiled
    already stays as it is: load before. Raises ValueError, with nothing changed, for what is no such file.
    """
    entries = tuning.read(path)
    tuning.from_environment()  # first, or it would come later and count more
    tuning.add(entries)
    repeat.forget()
    if "moe_ops.lowering" in sys.modules:  # what it put into the compiler's cache key
        from .lowering import cache

        cache.register()
    return len(entries)

"""Where ops are opened: on CUDA, where our own kernels would run. Elsewhere they stay what they are."""

from __future__ import annotations

from moe_ops.backends.base import Problem, select


def opens(problem: Problem, backend: str = "auto") -> bool:
    """False, too, where no backend runs the problem: the op itself says so when it is called."""
    if problem.device != "cuda":
        return False
    try:
        return select(problem, backend).backend == "triton"
    except ValueError:
        return False

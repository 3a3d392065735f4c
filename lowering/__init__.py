"""What the compiler is told about the ops. Import it as `moe_ops.lowering`; loading it does not load Inductor."""

from __future__ import annotations

import importlib.util
import warnings

import torch

if __name__ == "lowering":
    raise ImportError("import moe_ops.lowering: `lowering` on its own would register everything a second time")

from moe_ops.huggingface.watch import after_import

from . import _compat, cache
from .where import whole

__all__ = ["register", "whole"]


def register() -> None:
    """Tell torch.compile about our ops: at once where Inductor is loaded, else as soon as it is. Again is no harm.

    Done by `quantize_`, and when an op is first traced. What Inductor of this torch does not have is said in a warning;
    the ops are then opaque to it, and compute the same.
    """
    cache.register()
    after_import("torch._inductor.compile_fx", _open)


def _open() -> None:
    try:
        _compat.check()
        from . import decompositions, divide, quantize, routing, rows

        lowerings = divide.LOWERINGS | rows.LOWERINGS
        if importlib.util.find_spec("triton") is not None:  # else there is no GPU that generated code could run on
            from . import product

            lowerings |= product.LOWERINGS
        for op, fn in lowerings.items():
            _compat.add_lowering(op, fn)
        for table in (decompositions, quantize, routing):
            for op, fn in table.DECOMPOSITIONS.items():
                _compat.add_decomposition(op, fn)
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(f"torch.compile takes the ops of moe_ops as they are: torch {torch.__version__} has changed what "
                      f"moe_ops.lowering needs ({type(error).__name__}: {error})", stacklevel=2)  # fmt: skip

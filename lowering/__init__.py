"""What the compiler is told about the ops. Import it as `moe_ops.lowering`; loading it does not load Inductor."""

if __name__ == "lowering":
    raise ImportError("import moe_ops.lowering: `lowering` on its own would register everything a second time")

from .cache import register

__all__ = ["register"]

"""The ops `torch.ops.moe_ops.*`: importing this registers them."""

from . import experts, grouped_mm, library, linear, quantize, routing, training  # noqa: F401

"""Tensor and expert parallelism of quantized models: slices of weights, and models whose ranks hold them.

mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("ep", "tp"))
moe_ops.quantize_(model, "fp8")
moe_ops.sharding.parallelize_(model, mesh)
"""

from .modules import shard_module
from .parallel import parallelize_
from .slices import bounds, local_ids, shard, shard_bias, shard_experts, unit_for
from .states import kept_whole

__all__ = [
    "bounds", "kept_whole", "local_ids", "parallelize_", "shard", "shard_bias", "shard_experts", "shard_module",
    "unit_for",
]  # fmt: skip

"""NVIDIA's nvfp4: e2m1 in groups of 16 along K, a scale in e4m3 for each, and one fp32 scale above those per matrix.

g = amax / (6 * 448);  s = e4m3((group's amax / 6) / g);  code = e2m1(x / (s * g));  x ~ code * s * g

g is a multiplier, ModelOpt's `weight_scale_2`; compressed-tensors stores its reciprocal. A group of zeros has s = 0. As
activations, every token is a matrix of its own unless a static g is given.
"""

import torch

from .base import FORMATS, Codec, Format
from .mx import E2M1
from .scales import ratio

NVFP4 = Codec(name="nvfp4", element=E2M1, block=(1, 16), scale_dtype=torch.float8_e4m3fn, scale_rule=ratio,
              global_scale=True)  # fmt: skip

FORMATS.register(Format("nvfp4", NVFP4, NVFP4))
FORMATS.list_pair("nvfp4/bf16")

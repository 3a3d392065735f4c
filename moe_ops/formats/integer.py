"""Integers: int8 with a scale per row, int4 with a scale per group of 32 or 128. Rounded half to even, symmetric.

They have no NaN: the scale of a row that holds one carries it, a static scale does not.
"""

import torch

from .base import FORMATS, Codec, Element, Format
from .scales import amax_over_max


def _round(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.round(x).clamp(low, high).nan_to_num(0.0)


# amax / 127 in fp32 and codes in [-127, 127]: the rule of experts_int8. Tools that divide by 127.5 load just as well.
INT8 = Element(
    name="int8", bits=8, exponent_bits=0, mantissa_bits=7, bias=0, max=127.0, storage=torch.int8,
    encode=lambda x: _round(x, -127.0, 127.0).to(torch.int8), decode=lambda q: q.float(),
)  # fmt: skip
# Codes are q + 8 with q in [-8, 7] and scale amax / 7.5, as compressed-tensors packs them (pack_to_int32 in bytes).
INT4 = Element(
    name="int4", bits=4, exponent_bits=0, mantissa_bits=3, bias=0, max=7.5, storage=torch.uint8,
    encode=lambda x: (_round(x, -8.0, 7.0) + 8.0).to(torch.uint8), decode=lambda q: q.float() - 8.0,
)  # fmt: skip


def _int4(group: int) -> Codec:
    """Scales are stored in bf16, and codes belong to the scale that is stored."""
    return Codec(name=f"int4_g{group}", element=INT4, block=(1, group), scale_dtype=torch.bfloat16,
                 scale_rule=amax_over_max)  # fmt: skip


INT8_ROW = Codec(name="int8_row", element=INT8, block=(1, 0), scale_rule=amax_over_max)

FORMATS.register(Format("int8", INT8_ROW), as_activation=INT8_ROW)
FORMATS.list_pair("int8/int8")
for group in (128, 32):
    FORMATS.register(Format(f"int4_g{group}", _int4(group)))

"""fp8 e4m3 (OCP OFP8: bias 7, largest 448, NaN 0x7f, no infinity) with fp32 scales amax / 448."""

import torch

from .base import FORMATS, Codec, Element, Format
from .scales import amax_over_max

E4M3 = Element(
    name="e4m3", bits=8, exponent_bits=4, mantissa_bits=3, bias=7, max=448.0, storage=torch.float8_e4m3fn,
    # The clamp is ours: what a bare cast does beyond 464 depends on the version of torch. NaN passes through it.
    encode=lambda x: x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), decode=lambda q: q.float(),
)  # fmt: skip


def _codec(name: str, block: tuple[int, int]) -> Codec:
    return Codec(name=name, element=E4M3, block=block, scale_rule=amax_over_max)


ROW = _codec("e4m3_row", (1, 0))  # weights: per output channel; activations: per token
MATRIX = _codec("e4m3_matrix", (0, 0))
TILE = _codec("e4m3_128x128", (128, 128))
GROUP = _codec("e4m3_1x128", (1, 128))

FORMATS.register(Format("fp8", ROW, ROW))
FORMATS.register(Format("fp8_tensor", MATRIX, MATRIX))
FORMATS.register(Format("fp8_block", TILE, GROUP))
FORMATS.list_pair("fp8/bf16")

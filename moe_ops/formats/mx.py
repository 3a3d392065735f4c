"""OCP Microscaling: groups of 32 along K that share an exponent (e8m0), with elements of 8, 6 or 4 bits."""

import torch

from .base import FORMATS, Codec, Element, Format
from .fp8 import E4M3
from .minifloat import minifloat
from .scales import even, rceil

E2M3 = minifloat("e2m3", exponent_bits=2, mantissa_bits=3)
E3M2 = minifloat("e3m2", exponent_bits=3, mantissa_bits=2)
E2M1 = minifloat("e2m1", exponent_bits=2, mantissa_bits=1)


def _codec(name: str, element: Element, rule) -> Codec:
    return Codec(name=name, element=element, block=(1, 32), scale_dtype=torch.float8_e8m0fnu, scale_rule=rule)


# The rules are those of the producers: NVIDIA's for 8 bits, Quark's and compressed-tensors' for 6 and 4.
MXFP8 = _codec("mxfp8", E4M3, rceil)
MXFP6_E2M3 = _codec("mxfp6_e2m3", E2M3, even)
MXFP6_E3M2 = _codec("mxfp6_e3m2", E3M2, even)
MXFP4 = _codec("mxfp4", E2M1, even)

FORMATS.register(Format("mxfp8", MXFP8, MXFP8))
for codec in (MXFP6_E2M3, MXFP6_E3M2, MXFP4):
    FORMATS.register(Format(codec.name, codec), as_activation=codec)
for pair in ("mxfp4/fp8", "mxfp4/mxfp8", "mxfp4/mxfp6_e2m3", "mxfp4/mxfp6_e3m2", "mxfp4/mxfp4", "mxfp6_e2m3/fp8",
             "mxfp6_e2m3/mxfp6_e2m3", "mxfp6_e3m2/fp8", "mxfp6_e3m2/mxfp6_e3m2"):  # fmt: skip
    FORMATS.list_pair(pair)

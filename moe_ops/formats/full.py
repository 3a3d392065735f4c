"""Not quantized: the tensor as it is, run by our kernels."""

from .base import FORMATS, Codec, Element, Format

BF16 = Element(
    name="bf16", bits=16, exponent_bits=8, mantissa_bits=7, bias=127, max=3.3895313892515355e38, storage=None,
    encode=lambda x: x, decode=lambda x: x.float(),
)  # fmt: skip

FORMATS.register(Format("bf16", weight=Codec(name="bf16", element=BF16)))

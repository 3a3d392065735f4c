"""Adds a format of one's own, made up: e3m4 in groups of 64 that share an exponent, and compares it with built-in ones.

    python examples/add_a_format.py

E experts, H hidden, I intermediate, T tokens.
"""

import torch

from moe_ops import FORMATS, Codec, Format, QuantizedExperts
from moe_ops.formats import minifloat
from moe_ops.formats.scales import rceil

E3M4 = minifloat("e3m4", exponent_bits=3, mantissa_bits=4)  # one number: bias 3, largest 31
GROUP64 = Codec(  # a tensor of them: blocks of 1 x 64, each with the least power of two that brings it below 31
    name="e3m4_g64", element=E3M4, block=(1, 64), scale_dtype=torch.float8_e8m0fnu, scale_rule=rceil
)
FORMAT = Format("e3m4", weight=GROUP64)


def main() -> None:
    FORMATS.register(FORMAT, as_activation=GROUP64)  # as_activation: what its name means to the right of a slash
    g = torch.Generator().manual_seed(0)
    gate_up = torch.randn(8, 512, 512, generator=g) / 512**0.5  # (E, 2I, H)
    down = torch.randn(8, 512, 256, generator=g) / 256**0.5  # (E, H, I)
    x, ids = torch.randn(64, 512, generator=g), torch.randint(8, (64, 2), generator=g)  # (T, H), (T, 2)
    weights = torch.full((64, 2), 0.5)
    exact = QuantizedExperts.from_float(gate_up, down, "bf16")(x, ids, weights)  # not quantized: fp32, as the weights
    print("format             bytes    error")
    for name in ("fp8/bf16", "e3m4", "e3m4/e3m4", "mxfp8/bf16", "mxfp4"):
        experts = QuantizedExperts.from_float(gate_up, down, name)
        error = (experts(x, ids, weights) - exact).norm() / exact.norm()
        print(f"{name:14}{experts.bytes_stored():10,}{error:9.4f}")


if __name__ == "__main__":
    main()

"""Other people's formats: elements of ml_dtypes, checkpoints of compressed-tensors, and what comparisons need."""

import ml_dtypes
import pytest
import torch
from torch import Tensor

from moe_ops.formats import minifloat
from moe_ops.formats.fp8 import E4M3
from moe_ops.formats.mx import E2M1, E2M3, E3M2
from moe_ops.formats.packing import unpack

E5M2 = minifloat("e5m2", exponent_bits=5, mantissa_bits=2, largest=57344.0)
# element -> ml_dtypes' definition of it
ELEMENTS = {
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn),
    "e2m3": (E2M3, ml_dtypes.float6_e2m3fn),
    "e3m2": (E3M2, ml_dtypes.float6_e3m2fn),
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2),
}


def as_bytes(t):
    return t.contiguous().view(torch.uint8)


def codes_of(q):
    return unpack(q.qdata, q.codec.element.bits) if q.codec.packed else as_bytes(q.qdata)


def no_minus_zero(codes, bits):
    """Tools do not agree on the sign of what rounds to zero: every reader must take both."""
    return torch.where(codes == 1 << (bits - 1), 0, codes)


def generator():
    return torch.Generator().manual_seed(0)


def every_bf16():
    """All finite bf16 values as fp32: every exponent, ties of every element included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[x.isfinite()]


def compressed(
    x: Tensor, kind: str, group: int, static: Tensor | None = None, **args
) -> tuple[dict[str, Tensor], Tensor]:
    """What compressed-tensors writes to a checkpoint of x (N, K), in groups along K, and the values that it reads back.

    `static` are scales to use instead of those that it finds.
    """
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(group_size=group, **args)
    scheme, groups = QuantizationScheme(targets=["Linear"], weights=args), x.unflatten(-1, (-1, group))
    above = generate_gparam(x.amin(), x.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, above)
    state = {"weight": x, "weight_scale": scale if static is None else static}
    state |= {} if above is None else {"weight_global_scale": above}
    state |= {"weight_zero_point": zero} if args.type == "int" else {}
    compressor = BaseCompressor.get_value_from_registry(kind)
    torch.compiler.set_stance("force_eager")  # it compiles its cast to fp4, which takes seconds
    try:
        written = compressor.compress(state, scheme)
        return written, compressor.decompress(dict(written), scheme)["weight"]
    finally:
        torch.compiler.set_stance("default")

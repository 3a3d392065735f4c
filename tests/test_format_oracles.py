"""Elements, fp8, nvfp4 and integers against ml_dtypes, torchao and compressed-tensors (mx: test_format_mx.py).

Where one of them is wrong or follows another convention, a test says so and leaves out just those values,
after asserting that they are what is expected of the fault.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign import ELEMENTS, as_bytes, codes_of, compressed, every_bf16, generator, no_minus_zero

from moe_ops.formats import FORMATS, QuantizedTensor
from moe_ops.formats.fp8 import GROUP, MATRIX, ROW, TILE
from moe_ops.formats.minifloat import encode_minifloat
from moe_ops.formats.packing import unpack

# ---- elements


@pytest.mark.parametrize("name", ELEMENTS)
def test_element_is_ml_dtypes(name):
    element, theirs = ELEMENTS[name]
    random = torch.randn(20_000, generator=generator()) * element.max / 3
    x = torch.cat([every_bf16(), random, random / element.max, torch.tensor([element.max, -element.max, 0.0, -0.0])])
    want = torch.from_numpy(x.clamp(-element.max, element.max).numpy().astype(theirs).view(np.uint8))
    assert torch.equal(as_bytes(element.encode(x)), want)
    bits = (element.exponent_bits, element.mantissa_bits, element.bias)
    assert torch.equal(encode_minifloat(x, *bits, element.max), want)
    decoded = torch.from_numpy(want.numpy().view(theirs).astype(np.float32))
    got = element.decode(want.view(element.storage))
    assert torch.equal(got.view(torch.int32), decoded.view(torch.int32))


# ---- nvfp4


def nvfp4_input():
    """(96, 64): blocks that lie up to 2^24 below the largest, zeros, and a row of ties, of multiples of 1/4."""
    g = generator()
    x = torch.randn(96, 64, generator=g)
    x *= torch.randint(-24, 1, (96, 4), generator=g).float().exp2().repeat_interleave(16, 1)
    x[0, :16] = 0.0
    x[1] = torch.randint(-24, 25, (64,), generator=g) / 4
    x[1, ::16] = 6.0  # amax of all: the scale times the global scale is 1
    return x


def differ_at_ties_only(x, q, codes, eff):
    """Codes are one step apart where x / scale is within rounding of a tie: fp32 in another order. Else equal."""
    ours, theirs = (no_minus_zero(c, 4) for c in (codes_of(q), codes))
    differ = ours != theirs
    quotient = (x.double() / eff.double()).abs()[differ]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    assert ((quotient[:, None] / ties - 1).abs().amin(1) < 2.0**-21).all()
    assert ((ours.int() & 7) - (theirs.int() & 7)).abs().max() <= 1
    return differ.sum()


def with_scale(x, scale, g):
    """Quantized with a given block scale, and what x is divided by."""
    codec = FORMATS["nvfp4"].weight
    return codec.quantize(x, scale, g), scale.float().repeat_interleave(16, 1) * g


def test_nvfp4_is_torchao():
    """Its scales are at least 2^-6, and it multiplies by a rounded reciprocal, which moves ties."""
    theirs = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x, codec = nvfp4_input(), FORMATS["nvfp4"].weight
    q, g = codec.quantize(x), theirs.per_tensor_amax_to_scale(x.abs().amax())
    scale, packed = theirs.nvfp4_quantize(x, 16, g)
    assert torch.equal(q.global_scale, g)
    assert torch.equal(as_bytes(scale), as_bytes(q.scale).clamp(min=8)) and (as_bytes(q.scale) < 8).sum() > 20
    static, eff = with_scale(x, scale, g)
    assert differ_at_ties_only(x, static, unpack(packed, 4), eff) > 0


def test_nvfp4_is_compressed_tensors():
    """Codes and scales, but for groups whose scale rounds to 0: it writes 0x20 there. Its global scale is 1 / g."""
    codec = FORMATS["nvfp4"].weight
    for x in (nvfp4_input(), nvfp4_input() * 0.3141):
        kind = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
        written, values = compressed(x, "nvfp4-pack-quantized", 16, **kind)
        q, scale, packed = codec.quantize(x), written["weight_scale"], written["weight_packed"]
        g = 1.0 / written["weight_global_scale"][0]
        torch.testing.assert_close(g, q.global_scale, rtol=2.0**-22, atol=0.0)
        ours = as_bytes(q.scale)
        assert torch.equal(as_bytes(scale), torch.where(ours == 0, 0x20, ours)) and (ours == 0).sum() > 20
        static, eff = with_scale(x, scale, g)
        differ_at_ties_only(x, static, unpack(packed, 4), eff)
        read = QuantizedTensor(packed, scale, None, g, codec)
        torch.testing.assert_close(codec.dequantize(read), values.float(), rtol=2.0**-7, atol=0.0)  # bf16 there
        wrong = QuantizedTensor(packed, scale, None, 1.0 / g, codec)
        assert codec.dequantize(wrong).abs().max() > 1e5 * x.abs().max()


# ---- fp8 and integers


def test_fp8_is_torchao():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(40, 300, generator=generator())
    for codec, block in ((ROW, [1, 300]), (MATRIX, [40, 300])):
        scale = primitives._choose_scale_float8(x, block)
        codes = primitives._quantize_affine_float8(x, scale)
        q = codec.quantize(x)
        assert torch.equal(q.scale.view(scale.shape), scale)
        assert torch.equal(as_bytes(q.qdata), as_bytes(codes))


@pytest.mark.parametrize("codec", [ROW, MATRIX, TILE, GROUP], ids=lambda c: c.name)
def test_fp8_is_compressed_tensors(codec):
    """Partial tiles included."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = torch.randn(200, 256 if codec is GROUP else 300, generator=generator())
    kinds = {
        ROW: ({"strategy": "channel"}, (1, 300)),
        MATRIX: ({"strategy": "tensor"}, (200, 300)),
        TILE: ({"strategy": "block", "block_structure": [128, 128]}, (128, 128)),
        GROUP: ({"strategy": "group", "group_size": 128}, (1, 128)),
    }
    kind, (n, k) = kinds[codec]
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **kind)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % k, 0, -x.shape[0] % n))
    parts = padded.unflatten(1, (-1, k)).unflatten(0, (-1, n))  # (N/n, n, K/k, k)
    scale, zero = calculate_qparams(parts.amin((1, 3)), parts.amax((1, 3)), args)
    q = codec.quantize(x)
    assert torch.equal(q.scale.view(scale.shape), scale)
    codes = quantize(x, scale, zero, args, dtype=torch.float8_e4m3fn)
    assert torch.equal(as_bytes(q.qdata), as_bytes(codes))


def test_int8_of_compressed_tensors_loads():
    """It divides by 127.5 and writes -128 too: another convention, read by the same codec."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    codec, x = FORMATS["int8"].weight, torch.randn(40, 300, generator=generator())
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(x.amin(1, True), x.amax(1, True), args)
    codes = quantize(x, scale, zero, args, dtype=torch.int8)
    read = codec.dequantize(QuantizedTensor(codes, scale, None, None, codec))
    assert (codes == -128).any() and torch.equal(read, dequantize(codes, scale, zero, args))
    ours = codec.quantize(x, scale)
    assert torch.equal(ours.qdata, codes.clamp(min=-127))


@pytest.mark.parametrize("group", [32, 128])
def test_int4_is_compressed_tensors(group):
    """Words of the checkpoint and values, with fp32 scales; then with ours in bf16, to which our codes belong."""
    stored = FORMATS[f"int4_g{group}"].weight
    codec = replace(stored, scale_dtype=torch.float32)
    x = torch.randn(40, 512, generator=generator())
    x[3, :group] = 0.0  # its scale there is 2^-23, ours 1
    written, values = compressed(x, "pack-quantized", group, num_bits=4, type="int", strategy="group")
    q, scale = codec.quantize(x), written["weight_scale"]
    assert torch.equal(torch.where(scale == 2.0**-23, 1.0, scale), q.scale) and (scale == 2.0**-23).sum() == 1
    assert torch.equal(as_bytes(written["weight_packed"]), q.qdata)
    read = QuantizedTensor(as_bytes(written["weight_packed"]), scale, None, None, codec)
    assert torch.equal(codec.dequantize(read), values) and torch.equal(codec.dequantize(q), values)

    q = stored.quantize(x)
    written, values = compressed(x, "pack-quantized", group, q.scale.float(), num_bits=4, type="int", strategy="group")
    assert torch.equal(as_bytes(written["weight_packed"]), q.qdata)
    assert torch.equal(stored.dequantize(q), values)

"""What products on a CPU are made of: packed 4-bit sums, blocks decoded in half and in bf16, scales."""

import pytest
import torch
from test_torch_native import QUANTIZED, error

from moe_ops.backends import cpu_matrix, cpu_nibbles
from moe_ops.backends.base import Weight
from moe_ops.backends.cpu_decode import decoder, scale_values, to_planes
from moe_ops.formats import FORMATS, quantize_weight


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("each,groups", [(1, 64), (8, 8), (16, 6), (32, 3), (64, 2), (96, 1), (128, 1), (768, 2)])
def test_nibbles(each, groups, rows):
    """Channels of 32 and 96, groups of `each` bytes: what the packed product gives, by the numbers of each byte."""
    if not cpu_nibbles.has_kernel():
        pytest.skip("torch packs otherwise on this CPU")
    torch.manual_seed(0)
    for n in (32, 96):
        lanes = each * groups
        assert cpu_nibbles.fits(n, lanes, each)
        codes = torch.randint(0, 256, (n, lanes), dtype=torch.uint8)
        scale = (torch.randn(2, n, groups) / 8).bfloat16()  # of two experts; a scale may be negative
        x = torch.randn(rows, 2, lanes).bfloat16()  # even columns, odd columns
        spread = cpu_nibbles.spread_rows(x.flatten(1), each), cpu_nibbles.spread_scales(scale, each)[1]
        cpu_nibbles.multiply(spread[0], codes, spread[1], got := torch.full((rows, n), torch.nan))
        numbers = torch.stack([codes & 15, codes >> 4]).double() - 8.0  # (2, N, L)
        numbers *= scale[1].double().repeat_interleave(each, 1)
        want, most = (torch.einsum("mpl,pnl->mn", f(x.double()), f(numbers)) for f in (torch.clone, torch.abs))
        assert ((got - want).abs() <= most * 2.0**-8).all() and error(got, want) < 0.004  # roundings to bf16


@pytest.mark.parametrize("n,lanes,each", [(48, 64, 32), (64, 48, 16), (64, 96, 48), (64, 24, 24), (64, 64, 0)])
def test_what_the_packed_product_does_not_take(n, lanes, each):
    assert not cpu_nibbles.fits(n, lanes, each)


@pytest.mark.parametrize("spread", [0, 6, 11, 26, 30, 60])
@pytest.mark.parametrize("codec", {FORMATS[n].weight.name: FORMATS[n].weight for n in QUANTIZED}.values(),
                         ids=lambda codec: codec.name)  # fmt: skip
def test_halves_are_exact(codec, spread):
    """Codes times scales of groups that are up to 2^spread apart are in half what they are in float64, or refused."""
    if not cpu_matrix.plan_of(codec).is_half or not codec.block[1]:
        pytest.skip("its scales do not multiply halves")
    torch.manual_seed(spread)
    q = quantize_weight(codec, torch.randn(2, 32, 480))
    if codec.scale_dtype == torch.float8_e8m0fnu:
        q.scale.view(torch.uint8).random_(40, 41 + spread)
        q.scale.view(torch.uint8).view(-1)[:2] = torch.tensor([40, 40 + spread])
    matrix = cpu_matrix.Matrix(Weight(q.qdata, q.scale, q.global_scale), codec)
    by = matrix.half_factor(0)
    assert by is not None or (spread > 11 and codec.scale_dtype == torch.float8_e8m0fnu)
    assert by is None or spread < 60 or codec.scale_dtype != torch.float8_e8m0fnu
    if by is not None:
        want = codec.decode(q.qdata[0]).double() * codec.spread(q.scale[0].double(), 32, 480)
        for a, b, block in matrix.halves(0, by):
            assert torch.equal(block.double() / by, to_planes(want, matrix.planes)[a:b])
            assert block.abs().max() <= 64


@pytest.mark.parametrize("codec", {FORMATS[n].weight.element.name: FORMATS[n].weight for n in QUANTIZED}.values(),
                         ids=lambda codec: codec.element.name)  # fmt: skip
def test_decoding(codec):
    found = decoder(codec.element)
    qdata = torch.randint(0, 256, (7, codec.stored(480)), dtype=torch.uint8)
    qdata = qdata if codec.packed else qdata.view(codec.element.storage)
    out = torch.empty(found.planes, 7, 480 // found.planes, dtype=found.dtype)
    found(qdata, out)
    want, got = codec.decode(qdata), out.permute(1, 2, 0).flatten(1) * found.factor
    assert ((got == want) | want.isnan()).all()
    assert torch.equal(to_planes(got, found.planes), out.transpose(0, 1).flatten(1) * found.factor)


def test_an_element_that_bits_do_not_explain_is_left_alone():
    name = "fp8"
    element = FORMATS[name].weight.element
    assert decoder(type(element)(**(vars(element) | {"decode": lambda q: q.float() * 2}))) is None
    assert decoder(FORMATS["bf16"].weight.element) is None


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_scales(dtype):
    bits = torch.arange(256 if dtype == torch.float8_e8m0fnu else 128).to(torch.uint8)  # scales are not negative
    for factor, copies, to in ((1.0, 1, torch.float32), (1.0, 4, torch.float32), (0.25, 8, torch.bfloat16),
                               (1.0, 4, torch.bfloat16), (2.0, 1, torch.bfloat16)):  # fmt: skip
        want = (bits.view(dtype).float() * factor).view(-1, 8).repeat_interleave(copies, 1)
        got = scale_values(bits.view(dtype).view(-1, 8), factor, copies, to).float()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

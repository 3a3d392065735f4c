"""What the ops refuse: a ValueError that says what was got and what is allowed, whatever the format."""

import pytest
import torch
from oracle import Layer, inputs

import moe_ops.ops  # noqa: F401

OPS = torch.ops.moe_ops
E, H, I = 5, 72, 40  # noqa: E741
DTYPE = torch.bfloat16
PARTS = ("", "_scale", "_global_scale", "_zero_point", "_bias", "_input_scale")
NAMES = [f"{name}{part}" for part in PARTS for name in ("gate_up_proj", "down_proj")]


def arguments(name="fp8", hidden=H, intermediate=I, **changes):
    layer = Layer(name, E, hidden, intermediate, dtype=DTYPE)
    x, ids, weights = inputs(4, hidden, 2, E, DTYPE)
    call = {"x": x, "topk_ids": ids, "topk_weights": weights} | dict(zip(NAMES, layer.tensors()))
    return call | layer.options() | changes


REFUSED = {
    "x in float64": ({"x": torch.zeros(4, H, dtype=torch.float64)}, "float64"),
    "x of another width": ({"x": torch.zeros(4, H + 1)}, rf"\(T, {H}\)"),
    "x with three dims": ({"x": torch.zeros(2, 2, H)}, r"\(2, 2, 72\)"),
    "ids of other tokens": ({"topk_ids": torch.zeros(3, 2, dtype=torch.int64)}, "topk_ids and topk_weights"),
    "weights of another width": ({"topk_weights": torch.zeros(4, 3)}, "topk_ids and topk_weights"),
    "masks as ids": ({"topk_ids": torch.zeros(4, 2, dtype=torch.bool)}, "integers"),
    "float ids": ({"topk_ids": torch.zeros(4, 2)}, "integers"),
    "no scale": ({"down_proj_scale": None}, "down_proj_scale is missing"),
    "a scale of another shape": ({"gate_up_proj_scale": torch.ones(E, 2)}, r"up_proj_scale .* must be \(5, 80, 1\)"),
    "weights that are not codes": ({"down_proj": torch.zeros(E, H, I)}, "down_proj .* must hold torch.float8_e4m3fn"),
    "a down_proj that does not fit": ({"gated": False}, "down_proj must be"),
    "a bias of another shape": ({"down_proj_bias": torch.zeros(E, I)}, "bias of down_proj"),
    "an unknown activation": ({"activation": "swish"}, "known: silu"),
    "no activation": ({"activation": "none"}, "needs an activation"),
    "alpha for gelu": ({"activation": "gelu", "alpha": 1.0}, "no alpha"),
    "an unknown format": ({"format": "fp9"}, "known: bf16, fp8"),
    "an unknown backend": ({"backend": "cuda"}, "known: auto, triton, torch, reference"),
    "a weight-only format with input scales": (
        {"format": "fp8/bf16", "gate_up_proj_input_scale": torch.ones(E)}, "quantized activations"),
    "one input scale for all": ({"down_proj_input_scale": torch.ones(1)}, r"must be \(5,\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    changes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        OPS.experts(**arguments(**changes))


def e8m0(*shape):
    return torch.full(shape, 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)


FORMAT_REFUSED = {  # (format, what is wrong, message); H and I are 96 and 64
    "a scale for plain weights": (
        "bf16", {"gate_up_proj_scale": torch.ones(E, 1, 1)}, "gate_up_proj_scale is not used"),
    "a zero point": ("int8", {"down_proj_zero_point": torch.ones(E, 96, 1)}, "down_proj_zero_point is not used"),
    "a zero point for integers in groups": (
        "int4_g32", {"gate_up_proj_zero_point": torch.ones(E, 128, 3)}, "gate_up_proj_zero_point is not used"),
    "a global scale that the format lacks": (
        "fp8", {"down_proj_global_scale": torch.ones(E, 1)}, "down_proj_global_scale is not used: format 'fp8'"),
    "no global scale": ("nvfp4", {"gate_up_proj_global_scale": None}, "gate_up_proj_global_scale is missing"),
    "one global scale for gate and up": (
        "nvfp4", {"gate_up_proj_global_scale": torch.ones(E, 1)}, r"must be float32 \(5, 2\), .* got .*32 \(5, 1\)"),
    "a global scale in a half": (
        "nvfp4/bf16", {"down_proj_global_scale": torch.ones(E, 1).half()}, r"must be float32 .* got torch.float16"),
    "exponents as integers": (
        "mxfp4", {"down_proj_scale": torch.full((E, 96, 2), 127, dtype=torch.uint8)},
        "down_proj_scale .* must be torch.float8_e8m0fnu, got torch.uint8: view uint8 exponents as float8_e8m0fnu"),
    "scales as integers": (
        "nvfp4", {"down_proj_scale": torch.full((E, 96, 4), 1, dtype=torch.uint8)},
        "must be torch.float8_e4m3fn, got torch.uint8: view uint8 scales as float8_e4m3fn"),
    "scales of another type": (
        "mxfp8", {"down_proj_scale": torch.ones(E, 96, 2)}, "must be torch.float8_e8m0fnu, got torch.float32"),
    "exponents where scales are numbers": (
        "int8", {"down_proj_scale": e8m0(E, 96, 1)}, "must be float32, bfloat16 or float16, got torch.float8_e8m0fnu"),
    "scales of other groups": ("mxfp4", {"down_proj_scale": e8m0(E, 96, 4)}, r"must be \(5, 96, 2\)"),
    "codes that fill half a group": (
        "mxfp4", {"down_proj": torch.zeros(E, 96, 24, dtype=torch.uint8)}, "groups of 32: 48 is not a multiple"),
    "bytes that hold no number of codes": (
        "mxfp6_e2m3", {"down_proj": torch.zeros(E, 96, 50, dtype=torch.uint8)}, "no number of 6-bit codes fills 50"),
    "a down_proj that does not fit": (
        "mxfp4", {"down_proj": torch.zeros(E, 96, 16, dtype=torch.uint8), "down_proj_scale": e8m0(E, 96, 1)},
        r"down_proj must be \(5, 96, 32\), \(E, H, I in bytes\)"),
    "x in bytes": ("mxfp4", {"x": torch.zeros(4, 48)}, r"x must be \(T, 96\)"),
    "a static scale for exponents": (
        "mxfp4/mxfp4", {"down_proj_input_scale": torch.ones(E)}, "activations in 'mxfp4' take no static scale"),
    "a static scale for floats": ("mxfp4", {"down_proj_input_scale": torch.ones(E)}, "quantized activations"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORMAT_REFUSED)
def test_refused_by_the_format(what):
    name, changes, message = FORMAT_REFUSED[what]
    with pytest.raises(ValueError, match=message):
        OPS.experts(**arguments(name, 96, 64, **changes))


def test_batch_invariance_needs_independent_scales():
    with pytest.raises(ValueError, match="cannot be batch-invariant"):
        OPS.experts(**arguments("fp8_tensor", batch_invariant=True))
    x = torch.zeros(2, H, dtype=DTYPE)
    layer = Layer("fp8_tensor", 1, H, I, dtype=DTYPE, gated=False)
    with pytest.raises(ValueError, match="cannot be batch-invariant"):
        OPS.linear(x, layer.up.qdata[0], layer.up.scale[0, 0], format="fp8_tensor", batch_invariant=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        OPS.experts(**arguments(backend="triton"))
    assert torch.isfinite(OPS.experts(**arguments(backend="reference"))).all()


def test_parts_refuse():
    x, codes = torch.zeros(4, 16), torch.zeros(2, 8, 16)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    for wrong, message in (
        ({"offsets": offsets.long()}, "int32"),
        ({"offsets": offsets[:2]}, r"\(3,\)"),
        ({"x": x[:, :8]}, r"\(rows, 16\)"),
        ({"x": x.double()}, "float64"),
        ({"rows_out": offsets}, "rows_out"),
        ({"row_weights": x[0]}, "row_weights"),
        ({"transpose": True, "bias": torch.zeros(2, 8), "x": x[:, :8]}, "neither bias"),
        ({"weight": codes[0]}, "weight must"),
        ({"x_scale": torch.ones(4, 1)}, "x_scale"),
        ({"weight": codes.int()}, "int32"),
        ({"shards": 3}, "not 3 matrices"),
        ({"shards": 0}, "not 0 matrices"),
        ({"top_k": 0}, "at least 1"),
        ({"rows_in": offsets.float()}, "rows_in must be a vector of int32"),
        ({"rows_in": torch.zeros(4, 1, dtype=torch.int32)}, "rows_in must be a vector"),
        ({"rows_out": torch.zeros(4)}, "rows_out must be a vector of int32"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.grouped_mm(**({"x": x, "weight": codes, "offsets": offsets, "format": "bf16"} | wrong))
    with pytest.raises(ValueError, match="at least 1"):
        OPS.sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="integers"):
        OPS.sort_by_expert(x, 3)
    with pytest.raises(ValueError, match="multiple of top_k"):
        OPS.combine(x, 3)
    with pytest.raises(ValueError, match="known: "):
        OPS.quantize(x, None, "e4m3")
    with pytest.raises(ValueError, match="nothing to quantize"):
        OPS.quantize(x, None, "bf16")
    with pytest.raises(ValueError, match="one value or"):
        OPS.quantize(x, torch.ones(2), "e4m3_row")
    with pytest.raises(ValueError, match="single number"):
        OPS.quantize(x[0, 0], None, "e4m3_row")
    with pytest.raises(ValueError, match=r"x \(4, 16\): mxfp4 packs 4-bit codes in groups of 32: 16 is not"):
        OPS.quantize(x, None, "mxfp4")
    with pytest.raises(ValueError, match="activations in 'mxfp8' take no static scale"):
        OPS.quantize(x, torch.ones(()), "mxfp8")
    for wrong, message in ((codes[0, :, :8], r"x must be \(..., 8\)"), (codes, r"weight must be \(N, stored K\)")):
        with pytest.raises(ValueError, match=message):
            OPS.linear(x, wrong, format="bf16")
    with pytest.raises(ValueError, match="x must be"):
        OPS.linear(x[0, 0], codes[0], format="bf16")
    with pytest.raises(ValueError, match="at least 1"):
        OPS.permute(x, offsets, 0)


def test_scales_of_activations_must_fit():
    layer = Layer("fp8_block", 2, 256, 128, dtype=DTYPE, gated=False)
    x, scale = torch.zeros(4, 256).to(layer.up.qdata.dtype), layer.up.scale
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    for shape in ((4, 3), (3, 2), (4,), (1, 1)):
        with pytest.raises(ValueError, match=r"x_scale must be one value, \(4, 1\) or \(4, 2\)"):
            OPS.grouped_mm(x, layer.up.qdata, offsets, scale, x_scale=torch.ones(shape), format="fp8_block")
    with pytest.raises(ValueError, match="input_scale must be one value"):
        OPS.linear(x.to(DTYPE), layer.up.qdata[0], scale[0], input_scale=torch.ones(2), format="fp8_block")


def test_codes_of_activations_must_fit():
    """The format's codes, in its packing, with both of its scales."""
    layer, offsets = Layer("nvfp4", 2, 64, 32, dtype=DTYPE, gated=False), torch.tensor([0, 2, 4], dtype=torch.int32)
    x, scale, whole = OPS.quantize(torch.randn(4, 64), None, "nvfp4")
    weight = {"weight": layer.up.qdata, "weight_scale": layer.up.scale, "weight_global_scale": layer.up.global_scale}
    call = weight | {"x": x, "x_scale": scale, "x_global_scale": whole, "offsets": offsets, "format": "nvfp4"}
    assert OPS.grouped_mm(**call).isfinite().all()
    for wrong, message in (
        ({"x_global_scale": None}, r"x_global_scale is missing: it is \(4, 1\)"),
        ({"x_global_scale": whole[:1]}, r"x_global_scale must be \(4, 1\), got \(1, 1\)"),
        ({"x_scale": None, "x": torch.zeros(4, 64)}, "x_global_scale comes with codes"),
        ({"x_scale": scale.view(torch.uint8)}, "x_scale must be torch.float8_e4m3fn, got torch.uint8: view uint8"),
        ({"x_scale": scale[:, :1]}, r"x_scale must be \(4, 4\), got \(4, 1\)"),
        ({"x": x.view(torch.int8)}, "must hold torch.uint8, got torch.int8"),
        ({"x": x[:, :16]}, r"x must be \(rows, 32\)"),
        ({"x": torch.zeros(4, 64, dtype=torch.uint8)}, r"x must be \(rows, 32\)"),
        ({"format": "nvfp4/bf16"}, "x_scale needs a format with quantized activations"),
        ({"format": "nvfp4/fp8"}, "must hold torch.float8_e4m3fn, got torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.grouped_mm(**(call | wrong))
    codes, scale, _ = OPS.quantize(torch.randn(4, 64), None, "mxfp4")
    given = {"x": codes, "x_scale": scale, "x_global_scale": whole, "format": "nvfp4/mxfp4"}
    with pytest.raises(ValueError, match="x_global_scale is not used"):
        OPS.grouped_mm(**(call | given))
    one = layer.up.qdata[0], layer.up.scale[0], layer.up.global_scale[0, 0]
    with pytest.raises(ValueError, match="take no static scale"):
        OPS.linear(torch.zeros(4, 64), *one, input_scale=torch.ones(()), format="nvfp4/mxfp4")
    with pytest.raises(ValueError, match="x must be"):
        OPS.linear(torch.zeros(4, 32), *one, format="nvfp4")

"""Few rows on a CPU: what the parts compute, what the loop that Inductor writes computes, and where ops are opened."""

import re

import pytest
import torch
from oracle import STORED, Layer, assert_as_good, decoded, fit, inputs, takes_static
from oracle import experts as definition
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache, run_and_get_code

import moe_ops
import moe_ops.lowering.cpu as cpu
from moe_ops.formats import FORMATS, quantize_weight
from moe_ops.lowering import codes, rows
from moe_ops.lowering import whole as kept_whole

moe_ops.lowering.register()
OPS = torch.ops.moe_ops
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
# One format for each way to read codes, and one for each type of scales and way to read those.
LOOPS = list({(codec.element.exponent_bits > 3, codec.element.exponent_bits > 0, rows.words_of(codec, 256), scales):
              name for name in STORED if (codec := FORMATS[name].weight).block
              and (scales := codec.block[1] and codec.scale_dtype) is not None}.values())  # fmt: skip
KINDS = [
    {"activation": "swiglu_oai", "interleaved": True}, {"on_input": True, "static": True},
    {"activation": "relu2", "gated": False}, {"activation": "gelu", "bias": False, "static": True},
]  # fmt: skip


def compiled(fn, *args):
    """What a compiled function returns, and its code."""
    torch._dynamo.reset()
    with torch.no_grad(), fresh_cache():
        out, (code,) = run_and_get_code(torch.compile(fn, fullgraph=True), *args)
    return out, code


def is_opened(code):
    """Whether no op of ours is called, comments aside."""
    return not re.search(r"^[^#\n]*= torch\.ops\.moe_ops\.\w+\.default\(", code, re.M)


# ---- the parts as they are, without Inductor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("name", QUANTIZED)
def test_experts_of_parts(name, kind, dtype):
    """With ids that no expert has."""
    options = dict(KINDS[kind])
    on_input, static = options.pop("on_input", False), options.pop("static", False)
    static = static and takes_static(FORMATS[name].activation)
    layer = Layer(name, 4, *fit(name, 128, 128), dtype=dtype, static=static, **options)
    x, ids, weights = inputs(5, layer.hidden, 2, 4, dtype)
    got = OPS.experts(x, ids, weights, *layer.tensors(), router_weight_on_input=on_input, **layer.options(),
                      backend="inductor_cpu")  # fmt: skip

    def wanted(work, nudge=0.0):
        return definition(layer, x, ids, weights, work, on_input=on_input, stored=dtype, nudge=nudge)

    truth = wanted(torch.float64)
    assert_as_good(got, truth, wanted(dtype), nudged=lambda nudge: wanted(torch.float64, nudge))


def test_a_grouped_product_of_codes():
    """x that comes with its scales, gathered, scattered and weighed, with rows that no expert owns."""
    g = torch.Generator().manual_seed(0)
    for name in ("fp8", "fp8_block", "mxfp4/mxfp6_e2m3", "nvfp4", "int8/int8"):
        fmt, w = FORMATS[name], torch.randn(3, 40, 128, generator=g)
        q, x = quantize_weight(fmt.weight, w), torch.randn(4, 128, generator=g)
        data, scale, whole = OPS.quantize(x, None, fmt.activation.name)
        offsets, read = torch.tensor([0, 3, 3, 7]).int(), torch.randperm(8, generator=g).int()
        write, weigh = torch.randperm(8, generator=g).int(), torch.rand(8, generator=g)
        args = [data, q.qdata, offsets, q.scale, q.global_scale, None, None, scale, whole if whole.numel() else None]
        more = {"rows_in": read, "rows_out": write, "row_weights": weigh, "top_k": 2, "format": name}
        got, truth = (OPS.grouped_mm(*args, **more, backend=b) for b in ("inductor_cpu", "reference"))
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
        assert not got[write[7].long()].any()


# ---- the loop


def _stack(name, k):
    """Random codes and scales (3, 10, k) of two shards; every code of the element is among them."""
    g = torch.Generator().manual_seed(0)
    codec = FORMATS[name].weight
    q = quantize_weight(codec, torch.randn(3, 10, k, generator=g), 2)
    bits = torch.randint(0, 256, q.qdata.shape, generator=g).to(torch.uint8)
    if codec.element.name == "e4m3":
        bits[(bits & 0x7F) == 0x7F] = 0
    scale = q.scale if codec.block[1] else None
    if scale is not None and scale.dtype.itemsize == 1:
        scale.view(torch.uint8).flatten()[:3] = torch.tensor([0, 1, 254 if codec.global_scale else 120])
    return codec, bits.view(q.qdata.dtype), scale


def _numbers(codec, data, scale):
    """(3, 10, K) in float64, by somebody else's decoders."""
    values = decoded(data, codec)
    if scale is None:
        return values
    (bn, bk), inner = codec.block, values.shape[1] // 2
    row = torch.tensor([s * -(-inner // bn) + n // bn for s in range(2) for n in range(inner)])
    return values * scale.double()[:, row].repeat_interleave(bk, 2)


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop(name):
    """Rows gathered, each with its expert, in some order."""
    k, read, owner = 256, torch.tensor([2, 0, 0, 1]), torch.tensor([0, 2, 2, 1])
    x, (codec, data, scale) = torch.randn(3, k, generator=torch.Generator().manual_seed(1)), _stack(name, k)
    lanes = x.unflatten(1, (-1, rows.words_of(codec, k).planes)).permute(2, 0, 1).contiguous()
    options = {"format": name, "shards": 2, "interleaved": False}
    got, code = compiled(lambda *tensors: OPS._rows(*tensors, **options), lanes, read, owner, data, scale)
    assert is_opened(code) and "acc0_vec" in code
    terms = x.double()[read][:, None] * _numbers(codec, data, scale)[owner] / codes.unit(codec.element)  # (R, N, K)
    assert ((got.double() - terms.sum(-1)).abs() <= 2.0**-20 * terms.abs().sum(-1)).all()
    assert torch.allclose(OPS._rows(lanes, read, owner, data, scale, **options), got, rtol=1e-4, atol=1e-3)


def test_a_scale_that_is_nan_is_one_in_the_loop():
    _, data, scale = _stack("mxfp4", 64)
    scale.view(torch.uint8)[1, 2, 0] = 255
    data[1, 2] = 0x22  # all of one sign: an infinite scale would give an infinite sum
    x = torch.ones(2, 1, 32)
    fn = lambda x, d, s: OPS._rows(x, None, torch.tensor([1]), d, s, format="mxfp4", shards=2, interleaved=False)  # noqa: E731
    out, _ = compiled(fn, x, data, scale)
    assert out.isnan().nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("name", ["fp8", "nvfp4/bf16"])
def test_a_compiled_layer(name):
    """From float activations on; ids that no expert has add nothing."""
    layer = Layer(name, 4, 128, 64, dtype=torch.bfloat16, interleaved=True, activation="swiglu_oai")
    x, ids, weights = inputs(5, 128, 2, 4, torch.bfloat16)
    x[2], ids[2] = float("nan"), torch.tensor([-1, 4])
    tensors = layer.tensors()
    out, code = compiled(lambda x, i, w: OPS.experts(x, i, w, *tensors, **layer.options()), x, ids, weights)
    x[2] = 0
    truth, plain = (definition(layer, x, ids, weights, work) for work in (torch.float64, torch.bfloat16))
    assert is_opened(code) and not out[2].any()
    # Rows between two products are not rounded in one loop: other codes, of as good numbers.
    assert_as_good(out, truth, plain, nudged=lambda nudge: definition(
        layer, x, ids, weights, torch.float64, nudge=nudge * 2.0**11))  # fmt: skip


def test_rows_of_a_linear_share_what_is_decoded():
    codec, k = FORMATS["fp8/bf16"].weight, 64
    q, x, bias = codec.quantize(torch.randn(48, k)), torch.randn(3, k), torch.randn(48)
    fn = lambda x, w, s, b: OPS.linear(x, w, s, bias=b, format="fp8/bf16")  # noqa: E731
    out, code = compiled(fn, x, q.qdata, q.scale, bias)
    want = x.double() @ (decoded(q.qdata, codec) * q.scale.double()).T + bias.double()
    assert is_opened(code)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert code.count("loadu(in_ptr") and code.count("tmp_acc2_vec =") and "tmp_acc3_vec" not in code


# ---- where ops are opened


def _given(name="fp8", tokens=2, e=4, h=128, i=64, **changed):
    layer = Layer(name, e, h, i, dtype=torch.bfloat16)
    x, ids, weights = inputs(tokens, h, 2, e, torch.bfloat16)
    names = [a.name for a in OPS.experts.default._schema.arguments]
    return dict(zip(names, [x, ids, weights, *layer.tensors()])) | layer.options() | changed


def opens(given, op="experts"):
    from moe_ops.backends.base import Problem

    return cpu.opens(op, given, Problem("grouped_mm", given["x"].device.type, 0, given["x"].dtype, given["format"]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_quantized_format_is_opened(name):
    assert opens(_given(name, h=128, i=128)) == FORMATS[name].quantized


def test_what_stays_whole():
    half = _given("int4_g32")
    half["down_proj_scale"] = half["down_proj_scale"].half()
    few = cpu._ROWS * 4 // 2  # tokens
    apart = _given()
    apart["gate_up_proj"] = apart["gate_up_proj"].repeat(1, 1, 2)[:, :, ::2]
    refused = {
        "many rows": _given(tokens=few + 1), "scales of half": half, "not contiguous": apart,
        "another backend": _given(backend="reference"), "the same for every batch": _given(batch_invariant=True),
        "a tile of columns is partial": _given("fp8_block", i=192, h=192),
    }  # fmt: skip
    assert opens(_given(tokens=few)) and opens(_given("fp8_block", h=128, i=128))
    assert not [why for why, given in refused.items() if opens(given)]
    assert not opens(_given(), "experts_backward")


def test_rows_of_a_linear_are_few_by_themselves():
    q = FORMATS["fp8"].weight.quantize(torch.randn(16, 64))
    given = lambda m: {"x": torch.randn(m, 64), "weight": q.qdata, "weight_scale": q.scale, "format": "fp8"}  # noqa: E731
    assert opens(given(8), "linear") and not opens(given(9), "linear")


def test_tokens_that_are_not_known_have_two_graphs():
    given = _given()
    x, ids, weights, *tensors = list(given.values())[:15]
    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    fn = torch.compile(lambda x, i, w: OPS.experts(x, i, w, *tensors, format="fp8"), fullgraph=True, backend=counter)
    for tokens, graphs in ((3, 1), (5, 1), (40, 2), (50, 2)):
        x, ids, weights = inputs(tokens, 128, 2, 4, torch.bfloat16)
        for t in (x, ids, weights):
            torch._dynamo.maybe_mark_dynamic(t, 0)
        with torch.no_grad(), fresh_cache():
            out = fn(x, ids, weights)
        eager = OPS.experts(x, ids, weights, *tensors, format="fp8")
        assert (out.double() - eager.double()).norm() < 0.05 * eager.double().norm()
        assert counter.frame_count == graphs


def test_kept_whole():
    given = _given()
    x, ids, weights, *tensors = list(given.values())[:15]
    with kept_whole():
        _, code = compiled(lambda x: OPS.experts(x, ids, weights, *tensors, format="fp8"), x)
    assert code.count("torch.ops.moe_ops.experts.default(") == 1

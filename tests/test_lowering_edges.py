"""Legitimate calls at the edges of what the compiler opens: right numbers, or the op as it is. No GPU."""

import re
from functools import partial

import pytest
import torch
from fake_gpu import compile_kernels, empty, extern_calls, fake_gpu, generated, launches, symbol

import moe_ops.lowering
from moe_ops.backends.base import Operand, Rows, Weight
from moe_ops.backends.triton_plan import Prepared, Product, plan_of
from moe_ops.formats import FORMATS, empty_weight
from moe_ops.lowering import product
from moe_ops.lowering.parts import Parts

OPS = torch.ops.moe_ops
E, N, K = 4, 64, 256


@pytest.fixture(autouse=True, scope="module")
def registered():
    moe_ops.lowering.register()


def weight(name, experts=E, n=N, k=K, shards=1):
    """Codes, scale, global scale of a format, on the fake device."""
    w = empty_weight(FORMATS[name].weight, experts, n, k, shards, dtype=torch.bfloat16, device="cuda")
    return w.qdata, w.scale, w.global_scale


def offsets():
    return empty(E + 1, dtype=torch.int32)


def called(source):
    """Our ops that were left as they are."""
    return [name for name in extern_calls(source) if "moe_ops" in name]


def test_one_tensor_of_indices_serves_reads_and_writes():
    def fn(x, w, scale, offsets, rows):
        return OPS.grouped_mm(x, w, offsets, scale, rows_in=rows, rows_out=rows, format="fp8")

    with fake_gpu(90):
        source = generated(fn, lambda: [empty(8, K), *weight("fp8")[:2], offsets(), empty(8, dtype=torch.int32)])
    tile = re.search(r"product_tile\((.*?)\)", source)[1].split(", ")
    assert tile[7:9] == ["read_ptr", "write_ptr"]


def test_strides_of_a_scale_are_those_that_the_compiler_chose():
    def fn(x, w, scale, offsets):
        return OPS.grouped_mm(x, w, offsets, (scale * 2).expand(E, N, 1), format="fp8")

    with fake_gpu(90):
        make = lambda: [empty(8, K), weight("fp8")[0], empty(E, 1, 1, dtype=torch.float32), offsets()]  # noqa: E731
        source = generated(fn, make)
    assert f"empty_strided_cuda(({E}, {N}, 1), ({N}, 1, {N})" in source  # expanded values are copied
    assert f"stride_wce : tl.constexpr = {N}\n" in source and "stride_wcn : tl.constexpr = 1\n" in source


def test_gradients_of_biases():
    def fn(grad, x, ids, weights, up, s1, down, s2, b1, b2):
        rest = (None, None, None, None, b1, b2, None, None, None, None, [True] * 4 + [False] * 2)
        return OPS.experts_backward(grad, x, ids, weights, up, down, s1, s2, *rest, format="fp8")

    def make():
        ids, weights = empty(8, 2, dtype=torch.int64), empty(8, 2)
        two = (*weight("fp8", shards=2)[:2], *weight("fp8", n=K, k=N)[:2])
        return [empty(8, K), empty(8, K), ids, weights, *two, empty(E, 2 * N), empty(E, K)]

    with fake_gpu(90):
        assert not called(generated(fn, make))


PACKED = [name for name, f in FORMATS.items() if f.activation is not None and f.activation.packed]


@pytest.mark.parametrize("name", PACKED)
def test_packed_codes_that_are_given(name):
    def fn(x, offsets, w, scale, global_scale=None):
        q, s, g = OPS.quantize(x, None, FORMATS[name].activation.name)
        x_global = g if g.numel() else None
        return OPS.grouped_mm(q, w, offsets, scale, global_scale, x_scale=s, x_global_scale=x_global, format=name)

    with fake_gpu(90):
        make = lambda: [empty(8, K), offsets(), *(t for t in weight(name) if t is not None)]  # noqa: E731
        source = generated(fn, make)
    assert not extern_calls(source)


@pytest.mark.parametrize("name", PACKED)
def test_numbers_of_packed_codes(name):
    codec, plan = FORMATS[name].activation, plan_of(FORMATS[name], torch.bfloat16, True, K, 90)
    made = Parts.quantize(torch.randn(5, K, generator=torch.Generator().manual_seed(0)), codec)
    given = Operand(made.data, made.scale, made.global_scale)  # nothing known of what it was made of
    arranged = partial(Parts.arranged, codec=codec, plan=plan, k=K, dtype=torch.float32)
    assert torch.equal(arranged(given), arranged(made))


def unknown_rows(fn):
    return lambda mask, x, *args: fn(x[torch.nonzero(mask).squeeze(-1)], *args)


@pytest.mark.parametrize("op", ["linear", "quantize", "sort_by_expert", "combine"])
def test_ops_with_unknown_numbers_of_rows_stay(op):
    fn, x, rest = {
        "linear": (lambda x, w, s: OPS.linear(x, w[0], s[0], format="fp8"), (70, K), 2),
        "quantize": (lambda x: OPS.quantize(x, None, FORMATS["fp8"].activation.name), (70, K), 0),
        "sort_by_expert": (lambda x: OPS.sort_by_expert(x.long(), E), (70, 2), 0),
        "combine": (lambda x: OPS.combine(x.view(-1, N), 2), (70, 2 * N), 0),
    }[op]
    with fake_gpu(90):
        make = lambda: [empty(70, dtype=torch.bool), empty(*x), *weight("fp8", experts=1)[:rest]]  # noqa: E731
        assert called(generated(unknown_rows(fn), make)) == [f"torch.ops.moe_ops.{op}.default"]


def test_a_weight_of_unknown_size_stays():
    def make():
        n, k = symbol(N, "N"), symbol(K, "K")
        return [empty(symbol(8), k), empty(n, k, dtype=torch.float8_e4m3fn), empty(n, 1, dtype=torch.float32)]

    with fake_gpu(90):
        source = generated(lambda x, w, scale: OPS.linear(x, w, scale, format="fp8"), make)
    assert called(source) == ["torch.ops.moe_ops.linear.default"]


@pytest.mark.parametrize("name", ["bf16", "int8", "mxfp4", "fp8", "nvfp4"])
def test_what_triton_has_no_type_for_stays(name):
    def fn(x, offsets, w, scale=None, global_scale=None):
        return OPS.grouped_mm(x, w, offsets, scale, global_scale, format=name)

    with fake_gpu(80):
        make = lambda: [empty(8, K), offsets(), *(t for t in weight(name) if t is not None)]  # noqa: E731
        source = generated(fn, make)
        stays = name in ("fp8", "nvfp4")
        assert bool(called(source)) == stays and bool(launches(source)) != stays
        compile_kernels(source)


def test_whole_keeps_all_ops():
    def fn(x, order):
        return OPS.unpermute(OPS.permute(x, order, 2), order)

    with fake_gpu(90), moe_ops.lowering.whole():
        source = generated(fn, lambda: [empty(8, K), empty(16, dtype=torch.int32)])
    assert called(source) == ["torch.ops.moe_ops.permute.default", "torch.ops.moe_ops.unpermute.default"]


def test_examples_of_rows_to_read_are_rows_of_x():
    """More rows may be read than there are: max_autotune runs kernels on these."""
    x, w, f = Prepared(torch.empty(4, K, dtype=torch.bfloat16)), Weight(torch.empty(E, N, K)), FORMATS["bf16"]
    rows, plan = Rows(torch.empty(E + 1), read=torch.empty(64), top_k=2), plan_of(f, torch.bfloat16, False, K, 90)
    p = Product(x, w, rows, None, f, plan, torch.bfloat16)
    read = product._examples(p, [product.TENSORS.index("read")])[0].args[0]
    assert read.shape == (64,) and read.max() // 2 == 3


@pytest.mark.kernels
def test_a_bias_with_strides():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w, bias = (torch.randn(*size, dtype=torch.bfloat16, device=device) for size in ((3, K), (N, K), (2 * N,)))
    run = partial(OPS.linear, x, w, None, None, None, format="bf16", backend="triton")
    assert torch.equal(run(bias=bias[::2]), run(bias=bias[::2].contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_wider_than_the_codec_s_own_are_not_rounded(dtype):
    q = FORMATS["int4_g32"].weight.quantize(torch.randn(N, K).bfloat16())
    x, scale = torch.randn(1, K).bfloat16(), (q.scale.float() * 1.003).to(dtype)
    got, want = (OPS.linear(x, q.qdata, scale, format="int4_g32", backend=name) for name in ("auto", "reference"))
    assert (got - want).norm() < 2e-3 * want.norm()


def test_packed_weights_that_are_not_words():
    """Compiled code has no address to look at: it would read past it, or stop the whole process."""
    bad = lambda x, w, scale: OPS.linear(x, w[2 : 2 + N * K // 2].view(N, K // 2), scale, format="mxfp4")  # noqa: E731
    with fake_gpu(90), pytest.raises(ValueError, match="multiple of 4 bytes"):
        make = lambda: [empty(8, K), empty(N * K, dtype=torch.uint8), weight("mxfp4", experts=1)[1][0]]  # noqa: E731
        generated(bad, make)


@pytest.mark.kernels
def test_packed_rows_that_are_not_words():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide, scale = torch.zeros(N, K // 2 + 1, dtype=torch.uint8, device=device), torch.ones(N, K // 32, device=device)
    x = torch.ones(3, K, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        OPS.linear(x, wide[:, :-1], scale.to(torch.float8_e8m0fnu), format="mxfp4", backend="triton")


def test_traces_refuse_the_scales_that_calls_refuse():
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="take no static scale"):
        OPS.quantize(torch.empty(4, K), torch.ones(()), FORMATS["mxfp8"].activation.name)

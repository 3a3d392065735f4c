"""Whole layers and what stands around a product, in the code that Inductor generates: which kernels there are.

Formats: test_lowering_formats.py; values: test_lowering_parts.py; on a GPU: test_lowering_gpu.py.
"""

import re
from functools import cache

import expecttest
import pytest
from fake_gpu import empty, extern_calls, fake_gpu, generated, kernels, launches, traced
from lowering_cases import (
    MODELS,
    OPS,
    VERSION,
    assert_they_fit,
    block,
    built_templates,
    flat,
    matrix,
    ours,
    some_experts,
)
from torch.nn.functional import gelu

import moe_ops.lowering
from moe_ops.lowering import routing

moe_ops.lowering.register()
T = 8
NOT_OURS = {"extern_kernels.mm", "extern_kernels.addmm", "torch.ops.aten.topk.default"}


def layer(model, arch, **options):
    """The kernels of a layer from residual to residual, one a line, without the router's; one that follows another of
    its kind without anything between them stands after it."""
    experts, top_k = MODELS[model][1], MODELS[model][4]
    with fake_gpu(arch):
        source = generated(*block(model, T, **options))
        assert_they_fit(built_templates(source))
    found = ours(source, top_k, few=T * experts)
    assert set(extern_calls(source)) <= NOT_OURS and len(extern_calls(source)) == 2
    assert len(launches(source)) - len(found) <= 3  # the router's: softmax, and the sum that its weights are divided by
    return found


class TestLayers(expecttest.TestCase):
    """fp8 at 8 tokens. Run with EXPECTTEST_ACCEPT=1 to write down what there is now."""

    def both(self, model):
        on_hopper, on_blackwell = (layer(model, arch) for arch in (90, 100))
        assert on_hopper == on_blackwell and len(on_hopper) <= 6
        return "\n".join(on_hopper)

    def test_qwen3_moe(self):
        self.assertExpectedInline(self.both("qwen3_moe"), """\
red norm quantize
_sort_kernel
tem
per quantize
tem
poi sum 2""")

    def test_gpt_oss(self):
        self.assertExpectedInline(self.both("gpt_oss"), """\
red norm quantize
_sort_kernel
tem
red quantize
tem
poi sum 2""")

    def test_the_next_norm_costs_nothing(self):
        for arch, model in ((90, "qwen3_moe"), (100, "gpt_oss")):
            alone, found = layer(model, arch), layer(model, arch, next_norm=True)
            assert found[:-1] == alone[:-1]
            self.assertExpectedInline(found[-1], """red norm sum 3""")

    def test_a_shared_expert(self):
        """x is quantized once, for both; the sum with the experts is in a kernel that there is anyway."""
        self.assertExpectedInline("\n".join(layer("qwen3_moe", 90, shared=1024)), """\
red norm quantize
_sort_kernel
tem
per quantize
tem
tem
per quantize gate
tem
tem
poi sum 3""")

    def test_a_shared_expert_on_blackwell(self):
        self.assertExpectedInline("\n".join(layer("qwen3_moe", 100, shared=1024)), """\
red norm quantize
_sort_kernel
tem
per quantize
tem
tem
tem
per quantize gate
tem sum 2""")

    def test_a_shared_expert_and_the_next_norm(self):
        self.assertExpectedInline("\n".join(layer("qwen3_moe", 90, shared=1024, next_norm=True)), """\
red norm quantize
_sort_kernel
tem
per quantize
tem
tem
per quantize gate
tem
tem
red norm sum 5""")


# ---- what follows a product is in its kernel

ONE_OF_EACH_KIND = ["bf16", "fp8", "int8/int8", "fp8_block", "mxfp4", "int4_g128", "mxfp6_e2m3/fp8"]  # of MMA and bits


def with_what_follows(name, rows, approximate, k=512, n=768):
    def fn(x, weights, bias, residual):
        return residual + gelu(OPS.linear(x, *weights, None, bias, format=name), approximate=approximate)

    return flat(fn, lambda: [empty(rows, k), matrix(name, n, k), empty(n), empty(rows, n)])


@cache
def code_with_what_follows(arch, name, rows, approximate):
    return generated(*with_what_follows(name, rows, approximate))


# With scales, bias, erf and a residual behind it the tallest tile of fp8 spills 32 bytes, 128 x 256 in two warp groups.
STRICT = VERSION == (2, 13)  # it was found with that
SPILLS = {"fp8": 32}


@pytest.mark.parametrize("name,rows", [
    pytest.param(name, rows, marks=pytest.mark.xfail(strict=STRICT, reason="spills")) if rows > 16 and name in SPILLS
    else (name, rows) for name in ONE_OF_EACH_KIND for rows in (16, 300)])  # fmt: skip
def test_products_fit_with_what_follows(name, rows):
    with fake_gpu(90):
        assert_they_fit(built_templates(code_with_what_follows(90, name, rows, "none")))


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_bias_gelu_and_residual_are_in_the_product(name, arch):
    approximate, function = ("none", "libdevice.erf") if arch == 90 else ("tanh", "libdevice.tanh")
    with fake_gpu(arch):
        source = code_with_what_follows(arch, name, 300, approximate)
    texts = [text for kernel, text in kernels(source) if "_tem_" in kernel]
    assert len(texts) == 1 and launches(source)[-1].startswith("triton_tem") and not extern_calls(source)
    assert function in texts[0] and "bias_ptr = arg_bias_ptr" in texts[0]
    assert len(re.findall(r"tl\.load\(in_ptr\d", texts[0])) == texts[0].count("tl.store(out_ptr") > 0  # the residual


def test_what_follows_a_product_in_parts_is_where_they_are_added():
    with fake_gpu(90):
        source = generated(*with_what_follows("fp8/bf16", 4, "none", k=4096, n=512))
    assert [name.split("_")[1] for name in launches(source)] == ["tem", "poi"] and not extern_calls(source)
    (_, product), (_, added) = kernels(source)
    assert "libdevice.erf" in added and "libdevice.erf" not in product and "PARTS : tl.constexpr = 1" not in product


# ---- any number of tokens


@pytest.mark.parametrize("tokens,assumed,arch,name", [
    (12, "<=", 90, "fp8"), (12, "<=", 100, "mxfp4/mxfp8"), (500, ">", 90, "mxfp4/mxfp8"), (500, ">", 100, "fp8"),
])  # fmt: skip
def test_of_the_number_of_tokens_one_thing_is_assumed(tokens, assumed, arch, name):
    with fake_gpu(arch):
        source, env = traced(*some_experts([tokens], name))
        assert_they_fit(built_templates(source))
    guards = [str(guard.expr) for guard in env.guards]
    fits_32_bits = [guard for guard in guards if guard.endswith("<= 2147483647")]
    (symbol_name,) = env.var_to_range
    assert [guard for guard in guards if guard not in fits_32_bits] == [f"{symbol_name} {assumed} {routing.FEW}"]
    assert not extern_calls(source)
    calls = re.findall(r"^\s*(\w+)\.run\((.*)\)", source, re.M)
    assert len(calls) == len(launches(source))
    for kernel, arguments in calls:  # grids of Inductor's own kernels are made of a number that is made of the symbol
        rows = rf"{symbol_name}\b|{kernel}_xnumel|ks\d"
        assert re.search(rows, arguments), (kernel, arguments)
        assert not re.search(rf"\b({tokens}|{tokens * 4})\b", arguments), (kernel, arguments)
    for kernel, arguments in calls:
        if "_tem_" in kernel:
            assert re.search(rf"{symbol_name}\b", arguments.partition(f", {symbol_name}, ")[2]), arguments  # the grid


@pytest.mark.parametrize("arch", [90, 100])
def test_one_token(arch):
    with fake_gpu(arch):
        source = generated(*some_experts(1))
        assert_they_fit(built_templates(source))
    assert not extern_calls(source)


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "mxfp4"])
def test_no_token(name):
    """Nothing is launched: the sum over no experts of no tokens is as it is allocated."""
    with fake_gpu(90):
        source = generated(*some_experts(0, name))
    assert not launches(source) and not extern_calls(source) and "empty_strided_cuda((0, 512)" in source

"""What max_autotune is offered, and what it times that with. The timing itself is replaced: there is no GPU."""

import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch._inductor.select_algorithm as selection
from fake_gpu import extern_calls, fake_gpu, launches, traced
from lowering_cases import VERSION, some_experts

import moe_ops.lowering
from moe_ops.kernels.configs import table
from moe_ops.lowering import product

moe_ops.lowering.register()
E, H, WIDTH, A = 32, 512, 256, 4
NAMES = ["fp8", "mxfp4", "mxfp8", "int4_g128"]  # a scale for each row, exponents, scales of the MMA, bf16 scales


@pytest.fixture
def offered():
    """For each product: its choices, and what it is."""
    found = []

    def timed(*args, **kwargs):
        choices = next(a for a in [*args, *kwargs.values()] if isinstance(a, (list, tuple)) and a and isinstance(
            a[0], selection.ChoiceCaller))  # fmt: skip
        found.append(list(choices))
        return {choice: 1.0 + i for i, choice in enumerate(choices)}  # the first one wins

    cache = selection.AlgorithmSelectorCache
    with ExitStack() as stack:
        for name in ("benchmark_choices", "benchmark_in_current_process", "benchmark_in_sub_process"):
            if hasattr(cache, name):
                stack.enter_context(mock.patch.object(cache, name, staticmethod(timed)))
        precompile = lambda *args, **kwargs: lambda: {}  # noqa: E731
        stack.enter_context(mock.patch.object(cache, "make_precompile_fn", precompile))
        stack.enter_context(mock.patch.object(selection, "PRINT_AUTOTUNE", False, create=True))
        yield found


@pytest.fixture
def products(monkeypatch):
    """What is lowered, and examples of what it is timed with, by name, as they are while it is lowered."""
    found, examples = [], product._examples

    def record(p, present):
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            made = examples(p, present)
            tensors = _fake_arguments()
            of = {index: fn(_node(tensors[present[index]])) for index, fn in made.items()}
        found.append((p, {product.TENSORS[present[index]]: t for index, t in of.items()}))
        return made

    monkeypatch.setattr(product, "_examples", record)
    return found


def _fake_arguments():
    return moe_ops.lowering._compat.fake_tensors()


def _node(fake):
    """Of the graph, but on the CPU."""
    size = [s.node.expr if isinstance(s, torch.SymInt) else s for s in fake.shape]
    return SimpleNamespace(get_dtype=lambda: fake.dtype, get_device=lambda: torch.device("cpu"), get_size=lambda: size)


def settings(**more):
    quiet = {"benchmark_epilogue_fusion": False, "benchmark_template_fusion": False, "autotune_local_cache": False}
    return {k: v for k, v in quiet.items() if hasattr(torch._inductor.config, k)} | {"max_autotune": True, **more}


def tiles_of(choice):
    """Of a template, as its description has them."""
    said = dict(re.findall(r"(\w+)=([^,]+)", choice.description))
    numbers = [int(said[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "GROUP_M", "SHORT")]
    return (*numbers, said["SWAP"] == "True")


def tiles(config):
    return (config.block_m, config.block_n, config.block_k, config.warps, config.stages, config.group_m, config.short,
            config.swap)  # fmt: skip


def assert_valid_examples(products, tokens):
    """What is timed: indices in range, each once, and numbers that are no surprise."""
    hint = tokens[0] if isinstance(tokens, list) else tokens
    rows = hint * A
    (_, first), (_, second) = products
    assert {"offsets", "read"} <= set(first) and {"offsets", "write"} <= set(second)
    for p, examples in products:
        for which, t in examples.items():
            if which == "offsets":
                assert t.shape == (E + 1,) and t[0] == 0 and t[-1] == rows and (t.diff() >= 0).all()
            elif which in ("read", "write"):
                assert torch.equal(t.sort().values, torch.arange(rows, dtype=t.dtype)) and t.dtype == torch.int32
            else:
                assert t.float().isfinite().all() and (t.float() > 0).all()
        made = set(examples)
        floats = {"x_along_k": p.x.along_k, "x_each": p.x.each, "weight_scale": p.w.scale,
                  "weight_global_scale": p.w.global_scale}  # fmt: skip
        assert {which for which, t in floats.items() if t is not None} <= made


@pytest.mark.parametrize("tokens,arch", [(8, 90), ([500], 90), ([12], 100)])
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_table_and_the_op(name, arch, tokens, offered, products):
    with fake_gpu(arch):
        source, _ = traced(*some_experts(tokens, name, E, H, WIDTH, A), config=settings())
    assert len(offered) == len(products) == 2
    for choices, (p, _) in zip(offered, products):
        assert [c.name for c in choices if not isinstance(c, selection.TritonTemplateCaller)] == ["moe_ops_product"]
        templates = [c for c in choices if isinstance(c, selection.TritonTemplateCaller)]
        assert {tiles_of(c) for c in templates} == {tiles(config) for config in table(p.kind, arch).values()}
        assert len({tiles_of(c) for c in templates}) == len(templates) >= (3 if arch == 90 else 1)
    assert not any("moe_ops" in call for call in extern_calls(source))
    assert sum("_tem_" in name for name in launches(source)) == 2
    assert_valid_examples(products, tokens)


def test_without_it_there_is_one_choice(offered, products):
    with fake_gpu(90):
        traced(*some_experts(8, "fp8", E, H, WIDTH, A))
    assert not offered and len(products) == 2


def test_where_the_op_is_the_fastest_it_is_called(offered, monkeypatch):
    """In Python: with its tensors that are there, in their order."""
    monkeypatch.setattr(product, "_configs", lambda *args, made=product._configs: made(*args)[:2])
    last_wins = lambda choices: {c: -float(i) for i, c in enumerate(choices)}  # noqa: E731
    cache = selection.AlgorithmSelectorCache
    find = lambda *args, **kwargs: last_wins(  # noqa: E731
        next(a for a in [*args, *kwargs.values()] if isinstance(a, (list, tuple)) and a and isinstance(
            a[0], selection.ChoiceCaller)))  # fmt: skip
    for name in ("benchmark_choices", "benchmark_in_current_process", "benchmark_in_sub_process"):
        if hasattr(cache, name):
            monkeypatch.setattr(cache, name, staticmethod(find))
    with fake_gpu(90):
        source, _ = traced(*some_experts(8, "mxfp4", E, H, WIDTH, A), config=settings())
    assert extern_calls(source) == ["extern_kernels.moe_ops_product"] * 2
    assert not any("_tem_" in name for name in launches(source))


def test_the_c_plus_plus_wrapper_is_offered_no_python(offered, products):
    if VERSION < (2, 12):
        pytest.skip("2.11 runs kernels to time them when it writes a C++ wrapper")
    with fake_gpu(90):
        source, _ = traced(*some_experts(8, "fp8", E, H, WIDTH, A), config=settings(cpp_wrapper=True))
        assert all(isinstance(c, selection.TritonTemplateCaller) for choices in offered for c in choices)
        plain, _ = traced(*some_experts(8, "fp8", E, H, WIDTH, A), config={"cpp_wrapper": True})
    assert len(offered) == 2
    for code in (source, plain):
        assert "moe_ops::" not in code and "moe_ops_product(" not in code and code.count("call_triton_tem_fused") >= 2

"""Routing opened for Inductor: the values of the definitions, kernels of the graph, no assumption but T <= 64."""

import pytest
import torch
from fake_gpu import compile_kernels, empty, extern_calls, fake_gpu, generated, launches, symbol, traced

from moe_ops import routing as definition
from moe_ops.lowering import _compat, routing

OPS = torch.ops.moe_ops
E, A, H = 128, 8, 2048
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
ONE, THREE = ["_sort_kernel"], ["_count_kernel", "_scan_kernel", "_scatter_kernel"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    for op, fn in routing.DECOMPOSITIONS.items():
        _compat.add_decomposition(op, fn)


def kernels_of(source):
    """In the order of launches, without Inductor's numbers; its own by their kind."""
    names = [name.rpartition("_")[0] for name in launches(source)]
    return [name.split("_")[1] if name.startswith("triton_") else name for name in names]


# ---- values


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens,top_k,experts", [(0, 2, 4), (1, 1, 1), (7, 3, 5), (64, 8, 128), (350, 8, 60)])
def test_sort(tokens, top_k, experts, dtype):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(0)).to(dtype)
    from moe_ops.kernels import routing as kernels

    assert (tokens * top_k > kernels._ONE_KERNEL_ROWS) == (tokens == 350)  # both ways are tried
    for got, want in zip(routing.sort_by_expert(ids, experts), definition.sort_by_expert(ids, experts)):
        assert got.dtype == torch.int32 and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_combine_of_parts(dtype):
    """In order, one by one; a row is rounded before it is added."""
    parts = torch.randn(3, 5 * 4, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16)
    want = torch.zeros(5, 16)
    for t in range(5):
        for a in range(4):
            p = parts[:, t * 4 + a]
            want[t] += ((p[0] + p[1]) + p[2]).to(dtype).float()
    assert torch.equal(routing.combine(parts, 4, dtype), want.to(dtype))
    rows = parts[0].to(dtype)
    assert torch.equal(routing.combine(rows, 4), definition.combine(rows, 4))


@pytest.mark.parametrize("experts", [1, 6])
def test_permute_and_back(experts):
    ids = torch.randint(-1, experts, (9, 3), generator=torch.Generator().manual_seed(0))
    order, x = definition.sort_by_expert(ids, experts)[0], torch.randn(9, 8)
    rows = definition.permute(x, order, 3)
    assert torch.equal(routing.unpermute(rows, order), definition.unpermute(rows, order))
    assert torch.equal(routing.unpermute(rows, order).view(9, 3, 8)[:, 1], x)


# ---- kernels


def ids(tokens, dtype=torch.int32):
    return lambda: [empty(symbol(tokens[0]) if isinstance(tokens, list) else tokens, A, dtype=dtype)]


def sort(topk_ids):
    return OPS.sort_by_expert(topk_ids, E)


# [T]: a symbolic T, tried with that.
@pytest.mark.parametrize("tokens,want", [(1, ONE), (8, ONE), (256, ONE), (257, THREE), ([8], ONE), ([4096], THREE)])
def test_sort_is_in_the_graph(tokens, want):
    with fake_gpu(90):
        source, env = traced(sort, ids(tokens))
        built = compile_kernels(source)
    assert kernels_of(source) == want and not extern_calls(source)  # its outputs are written where they are: no copies
    assert not any(b.stack for b in built)
    assumed = [str(guard.expr) for guard in env.guards if "2147483647" not in str(guard.expr)]
    symbolic = isinstance(tokens, list)
    assert len(assumed) == symbolic and all(a.endswith("<= 64" if tokens == [8] else "> 64") for a in assumed)


def test_one_configuration_for_few_tokens():
    """No constant of the kernels comes from the size that a graph is traced with."""
    with fake_gpu(90):
        few, many = ([generated(sort, ids([t])) for t in each] for each in ((2, 64), (65, 5000)))
    for pair in (few, many):
        calls = {source.partition("def call(")[2].partition("return")[0] for source in pair}
        constants = {tuple(line for line in source.splitlines() if "BLOCK" in line) for source in pair}
        assert len(calls) == len(constants) == 1


@pytest.mark.skipif(VERSION < (2, 13), reason="runs the kernels to time them")
def test_sort_without_python():
    """AOTInductor's C++ wrapper launches the kernel itself; it would look an op that stays closed up by its name."""
    with fake_gpu(90):
        source, closed = (
            generated(lambda t: OPS.sort_by_expert(t, E, backend), ids(8), config={"cpp_wrapper": True})
            for backend in ("auto", "reference")
        )
    assert "moe_ops::sort_by_expert" in closed and "moe_ops::" not in source
    assert "call__sort_kernel_0(" in source


def norm(x, weight):
    xf = x.float()
    return weight * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("tokens", [1, 8, [512]])
def test_the_sum_residual_and_norm_are_one_kernel(tokens, arch):
    def fn(residual, rows, shared, weight):
        h = residual + OPS.combine(rows, A) + shared
        return h, norm(h, weight)

    def inputs():
        t = symbol(tokens[0]) if isinstance(tokens, list) else tokens
        return [empty(t, H), empty(A * t, H), empty(t, H), empty(H)]

    with fake_gpu(arch):
        source, env = traced(fn, inputs)
        built = compile_kernels(source)
    assert kernels_of(source) == ["red"]
    assert not extern_calls(source) and not any(b.stack for b in built)
    assert not any("Eq" in str(guard.expr) for guard in env.guards)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_are_added_in_the_same_kernel(parts):
    def fn(residual, rows, weight):
        h = residual + routing.combine(rows, A, torch.bfloat16)
        return h, norm(h, weight)

    with fake_gpu(90):
        source = generated(fn, lambda: [empty(8, H), empty(parts, A * 8, H, dtype=torch.float32), empty(H)])
    assert kernels_of(source) == ["red"] and not extern_calls(source)


def test_permute_fuses():
    """The way back takes one more kernel, of R numbers."""
    order = lambda: empty(4096, dtype=torch.int32)  # noqa: E731
    with fake_gpu(90):
        there = generated(lambda x, o: OPS.permute(x, o, A) * 2, lambda: [empty(512, H), order()])
        back = generated(lambda x, o: OPS.unpermute(x, o) * 2, lambda: [empty(4096, H), order()])
    assert kernels_of(there) == ["poi"] and kernels_of(back) == ["poi"] * 2
    assert not extern_calls(there) and not extern_calls(back)


def test_where_ops_stay_closed():
    def fn(topk_ids, rows):
        return OPS.sort_by_expert(topk_ids, E, "reference"), OPS.combine(rows, A, "reference")

    with fake_gpu(90):
        source = generated(fn, lambda: [empty(8, A, dtype=torch.int32), empty(64, H)])
    assert {"torch.ops.moe_ops.sort_by_expert.default", "torch.ops.moe_ops.combine.default"} <= {*extern_calls(source)}
    cpu, order = torch.zeros(2, 2, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    rows = torch.zeros(4, 3)
    arguments = {"sort_by_expert": (cpu, 4), "combine": (rows, 2), "permute": (rows, order, 1)}
    arguments["unpermute"] = (rows, order)
    for op, fn in routing.DECOMPOSITIONS.items():
        assert fn(*arguments[op._opname]) is NotImplemented

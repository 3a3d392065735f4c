"""Activation quantization opened for Inductor: the reference's bits, and how many kernels are left of it."""

from contextlib import nullcontext
from functools import cache
from itertools import count

import pytest
import torch
from fake_gpu import compile_kernels, empty, extern_calls, fake_gpu, generated, launches, symbol, traced
from torch.nn.functional import silu

from moe_ops.backends import reference
from moe_ops.formats import FORMATS
from moe_ops.lowering import _compat, divide, quantize

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
OP = torch.ops.moe_ops.quantize
CODECS = sorted({f.activation.name for f in FORMATS.values() if f.activation})
ROWS = [c for c in CODECS if FORMATS.codec(c).block == (1, 0)]
STATIC = [c for c in CODECS if FORMATS.codec(c).global_scale or FORMATS.codec(c).scale_dtype.itemsize > 1]
SHAPES = {}  # one codec of each shape of loops: kernels of others are as many
for _codec in map(FORMATS.codec, CODECS):
    _key = (_codec.element.bits, _codec.block, _codec.scale_dtype, _codec.global_scale, _codec.element.storage)
    SHAPES.setdefault(_key, _codec.name)
T, H = 512, 4096


@pytest.fixture(autouse=True, scope="module")
def registered():
    for op, fn in quantize.DECOMPOSITIONS.items():
        _compat.add_decomposition(op, fn)
    for op, fn in divide.LOWERINGS.items():
        _compat.add_lowering(op, fn)


# ---- values


def rows(codec, dtype, k=200):
    """Ordinary rows, and those that codecs treat on their own."""
    k = next(k for k in count(k) if not FORMATS.codec(codec).check(1, k))
    special = torch.tensor([0.0, -0.0, 448.0, -449.0, 465.0, 1e-3, 1.0625, 2.0**-9, 3e38, 1e-38, 1e-40, -1e-45, 240.0])
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(0)) * 3
    x[1] = 0.0
    x[2, : len(special)] = special
    x[3] *= 1e-30
    x[4] = 1e-42
    x[5] *= 1e30
    x[6, 100] = float("nan")
    x[7, 7] = float("inf")
    x[8, :64] = 0.0
    return x.to(dtype)


def some(x, codec):
    """x, or its rows one by one where they would share a scale."""
    return list(x[:, None]) if FORMATS.codec(codec).block == (0, 0) else [x]


def same(got, want):
    assert (got is None) == (want is None)
    if want is not None:
        assert got.shape == want.shape and (got.dtype == want.dtype or got.dtype == torch.uint8)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.element_size()]
        nan = want.float().isnan()  # its sign is nobody's
        assert torch.equal(got.view(bits)[~nan], want.view(bits)[~nan])
        assert got.dtype == torch.uint8 or torch.equal(got.float().isnan(), nan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_of_the_reference(codec, dtype):
    for x in some(rows(codec, dtype), codec):
        got, want = quantize.quantize(x, FORMATS.codec(codec)), reference.quantize(x, FORMATS.codec(codec))
        for part in ("data", "scale", "global_scale"):
            same(getattr(got, part), getattr(want, part))
        assert got.scale.dtype != torch.float8_e8m0fnu


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("codec", STATIC)
def test_static_scales(codec, one):
    x = rows(codec, torch.float32)
    scale = torch.tensor([[0.37]]) if one else torch.rand(9, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    got, want = (m.quantize(x, FORMATS.codec(codec), scale) for m in (quantize, reference))
    for part in ("data", "scale", "global_scale"):
        same(getattr(got, part), getattr(want, part))


def numbers(q, codec):
    """What codes stand for, fp32: times every scale."""
    values = codec.decode(q.data)
    scale = q.scale.float()
    values = values * (scale if scale.shape[-1:] in ((), (1,)) else codec.spread(scale, *values.shape))
    return values if q.global_scale is None else values * q.global_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_rounded(codec, dtype):
    """Exact in bf16 too, whatever scale is in the numbers."""
    found = FORMATS.codec(codec)
    for x in some(rows(codec, torch.bfloat16)[:5], codec):
        got, want = quantize.rounded(x, found, dtype=dtype), numbers(reference.quantize(x, found), found)
        values, left = got.data.float(), got.scale
        assert got.data.dtype == dtype and (left is None) == (quantize.folds(found) and not found.global_scale)
        if left is not None:
            values = values * (left if left.shape[-1:] in ((), (1,)) else found.spread(left, *values.shape))
        assert torch.equal(values, want)


@pytest.mark.parametrize("codec", [c for c in STATIC if FORMATS.codec(c).block != (0, 0)])
def test_rounded_static(codec):
    found, x = FORMATS.codec(codec), rows(codec, torch.float32)[:5]
    scale = torch.rand(5, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    got = quantize.rounded(x, found, scale, torch.float32)
    assert torch.equal(got.data * got.scale, numbers(reference.quantize(x, found, scale), found))


@pytest.mark.parametrize("rule", ["rceil", "even", "floor"])
def test_shared_exponents_by_every_rule(rule):
    from dataclasses import replace

    from moe_ops.formats import scales

    one = next(c for c in map(FORMATS.codec, CODECS) if c.scale_dtype == torch.float8_e8m0fnu)
    codec = replace(one, scale_rule=getattr(scales, rule))
    x = rows(one.name, torch.float32)
    same(quantize.quantize(x, codec).scale, reference.quantize(x, codec).scale)
    same(quantize.quantize(x, codec).data, reference.quantize(x, codec).data)


def test_no_rows():
    for codec in map(FORMATS.codec, CODECS):
        x = torch.empty(0, 256)
        for got, want in zip(*(vars(m.quantize(x, codec)).values() for m in (quantize, reference))):
            assert (got is None and want is None) or got.shape == want.shape


# ---- kernels


def norm(x, weight):
    """As transformers writes RMSNorm."""
    xf = x.float()
    xf = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * xf.to(x.dtype)


def gated(h):
    g, u = h.chunk(2, -1)
    return silu(g) * u


def alone(codec):
    return lambda x: OP(x, None, codec), lambda: [empty(T, H)]


def after_norm(codec):
    return lambda x, w: OP(norm(x, w), None, codec), lambda: [empty(symbol(T), H), empty(H)]


def after_norm_that_is_read(codec):
    def fn(x, w):
        y = norm(x, w)
        return y, OP(y, None, codec)

    return fn, lambda: [empty(T, H), empty(H)]


def after_gate(codec):
    return lambda h: OP(gated(h), None, codec), lambda: [empty(T, H)]


def after_parts(codec):
    def fn(parts):  # (P, R, 2N) fp32
        a, b, c, d = parts.unbind(0)
        return OP(gated((a + b + c + d).bfloat16().float()).bfloat16(), None, codec)

    return fn, lambda: [empty(4, T, H, dtype=torch.float32)]


GRAPHS = [alone, after_norm, after_norm_that_is_read, after_gate, after_parts]


@cache
def code(arch, codec, graph):
    """Inductor's code, and what was assumed of its symbols."""
    with fake_gpu(arch):
        return traced(*graph(codec))


def kinds(source):
    """What Inductor calls a kernel by its shape: poi, per and red are pointwise, persistent and looped reductions."""
    return [name.split("_")[1] for name in launches(source)]


def count_of(codec, graph):
    """The scale of a matrix waits for all rows, a global one for its row, that of a group for its row's norm."""
    found, norms = FORMATS.codec(codec), graph in (after_norm, after_norm_that_is_read)
    if found.block == (0, 0):
        return 3
    if found.block == (1, 0):
        return 1
    if found.global_scale:
        return 2
    if norms:  # 2.15 nests the reductions of groups into that of the row, unless codes are packed
        return 1 if VERSION >= (2, 15) and not found.packed else 2
    return 2 if found.packed and graph is after_parts else 1  # the sums are stored, and read once for each half byte


COUNTED = {}  # one codec of each that `count_of` tells apart
for _codec in map(FORMATS.codec, CODECS):
    COUNTED.setdefault((_codec.block[1] and 1, _codec.block[0], _codec.global_scale, _codec.packed), _codec.name)
CASES = [(c, g) for g in GRAPHS for c in (SHAPES if g in (alone, after_norm) else COUNTED).values()]


@pytest.mark.parametrize("codec,graph", CASES)
def test_kernels(codec, graph):
    source, env = code(90, codec, graph)
    with fake_gpu(90):
        built = compile_kernels(source) if codec in ROWS else []
    assert len(launches(source)) == count_of(codec, graph), launches(source)
    assert codec not in ROWS or (kinds(source) == ["red"] and not any(b.stack for b in built))
    if FORMATS.codec(codec).block == (0, 0):  # the scale of all rows comes from the maxima of rows, not from x again
        assert launches(source)[1].endswith("_fused_quantize_1")
    assert set(extern_calls(source)) <= {"aten.view.dtype"}  # how 2.15 writes the public op's type: no kernel
    assert "div.rn.f32" in source and "moe_ops.quantize.default(" not in source
    assert not any("Eq" in str(guard.expr) for guard in env.guards)


@pytest.mark.parametrize("codec,graph", [case for case in CASES if case[0] in ROWS and case[1] in (
    after_norm, after_gate)])  # fmt: skip
def test_per_token_on_blackwell(codec, graph):
    with fake_gpu(100):
        source = generated(*graph(codec))
        built = compile_kernels(source)
    assert kinds(source) == ["red"] and not extern_calls(source) and not any(b.stack for b in built)


@pytest.mark.parametrize("codec", SHAPES.values())
def test_cubins(codec):
    """Every division is exact: of the scale and of the numbers. Inductor does not launch configurations that spill."""
    with fake_gpu(90):
        built = compile_kernels(code(90, codec, alone)[0])
    for b in built:
        assert "div.full" not in b.ptx and "div.approx" not in b.ptx and "rcp" not in b.ptx
    assert any("div.rn.f32" in b.ptx for b in built)
    assert {b.kernel for b in built} == {b.kernel for b in built if not b.stack}


def test_without_the_mode_division_would_be_approximate(monkeypatch):
    monkeypatch.setattr(quantize, "_Bytes", nullcontext)
    with fake_gpu(90):
        built = compile_kernels(generated(*alone(ROWS[0])))
    assert all("div.full" in b.ptx and "div.rn" not in b.ptx for b in built)


@pytest.mark.parametrize("codec", SHAPES.values())
def test_rounded_is_one_expression(codec):
    """No more kernels than codes take; 2.11 reads the codes of long groups back."""
    op, found = traced_as_part("rounded", _rounded, lambda x, codec: torch.empty_like(x)), FORMATS.codec(codec)
    with fake_gpu(90):
        source = generated(lambda x: op(x, codec), lambda: [empty(T, H)])
    stored = VERSION < (2, 12) and found.block == (1, 128)
    assert len(launches(source)) == count_of(codec, alone) + bool(stored) and not extern_calls(source)


def traced_as_part(name, run, fake):
    """An op of the tests that opens into `run`, as experts and linear open into their parts."""
    if not hasattr(torch.ops.moe_ops_test, name):
        torch.library.define(f"moe_ops_test::{name}", "(Tensor x, str codec) -> Tensor")
        torch.library.impl(f"moe_ops_test::{name}", "default", run)
        torch.library.register_fake(f"moe_ops_test::{name}", fake)
        _compat.add_decomposition(getattr(torch.ops.moe_ops_test, name).default, run)
    return getattr(torch.ops.moe_ops_test, name)


def _rounded(x, codec):
    return quantize.rounded(x, FORMATS.codec(codec)).data


def _sum_of_codes(x, codec):
    q = quantize.quantize(x, FORMATS.codec(codec))
    return q.data.float().flatten().sum(0, keepdim=True) + q.scale.float().amax()


def test_nothing_is_quantized_twice(monkeypatch):
    """By two that take one y, even as different views of it; another tensor or codec gets codes of its own."""
    consumer = traced_as_part("consumer", _sum_of_codes, lambda x, codec: x.new_empty(1, dtype=torch.float32))
    whole, made, (a, b) = quantize._quantize, [], (CODECS[0], ROWS[0])
    monkeypatch.setattr(quantize, "_quantize", lambda *args: made.append(1) or whole(*args))

    def fn(x, z):
        y = x.exp()
        viewed = y.view(8, -1, H).view(T, H)
        return [consumer(t, codec) for t, codec in take(y, viewed, z)]

    for expected, take in (
        (1, lambda y, viewed, z: [(y, a), (viewed, a), (y.reshape(-1, H), a)]),
        (2, lambda y, viewed, z: [(y, a), (y, b), (viewed, b)]),
        (3, lambda y, viewed, z: [(y, a), (z, a), (viewed.view(2 * T, -1), a)]),
    ):
        made.clear()
        with fake_gpu(90):
            source = generated(fn, lambda: [empty(T, H), empty(T, H)])
        assert len(made) == expected and not extern_calls(source)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens):
    def fn(x):
        return [OP(x, None, codec) for codec in SHAPES.values()]

    with fake_gpu(90):
        source = generated(fn, lambda: [empty(tokens, 256)])
    at_most = 1 if tokens == 0 else 2 * len(SHAPES)  # a matrix has a scale without rows, too
    assert tokens <= len(launches(source)) <= at_most and set(extern_calls(source)) <= {"aten.view.dtype"}


def test_where_ops_stay_closed():
    for backend, opened in (("auto", True), ("triton", True), ("reference", False)):
        with fake_gpu(90):
            source = generated(lambda x: OP(x, None, ROWS[0], backend), lambda: [empty(T, H)])
        assert ("torch.ops.moe_ops.quantize.default" in extern_calls(source)) != opened
    assert quantize._quantize_op(torch.zeros(2, 4), None, ROWS[0]) is NotImplemented


def test_compiled_on_the_cpu():
    """Inductor's own arithmetic, as C++: bytes, shifts, shared exponents, halves to even."""
    codecs = [c for c in CODECS if FORMATS.codec(c).packed]

    def run(*xs):
        return [t for x, c in zip(xs, codecs) for t in vars(quantize.quantize(x, FORMATS.codec(c))).values()]

    xs = [rows(c, torch.float32) for c in codecs]
    torch._dynamo.reset()
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(run)(*xs)
    got = torch.compile(graph, fullgraph=True)(*xs)
    for a, b in zip(got, run(*xs)):
        same(a, b)

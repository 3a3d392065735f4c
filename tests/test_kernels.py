"""Triton kernels against the reference and float64: on a GPU as compiled, without one in Triton's interpreter.

Casts to bf16 truncate in the interpreter, so activations are fp32 there.
"""

from contextlib import contextmanager

import oracle
import pairwise
import pytest
import torch
from oracle import Layer, assert_as_good, inputs

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, dequantize_weight, quantize_weight

pytestmark = pytest.mark.kernels
OPS = torch.ops.moe_ops
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CODECS = list(dict.fromkeys(f.activation.name for f in FORMATS.values() if f.activation is not None))


def bits(t):
    """Codes or floats as integers, every NaN the same: fp8 has two of them, and a tensor equals itself."""
    f = t.detach().float().cpu()
    return torch.where(f.isnan(), torch.nan, f).view(torch.int32)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# ---- routing


@pytest.mark.parametrize("one_kernel", [True, False], ids=["one_kernel", "chunks"])
@pytest.mark.parametrize("tokens,top_k,num_experts", [(1, 1, 1), (1, 3, 5), (9, 3, 6), (150, 2, 130), (64, 8, 16)])
def test_sort_by_expert(tokens, top_k, num_experts, one_kernel):
    from moe_ops.kernels import routing as kernels

    ids = inputs(tokens, 1, top_k, num_experts)[1]
    ids[0, 0] = 2**40  # no expert either
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_ONE_KERNEL_ROWS", 2048 if one_kernel else 0)
        got = OPS.sort_by_expert(ids.to(DEVICE), num_experts, "triton")
    want = OPS.sort_by_expert(ids, num_experts, "reference")
    assert same(got[0], want[0]) and same(got[1], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 4097, 100_000])
@pytest.mark.parametrize("num_experts", [1, 8, 128, 384])
def test_sort_many(rows, num_experts):
    for dtype in (torch.int32, torch.int64):
        ids = torch.randint(-1, num_experts + 1, (rows, 1), generator=torch.Generator().manual_seed(rows)).to(dtype)
        for chosen in (ids, torch.zeros_like(ids), ids.clamp(max=0)):
            got = OPS.sort_by_expert(chosen.cuda(), num_experts, "triton")
            want = OPS.sort_by_expert(chosen, num_experts, "reference")
            assert same(got[0], want[0]) and same(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float32])
@pytest.mark.parametrize("top_k,width", [(1, 40), (3, 72), (8, 1030)])
def test_combine(top_k, width, dtype):
    rows = torch.randn(3 * top_k, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(OPS.combine(rows.to(DEVICE), top_k, "triton"), OPS.combine(rows, top_k, "reference"))


# ---- quantization

SPECIAL = [0.0, -0.0, 448.0, -449.0, 464.0, 465.0, 1e-3, 1.0625, 2.0**-9, 2.0**-10, 3e38, 1e-38, 1e-40, -1e-45, 240.0]


def to_quantize(dtype, width=300):
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0)) * 3
    x[1] = 0.0
    x[2, : len(SPECIAL)] = torch.tensor(SPECIAL)
    x[3] *= 1e-30
    x[4] = 1e-42
    x[5, : len(SPECIAL)] = torch.tensor(SPECIAL).clamp(-448, 448)  # an unscaled copy of most, amax 448
    x[5, len(SPECIAL) :] = 0.0
    x[6, 200] = float("nan")
    x[7, 7] = float("inf")
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_quantize_to_the_bit(codec, dtype):
    x = to_quantize(dtype)
    whole = FORMATS.codec(codec).block == (0, 0)
    for part in [x[i : i + 1] for i in range(len(x))] if whole else [x, x[:, :72]]:
        got, want = OPS.quantize(part.to(DEVICE), None, codec, "triton"), OPS.quantize(part, None, codec, "reference")
        assert same(got[1], want[1]), "scales"
        assert same(got[0], want[0]), "codes"


@pytest.mark.parametrize("shape", [(), (9, 1)], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_quantize_static_to_the_bit(codec, shape):
    x, scale = to_quantize(DTYPE), torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.01
    got = OPS.quantize(x.to(DEVICE), scale.to(DEVICE), codec, "triton")
    assert same(got[0], OPS.quantize(x, scale, codec, "reference")[0])


@pytest.mark.parametrize("codec", CODECS)
def test_quantize_strided_and_long(codec):
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    long = torch.randn(2, 9000 if CUDA else 8200, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    for view in (lambda t: t[:, 100:], lambda t: t[::2], lambda t: t[:, ::2], lambda t: t.T):
        got = OPS.quantize(view(x.to(DEVICE)), None, codec, "triton")
        want = OPS.quantize(view(x), None, codec, "reference")
        assert same(got[0], want[0]) and same(got[1], want[1])
    got, want = OPS.quantize(long.to(DEVICE), None, codec, "triton"), OPS.quantize(long, None, codec, "reference")
    assert same(got[0], want[0]) and same(got[1], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_quantize_many(codec, dtype):
    x = (torch.randn(2048, 2880, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    got, want = OPS.quantize(x.cuda(), None, codec, "triton"), OPS.quantize(x, None, codec, "reference")
    assert same(got[0], want[0]) and same(got[1], want[1])


# ---- products

GATES = {
    "none": {"activation": "none"},
    "halves": {"activation": "silu", "alpha": 1.702, "beta": 1.0, "limit": 1.0},
    "interleaved": {"activation": "gelu_tanh", "interleaved": True},
    "plain": {"activation": "relu2", "gated": False},
    "gelu": {"activation": "gelu"},
}
TILES = {
    "small": (16, 32, 32, 4, 2), "large": (64, 64, 64, 4, 2, False, 4), "swap": (16, 64, 64, 4, 2, True),
    "short": (32, 64, 64, 4, 2, False, 1, 16), "table": None,
}  # fmt: skip
FACTORS = {
    "name": list(FORMATS), "tile": list(TILES), "gate": list(GATES), "bias": [True, False], "even_k": [True, False],
    "rows": ["few", "many"], "index": ["none", "read", "write"], "shards": [1, 2],
}  # fmt: skip
SHARDS = {"none": (1, 2), "plain": (1,)}  # two where gate and up are multiplied together
CASES = pairwise.cover(FACTORS, lambda case: case["shards"] in SHARDS.get(case["gate"], (2,)))


@contextmanager
def tile(name):
    """A configuration for the products inside, whatever the tables say; None: what they say."""
    from moe_ops.backends import triton
    from moe_ops.kernels.configs import Config

    with pytest.MonkeyPatch.context() as patch:
        if TILES[name]:
            patch.setattr(triton, "_config", lambda *_: Config(*TILES[name]))
        yield


def product_case(case):
    """Arguments of grouped_mm, and its options."""
    name, gate = case["name"], dict(GATES[case["gate"]])
    experts, n, k = 5, 96, 128 if case["even_k"] else 136
    g = torch.Generator().manual_seed(len(str(case)))
    fmt, few = FORMATS[name], case["rows"] == "few"
    if fmt.check(n // case["shards"], k):
        k = 160
    q = quantize_weight(fmt.weight, (torch.randn(experts, n, k, generator=g) / k**0.5).to(DTYPE), case["shards"])
    ids = torch.randint(-1, experts + 1, (2, 2) if few else (29, 2), generator=g)
    ids[0, 0] = 1
    order, offsets = OPS.sort_by_expert(ids, experts)
    read = case["index"] == "read"
    x = torch.randn(len(ids) if read else ids.numel(), k, generator=g).to(DTYPE)
    tensors = {
        "bias": torch.randn(experts, n, generator=g).to(DTYPE) if case["bias"] else None,
        "rows_in": order if read else None,
        "rows_out": order if case["index"] == "write" else None,
        "row_weights": torch.randn(ids.numel(), generator=g) if case["index"] == "write" else None,
    }
    options = {"format": name, "shards": case["shards"], "top_k": 2 if read else 1}
    return (x, q.qdata, offsets, q.scale), tensors, gate | options


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_grouped_mm(case):
    """The kernel's error against float64 is at most twice the reference's."""
    args, tensors, options = product_case(case)
    there = lambda t: None if t is None else t.to(DEVICE)  # noqa: E731
    with tile(case["tile"]):
        moved = {k: there(v) for k, v in tensors.items()}
        got = OPS.grouped_mm(*map(there, args), **moved, **options, backend="triton").cpu()
    reference = OPS.grouped_mm(*args, **tensors, **options, backend="reference")
    assert got.isfinite().all() and torch.equal(zero_rows(got), zero_rows(reference))
    if not CUDA:  # both lie within the rounding of a sum in fp32
        return torch.testing.assert_close(got, reference)
    (x, codes, *rest), wide = args, lambda t: t.float() if t is not None and t.dtype == DTYPE else t
    tensors = {k: wide(v) for k, v in tensors.items()}
    truth = OPS.grouped_mm(wide(x), wide(codes), *rest, **tensors, **options, backend="reference")
    assert_as_good(got, truth.double(), reference)


def zero_rows(t):
    return (t == 0).all(1)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("shape", TILES)
@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm_transposed(name, shape, rows):
    g = torch.Generator().manual_seed(0)
    q = quantize_weight(FORMATS[name].weight, torch.randn(5, 144, 72, generator=g) / 12, 2)
    bounds = torch.randint(0, rows, (4,), generator=g).sort().values
    offsets = torch.tensor([0, *bounds.tolist(), rows - 1], dtype=torch.int32)
    x = torch.randn(rows, 144, generator=g).to(DTYPE)
    codes = q.qdata.to(DTYPE) if q.scale is None else q.qdata
    args = [t if t is None else t.to(DEVICE) for t in (x, codes, offsets, q.scale)]
    with tile(shape):
        got = OPS.grouped_mm(*args, format=name, shards=2, transpose=True, backend="triton").cpu()
    weights = dequantize_weight(q, 2)
    want = torch.zeros(rows, 72, dtype=torch.float64)
    plain = torch.zeros(rows, 72, dtype=DTYPE)
    for e, (low, high) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        want[low:high] = x[low:high].double() @ weights[e].double()
        plain[low:high] = x[low:high] @ weights[e].to(DTYPE)
    assert_as_good(got, want, plain)


# ---- the whole layer

LAYERS = {
    "silu": {},
    "on_input": {"on_input": True},
    "oai": {"activation": "swiglu_oai", "interleaved": True},
    "relu2": {"activation": "relu2", "gated": False},
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, kind):
    """Forward and gradients: error against float64 at most twice the reference's in bf16."""
    options = dict(LAYERS[kind])
    on_input = options.pop("on_input", False)
    layer = Layer(name, 4, 72, 40, dtype=torch.bfloat16, **options)
    x, ids, weights = inputs(6, 72, 2, 4, torch.bfloat16)
    call = {"router_weight_on_input": on_input, **layer.options()}
    results = []
    for backend, where, dtype in (("triton", DEVICE, DTYPE), ("reference", "cpu", torch.bfloat16)):
        tensors = [t.to(dtype) if t is not None and t.dtype == torch.bfloat16 else t for t in layer.tensors(where)]
        results.append(gradients(
            lambda a, b: OPS.experts(a, ids.to(where), b, *tensors, **call, backend=backend),
            x.to(where, dtype), weights.to(where)))  # fmt: skip
    truth = gradients(lambda a, b: oracle.experts(layer, a, ids, b, on_input=on_input), x.float(), weights)
    for what, got, reference, want in zip(("out", "x", "weights"), *results, truth):
        assert_as_good(got, want.double(), reference.cpu(), what)


def gradients(run, *leaves):
    """The result of a function and its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = run(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    return [out.detach()] + [t.grad for t in leaves]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_nobody_owns_are_zero_and_nan_stays_put(name):
    layer = Layer(name, 5, 72, 40, dtype=DTYPE)
    x, ids, weights = (t.to(DEVICE) for t in inputs(6, 72, 3, 5, DTYPE, dropped=False))
    ids[4] = -1
    clean = OPS.experts(x, ids, weights, *layer.tensors(DEVICE), **layer.options(), backend="triton")
    x[4] = float("nan")
    got = OPS.experts(x, ids, weights, *layer.tensors(DEVICE), **layer.options(), backend="triton")
    assert (got[4] == 0).all() and got.isfinite().all()
    assert same(got, clean)


@pytest.mark.parametrize("name", FORMATS)
def test_offsets_beyond_32_bits(name):
    """expert * stride and row * stride pass 2^31 elements (on the CPU in memory that is only reserved)."""
    if CUDA and torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("needs 32 GiB")
    fmt, experts, n, k = FORMATS[name], 3, 32, 64
    q = quantize_weight(fmt.weight, (torch.randn(experts, n, k) / 8).to(DTYPE))
    x, offsets = torch.randn(experts, k).to(DTYPE), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    far, wide = (torch.empty(2**31 + n * k, dtype=t.dtype, device=DEVICE) for t in (q.qdata, x))
    far = far.as_strided((experts, n, k), (2**30, k, 1)).copy_(q.qdata)
    wide = wide.as_strided((experts, k), (2**30, 1)).copy_(x)
    scale = None if q.scale is None else q.scale.to(DEVICE)
    with tile("small"):
        got = OPS.grouped_mm(wide, far, offsets.to(DEVICE), scale, format=name, backend="triton").cpu()
    torch.testing.assert_close(got, OPS.grouped_mm(x, q.qdata, offsets, q.scale, format=name, backend="reference"))



# ---- what only a GPU has


def big_layer(name, **options):
    layer = Layer(name, 16, 256, 192, dtype=torch.bfloat16, **options)
    x, ids, weights = (t.cuda() for t in inputs(64, 256, 4, 16, torch.bfloat16))
    tensors = layer.tensors("cuda")
    return (x, ids, weights), lambda *a, **k: OPS.experts(*a, *tensors, **layer.options(), backend="triton", **k)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_cuda_graph(name, tokens):
    """Captured once, replayed with other tokens and another routing: equal to eager to the bit."""
    args, run = big_layer(name)
    args = [t[:tokens] for t in args]
    static = [t.clone() for t in args]
    run(*static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*static)
    for t, new in zip(static, (args[0].flip(0) * 2, (args[1] + 3) % 16, args[2].flip(0))):
        t.copy_(new)
    graph.replay()
    assert same(out, run(*static))
    assert not same(out, run(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_no_synchronisation(name):
    layer = Layer(name, 16, 256, 192, dtype=torch.bfloat16)
    x, ids, weights = (t.cuda() for t in inputs(64, 256, 4, 16, torch.bfloat16))
    tensors = layer.tensors("cuda")
    for t in (x, weights, *tensors[8:10]):
        t.requires_grad_()
    step = lambda: OPS.experts(x, ids, weights, *tensors, **layer.options()).sum().backward()  # noqa: E731
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_same_result_every_time(name):
    (x, ids, weights), run = big_layer(name)
    first, *others = (gradients(lambda a, b: run(a, ids, b), x, weights) for _ in range(4))
    assert all(same(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_batch_invariant(name):
    """A token's result is the same alone and in any batch."""
    static = FORMATS[name].activation is not None and FORMATS[name].activation.block == (0, 0)
    args, run = big_layer(name, static=static)
    many = [torch.cat([t] * 40) for t in args]
    whole = run(*many, batch_invariant=True)
    for first, last in ((0, 1), (5, 6), (2, 5), (0, 17), (0, 64)):
        alone = run(*(t[first:last] for t in args), batch_invariant=True)
        assert same(alone, whole[first:last])


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_large(name, gated):
    layer = Layer(name, 64, 512, 256, gated=gated, activation="silu" if gated else "relu2", dtype=torch.bfloat16)
    x, ids, weights = (t.cuda() for t in inputs(4096, 512, 4, 64, torch.bfloat16))
    tensors, options = layer.tensors("cuda"), layer.options()
    got, reference = (OPS.experts(x, ids, weights, *tensors, **options, backend=b) for b in ("triton", "reference"))
    wide = [t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in (x, ids, weights, *tensors)]
    truth = OPS.experts(*wide, **options, backend="reference")
    assert_as_good(got, truth.cpu().double(), reference.cpu())

"""Triton's kernels against the reference and float64: routing, products, layers. See kernel_cases.py.

Quantization: test_kernels_quantize.py; what only a GPU has: test_kernels_gpu.py.
"""

import itertools
import math
from contextlib import nullcontext

import kernel_cases
import oracle
import pairwise
import pytest
import torch
from kernel_cases import CUDA, DEVICE, DTYPE, FACTORS, OPS, WEIGHTS, gradients, product_case, same, there, tile
from oracle import Layer, assert_as_good, fit, inputs, takes_static

import moe_ops.activation
from moe_ops.activation import ACTIVATIONS, Gate
from moe_ops.backends import triton_plan
from moe_ops.backends.triton import activation_grad
from moe_ops.formats import FORMATS, dequantize_weight, quantize_weight

pytestmark = pytest.mark.kernels
ids_of = lambda case: "-".join(str(v).removeprefix("torch.") for v in case.values())  # noqa: E731

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float32])
@pytest.mark.parametrize("top_k,width", [(1, 40), (3, 72), (8, 1030)])
def test_combine(top_k, width, dtype):
    rows = torch.randn(3 * top_k, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(OPS.combine(rows.to(DEVICE), top_k, "triton"), OPS.combine(rows, top_k, "reference"))


# ---- products

def zero_rows(t):
    return (t == 0).all(1)


def check_product(case):
    """The kernel's error against fp32 is at most twice the reference's; in fp32 both lie within an order of adding."""
    tensors, options = product_case(case)
    shape = "table" if CUDA and case["dtype"] == torch.float32 else case["tile"]  # no tensor core: unrolled
    with tile(shape, ahead_from_k=0 if case["ahead"] else 1 << 30):
        got = OPS.grouped_mm(**there(tensors), **options, backend="triton").cpu()
    reference = OPS.grouped_mm(**tensors, **options, backend="reference")
    assert got.dtype == reference.dtype and got.isfinite().all() and torch.equal(zero_rows(got), zero_rows(reference))
    wide = {k: t.float() if t is not None and t.dtype == case["dtype"] else t for k, t in tensors.items()}
    truth = OPS.grouped_mm(**wide, **options | {"out_dtype": torch.float32}, backend="reference")
    assert_as_good(got, truth.double(), reference.to(worst_type(options["format"], reference.dtype)))


def worst_type(name, dtype):
    """Of a result: Hopper's tensor core sums products of fp8 in a short accumulator, as good as bf16 has to be."""
    from moe_ops.backends import triton
    from moe_ops.backends.base import arch_of

    fmt = FORMATS[name]
    plan = triton.plan_of(fmt, dtype, fmt.activation is not None, 256, arch_of(torch.device(DEVICE)))
    return torch.bfloat16 if plan.mma == "fp8" else dtype


@pytest.mark.parametrize("case", pairwise.cover(FACTORS), ids=ids_of)
def test_grouped_mm(case):
    check_product(case)


@pytest.mark.skipif(CUDA, reason="what the interpreter can be told to be")
@pytest.mark.parametrize("case", pairwise.cover(
    {"pair": kernel_cases.BLOCK_SCALED, "tile": ["large", "step", "short"]}
    | {name: values for name, values in FACTORS.items() if name not in ("weight", "activation", "tile", "ahead")}
), ids=ids_of)  # fmt: skip
def test_block_scaled_products(case):
    """Those of a Blackwell's tensor core: codes and scales of groups go in as they are."""
    from moe_ops.backends import triton

    weight, activation = case["pair"].split("/")
    assert triton.plan_of(FORMATS[case["pair"]], DTYPE, True, 256, 100).types
    with kernel_cases.blackwell():
        check_product(case | {"weight": weight, "activation": activation, "ahead": False})


@pytest.mark.parametrize("activation", FACTORS["activation"])
def test_long_rows(activation):
    """More columns than one program arranges, or finds the scale of."""
    case = dict.fromkeys(FACTORS, "none") | {"weight": "mxfp4", "activation": activation, "rows": "few", "bias": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_cases, "fit", lambda name, _: fit(name, 1224))
        tensors, options = product_case(case | {"x": "floats", "dtype": DTYPE})
    with tile("step_large_swap"):
        got = OPS.grouped_mm(**there(tensors), **options, backend="triton").cpu()
    options |= {"backend": "reference"}
    truth = OPS.grouped_mm(**tensors, **options | {"out_dtype": torch.float32})
    assert_as_good(got, truth.double(), OPS.grouped_mm(**tensors, **options))


@pytest.mark.parametrize("name", [f.format(name) for f in ("{}/bf16", "fp8/{}") for name in kernel_cases.EXPONENTS])
def test_exponents_from_end_to_end(name):
    """An expert each for the bytes 0 (2^-127), 1, 127, the largest that keeps numbers finite, and 255 (NaN)."""
    fmt, (k,), g = FORMATS[name], fit(name, 136), torch.Generator().manual_seed(0)
    exponent = torch.tensor([0, 1, 127, 254 - math.floor(math.log2(fmt.weight.element.max)), 255])
    q = quantize_weight(fmt.weight, torch.randn(5, 48, k, generator=g).to(DTYPE))
    if fmt.weight.scale_dtype == torch.float8_e8m0fnu:
        q.scale.view(torch.uint8).copy_(exponent[:, None, None])
    x = torch.randn(5, 2, k, generator=g) * 2.0 ** (127.0 - exponent).clamp(-100, 110)[:, None, None]
    tensors = {"x": x.flatten(0, 1).to(DTYPE), "weight": q.qdata, "offsets": torch.arange(0, 11, 2, dtype=torch.int32),
               "weight_scale": q.scale}  # fmt: skip
    with tile("step"):
        got = OPS.grouped_mm(**there(tensors), format=name, backend="triton").cpu()
    call = {"format": name, "backend": "reference"}
    plain, truth = (OPS.grouped_mm(**tensors, **call, out_dtype=dtype) for dtype in (DTYPE, torch.float32))
    assert same(got.isnan(), truth.isnan())
    for rows, reference, exact in zip(*(t.split(2) for t in (got, plain, truth))):
        if exact.isfinite().all():
            assert_as_good(rows, exact.double(), reference)
    assert truth[:8].isfinite().all()


TRANSPOSED = {
    "name": WEIGHTS, "tile": ["small", "swap", "step" if CUDA else "small", "table"], "rows": [3, 40],
    "order": ["one", "two", "interleaved"], "even": [True, False], "expand": [True, False],
}  # fmt: skip


@pytest.mark.parametrize("case", pairwise.cover(TRANSPOSED), ids=ids_of)
def test_grouped_mm_transposed(case):
    g, name, rows, shards = torch.Generator().manual_seed(0), case["name"], case["rows"], 1 + (case["order"] != "one")
    n, (k,) = 192 if case["even"] else 152, fit(name, 72)
    q = quantize_weight(FORMATS[name].weight, kernel_cases.varied(5, n, k, g=g) / 12, shards)
    bounds = torch.randint(0, rows, (4,), generator=g).sort().values
    offsets = torch.tensor([0, *bounds.tolist(), rows - 1], dtype=torch.int32)
    x = torch.randn(rows, n, generator=g).to(DTYPE)
    weights, scale, codes = dequantize_weight(q, shards), q.scale, q.qdata
    if case["order"] == "interleaved":
        codes = oracle.interleave(codes)
        scale = oracle.interleave(scale) if scale is not None and FORMATS[name].weight.block[0] == 1 else scale
    tensors = {"weight": codes, "offsets": offsets, "weight_scale": scale, "weight_global_scale": q.global_scale}
    options = {"format": name, "shards": shards, "interleaved": case["order"] == "interleaved", "transpose": True}
    with tile(case["tile"]), pytest.MonkeyPatch.context() as patch:
        if case["expand"]:  # weights dequantized first, two experts of five at a time
            patch.setattr(triton_plan, "_EXPAND_ABOVE_ROWS", 0)
        got = OPS.grouped_mm(x.to(DEVICE), **there(tensors), **options, backend="triton").cpu()
    want = torch.zeros(rows, k, dtype=torch.float64)
    plain = torch.zeros(rows, k, dtype=DTYPE)
    for e, (low, high) in enumerate(itertools.pairwise(offsets.tolist())):
        want[low:high] = x[low:high].double() @ weights[e].double()
        plain[low:high] = x[low:high] @ weights[e].to(DTYPE)
    assert_as_good(got, want, plain)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_grad(name, gated):
    """In fp32: both sides of every limit, and NaN."""
    g = torch.Generator().manual_seed(0)
    gate = Gate(activation=name, gated=gated)
    h, grad, weights = (torch.randn(7, n, generator=g) for n in (80 if gated else 40, 40, 1))
    h[:, ::3] *= 9
    h[0, 0] = h[1, -1] = torch.nan
    got = activation_grad(gate, *(t.to(DEVICE) for t in (h, grad, weights))).cpu()
    want = moe_ops.activation.activation_grad(gate, h, grad * weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_linear(name):
    """One expert, no offsets."""
    (k,), g = fit(name, 136), torch.Generator().manual_seed(0)
    q = FORMATS[name].weight.quantize(kernel_cases.varied(80, k, g=g) / k**0.5)
    x, bias = kernel_cases.varied(2, 9, k, g=g), torch.randn(80, generator=g).to(DTYPE)
    tensors = {"weight": q.qdata, "weight_scale": q.scale, "weight_global_scale": q.global_scale, "bias": bias}

    def run(backend, device, dtype):
        args = {n: t.to(dtype) if t is not None and t.dtype == DTYPE else t for n, t in there(tensors, device).items()}
        return gradients(lambda x: OPS.linear(x, **args, format=name, backend=backend), x.to(device, dtype))

    cases = ("triton", DEVICE, DTYPE), ("reference", "cpu", DTYPE), ("reference", "cpu", torch.float32)
    for got, plain, truth in zip(*(run(*case) for case in cases)):
        assert_as_good(got, truth.double(), plain)


# ---- the tensor core's own products of codes


def int8_sums(x, w, offsets):
    """What the kernel makes of codes alone."""
    scales = {"x_scale": torch.ones(len(x), 1), "weight_scale": torch.ones(*w.shape[:2], 1)}
    tensors = there({"x": x, "weight": w, "offsets": torch.tensor(offsets, dtype=torch.int32), **scales})
    return OPS.grouped_mm(**tensors, format="int8/int8", out_dtype=torch.float32, backend="triton").cpu()


@pytest.mark.parametrize("shape", ["large", "swap"])
@pytest.mark.parametrize("run", [nullcontext, kernel_cases.emulated], ids=["native", "emulated"])
def test_int8_sums_are_exact(run, shape):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, size, generator=g).to(torch.int8) for size in ((9, 520), (2, 40, 520)))
    with tile(shape), run():
        got = int8_sums(x, w, [0, 4, 9]).double()
    x, w = x.double(), w.double()
    assert torch.equal(got, torch.cat([x[:4] @ w[0].T, x[4:] @ w[1].T]))


def test_int8_sums_beyond_the_integers_of_fp32():
    """They are int32, and rounded once."""
    k = 2305
    x, w = torch.full((3, k), 127, dtype=torch.int8), torch.full((1, 32, k), 127, dtype=torch.int8)
    x[1], x[2] = -127, torch.arange(k) % 255 - 127
    with tile("step"):
        got = int8_sums(x, w, [0, 3])
    assert torch.equal(got, (x.double() @ w[0].double().T).float())


ON_TENSOR_CORES = ["int8/int8", *(pytest.param(n, marks=pytest.mark.gpu) for n in ("fp8", "fp8_tensor", "fp8_block"))]


@pytest.mark.parametrize("gate", ["none", "halves"])
@pytest.mark.parametrize("name", ON_TENSOR_CORES)
def test_native_equals_emulated(name, gate):
    """The same codes, multiplied as such and as numbers: apart by an order of adding and the rounding of the output."""
    codec = FORMATS[name].weight.name
    names = {"weight": next(w for w in WEIGHTS if FORMATS[w].weight.name == codec), "activation": name.split("/")[-1]}
    case = dict.fromkeys(FACTORS, "none") | names | {"gate": gate, "even_k": True, "rows": "many", "bias": True}
    tensors, options = product_case(case | {"x": "codes", "dtype": DTYPE})
    with tile("large"):
        native = OPS.grouped_mm(**there(tensors), **options, backend="triton").cpu().double()
        with kernel_cases.emulated():
            got = OPS.grouped_mm(**there(tensors), **options, backend="triton").cpu().double()
    reference = OPS.grouped_mm(**tensors, **options, backend="reference").double()
    rounding = torch.finfo(DTYPE).eps / 2
    for other in (native, reference):
        assert (got - other).norm() <= (256**0.5 * 2.0**-23 + rounding) * reference.norm()


# ---- the whole layer

LAYER_TILE = "table" if CUDA else "large"  # those of the tables for fp32 are small: slow in the interpreter

LAYERS = {
    "silu": {"bias": False},
    "on_input": {"on_input": True, "static": True},
    "oai": {"activation": "swiglu_oai", "interleaved": True},
    "relu2": {"activation": "relu2", "gated": False, "static": True},
}


def layer_shows(case):
    """Every format, every way to store weights and activations in every kind of layer, and every weight in parts."""
    fmt, kind, tile = FORMATS[case["name"]], case["kind"], case["tile"]
    return {case["name"], (fmt.weight.name, kind), (fmt.activation, kind), (fmt.weight.name, tile), (kind, tile)}


def layer_for(name, experts, hidden, intermediate, **options):
    options["static"] = options.get("static", False) and takes_static(FORMATS[name].activation)
    return Layer(name, experts, *fit(name, hidden, intermediate), dtype=DTYPE, **options)


@pytest.mark.parametrize("case", pairwise.fewest(
    [{"name": n, "kind": kind, "tile": tile} for n in FORMATS for kind in LAYERS for tile in (LAYER_TILE, "parts")],
    layer_shows), ids=ids_of)  # fmt: skip
def test_experts(case):
    """Forward and gradients: error against float64 at most twice what plain torch's is."""
    options = dict(LAYERS[case["kind"]])
    on_input = options.pop("on_input", False)
    layer = layer_for(case["name"], 4, 72, 40, **options)
    x, ids, weights = inputs(6, layer.hidden, 2, 4, DTYPE)
    call = {"router_weight_on_input": on_input, **layer.options(), "backend": "triton"}
    tensors = layer.tensors(DEVICE)
    run = lambda a, b: OPS.experts(a, ids.to(DEVICE), b, *tensors, **call)  # noqa: E731
    with tile(case["tile"]):
        got = gradients(run, x.to(DEVICE), weights.to(DEVICE))

    def wanted(work, nudge=0.0):
        exact = work == torch.float64
        more = {"on_input": on_input, "stored": DTYPE, "nudge": nudge}
        leaves = (t.double() if exact else t for t in (x, weights))
        return gradients(lambda a, b: oracle.experts(layer, a, ids, b, work, **more), *leaves)

    truth, plain = wanted(torch.float64), wanted(DTYPE)
    for i, what in enumerate(("out", "x", "weights")):
        nudged = lambda nudge, i=i: wanted(torch.float64, nudge)[i].double()  # noqa: E731
        assert_as_good(got[i], truth[i].double(), plain[i], what, nudged=nudged)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_nobody_owns_are_zero_and_nan_stays_put(name):
    """Unless one scale is found for all rows that somebody owns."""
    codec = FORMATS[name].activation
    whole = codec is not None and codec.block == (0, 0)
    layer = layer_for(name, 3, 72, 40)
    x, ids, weights = (t.to(DEVICE) for t in inputs(5, layer.hidden, 2, 3, DTYPE, dropped=False))
    ids[4] = -1
    tensors, options = layer.tensors(DEVICE), layer.options()
    with tile(LAYER_TILE):
        clean = OPS.experts(x, ids, weights, *tensors, **options, backend="triton")
        x[4], x[1, 5] = float("nan"), x[1, 5] if whole else float("nan")
        got = OPS.experts(x, ids, weights, *tensors, **options, backend="triton")
    assert (got[4] == 0).all() and clean.isfinite().all()
    if not whole:
        assert got[1].isnan().all()
        got[1] = clean[1]
    assert same(got, clean)


@pytest.mark.parametrize("name", WEIGHTS)
def test_offsets_beyond_32_bits(name):
    """expert * stride and row * stride pass 2^31 elements (on the CPU in memory that is only reserved)."""
    fmt, experts, n, (k,) = FORMATS[name], 3, 32, fit(name, 64)
    q = quantize_weight(fmt.weight, (torch.randn(experts, n, k) / 8).to(DTYPE))
    offsets, stored = torch.tensor([0, 1, 2, 3], dtype=torch.int32), q.qdata.shape[2]
    options = {"weight_scale": q.scale, "weight_global_scale": q.global_scale}
    with kernel_cases.alone():
        far = torch.empty(2**31 + n * k, dtype=q.qdata.dtype, device=DEVICE)
        far = far.as_strided((experts, n, stored), (2**30, stored, 1)).copy_(q.qdata)
        for x, transpose in ((torch.randn(experts, k).to(DTYPE), False), (torch.randn(experts, n).to(DTYPE), True)):
            wide = torch.empty(2**31 + n * k, dtype=x.dtype, device=DEVICE)
            wide = wide.as_strided(x.shape, (2**30, 1)).copy_(x)
            call = {"format": name, "transpose": transpose}
            with tile("small"):
                args = there({"offsets": offsets, **options})
                got = OPS.grouped_mm(wide, far, **args, **call, backend="triton").cpu()
            call |= {"offsets": offsets, **options, "backend": "reference"}
            truth = OPS.grouped_mm(x, q.qdata, **call, out_dtype=torch.float32)
            plain = OPS.grouped_mm(x, q.qdata, **call)
            if transpose:  # of plain torch: weights in the dtype that x has
                plain = torch.einsum("ec,eck->ek", x, dequantize_weight(q, dtype=DTYPE))
            assert_as_good(got, truth.double(), plain)

"""The CPU backend against float64 on the stored values: every format, every route that a product can take.

test_ops.py and test_edge_cases.py run it too: on a CPU it is what `auto` chooses.
"""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from moe_ops import QuantizedLinear
from moe_ops.backends import BACKENDS, Problem, cpu_matrix, cpu_nibbles, cpu_products, select
from moe_ops.backends.base import Operand, Rows, Weight
from moe_ops.formats import FORMATS, dequantize_weight, quantize_weight

OPS = torch.ops.moe_ops
QUANTIZED = [name for name in FORMATS if FORMATS[name].quantized]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(256, 256), (160, 384)]  # (N, K): whole tiles and vectors, and neither


def error(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


def assert_as_good(got, reference, truth):
    """At most twice the error of the reference, which few numbers may happen to have smaller than half a last place, or
    than what an order of adding costs in fp32."""
    assert torch.isfinite(got).all() and got.dtype == reference.dtype
    assert error(got, truth) <= max(2 * error(reference, truth), torch.finfo(got.dtype).eps / 2, 64**0.5 * 2.0**-23)


def activations(fmt, x):
    """x (M, K) as the format's codes say, in float64."""
    codec = fmt.activation
    if codec is None or not x.numel():
        return x.double()
    q = codec.quantize(x[:, None] if codec.global_scale else x)  # every row a matrix of its own
    return codec.dequantize(q).view(x.shape).double()


def scaled_by_row(fmt):
    """Else activations have one scale, for all rows that an expert uses."""
    return fmt.activation is None or fmt.activation.block != (0, 0)


def linear_of(name, n, k, bias, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return QuantizedLinear.from_float(nn.Linear(k, n, bias).to(dtype), name).requires_grad_(False)


def check(q, x):
    truth = activations(q.quantization, x) @ q.dequantize().double().T
    truth = truth if q.bias is None else truth + q.bias.double()
    results = []
    for q.backend in ("torch", "reference"):
        results.append(q(x))
    assert_as_good(*results, truth)
    return results[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 40])
@pytest.mark.parametrize("name", QUANTIZED)
def test_linear(name, rows, dtype, shape):
    q = linear_of(name, *shape, bias=rows % 2 == 1, dtype=dtype)
    check(q, torch.randn(rows, shape[1]).to(dtype))


@pytest.mark.parametrize("name", QUANTIZED)
def test_nothing_to_multiply(name):
    q = linear_of(name, 64, 128, True)
    q.backend = "torch"
    assert q(torch.empty(0, 128, dtype=torch.bfloat16)).shape == (0, 64)
    q = linear_of(name, 0, 128, True)
    q.backend = "torch"
    assert q(torch.empty(2, 128, dtype=torch.bfloat16)).shape == (2, 0)


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("n,k", [(1, 1), (5, 24), (7, 129), (130, 200), (256, 200), (33, 1056)])
@pytest.mark.parametrize("name", QUANTIZED)
def test_odd_sizes(name, n, k, rows):
    """Partial tiles and groups, rows shorter than a vector."""
    if reason := FORMATS[name].check(n, k):
        pytest.skip(reason)
    check(linear_of(name, n, k, True), torch.randn(rows, k).bfloat16())


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("name", QUANTIZED)
def test_strided_rows(name, rows):
    q, x = linear_of(name, 64, 128, False), torch.randn(rows, 512).bfloat16()
    q.backend = "torch"
    for strided in (x[:, 128:256], x[:, ::4], x.view(-1, 128)[::4], x[:, :128].t().contiguous().t()):
        assert torch.equal(q(strided), q(strided.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("name", QUANTIZED)
def test_many_blocks(name, rows, dtype, monkeypatch):
    """A matrix decoded in blocks of 50 rows and a rest, or of 128 where those share scales."""
    monkeypatch.setattr(cpu_matrix, "_BLOCK", 50 * 256 + 1)
    check(linear_of(name, 256, 256, False, dtype), torch.randn(rows, 256).to(dtype))


def grouped(name, shards=1, experts=5, n=96, k=128, dtype=torch.bfloat16):
    """Random experts: the arguments of the op, and the matrices (E, N, K) in float64 with their bias (E, N)."""
    torch.manual_seed(0)
    fmt = FORMATS[name]
    w = quantize_weight(fmt.weight, torch.randn(experts, n, k) / k**0.5, shards)
    weight = {"weight": w.qdata, "weight_scale": w.scale, "weight_global_scale": w.global_scale,
              "bias": torch.randn(experts, n).to(dtype)}  # fmt: skip
    matrices, bias = dequantize_weight(w, shards).double(), weight["bias"].double()
    return weight, matrices, bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_are_gathered_scattered_and_weighed(name, dtype):
    """Experts of 0, 1, 2, 5 and 30 rows; two rows belong to none; a row may be read twice."""
    weight, matrices, bias = grouped(name, dtype=dtype)
    x, bounds = torch.randn(25, 128).to(dtype), [0, 0, 1, 3, 8, 38]
    rows_in, rows_out, factors = torch.randint(0, 50, (40,)), torch.randperm(40), torch.randn(40)
    values, truth = activations(FORMATS[name], x), torch.zeros(40, 96, dtype=torch.float64)
    for e in range(5):
        for i in range(bounds[e], bounds[e + 1]):
            o = rows_out[i]
            truth[o] = factors[o].double() * (matrices[e] @ values[rows_in[i] // 2] + bias[e])
    options = {"rows_in": rows_in, "rows_out": rows_out, "row_weights": factors, "top_k": 2, "format": name}
    results = [OPS.grouped_mm(x, weight["weight"], torch.tensor(bounds, dtype=torch.int32), **options, backend=b,
                              **{k: v for k, v in weight.items() if k != "weight"})
               for b in ("torch", "reference")]  # fmt: skip
    assert (results[0][rows_out[38:]] == 0).all()
    if scaled_by_row(FORMATS[name]):
        assert_as_good(*results, truth)
    torch.testing.assert_close(*results, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_transposed(name, interleaved, dtype):
    weight, matrices, _ = grouped(name, shards=2)
    fmt, bounds = FORMATS[name], [0, 2, 2, 5, 6, 12]
    qdata, scale = weight["weight"], weight["weight_scale"]
    if interleaved:
        qdata, scale = alternate(qdata), alternate(scale) if fmt.weight.block[0] == 1 else scale
    w = Weight(qdata, scale, weight["weight_global_scale"], shards=2, interleaved=interleaved)
    x, rows = torch.randn(12, 96).to(dtype), Rows(torch.tensor(bounds, dtype=torch.int32))
    results = []
    for backend in ("torch", "reference"):
        f = select(Problem("grouped_mm", "cpu", format=name), backend).fn
        results.append(f(Operand(x), w, rows, None, fmt, out_dtype=dtype, transpose=True))
    truth = torch.cat([x[a:b].double() @ m for m, (a, b) in zip(matrices, pairwise(bounds))])
    assert_as_good(*results, truth)


def alternate(t):
    """Rows of two matrices (E, 2N, ...), one above the other -> one from each in turn."""
    return t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


# ---- routes

TAKEN = [
    # format, rows, dtype -> route
    ("int8", 1, "_bytes"), ("int8", 8, "_digits"), ("int8", 40, "_bf16"), ("int8/int8", 1, "_int8"),
    ("int8/int8", 40, "_int8"), ("fp8", 1, "_half"), ("fp8", 3, "_half"), ("fp8", 8, "_bf16"), ("mxfp4", 3, "_half"),
    ("mxfp4", 8, "_bf16"), ("nvfp4/bf16", 1, "_half"), ("mxfp8", 1, "_half"), ("fp8_block", 1, "_tiles"),
    ("fp8_block", 40, "_fp32"), ("int4_g128", 1, "_nibbles"), ("int4_g128", 40, "_fp32"),
    ("int4_g32", 4, "_nibbles"), ("int4_g32", 5, "_fp32"),
]  # fmt: skip


@pytest.mark.parametrize("name,rows,route", TAKEN)
def test_routes(name, rows, route, monkeypatch):
    if not cpu_products._has_vnni() or not cpu_products._has_bf16() or not cpu_nibbles.has_kernel():
        pytest.skip("other routes on this CPU")
    taken = []
    for known in ("_bytes", "_digits", "_int8", "_nibbles", "_half", "_bf16", "_tiles", "_fp32"):
        f = getattr(cpu_products, known)
        monkeypatch.setattr(cpu_products, known, lambda *a, f=f, known=known: (taken.append(known), f(*a)))
    check(linear_of(name, 256, 256, False), torch.randn(rows, 256).bfloat16())
    assert taken == [route]


@pytest.mark.parametrize("name", QUANTIZED)
def test_other_processors(name, monkeypatch):
    """Without exact int8 sums, without the product with packed integers, and without products in bf16."""
    monkeypatch.setattr(cpu_products, "_has_vnni", lambda: False)
    monkeypatch.setattr(cpu_nibbles, "has_kernel", lambda: False)
    for rows, has_bf16 in ((1, True), (8, True), (8, False), (30, False)):
        monkeypatch.setattr(cpu_products, "_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        check(linear_of(name, 192, 256, False), torch.randn(rows, 256).bfloat16())


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("name", [n for n in QUANTIZED if FORMATS[n].activation is not None])
def test_what_becomes_codes_is_as_good_as_the_reference(name, rows):
    """A gated product in bf16 differs from the reference's in few places, where fp32 sums lie between two numbers."""
    torch.manual_seed(0)
    weight = quantize_weight(FORMATS[name].weight, torch.randn(1, 512, 256) / 16, 2)
    args = torch.randn(rows, 256).bfloat16(), weight.qdata, torch.tensor([0, rows], dtype=torch.int32)
    options = {"weight_scale": weight.scale, "weight_global_scale": weight.global_scale, "format": name}
    got, want = (OPS.grouped_mm(*args, **options, activation="silu", backend=b) for b in ("torch", "reference"))
    assert (got != want).float().mean() < 0.005
    torch.testing.assert_close(got, want)


# ---- values


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("name", QUANTIZED)
def test_not_finite(name, rows):
    """NaN in a row of x, and in a row of the matrix by its scale, reach their row and column, and nothing else."""
    q = linear_of(name, 64, 128, False)
    q.backend = "torch"
    x = torch.randn(rows, 128).bfloat16()
    fmt = FORMATS[name]
    if scaled_by_row(fmt):
        y = q(torch.cat([x, torch.full((1, 128), torch.nan).bfloat16()]))
        assert y[-1].isnan().all() and y[:-1].isfinite().all()
    if q.weight_scale.ndim == 2 and q.weight_scale.shape[0] == 64:
        bits = q.weight_scale.data.view(torch.uint8 if q.weight_scale.element_size() == 1 else q.weight_scale.dtype)
        nan = {torch.float8_e8m0fnu: 255, torch.float8_e4m3fn: 127}.get(q.weight_scale.dtype, torch.nan)
        bits[3, 0] = nan
        y = q(x)
        assert y[:, 3].isnan().all() and y.isnan().sum() == rows


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("name", [n for n in QUANTIZED if FORMATS[n].weight.scale_dtype == torch.float8_e8m0fnu])
def test_scales_of_any_size(name, rows):
    """Groups of one row that are 2^40 apart, rows that are 2^200 apart, and a row of zeros."""
    q = linear_of(name, 64, 256, False)
    exponents = torch.randint(107, 148, q.weight_scale.shape).to(torch.uint8)
    exponents[:8], exponents[8:16], exponents[16] = 20, 220, 0
    q.weight_scale.data = exponents.view(torch.float8_e8m0fnu)
    x = torch.randn(rows, 256).bfloat16()
    truth = activations(q.quantization, x) @ q.dequantize().double().T
    results = []
    for q.backend in ("torch", "reference"):
        results.append(q(x))
    for part in (slice(0, 8), slice(8, 16), slice(17, 64)):
        assert_as_good(*(r[:, part] for r in results), truth[:, part])
    assert (results[0][:, 16].abs() < 2.0**-100).all()


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("name", ["fp8/bf16", "mxfp4", "nvfp4/bf16", "int8"])
def test_activations_of_any_size(name, rows):
    """Magnitudes from 1e-30 to 1e30 in different rows, and one that is 4096 times the others of its row."""
    q = linear_of(name, 64, 256, False)
    x = torch.randn(rows, 256) * torch.logspace(-30, 30, 3)[torch.arange(rows) % 3, None]
    x[-1, 5] *= 4096
    x = x.bfloat16()
    truth = x.double() @ q.dequantize().double().T
    results = []
    for q.backend in ("torch", "reference"):
        results.append(q(x))
    for i in range(rows):
        assert_as_good(results[0][i], results[1][i], truth[i])


def test_weights_stay_as_they_are():
    for name in QUANTIZED:
        q = linear_of(name, 64, 128, True)
        before = {k: v.clone() for k, v in q.state_dict().items()}
        q.backend = "torch"
        for rows, dtype in ((1, torch.bfloat16), (12, torch.bfloat16), (2, torch.float32)):
            q(torch.randn(rows, 128).to(dtype))
        for k, v in q.state_dict().items():
            assert torch.equal(v.reshape(-1).view(torch.uint8), before[k].reshape(-1).view(torch.uint8)), (name, k)


# ---- choice


def test_choice():
    assert list(BACKENDS).index("torch") < list(BACKENDS).index("reference")
    for name in QUANTIZED:
        assert select(Problem("grouped_mm", "cpu", format=name)).backend == "torch"
        assert select(Problem("experts", "cpu", format=name, batch_invariant=True)).backend == "reference"
    with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
        select(Problem("grouped_mm", "cuda", 90), "torch")
    with pytest.raises(ValueError, match="not batch-invariant"):
        select(Problem("grouped_mm", "cpu", format="fp8", batch_invariant=True), "torch")


def test_under_autocast_and_other_defaults():
    """Rows are autocast's, what is inside of the product is not; buffers do not follow torch's defaults."""
    q, x = linear_of("fp8/bf16", 64, 128, False, torch.float32), torch.randn(12, 128)
    q.backend = "torch"
    want, rounded = q(x), q(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(x), rounded) and rounded.dtype == torch.bfloat16
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(q(x), want)
        with torch.device("meta"):
            assert torch.equal(q(x), want)
    finally:
        torch.set_default_dtype(old)


MEMORY = """
import resource, torch, moe_ops.ops
from moe_ops.formats import FORMATS
name, tokens = {name!r}, {tokens}
torch.set_num_threads(1)

def layer(experts, hidden, intermediate):
    codec = FORMATS[name].weight
    tensors = []
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        data = torch.randint(0, 100, (experts, n, codec.stored(k)), dtype=torch.uint8)
        rows = n if codec.block[0] == 1 else n // 128
        scale = torch.full((experts, rows, -(-k // codec.block[1]) if codec.block[1] else 1), 120, dtype=torch.uint8)
        scale = scale.view(codec.scale_dtype) if codec.scale_dtype.itemsize == 1 else scale.to(codec.scale_dtype) / 1e4
        tensors.append((data if codec.packed else data.view(codec.element.storage), scale))
    (up, s1), (down, s2) = tensors
    def run(tokens):
        ids = torch.arange(tokens * 2).view(tokens, 2) % experts
        x = torch.randn(tokens, hidden).bfloat16()
        return torch.ops.moe_ops.experts(x, ids, torch.rand(tokens, 2), up, down, s1, s2, format=name, backend="torch")
    return run

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for t in (2, tokens):
    layer(2, 256, 128)(t)  # code of torch that is loaded when it is first used
run = layer(24, 1024, 1024)  # an expert: 3 million weights, 12 MB in fp32
before = peak()
run(tokens)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory")
@pytest.mark.parametrize("tokens", [12, 120])
@pytest.mark.parametrize("name", ["fp8/bf16", "fp8_block", "int8", "int4_g32", "mxfp4", "mxfp6_e2m3"])
def test_memory(name, tokens):
    """Beside the quantized weights (24 to 72 MB): less than one expert in fp32, for all of 24 experts."""
    script = MEMORY.format(name=name, tokens=tokens)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 12

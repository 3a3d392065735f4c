"""What kernels show on a GPU only: graphs, no host in between, memory, determinism, sizes. See test_kernels.py."""

import pytest
import torch
from kernel_cases import OPS, gradients, same, tile, varied
from oracle import Layer, assert_as_good, fit, inputs

from moe_ops.formats import FORMATS, quantize_weight

pytestmark = [pytest.mark.kernels, pytest.mark.gpu]
STORED = {}  # one format for each number of bits and kind of scale
for name in (name for name in FORMATS if FORMATS[name].quantized):
    codec = FORMATS[name].weight
    STORED.setdefault((codec.element.bits, codec.scale_dtype, codec.global_scale), name)


@pytest.mark.parametrize("rows", [4096, 4097, 100_000])
@pytest.mark.parametrize("num_experts", [1, 8, 128, 384])
def test_sort_many(rows, num_experts):
    for dtype in (torch.int32, torch.int64):
        ids = torch.randint(-1, num_experts + 1, (rows, 1), generator=torch.Generator().manual_seed(rows)).to(dtype)
        for chosen in (ids, torch.zeros_like(ids), ids.clamp(max=0)):
            got = OPS.sort_by_expert(chosen.cuda(), num_experts, "triton")
            want = OPS.sort_by_expert(chosen, num_experts, "reference")
            assert same(got[0], want[0]) and same(got[1], want[1])


def big_layer(name, **options):
    """x, ids, weights on the GPU, and the layer as a function of them."""
    layer = Layer(name, 16, *fit(name, 256, 192), dtype=torch.bfloat16, **options)
    args, tensors = [t.cuda() for t in inputs(64, layer.hidden, 4, 16, torch.bfloat16)], layer.tensors("cuda")
    return args, lambda *a, **k: OPS.experts(*a, *tensors, **layer.options(), backend="triton", **k)


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


@pytest.mark.parametrize("name", FORMATS)
def test_no_synchronisation(name):
    layer = Layer(name, 16, *fit(name, 256, 192), dtype=torch.bfloat16)
    x, ids, weights = (t.cuda() for t in inputs(64, layer.hidden, 4, 16, torch.bfloat16))
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


@pytest.mark.parametrize("name", FORMATS)
def test_same_result_every_time(name):
    (x, ids, weights), run = big_layer(name)
    first, *others = (gradients(lambda a, b: run(a, ids, b), x, weights) for _ in range(4))
    assert all(same(a, b) for other in others for a, b in zip(first, other))


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


@pytest.mark.parametrize("shape", ["table", "step"])
@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "fp8_block", "int8/int8", "mxfp4/fp8"])
def test_long_sums(name, shape):
    """Tensor cores that add few bits: still at most twice the rounding of the result."""
    fmt, k, g = FORMATS[name], 14336, torch.Generator().manual_seed(0)
    q = quantize_weight(fmt.weight, varied(2, 64, k, g=g) / k**0.5)
    tensors = {"x": varied(96, k, g=g), "weight": q.qdata, "offsets": torch.tensor([0, 30, 96], dtype=torch.int32),
               "weight_scale": q.scale, "weight_global_scale": q.global_scale}  # fmt: skip
    tensors = {n: None if t is None else t.cuda() for n, t in tensors.items()}
    with tile(shape):
        got = OPS.grouped_mm(**tensors, format=name, backend="triton")
    plain, truth = (OPS.grouped_mm(**tensors, format=name, out_dtype=t, backend="reference").cpu()
                    for t in (torch.bfloat16, torch.float32))  # fmt: skip
    assert_as_good(got, truth.double(), plain)


@pytest.mark.parametrize("name", STORED.values())
def test_no_weight_is_dequantized(name):
    """Memory of a step: rows, by far less than the weights would take in bf16."""
    e, h, i, top_k, tokens = 32, 1024, 1024, 4, 64
    layer = Layer(name, e, h, i, dtype=torch.bfloat16)
    x, ids, weights = (t.cuda() for t in inputs(tokens, h, top_k, e, torch.bfloat16))
    tensors = layer.tensors("cuda")
    # Bytes: of weights in bf16; of rows in fp32, of which a product of few tiles writes up to four parts.
    floats, rows = 3 * e * h * i * 2, tokens * top_k * 4 * (h + i) * 4
    forward = lambda a, w: OPS.experts(a, ids, w, *tensors, **layer.options(), backend="triton")  # noqa: E731
    for step, allowed in ((forward, rows), (lambda a, w: gradients(forward, a, w), floats / 4)):
        step(x, weights)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x, weights)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < allowed, f"{peak} bytes; the weights in bf16: {floats}"

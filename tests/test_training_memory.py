"""A training step reads quantized weights: what it allocates does not grow with them. On the CPU one expert's matrix is
decoded at a time, or a block of it; on a GPU tiles are, in registers.

T tokens, A experts per token, R = T * A rows, E experts, H hidden, I intermediate, N x K a Linear.
"""

import json
import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import step_memory
import torch
import torch._dynamo
from fake_gpu import empty, fake_gpu
from lowering_cases import experts_weights
from oracle import STORED, Layer, fit, inputs
from test_lowering_formats import training_step
from torch.profiler import ProfilerActivity, profile

from moe_ops import FORMATS, QuantizedExperts, QuantizedLinear

OPS = torch.ops.moe_ops
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
MIB = 1 << 20


def allocations(fn):
    """Bytes that torch's allocator for the CPU gives (or takes back: negative) in a call of fn, in order."""

    def walk(events):
        for e in events:
            if e.tag.name == "Allocation":
                yield e.start_time_ns, e.extra_fields.alloc_size
            yield from walk(e.children)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = fn()  # what it returns is held until all has been counted
    found = [size for _, size in sorted(walk(profiled.profiler.kineto_results.experimental_event_tree()))]
    assert kept is not None and found
    return found


def peak(fn):
    """At the highest, above what there was before; and in one piece."""
    held = highest = 0
    for size in (found := allocations(fn)):
        held += size
        highest = max(highest, held)
    return highest, max(found)


def step(layer, *args):
    """A function that runs a layer forward and backward, with gradients of all floats among args and of biases."""

    def run():
        layer.zero_grad()
        leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
        layer(*leaves).float().square().sum().backward()
        return [a.grad for a in leaves]

    run()  # first calls build tables
    return run


def experts(name, e, h, i, device="cpu", bias=False, **options):
    torch.manual_seed(0)
    made = {"device": device, "dtype": torch.bfloat16}
    up, down = torch.randn(e, 2 * i, h, **made) / h**0.5, torch.randn(e, h, i, **made) / i**0.5
    if bias:
        options |= {"gate_up_bias": torch.zeros(e, 2 * i, **made), "down_bias": torch.zeros(e, h, **made)}
    return QuantizedExperts.from_float(up, down, name, **options)


def routed(t, e, h, top_k, device="cpu"):
    x, ids, weights = inputs(t, h, top_k, e, torch.bfloat16, dropped=False)
    return x.to(device), ids.to(device), weights.to(device)


# ---- on the CPU


@pytest.mark.parametrize("name", STORED)
def test_a_step_of_experts_decodes_one_at_a_time(name):
    """Activations, and a few forms of one expert's matrix: the layer's codes alone are 9 to 18 of them."""
    (h, i), e, t, top_k = fit(name, 256, 256), 24, 24, 2
    matrix, rows = 4 * 2 * i * h, 4 * t * top_k * (h + 2 * i)  # bytes of fp32
    highest, one = peak(step(experts(name, e, h, i), *routed(t, e, h, top_k)))
    assert one <= matrix, f"{one} bytes in one piece: more than the larger matrix of an expert in fp32"
    assert highest <= 6 * rows + 3 * matrix, (highest, rows, matrix)


def test_what_a_copy_of_the_layer_would_take_is_seen():
    """The measure itself: a layer that decodes its weights as a whole, which is what is not done."""
    layer = experts("fp8", 24, 256, 256)

    def whole(x, ids, weights):
        up, down = layer.dequantize(torch.bfloat16)
        return OPS.experts(x, ids, weights, up, down, format="bf16")

    whole.zero_grad = lambda: None
    highest, one = peak(step(whole, *routed(24, 24, 256, 2)))
    assert one >= 2 * 24 * 512 * 256 and highest > 4 * peak(step(layer, *routed(24, 24, 256, 2)))[0]


@pytest.mark.parametrize("name", [name for name in STORED if name in QUANTIZED])
def test_a_step_of_a_linear_decodes_a_block_at_a_time(name):
    """2 million numbers more: in bf16 4 MiB. Scales may be spread over the columns that share them: a byte for each."""
    t, k, found = 16, 1024, []
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    for n in (1024, 3072):
        layer = QuantizedLinear.from_float(torch.nn.Linear(k, n).bfloat16(), name)
        found.append(peak(step(layer, x))[0])
    rows = 4 * 4 * t * 2048
    assert found[1] - found[0] <= rows + 1.25 * 2048 * k


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4"])
def test_nothing_is_kept_for_backward_but_what_was_given(name):
    """Between forward and backward: the result, and what its inputs hold."""
    (h, i), t = fit(name, 256, 128), 64
    layer, (x, ids, weights) = experts(name, 8, h, i), routed(t, 8, h, 2)
    linear = QuantizedLinear.from_float(torch.nn.Linear(h, 512).bfloat16(), name)
    x.requires_grad_(), weights.requires_grad_()
    for run, result in ((lambda: layer(x, ids, weights), 2 * t * h), (lambda: linear(x), 2 * t * 512)):
        run()
        assert result <= sum(allocations(run)) <= result + 1024


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_step_of_no_tokens_takes_nothing(name):
    (h, i), e = fit(name, 256, 256), 24
    highest, _ = peak(step(experts(name, e, h, i), *routed(0, e, h, 2)))
    assert highest <= 8 * e * (h + 2 * i)  # less than zeros for the biases


def test_the_process_takes_no_more():
    """Seen from outside, with what libraries allocate for themselves: 3 to 4 forms of a matrix and blocks of it."""
    root = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Large blocks go back to the system when they are freed, so that what is held can be seen from outside.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": root}
    command = [sys.executable, Path(__file__).parent / "step_memory.py", "nvfp4"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    h, i = step_memory.HIDDEN, step_memory.INTERMEDIATE
    matrix, rows = 4 * 2 * i * h, 4 * step_memory.TOKENS * step_memory.TOP_K * (h + 2 * i)
    for name, got in json.loads(done.stdout.splitlines()[-1]).items():
        assert 0 < got["peak"] <= 8 * rows + 5 * matrix < got["floats"] / 4, (name, got)


# ---- our kernels, and what the compiler makes of them


@pytest.mark.skipif(torch.cuda.is_available(), reason="there its allocator is asked, below")
@pytest.mark.kernels
def test_kernels_allocate_rows_alone():
    """In Triton's interpreter."""
    layer = Layer("mxfp4", 32, 128, 64, dtype=torch.bfloat16)
    args = inputs(2, layer.hidden, 1, 32, torch.bfloat16, dropped=False)

    def run(x, ids, weights):
        return OPS.experts(x, ids, weights, *tensors, **layer.options(), backend="triton")

    run.zero_grad, tensors = lambda: None, layer.tensors()
    biases = 4 * 32 * (layer.hidden + 2 * layer.intermediate)
    highest, _ = peak(step(run, *args))
    assert highest <= 12 * 4 * 3 * (layer.hidden + 2 * layer.intermediate) + 2 * biases
    assert 20 * highest < 2 * layer.up.qdata.shape[0] * layer.up.qdata.shape[1] * layer.hidden  # gate_up_proj in bf16


def _buffers(source):
    """Numbers in each buffer that generated code allocates."""
    sizes = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\)", source)
    assert sizes and "empty(" not in source.partition("def call(")[2].replace("empty_strided_cuda(", "")
    return [prod(int(n) for n in size.split(",") if n.strip()) for size in sizes]


def test_generated_code_allocates_rows_alone():
    """The forward and the backward graph of a step on a GPU that is not there: no buffer of the size of a weight, or
    of one expert's of all of them."""
    name, (e, h, i, top_k, t) = "int4_g32", (64, 256, 128, 2, 32)

    def loss(x, router, up_bias, down_bias, *tensors):
        given = iter(tensors)
        weights = [next(given) if there else None for there in present]
        chosen, ids = torch.topk(torch.softmax((x @ router.T).float(), -1), top_k, -1)
        return OPS.experts(x, ids, chosen.to(x.dtype), *weights[:8], up_bias, down_bias, format=name).sum()

    present = []

    def make():
        weights = experts_weights(name, e, h, i)
        present[:] = [w is not None for w in weights]
        trained = [empty(t, h), empty(e, h), empty(e, 2 * i), empty(e, h)]
        return [p.requires_grad_() for p in trained] + [w for w in weights if w is not None]

    with fake_gpu(90):
        graphs = training_step(loss, make)
    for source in graphs:
        largest = max(_buffers(source))
        assert largest <= max(4 * t * top_k * max(h, 2 * i), e * max(h, 2 * i)), largest
        assert 32 * largest < e * 2 * i * h


# ---- on a GPU


def peak_on_gpu(fn):
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_of_experts_on_a_gpu(name, compiled):
    """Rows in a few forms, biases; never a weight: gate_up_proj in bf16 would be 256 MiB, of one expert 4."""
    torch._dynamo.reset()
    e, h, i, t, top_k = 64, 1024, 1024, 64, 4
    layer = experts(name, e, h, i, "cuda", bias=True)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    rows, biases = 4 * t * top_k * (h + 2 * i), 4 * e * (h + 2 * i)
    got = peak_on_gpu(step(run, *routed(t, e, h, top_k, "cuda")))
    assert got <= 16 * rows + 4 * biases + 8 * MIB, f"{got / MIB:.1f} MiB"
    assert got < 2 * e * 2 * i * h / 3


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_step_of_a_linear_on_a_gpu(name, compiled):
    """The weight would be 32 MiB in bf16."""
    torch._dynamo.reset()
    n = k = 4096
    layer = QuantizedLinear.from_float(torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), name)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    x = torch.randn(64, k, dtype=torch.bfloat16, device="cuda")
    got = peak_on_gpu(step(run, x))
    assert got <= 16 * 4 * 64 * k + 8 * MIB, f"{got / MIB:.1f} MiB"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_forward_keeps_no_rows_of_experts_on_a_gpu(name):
    """Eager: between forward and backward there is the result, and what was given."""
    e, h, i, t, top_k = 16, 1024, 1024, 512, 4
    layer, (x, ids, weights) = experts(name, e, h, i, "cuda"), routed(t, e, h, top_k, "cuda")
    x.requires_grad_(), weights.requires_grad_()
    layer(x, ids, weights)
    before = torch.cuda.memory_allocated()
    out = layer(x, ids, weights)
    assert torch.cuda.memory_allocated() - before <= out.nbytes + MIB
    out.float().sum().backward()
    assert x.grad is not None and weights.grad is not None

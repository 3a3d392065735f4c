"""What only a GPU shows: CUDA graphs under torch.compile, generation, memory. Of kernels: test_kernels_gpu.py."""

import pytest
import torch
import torch._dynamo

import moe_ops
import moe_ops.lowering

pytestmark = pytest.mark.gpu
FORMATS = [  # every way to multiply
    "bf16", "fp8", "fp8_block", "fp8/bf16", "int8/int8", "int4_g128", "mxfp8", "mxfp6_e2m3", "mxfp4", "mxfp4/fp8",
    "nvfp4",
]  # fmt: skip
BYTES = {"fp8": 1.0, "int8": 1.0, "int4_g32": 4.5 / 8, "mxfp6_e3m2": 6.25 / 8, "mxfp4": 4.25 / 8, "nvfp4": 4.5 / 8}


def experts(name, e=16, h=256, i=384):
    up, down = torch.randn(e, 2 * i, h) / h**0.5, torch.randn(e, h, i) / i**0.5
    return moe_ops.QuantizedExperts.from_float(up.bfloat16(), down.bfloat16(), name, device="cuda")


def routed(tokens, e=16, h=256, top_k=4):
    weights, ids = torch.randn(tokens, e, device="cuda").softmax(-1).topk(top_k)
    return torch.randn(tokens, h, device="cuda", dtype=torch.bfloat16), ids, weights


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", FORMATS)
def test_kept_whole_the_op_gives_the_same_bits(name, mode):
    """One call to the compiler, in CUDA graphs too."""
    torch._dynamo.reset()
    layer = experts(name)
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    with torch.no_grad(), moe_ops.lowering.whole():
        for tokens in (1, 4, 4, 100, 100, 7, 7):
            args = routed(tokens)
            assert torch.equal(compiled(*args).clone(), layer(*args))


@pytest.mark.parametrize("name", FORMATS)
def test_training_step_compiled(name):
    torch._dynamo.reset()
    layer, (x, ids, weights) = experts(name), routed(33)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        a, w = x.clone().requires_grad_(), weights.detach().clone().requires_grad_()
        run(a, ids, w).float().square().sum().backward()
        results.append((a.grad, w.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())


def test_generate_with_a_static_cache():
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=4,
        max_position_embeddings=256,
    )  # fmt: skip
    model = moe_ops.quantize_(transformers.Qwen3MoeForCausalLM(config).bfloat16().cuda().eval(), "fp8")
    ids = torch.randint(0, 256, (2, 9), device="cuda")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    eager = model.generate(ids, **options)
    compiled = model.generate(ids, cache_implementation="static", **options)  # compiles its forward on a GPU
    assert eager.shape == compiled.shape
    assert (eager == compiled).float().mean() > 0.8  # bf16 logits of a random model tie: a flip changes what follows


@pytest.mark.parametrize("name", BYTES)
def test_quantizing_frees_the_float_weights(name):
    """Afterwards what is held is the codes and scales; on the way, one expert in float besides."""
    e, h, i = 32, 1024, 1024
    w1, w2 = experts("bf16", e, h, i).dequantize(torch.bfloat16)
    numbers = 3 * e * h * i
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantized = moe_ops.QuantizedExperts.from_float(w1, w2, name)
    held = torch.cuda.memory_allocated() - before
    assert held < 1.02 * BYTES[name] * numbers  # and scales that are one for a row
    assert torch.cuda.max_memory_allocated() - before < 1.2 * held + 16 * h * i * 4
    x, ids, weights = routed(64, e, h)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        quantized(x, ids, weights)
    assert torch.cuda.max_memory_allocated() - before < 64 * 4 * (4 * h + 4 * i) * 4  # rows in parts, never a weight

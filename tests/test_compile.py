"""torch.compile: one graph, few graphs for many token counts, gradients, and generation with a static cache."""

import copy

import pytest
import torch
from oracle import fit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from toy_moe import HIDDEN, ToyModel, call_args, experts, relative_error, tokens

import moe_ops
from moe_ops import FORMATS, dequantize_, quantize_
from moe_ops.backends import resolve

COUNTS = (3, 2, 7, 64, 65, 300, 1, 0)
KINDS = ["plain", "everything", "own gate", "no gate", "post norm"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def fullgraph(module, **kwargs):
    """The compiled module, and a counter of its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, backend=counter, fullgraph=True, **kwargs), counter


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [True, None])
def test_token_counts(kind, dynamic):
    """T = 0 and T = 1 are one graph each; all other counts share one, after a static one where sizes start static."""
    q = quantize_(experts(kind, hidden=32, intermediate=16), "fp8")
    compiled, counter = fullgraph(q, dynamic=dynamic)
    graphs = []
    for n in COUNTS:
        args = call_args(n, hidden=32)
        before = counter.frame_count
        torch.testing.assert_close(compiled(*args), q(*args), rtol=1e-5, atol=1e-6)
        graphs.append(counter.frame_count - before)
    # With dynamic=True the first compilation may start over (a norm's eps is a float), so it is not counted.
    assert graphs[1:] == [0 if dynamic else 1, 0, 0, 0, 0, 1, 1]
    assert not counters["graph_break"]


def leaves(hidden, ids, weights):
    return hidden.clone().requires_grad_(), ids, weights.clone().requires_grad_()


def gradients(module, args, grad):
    """Of hidden, topk_weights and every parameter that has one."""
    module.zero_grad()
    hidden, ids, weights = leaves(*args)
    module(hidden, ids, weights).backward(grad)
    own = {n.removeprefix("_orig_mod."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"hidden": hidden.grad, "topk_weights": weights.grad} | own


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """Of the float module with the dequantized weights; and the compiled ones are the eager ones."""
    q = quantize_(experts(kind), "fp8/bf16")
    want_from = dequantize_(copy.deepcopy(q))
    args, grad = call_args(), torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(1))
    got, want = gradients(q, args, grad), gradients(want_from, args, grad)
    trained = {n for n in want if not n.endswith("_proj")}
    assert set(got) == trained  # everything but the frozen weights
    if kind == "everything":  # interleaved: the quantized module holds gate's biases first
        want["gate_up_proj_bias"] = want["gate_up_proj_bias"].unflatten(-1, (-1, 2)).mT.flatten(-2)
    for n in trained:
        torch.testing.assert_close(got[n], want[n], rtol=1e-4, atol=1e-4)
    compiled, counter = fullgraph(q)
    again = gradients(compiled, args, grad)
    assert set(again) == set(got) and counter.frame_count == 1
    for n in got:
        torch.testing.assert_close(again[n], got[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    """One graph, and the numbers of eager, gradients included."""
    hidden, intermediate = fit(name, 32, 16)
    q = quantize_(experts("biases", hidden=hidden, intermediate=intermediate), name)
    compiled, counter = fullgraph(q)
    args, grad = call_args(hidden=hidden), torch.randn(11, hidden, generator=torch.Generator().manual_seed(1))
    want, got = gradients(q, args, grad), gradients(compiled, args, grad)
    assert set(want) == {"hidden", "topk_weights", "gate_up_proj_bias", "down_proj_bias"} == set(got)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert counter.frame_count == 1 and not counters["graph_break"]
    with torch.no_grad():
        assert torch.equal(compiled(*args), q(*args))


def training_loss(model, steps=3):
    """Losses of a few steps on what is not quantized: embeddings, routers, biases, norms, the head."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens(16)), tokens(17)[1:])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_step():
    model = quantize_(ToyModel(bias=True), "fp8")
    eager, compiled_model = copy.deepcopy(model), copy.deepcopy(model)
    compiled, counter = fullgraph(compiled_model)
    want, got = training_loss(eager), training_loss(compiled)
    assert want[-1] < want[0] and counter.frame_count == 1 and not counters["graph_break"]
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-4)
    router = compiled_model.layers[0]["mlp"].gate.weight
    assert not torch.equal(router, model.layers[0]["mlp"].gate.weight)  # gradients reach it through topk_weights
    e, old = (m.layers[0]["mlp"].experts for m in (compiled_model, model))
    assert torch.equal(e.gate_up_proj.view(torch.uint8), old.gate_up_proj.view(torch.uint8))
    assert not torch.equal(e.down_proj_bias, old.down_proj_bias)


@torch.no_grad()
def test_linears_of_changing_length_share_a_graph():
    q = quantize_(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), "fp8")
    compiled, counter = fullgraph(q)
    for n in (2, 3, 9, 100):
        x = torch.randn(n, 64)
        torch.testing.assert_close(compiled(x), q(x))
    assert counter.frame_count == 2


@torch.no_grad()
def test_the_backend_is_part_of_the_graph():
    """It is an argument of the op, so a compiled model follows `use_backend` and never runs a stale choice."""
    seen = []

    def backend(gm, example_inputs):
        seen.extend(n.kwargs["backend"] for n in gm.graph.nodes if "experts" in str(n.target) and "backend" in n.kwargs)
        return gm.forward

    q = quantize_(experts(), "fp8")
    compiled = torch.compile(q, backend=backend, fullgraph=True)
    want = compiled(*call_args())
    with moe_ops.use_backend("reference"):
        torch.testing.assert_close(compiled(*call_args()), want)
    compiled(*call_args())
    assert seen == ["auto", "reference"]
    q.backend = "reference"
    compiled(*call_args())
    assert seen[2:] in ([], ["reference"])


@torch.no_grad()
def test_use_backend_inside_a_compiled_function():
    seen = []

    def backend(gm, example_inputs):
        seen.extend(n.kwargs["backend"] for n in gm.graph.nodes if "backend" in n.kwargs)
        return gm.forward

    q = quantize_(nn.Linear(64, 64), "fp8")

    def both(x):
        with moe_ops.use_backend("reference"):
            y = q(x)
        return y + q(x)

    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(both, backend=backend, fullgraph=True)(x), both(x))
    assert seen == ["reference", "auto"] and resolve(None) == ("auto", False)


@torch.no_grad()
def test_a_quantized_model_is_compiled_as_a_whole():
    model = quantize_(ToyModel(), "fp8")
    compiled, counter = fullgraph(model)
    torch.testing.assert_close(compiled(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    floats = ToyModel()
    assert relative_error(model(tokens()), floats(tokens())) < 0.2  # the same model, to the format's precision


@pytest.mark.swap
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generate_with_a_static_cache(name):
    tiny = pytest.importorskip("tiny_models")
    from transformers import CompileConfig

    model = quantize_(tiny.build(name), "fp8")
    ids = torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **how)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # generate() compiles on accelerators only
    got = model.generate(ids, cache_implementation="static", compile_config=config, **how)
    assert torch.equal(got, want)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2


@pytest.mark.swap
def test_training_a_transformers_model_with_its_router_loss():
    tiny = pytest.importorskip("tiny_models")
    model = quantize_(tiny.build("qwen3_moe", output_router_logits=True), "fp8").train()
    ids = tiny.inputs(model)["input_ids"]
    model(input_ids=ids, labels=ids, use_cache=False)  # transformers installs its recording hooks in the first call
    compiled, counter = fullgraph(model)
    out = compiled(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert counter.frame_count == 1 and out.aux_loss is not None
    router = model.get_submodule("model.layers.0.mlp.gate").weight.grad
    assert router is not None and router.abs().sum() > 0 and torch.isfinite(router).all()
    eager = copy.deepcopy(model)
    eager.zero_grad()
    eager(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    want = eager.get_submodule("model.layers.0.mlp.gate").weight.grad
    torch.testing.assert_close(router, want, rtol=1e-3, atol=1e-5)


@pytest.mark.swap
@torch.no_grad()
def test_weight_initialisation_passes_quantized_modules_over():
    tiny = pytest.importorskip("tiny_models")
    model = quantize_(tiny.build("qwen3_moe"), "fp8")
    e = model.get_submodule("model.layers.0.mlp.experts")
    before = {n: p.detach().clone() for n, p in e.named_parameters()}
    model.init_weights()
    model._init_weights(e)
    for n, p in e.named_parameters():
        assert torch.equal(p.view(torch.uint8), before[n].view(torch.uint8)), n

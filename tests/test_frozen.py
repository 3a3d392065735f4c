"""Frozen quantized experts and linears train everything around them: models against their float twins (frozen_twin.py),
and under the wrappers of training loops. T tokens, A experts per token, H hidden.
"""

import copy

import pytest
import torch
import torch._dynamo
from frozen_twin import assert_same_gradients, gradients, pair, relative
from oracle import fit
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from toy_moe import HIDDEN, INTERMEDIATE, ToyModel, call_args, experts, tokens

import moe_ops
from moe_ops import FORMATS, quantize_

FAMILIES = {"qwen3_moe": "silu", "gpt_oss": "swiglu_oai"}  # and their activation
SOME = ["fp8", "int4_g32", "mxfp4", "nvfp4"]
INDEPENDENT = [n for n, f in FORMATS.items() if f.activation is None or f.activation.block != (0, 0)]


def limit(name):
    """In norm. A code at the edge of two may turn over with an order of adding, and moves a row by its step."""
    return 1e-5 if FORMATS[name].activation is None else 1e-2


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def toy(name, **options):
    hidden, intermediate = fit(name, HIDDEN, INTERMEDIATE)
    return ToyModel(bias=True, hidden=hidden, intermediate=intermediate, **options)


def toy_loss(model, n=16):
    return cross_entropy(model(tokens(n)), tokens(n + 1)[1:])


def family(name, fmt="fp8", **config):
    """A tiny model in training mode, of sizes that the format takes."""
    tiny = pytest.importorskip("tiny_models")
    hidden, intermediate, dense = fit(fmt, 64, 32, 96)
    sizes = {"hidden_size": hidden, "moe_intermediate_size": intermediate}
    sizes["intermediate_size"] = intermediate if name == "gpt_oss" else dense  # gpt_oss: of its experts
    return tiny.build(name, **sizes, **config).train()


IDS = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))


def lm_loss(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def trained(model, loss):
    loss(model).backward()
    return gradients(model)


# ---- against the float model


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_trains_as_its_float_twin(name):
    model, twin = pair(toy(name), name)
    got = trained(model, toy_loss)
    assert_same_gradients(got, trained(twin, toy_loss), limit(name))
    for part in ("embed", "layers.0.mlp.gate", "layers.0.proj", "layers.1.mlp.experts", "lm_head"):
        assert any(g.any() for n, g in got.items() if n.startswith(part)), part


@pytest.mark.swap
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", FAMILIES)
def test_a_transformers_model_trains_as_its_float_twin(model, name):
    model, twin = pair(family(model, name, output_router_logits=True), name, FAMILIES[model])
    got = trained(model, lm_loss)
    assert_same_gradients(got, trained(twin, lm_loss), limit(name))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert set(got) == {n for n, _ in model.named_parameters()} - frozen
    assert any("norm" in n for n in got) and any("mlp.gate.weight" in n or "mlp.router.weight" in n for n in got)


def steps(model, run, count=3):
    """Losses of a few steps of an optimizer that is not part of what is compiled."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = run()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.swap
@pytest.mark.parametrize("model,name", [("qwen3_moe", "fp8"), ("gpt_oss", "nvfp4")])
def test_compiled_steps_of_a_transformers_model(model, name):
    """One graph; the losses of eager, which fall, and of what is stored nothing changes."""
    model = quantize_(family(model, name, output_router_logits=True), name)
    lm_loss(model)  # transformers installs its recording hooks in the first call
    eager, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    compiled = torch.compile(lm_loss, backend="aot_eager", fullgraph=True)
    got, want = steps(model, lambda: compiled(model)), steps(eager, lambda: lm_loss(eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got[-1] < got[0]
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    for key, t in model.state_dict().items():
        same = torch.equal(t.flatten().view(torch.uint8), before[key].flatten().view(torch.uint8))
        assert same != (key in learns) or not t.any(), key


def test_a_step_through_inductor():
    layer, linear = quantize_(experts("biases"), "fp8"), moe_ops.QuantizedLinear.from_float(nn.Linear(HIDDEN, HIDDEN))
    model, (x, ids, weights) = nn.ModuleList([layer, linear]), call_args()
    loss = lambda model: model[0](model[1](x), ids, weights).sum()  # noqa: E731
    assert_same_gradients(trained(model, torch.compile(loss, fullgraph=True)), trained(model, loss), 1e-5)


# ---- checkpointing, accumulation, hooks


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_checkpointed_layers(name, reentrant):
    """To the bit: what is computed again is what was computed."""
    model = quantize_(toy(name), name)

    def loss(model, n=16):
        x = model.embed(tokens(n))
        for layer in model.layers:
            call = lambda x, layer=layer: x + layer["mlp"](layer["proj"](x))  # noqa: E731
            x = checkpoint(call, x, use_reentrant=reentrant)
        return cross_entropy(model.lm_head(x), tokens(n + 1)[1:])

    got, want = trained(model, loss), trained(model, toy_loss)
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.swap
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize(
    "model,how", [*((model, how) for model in FAMILIES for how in ("reentrant", "not")), ("qwen3_moe", "compiled")]
)
def test_gradient_checkpointing_of_transformers(model, how):
    model = quantize_(family(model), "fp8")
    want, loss = trained(model, lm_loss), lm_loss
    model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how == "reentrant":
        model.enable_input_require_grads()
    if how == "compiled":
        lm_loss(model)
        loss = torch.compile(lm_loss, backend="aot_eager", fullgraph=True)
    assert_same_gradients(trained(model, loss), want, 1e-6)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_halves_of_a_batch_add_up(name):
    """Gradients of two halves, accumulated, are those of the whole."""
    model = quantize_(toy(name, layers=1), name)
    ids, targets = tokens(16), tokens(17)[1:]

    def add(part):
        cross_entropy(model(ids[part]), targets[part], reduction="sum").backward()

    add(slice(16))
    whole = gradients(model)
    add(slice(8)), add(slice(8, 16))
    assert_same_gradients(gradients(model), whole, limit(name))


@pytest.mark.parametrize("kind", ["plain", "own gate", "post norm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_router_learns(kind, compiled):
    """x needs no gradient and no parameter of the layer does; weights of experts have theirs all the same."""
    layer = quantize_(experts(kind), "fp8/bf16")
    floats = moe_ops.dequantize_(copy.deepcopy(layer)).requires_grad_(False)
    layer.requires_grad_(False)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x, ids, weights = call_args()
    found = []
    for module in (run, floats):
        w = weights.clone().requires_grad_()
        module(x, ids, w).square().sum().backward()
        found.append(w.grad)
    assert not x.requires_grad and all(p.grad is None for p in layer.parameters())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_hooks():
    """Of modules, of tensors, and of parameters whose gradient has been added: as those of an nn.Linear."""
    floats, found = nn.Linear(HIDDEN, 48), []
    layer = moe_ops.QuantizedLinear.from_float(copy.deepcopy(floats), "fp8/bf16")
    floats.weight.data, floats.weight.requires_grad = layer.dequantize(), False
    for module in (layer, floats):
        x, seen = call_args()[0].requires_grad_(), {}
        module.register_full_backward_pre_hook(lambda m, gout: (2 * gout[0],))
        module.register_full_backward_hook(lambda m, gin, gout: seen.update(input=gin[0], output=gout[0]))
        module.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: seen.update(above=g)) and None)
        module.bias.register_post_accumulate_grad_hook(lambda p: seen.update(bias=p.grad.clone()))
        module(x).square().sum().backward()
        found.append(seen | {"x": x.grad})
    assert_same_gradients(*found, 1e-5)


# ---- autocast


def run_under(dtype, module, *args, grad=True):
    """(result, gradients of floating args and biases) of module(*args) under autocast to dtype; None: without."""
    leaves = [a.clone().requires_grad_(grad) if a.is_floating_point() else a for a in args]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = module(*leaves)
    if not grad:
        return out, []
    out.float().square().sum().backward()
    own = gradients(module)
    return out, [a.grad for a in leaves if a.is_floating_point()] + [own[n] for n in sorted(own) if "bias" in n]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_linear(dtype, compiled):
    """Types are those of nn.Linear, values those of a model in autocast's type; outside of it, and in it, in turn."""
    floats = nn.Linear(64, 48)
    layer = moe_ops.QuantizedLinear.from_float(floats, "fp8/bf16")
    floats.weight.data = layer.dequantize()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for under, given in ((dtype, x), (None, x), (dtype, x.to(dtype)), (torch.bfloat16, x.half())):
        (out, grads), (want, wanted) = run_under(under, run, given), run_under(under, floats, given)
        assert out.dtype == want.dtype and [g.dtype for g in grads] == [g.dtype for g in wanted]
        for a, b in zip([out, *grads], [want, *wanted], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.detach().abs().max().item())
    as_cast, _ = run_under(None, layer, x.to(dtype), grad=False)
    assert torch.equal(run_under(dtype, run, x, grad=False)[0], as_cast)
    with pytest.raises(ValueError, match="float64"):  # which autocast leaves alone
        run_under(dtype, layer, x.double())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["biases", "own gate", "post norm"])
def test_autocast_of_experts(kind, compiled):
    """They compute in autocast's type and give back x's, as the loops of the models do."""
    layer = quantize_(experts(kind), "fp8/bf16")
    floats = moe_ops.dequantize_(copy.deepcopy(layer))
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    args = call_args()
    for under, (x, ids, weights) in ((torch.bfloat16, args), (None, args)):
        got, want = ([out, *grads] for out, grads in (run_under(under, m, x, ids, weights) for m in (run, floats)))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype == torch.float32
            error = relative(a.detach(), b.detach())
            assert (1e-4 < error < 2e-2) if under else error < 1e-5, error
    inside = run_under(torch.bfloat16, run, *args, grad=False)[0]
    half, ids, weights = args[0].bfloat16(), *args[1:]
    assert torch.equal(inside, run_under(None, layer, half, ids, weights, grad=False)[0].float())


@pytest.mark.swap
def test_autocast_of_a_transformers_model():
    """bf16 autocast around parameters in fp32, as Trainer(bf16=True) has it: every gradient is fp32, and near."""
    model = quantize_(family("qwen3_moe"), "fp8/bf16")
    floats = moe_ops.dequantize_(copy.deepcopy(model))
    found = []
    for m in (model, floats):
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm_loss(m)
        loss.backward()
        found.append(gradients(m))
    got, want = found
    assert {g.dtype for g in got.values()} == {torch.float32}
    assert_same_gradients(got, {n: want[n] for n in got}, 0.1)

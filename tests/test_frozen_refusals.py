"""What goes wrong in training loops around frozen experts and linears: NaN, empty batches, gradients that codes do not
have. It is said, or passed on to exactly whom it concerns. T tokens, A experts per token, H hidden."""

import copy

import pytest
import torch
import torch._dynamo
from oracle import Layer, fit
from oracle import inputs as some_inputs
from test_autograd import leaves
from torch import nn
from toy_moe import HIDDEN, INTERMEDIATE, ToyModel, bits, call_args, experts, tokens

from moe_ops import FORMATS, QuantizedLinear, quantize_

OPS = torch.ops.moe_ops
FLOAT8 = [n for n, f in FORMATS.items() if f.weight.element.storage == torch.float8_e4m3fn]
INTEGERS = [n for n, f in FORMATS.items() if f.quantized and n not in FLOAT8]
SHARED_SCALE = [n for n, f in FORMATS.items() if f.activation is not None and f.activation.block == (0, 0)]
BAD, OWNED, ALL = 4, [1, 3], [0, 1, 2, 3]  # a token, its experts


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def small(name, kind="biases", **options):
    """Experts of sizes that the format takes, and arguments for them."""
    hidden, intermediate = fit(name, HIDDEN, INTERMEDIATE)
    return quantize_(experts(kind, hidden=hidden, intermediate=intermediate), name), call_args(hidden=hidden, **options)


def linear(name, **options):
    (k,) = fit(name, HIDDEN)
    torch.manual_seed(0)
    return QuantizedLinear.from_float(nn.Linear(k, 48), name, **options), torch.randn(7, k)


# ---- NaN


def nan_rows(t):
    """Rows with a NaN; all that they hold is NaN."""
    assert torch.equal(t.isnan().any(-1), t.isnan().all(-1))
    return t.isnan().any(-1).nonzero().flatten().tolist()


def check_nan(run, x, weights, biases):
    """run(x, ids, weights, *biases) with a NaN in one token's gradient, then in its row: (T, H), (T, A), two (E, N)."""
    token = torch.arange(x.shape[0], device=x.device)
    ids = torch.stack([token % 3, (token + 1) % 3], 1)  # of experts 0 to 2
    ids[BAD] = torch.tensor(OWNED, device=x.device)
    found = []
    for bad in (False, True):
        ins = leaves(x, weights, *biases, device=x.device)
        out = run(ins[0], ids, *ins[1:])
        grad = torch.ones_like(out)
        grad[BAD] = torch.nan if bad else 1.0
        out.backward(grad)
        found.append([t.grad for t in ins])
    clean, got = found
    assert all(torch.isfinite(g).all() for g in clean)
    assert [nan_rows(g) for g in got] == [[BAD], [BAD], OWNED, OWNED]
    for a, b in zip(clean, got, strict=True):  # to all others nothing has happened
        assert torch.equal(a[~b.isnan().any(-1)], b[~b.isnan().any(-1)])
    x = x.clone()
    x[BAD, 0] = torch.nan
    return nan_rows(run(x, ids, weights, *biases))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_reaches_its_token_and_its_experts(name, on_input):
    """Nobody else, and nothing hides it: not codes, of which some have no NaN, and not rows that share a tile."""
    layer, (x, _, weights) = small(name)

    def run(x, ids, weights, *biases):
        own = dict(zip(("gate_up_proj_bias", "down_proj_bias"), biases, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(layer, own):
            return layer.routed(x, ids, weights, on_input)

    rows = check_nan(run, x, weights, (layer.gate_up_proj_bias, layer.down_proj_bias))
    assert rows == ([BAD] if name not in SHARED_SCALE else list(range(11)))  # whose amax is one for all


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_nan_in_kernels(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = Layer(name, 4, *fit(name, 64, 32), dtype=torch.bfloat16)
    x, _, weights = (t.to(device) for t in some_inputs(11, layer.hidden, 2, 4, torch.bfloat16))

    def run(x, ids, weights, up_bias, down_bias):
        tensors = layer.tensors(device, up_bias=up_bias, down_bias=down_bias)
        return OPS.experts(x, ids, weights, *tensors, **layer.options(), backend="triton")

    assert check_nan(run, x, weights, (layer.up_bias, layer.down_bias)) == [BAD]


@pytest.mark.parametrize("name", FORMATS)
def test_nan_in_a_linear(name):
    layer, x = linear(name)
    x.requires_grad_()
    grad = torch.ones(7, 48)
    grad[BAD, 5] = torch.nan
    layer(x).backward(grad)
    assert nan_rows(x.grad) == [BAD] and layer.bias.grad.isnan().nonzero().flatten().tolist() == [5]
    x = x.detach().clone()
    x[BAD, 0] = torch.nan
    assert nan_rows(layer(x)) == ([BAD] if name not in SHARED_SCALE else list(range(7)))


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_loss_that_is_nan(name):
    """So is every gradient: a loop that looks at their norm sees it. Codes, and the next step, are as before."""
    model = quantize_(ToyModel(bias=True), name)
    before = copy.deepcopy(model.state_dict())
    learns = [p for p in model.parameters() if p.requires_grad]
    (model(tokens()).sum() * torch.nan).backward()
    assert all(p.grad.isnan().any() for p in learns)
    assert torch.nn.utils.clip_grad_norm_(learns, 1.0).isnan()
    model.zero_grad()
    model(tokens()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in learns)
    assert all(torch.equal(bits(t), bits(before[n])) for n, t in model.state_dict().items())


# ---- empty batches, other types and shapes


@pytest.mark.parametrize("compiled", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4"])
def test_empty_batches(name, compiled):
    """T = 0, whoever wants a gradient: x, router weights, biases or all. Those of biases are zeros."""
    layer, (x, ids, weights) = small(name, num_tokens=0)
    one, rows = linear(name)
    biases = [p for n, p in layer.named_parameters() if "bias" in n]
    for wanted in ("x", "weights", "biases", "all")[:: 1 if compiled != "inductor" else 3]:
        leaf = [t.detach().clone().requires_grad_(wanted in (n, "all")) for n, t in (("x", x), ("weights", weights))]
        for b in biases:
            b.grad = None
            b.requires_grad_(wanted in ("biases", "all"))
        run = layer if compiled is None else torch.compile(layer, backend=compiled, fullgraph=True)
        out = run(leaf[0], ids, leaf[1])
        assert out.shape == x.shape
        out.sum().backward()
        for t in leaf:
            assert t.grad.shape == t.shape if t.requires_grad else t.grad is None
        for b in biases:
            assert torch.equal(b.grad, torch.zeros_like(b)) if b.requires_grad else b.grad is None
    run = one if compiled is None else torch.compile(one, backend=compiled, fullgraph=True)
    (empty,) = leaves(rows[:0].view(2, 0, rows.shape[1]))
    run(empty).sum().backward()
    assert empty.grad.shape == empty.shape and torch.equal(one.bias.grad, torch.zeros(48))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_a_gradient_of_another_type(given, on_input):
    """As of nn.Linear: it is taken, and the gradients that come out have the types of what they are gradients of."""
    layer, (x, ids, weights) = small("fp8")
    one, _ = linear("fp8")
    found = []
    for dtype in (torch.float32, given):
        x, weights = leaves(x, weights)
        grad = torch.ones(11, HIDDEN, dtype=dtype)
        layer.routed(x, ids, weights, on_input).backward(grad)
        (rows,) = leaves(x)
        one(rows).backward(grad[:, :48])
        found.append([x.grad, weights.grad, rows.grad])
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.swap
def test_labels_of_another_shape():
    """torch says so before anything of ours runs backward; the model trains on."""
    tiny = pytest.importorskip("tiny_models")
    model = quantize_(tiny.build("qwen3_moe"), "fp8").train()
    ids = tiny.inputs(model)["input_ids"]
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=ids, labels=ids[:, :3], use_cache=False)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert torch.isfinite(model.get_submodule("model.layers.0.mlp.gate").weight.grad).all()


# ---- gradients of codes and scales


def stored(module):
    """Names of codes and scales."""
    return [n for n, p in module._parameters.items() if p is not None and "bias" not in n]


@pytest.mark.parametrize("name", FLOAT8 + INTEGERS)
def test_codes_that_want_a_gradient(name):
    """float8 codes, and scales, can be told to; the forward refuses. Integers cannot, torch says."""
    for module, args in (small(name), (linear(name)[0], linear(name)[1:]), small(name, "own gate")):
        for key in stored(module):
            p = module._parameters[key]
            if not p.is_floating_point():
                with pytest.raises(RuntimeError, match="floating point"):
                    p.requires_grad_(True)
                continue
            p.requires_grad_(True)
            with pytest.raises(ValueError, match=f"{key} is stored in format '{name}'.*no gradient"):
                module(*args)
            with torch.no_grad():
                module(*args)  # nothing is asked for
            p.requires_grad_(False)
        (x,) = leaves(args[0])
        module(x, *args[1:]).sum().backward()
        assert x.grad.any()


@pytest.mark.parametrize("name", FLOAT8 + INTEGERS)
def test_modules_that_are_told_to_train(name):
    """As a whole, which would be their codes: refused before anything is changed. To freeze them is no harm."""
    for module in (small(name)[0], linear(name)[0]):
        before = {n: p.requires_grad for n, p in module.named_parameters()}
        with pytest.raises(ValueError, match=f"is stored in format '{name}'.*adapters"):
            module.requires_grad_()
        assert {n: p.requires_grad for n, p in module.named_parameters()} == before
        assert module.requires_grad_(False) is module and not any(p.requires_grad for p in module.parameters())


def test_a_model_that_is_told_to_train_as_a_whole():
    """nn.Module goes through parameters, not modules: float8 is refused by the first forward, compiled too."""
    model = quantize_(ToyModel(), "fp8").requires_grad_()
    for run in (model, torch.compile(model, backend="aot_eager")):
        with pytest.raises(ValueError, match="no gradient"):
            run(tokens())
    assert model.layers[0]["proj"].weight.grad is None
    with torch.inference_mode():
        assert torch.isfinite(model(tokens())).all()
    floats = quantize_(ToyModel(), "bf16").requires_grad_()  # stored as they are
    assert all(p.requires_grad for p in floats.parameters())


OPS_OF = {  # an op with the position of its codes and of their scale
    "experts": lambda layer, x, codes, scale: OPS.experts(
        x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), codes, layer.down.qdata, scale, layer.down.scale,
        **layer.options()),
    "grouped_mm": lambda layer, x, codes, scale: OPS.grouped_mm(
        x, codes, torch.tensor([0, 5, 5], dtype=torch.int32), scale, format="fp8"),
    "linear": lambda layer, x, codes, scale: OPS.linear(x, codes[0], scale[0], format="fp8"),
}  # fmt: skip


@pytest.mark.xfail(strict=True, reason="ops give codes that want a gradient none, in silence")
@pytest.mark.parametrize("which", ["codes", "scale"])
@pytest.mark.parametrize("op", OPS_OF)
def test_codes_that_want_a_gradient_of_an_op(op, which):
    layer = Layer("fp8", 2, 64, 32, bias=False)
    x, codes, scale = leaves(torch.randn(5, 64), layer.up.qdata, layer.up.scale)
    (codes if which == "scale" else scale).requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient"):
        OPS_OF[op](layer, x, codes, scale).sum().backward()


# ---- derivatives that there are none of


def test_a_second_derivative_of_a_layer():
    for kind in ("plain", "own gate"):
        layer, (x, ids, weights) = small("fp8", kind)
        (grad,) = torch.autograd.grad(layer(x.requires_grad_(), ids, weights).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="itself a gradient"):
            grad.sum().backward()


@pytest.mark.xfail(strict=True, reason="linear_backward has no gradient that refuses")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_second_derivative_of_a_linear(backend):
    layer, x = linear("fp8", backend=None if backend == "auto" else backend)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="itself a gradient"):
        grad.sum().backward()


@pytest.mark.xfail(strict=True, reason="tangents are dropped: the derivative is 0")
@pytest.mark.parametrize("what", ["experts", "linear"])
def test_forward_mode(what):
    run, x = _function_of_x(what)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(run, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("what", ["experts", "linear"])
def test_functional_transforms(what):
    """Of torch.func, grad is refused; vmap is a loop over what it maps."""
    run, x = _function_of_x(what)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: run(x).sum())(x)
    with torch.no_grad():
        want = torch.stack([run(x), run(2 * x)])
        torch.testing.assert_close(torch.func.vmap(run)(torch.stack([x, 2 * x])), want, rtol=1e-4, atol=1e-4)


def _function_of_x(what):
    if what == "linear":
        return linear("fp8/bf16")
    layer, (x, ids, weights) = small("fp8/bf16")
    return lambda x: layer(x, ids, weights), x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    """Nothing is recorded, and a module that was used so trains afterwards."""
    for module, args in (small("fp8"), (linear("fp8")[0], linear("fp8")[1:])):
        with mode():
            out = module(*args)
        assert not out.requires_grad and out.grad_fn is None and out.is_inference() == (mode is torch.inference_mode)
        (x,) = leaves(args[0])
        again = module(x, *args[1:])
        again.sum().backward()
        assert torch.equal(again, out) and x.grad.any()


def test_eval_mode_records_gradients_all_the_same():
    layer, (x, ids, weights) = small("fp8")
    (x,) = leaves(x)
    layer.eval()(x, ids, weights).sum().backward()
    assert x.grad.any()

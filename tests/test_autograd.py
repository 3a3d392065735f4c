"""Gradients of every op against autograd through the float64 definition: weights act as their dequantized values, and
quantized activations pass gradients straight through."""

import oracle
import pytest
import torch
from oracle import Layer, assert_as_good, fit, inputs

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, quantize_weight

OPS = torch.ops.moe_ops
LAYERS = {
    "silu": {},
    "on_input": {"on_input": True},
    "oai_interleaved": {"activation": "swiglu_oai", "interleaved": True, "numbers": {"limit": 1.0}},
    "gelu": {"activation": "gelu"},
    "gelu_tanh_clamped": {"activation": "gelu_tanh", "numbers": {"limit": 0.5, "beta": 0.5}},
    "relu2_plain": {"activation": "relu2", "gated": False},
    "silu_plain_on_input": {"activation": "silu", "gated": False, "on_input": True},
}


def leaves(*tensors, device="cpu"):
    return [t.detach().to(device).clone().requires_grad_() for t in tensors]


def upstream(out):
    g = torch.Generator().manual_seed(9)
    return torch.randn(out.shape, generator=g).to(out.device, out.dtype)


def working(name, device):
    """fp32 where an implementation computes in it: tensor cores add fp8 products in fewer bits."""
    return torch.bfloat16 if device == "cuda" and FORMATS[name].activation else torch.float32


def compare(got, truth, plain, nudged=None):
    """Gradients in one order; `nudged`: the true ones, of a nudge (see oracle.py)."""
    for i, (what, a, b, c) in enumerate(zip(("x", "router weights", "first bias", "second bias"), got, truth, plain)):
        assert a.dtype == c.dtype
        assert_as_good(a, b.double(), c.double(), what, nudged=nudged and (lambda nudge, i=i: nudged(nudge)[i]))


def case(name, kind, device, make=Layer):
    """A layer, what it is called with, and whether the router's weights multiply its input."""
    options, dtype = dict(LAYERS[kind]), working(name, device)
    on_input = options.pop("on_input", False)
    layer = make(name, 5, *fit(name, 72, 40), dtype=dtype, **options)
    return layer, inputs(12, layer.hidden, 3, 5, dtype), on_input


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, kind, device):
    layer, (x, ids, weights), on_input = case(name, kind, device)
    dtype = layer.dtype
    got = leaves(x, weights, layer.up_bias, layer.down_bias, device=device)
    args = layer.tensors(device, up_bias=got[2], down_bias=got[3])
    out = OPS.experts(got[0], ids.to(device), got[1], *args, **layer.options(), router_weight_on_input=on_input)
    out.backward(upstream(out))

    def wanted(work, nudge=0.0):
        exact = work == torch.float64
        ins = leaves(*(t.double() if exact else t for t in (x, weights, layer.up_bias, layer.down_bias)))
        more = {"on_input": on_input, "biases": ins[2:], "stored": dtype, "nudge": nudge}
        y = oracle.experts(layer, ins[0], ids, ins[1], work, **more)
        y.backward(upstream(out).cpu().to(work))
        return [t.grad for t in ins]

    nudged = lambda nudge: wanted(torch.float64, nudge)  # noqa: E731
    compare([t.grad for t in got], wanted(torch.float64), wanted(dtype), nudged)


@pytest.mark.parametrize("only", range(4), ids=["x", "weights", "up_bias", "down_bias"])
@pytest.mark.parametrize("on_input", [False, True])
def test_experts_only_what_is_needed(only, on_input, device):
    """The gradient of one input does not depend on whether others want theirs."""
    layer = Layer("fp8", 5, 72, 40)
    x, ids, weights = inputs(6, 72, 3, 5)
    results = []
    for wanted in ({only}, set(range(4))):
        ins = leaves(x, weights, layer.up_bias, layer.down_bias, device=device)
        for i, t in enumerate(ins):
            t.requires_grad_(i in wanted)
        args = layer.tensors(device, up_bias=ins[2], down_bias=ins[3])
        out = OPS.experts(ins[0], ids.to(device), ins[1], *args, **layer.options(), router_weight_on_input=on_input)
        out.backward(upstream(out))
        assert [t.grad is not None for t in ins] == [i in wanted for i in range(4)]
        results.append(ins[only].grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_gradients(dtype, device):
    layer = Layer("fp8/bf16", 5, 72, 40, dtype=dtype)
    x, ids, weights = inputs(6, 72, 3, 5, dtype)
    x, weights, bias = leaves(x, weights.bfloat16(), layer.up_bias.float(), device=device)
    out = OPS.experts(x, ids.to(device), weights, *layer.tensors(device, up_bias=bias), **layer.options())
    out.backward(upstream(out))
    assert [t.dtype for t in (out, x.grad, weights.grad, bias.grad)] == [dtype, dtype, torch.bfloat16, torch.float32]


PRODUCTS = {
    "plain": {},
    "gather": {"read": True},
    "scatter": {"write": True, "weigh": True},
    "gated": {"read": True, "write": True, "weigh": True, "activation": "silu", "shards": 2},
    "interleaved": {"activation": "gelu", "shards": 2, "interleaved": True},
    "not_gated": {"write": True, "activation": "relu2", "gated": False},
}


def product(x, w, bias, row_weights, ids, kind, fmt):
    """The grouped product in slot order, by loops, differentiable: (R, N)."""
    owned = [i for i, e in enumerate(ids.tolist()) if 0 <= e < w.shape[0]]
    source = [i // 2 if kind.get("read") else i for i in owned]
    used = sorted(set(source))
    values = oracle.quantized(x[used], fmt.activation)
    y = oracle.per_expert(values[[used.index(s) for s in source]], [int(ids[i]) for i in owned], w, bias)
    if kind.get("activation"):
        y = oracle.activation(kind["activation"], y, kind.get("gated", True))
    if kind.get("weigh"):
        y = y * row_weights[owned][:, None].to(y.dtype)
    out = y.new_zeros(len(ids), y.shape[1])
    return out.index_put((torch.tensor(owned),), y)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm(name, kind, device):
    kind, fmt, dtype = PRODUCTS[kind], FORMATS[name], working(name, device)
    g = torch.Generator().manual_seed(0)
    shards, rows, n, (k,) = kind.get("shards", 1), 14, 80, fit(name, 96)
    floats = (torch.randn(4, n, k, generator=g) / 10).to(dtype)
    q = quantize_weight(fmt.weight, floats, shards)
    ids = torch.randint(-1, 5, (rows,), generator=g)
    order, offsets = OPS.sort_by_expert(ids[:, None], 4)
    x = torch.randn(rows // 2 if kind.get("read") else rows, k, generator=g).to(dtype)
    tensors = [x, torch.randn(rows, generator=g), torch.randn(4, n, generator=g).to(dtype)]  # bias: gate first
    ins = leaves(*tensors, device=device)
    codes, scale, bias = q.qdata, q.scale, ins[2]
    if kind.get("interleaved"):
        codes, bias = oracle.interleave(codes), oracle.interleave(bias)
        scale = oracle.interleave(scale) if scale is not None and fmt.weight.block[0] == 1 else scale
    to = lambda t, use=True: t.to(device) if use and t is not None else None  # noqa: E731
    out = OPS.grouped_mm(
        ins[0] if kind.get("read") else ins[0][order.to(device).long()], to(codes), to(offsets), to(scale),
        to(q.global_scale), bias=bias,
        rows_in=to(order, kind.get("read")), rows_out=to(order, kind.get("write")), top_k=2 if kind.get("read") else 1,
        row_weights=ins[1] if kind.get("weigh") else None, format=name, shards=shards,
        **{o: kind[o] for o in ("activation", "gated", "interleaved") if o in kind})  # fmt: skip
    out = out if kind.get("write") else torch.empty_like(out).index_copy(0, order.to(device).long(), out)
    out.backward(upstream(out))
    wanted = []
    for work in (torch.float64, dtype):
        want = leaves(*(t.double() if work == torch.float64 else t for t in tensors))
        w = oracle.weights_of(floats, fmt.weight, shards).to(work)
        y = product(want[0].to(work), w, want[2].to(work), want[1], ids, kind, fmt)
        assert y.shape == out.shape
        y.backward(upstream(out).cpu().to(work))
        wanted.append([t.grad for t in want if t.grad is not None])
    compare([t.grad for t in ins if t.grad is not None], *wanted)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.activation is not None])
def test_grouped_mm_of_codes(name, device):
    """Bias and weights of rows have the gradients that they would have if x had come as floats."""
    fmt, (k,), g = FORMATS[name], fit(name, 96), torch.Generator().manual_seed(0)
    q = quantize_weight(fmt.weight, torch.randn(4, 80, k, generator=g) / 10, 2)
    order, offsets = (t.to(device) for t in OPS.sort_by_expert(torch.randint(0, 4, (14, 1), generator=g), 4))
    x = torch.randn(14, k, generator=g).to(device)
    weight = [t if t is None else t.to(device) for t in (q.qdata, q.scale, q.global_scale)]
    codes, scale, whole = OPS.quantize(x, None, fmt.activation.name)
    results = []
    for rows, scales in ((x, {}), (codes, {"x_scale": scale, "x_global_scale": whole if whole.numel() else None})):
        bias, row_weights = leaves(torch.ones(4, 80), torch.linspace(-1, 1, 14), device=device)
        out = OPS.grouped_mm(
            rows, weight[0], offsets, *weight[1:], bias=bias, rows_out=order, row_weights=row_weights, format=name,
            activation="silu", shards=2, out_dtype=torch.float32, **scales)  # fmt: skip
        out.backward(upstream(out))
        results.append((out, bias.grad, row_weights.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_grouped_mm_transposed_has_no_gradient():
    x = torch.randn(3, 8, requires_grad=True)
    weight, offsets = torch.randn(1, 8, 16), torch.tensor([0, 3], dtype=torch.int32)
    out = OPS.grouped_mm(x, weight, offsets, format="bf16", transpose=True)
    with pytest.raises(NotImplementedError, match="itself a gradient"):
        out.sum().backward()


@pytest.mark.parametrize("name", FORMATS)
def test_linear(name, device):
    fmt, dtype, g = FORMATS[name], working(name, device), torch.Generator().manual_seed(0)
    (k,) = fit(name, 72)
    floats = torch.randn(40, k, generator=g).to(dtype) / 8
    q = fmt.weight.quantize(floats)
    tensors = torch.randn(3, 4, k, generator=g).to(dtype), torch.randn(40, generator=g).to(dtype)
    x, bias = leaves(*tensors, device=device)
    weight = [t if t is None else t.to(device) for t in (q.qdata, q.scale, q.global_scale)]
    out = OPS.linear(x, *weight, bias=bias, format=name)
    out.backward(upstream(out))
    wanted = []
    for work in (torch.float64, dtype):
        a, b = leaves(*(t.to(work) for t in tensors))
        w = oracle.weights_of(floats[None], fmt.weight)[0].to(work)
        y = oracle.quantized(a.to(work).flatten(0, 1), fmt.activation) @ w.T + b.to(work)
        y.view(out.shape).backward(upstream(out).cpu().to(work))
        wanted.append([a.grad, b.grad])
    compare([x.grad, bias.grad], *wanted)


def test_routing_ops(device):
    ids = inputs(5, 1, 3, 4)[1]
    order = OPS.sort_by_expert(ids, 4)[0]
    for op, plain, shape in (
        (lambda x, o: OPS.permute(x, o, 3), lambda x: x[order.long() // 3], (5, 24)),
        (OPS.unpermute, lambda x: x[torch.argsort(order)], (15, 24)),
        (lambda x, o: OPS.combine(x, 3), lambda x: x.view(5, 3, 24).sum(1), (15, 24)),
    ):
        (got,) = leaves(torch.randn(shape, generator=torch.Generator().manual_seed(0)), device=device)
        (want,) = leaves(got)
        out, expected = op(got, order.to(device)), plain(want)
        out.backward(upstream(out))
        expected.backward(upstream(expected))
        torch.testing.assert_close(got.grad.cpu(), want.grad.cpu())


def test_the_output_of_a_linear_may_be_changed_in_place():
    q, (x,) = FORMATS["fp8"].weight.quantize(torch.randn(8, 16)), leaves(torch.randn(2, 3, 16))
    y = OPS.linear(x, q.qdata, q.scale, format="fp8")
    y += 1
    y.sum().backward()
    want = FORMATS["fp8"].weight.dequantize(q).sum(0)
    assert torch.allclose(x.grad, want.expand_as(x), atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_second_gradient_is_refused():
    layer = Layer("fp8", 3, 16, 8, activation="relu2", gated=False)
    x, ids, weights = inputs(4, 16, 2, 3)
    (x,) = leaves(x)
    out = OPS.experts(x, ids, weights, *layer.tensors(), **layer.options())
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="experts_backward is itself a gradient"):
        grad.sum().backward()
    offsets, up = OPS.sort_by_expert(ids, 3)[1], layer.up
    rows = x.repeat(2, 1)
    out = OPS.grouped_mm(rows, up.qdata, offsets, up.scale, format="fp8")
    (grad,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="grouped_mm_backward is itself a gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_under_autocast_and_checkpointing(name):
    """A training step's usual wrappers: activation checkpointing recomputes the op, autocast leaves it alone."""
    from torch.utils.checkpoint import checkpoint

    layer = Layer(name, 5, *fit(name, 72, 40))
    x, ids, weights = inputs(4, layer.hidden, 2, 5)
    results = []
    for wrapped in (False, True):
        a, w = leaves(x, weights)
        call = lambda a, w: OPS.experts(a, ids, w, *layer.tensors(), **layer.options())  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16, enabled=wrapped):
            out = checkpoint(call, a, w, use_reentrant=False) if wrapped else call(a, w)
        out.backward(upstream(out))
        results.append((out, a.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))

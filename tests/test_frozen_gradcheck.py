"""Gradients of ops against differences of their results: no oracle, and none of the package's own derivatives.

Differences see what is smooth: with quantized activations that is all after the last codes, router weights and the
second bias. What passes straight through codes is compared with float64's autograd in test_autograd.py.
"""

import pytest
import torch
from oracle import Layer, fit, inputs
from test_autograd import leaves, upstream

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, quantize_weight

OPS = torch.ops.moe_ops
STEP = 2.0**-7


def check_slopes(run, tensors, smooth, device, limit=2e-3):
    """run(*tensors) in fp32: its gradient along a random direction of each of `smooth`, as its results have it."""
    ins = leaves(*tensors, device=device)
    out = run(*ins)
    pull = upstream(out)
    out.backward(pull)
    g = torch.Generator().manual_seed(3)
    for i in smooth:
        assert ins[i].grad.dtype == ins[i].dtype == torch.float32
        way = torch.randn(ins[i].shape, generator=g).to(device)
        ends = []
        for step in (STEP, -STEP):
            moved = [t.detach() + step * way if i == j else t.detach() for j, t in enumerate(ins)]
            ends.append((run(*moved).double() * pull.double()).sum())
        slope, parts = (ends[0] - ends[1]) / (2 * STEP), ins[i].grad.double() * way.double()
        # Of many terms that cancel, the sum is as good as they are; and a difference has an error of its own.
        assert abs(parts.sum() - slope) <= limit * (parts.norm() + abs(slope)), (i, parts.sum(), slope)


def continuous(name):
    return FORMATS[name].activation is None


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, on_input, device):
    layer = Layer(name, 5, *fit(name, 72, 40))
    x, ids, weights = inputs(12, layer.hidden, 3, 5)

    def run(x, weights, up_bias, down_bias):
        tensors = layer.tensors(device, up_bias=up_bias, down_bias=down_bias)
        return OPS.experts(x, ids.to(device), weights, *tensors, **layer.options(), router_weight_on_input=on_input)

    smooth = range(4) if continuous(name) else (3,) if on_input else (1, 3)
    # What a GPU computes again for backward may turn a code over that the forward had the other way.
    limit = 2e-3 if continuous(name) or device == "cpu" else 1e-2
    check_slopes(run, (x, weights, layer.up_bias, layer.down_bias), smooth, device, limit)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm(name, activation, device):
    fmt, (k,), g = FORMATS[name], fit(name, 96), torch.Generator().manual_seed(0)
    q = quantize_weight(fmt.weight, torch.randn(4, 80, k, generator=g) / 10, 2)
    codes, scale, whole = (t if t is None else t.to(device) for t in (q.qdata, q.scale, q.global_scale))
    order, offsets = (t.to(device) for t in OPS.sort_by_expert(torch.randint(-1, 5, (14, 1), generator=g), 4))

    def run(x, bias, row_weights):
        return OPS.grouped_mm(x, codes, offsets, scale, whole, bias=bias, rows_in=order, rows_out=order, format=name,
                              row_weights=row_weights, activation=activation, shards=2)  # fmt: skip

    tensors = torch.randn(14, k, generator=g), torch.randn(4, 80, generator=g), torch.randn(14, generator=g)
    check_slopes(run, tensors, range(3) if continuous(name) else (1, 2), device)


@pytest.mark.parametrize("name", FORMATS)
def test_linear(name, device):
    fmt, (k,), g = FORMATS[name], fit(name, 72), torch.Generator().manual_seed(0)
    q = fmt.weight.quantize(torch.randn(40, k, generator=g) / 8)
    weight = [t if t is None else t.to(device) for t in (q.qdata, q.scale, q.global_scale)]
    run = lambda x, bias: OPS.linear(x, *weight, bias=bias, format=name)  # noqa: E731
    tensors = torch.randn(3, 4, k, generator=g), torch.randn(40, generator=g)
    check_slopes(run, tensors, range(2) if continuous(name) else (1,), device)

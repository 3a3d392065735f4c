"""Gradients of weights: masters of every format straight through, float weights, gradients multiplied in codes.

R sorted rows, E experts, N channels, K columns.
"""

import oracle
import pytest
import torch
from oracle import Layer, assert_as_good, fit, inputs
from test_autograd import LAYERS, case, leaves, upstream, working

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, quantize_weight
from moe_ops.ops.training import multiplies_gradients

OPS = torch.ops.moe_ops
IN_CODES = [name for name in FORMATS if multiplies_gradients(FORMATS[name])]


class Leaves(Layer):
    """Its dequantized weights are leaves: what flows into them is the straight-through gradient of the masters."""

    def weights(self, work=torch.float64):
        if not hasattr(self, "made"):
            self.made = leaves(*(w.to(work) for w in self._values))
        return self.made


def masters(layer, device):
    """As the op takes them: in the order of the stored rows."""
    up, down = (w for w, _ in layer.floats)
    return leaves(oracle.interleave(up) if layer.interleaved else up, down, device=device)


def arguments(layer, device):
    """Of the op after topk_weights, with what is trained: (arguments, [up, down])."""
    args, trained = layer.tensors(device), masters(layer, device)
    if layer.fmt.quantized:
        return [*args, *trained], trained
    return [*trained, *args[2:]], trained


@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in ("gelu", "silu_plain_on_input")])
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, kind, device):
    layer, (x, ids, weights), on_input = case(name, kind, device, Leaves)
    dtype = layer.dtype
    args, trained = arguments(layer, device)
    out = OPS.experts(x.to(device), ids.to(device), weights.to(device), *args, **layer.options(),
                      router_weight_on_input=on_input)  # fmt: skip
    out.backward(upstream(out))

    def wanted(work, nudge=0.0):
        layer.made = leaves(*(w.to(work) for w in layer._values))
        more = {"on_input": on_input, "stored": dtype, "nudge": nudge}
        y = oracle.experts(layer, x.to(work), ids, weights.to(work), work, **more)
        y.backward(upstream(out).cpu().to(work))
        up, down = (w.grad for w in layer.made)
        return oracle.interleave(up) if layer.interleaved else up, down

    for i, (got, truth, plain) in enumerate(zip(trained, wanted(torch.float64), wanted(dtype), strict=True)):
        nudged = lambda nudge, i=i: wanted(torch.float64, nudge)[i]  # noqa: E731
        assert got.grad.dtype == dtype
        assert_as_good(got.grad, truth, plain, ("up", "down")[i], nudged=nudged)


@pytest.mark.parametrize("name", FORMATS)
def test_products(name, device):
    """grouped_mm with gathered rows, and linear."""
    (k,), dtype = fit(name, 40), working(name, device)
    layer = Leaves(name, 3, *fit(name, 24, 40), gated=False, dtype=dtype)
    x, ids, _ = inputs(9, k, 2, 3, dtype)
    order, offsets = OPS.sort_by_expert(ids.to(device), 3)
    q, (w, _) = layer.down, layer.floats[1]
    (w,) = leaves(w, device=device)
    stored = [None if t is None else t.to(device) for t in (q.qdata, q.scale, q.global_scale)]
    codes, given = (stored[0], {"weight_master": w}) if layer.fmt.quantized else (w, {})
    out = OPS.grouped_mm(x.to(device), codes, offsets, *stored[1:], rows_in=order, top_k=2, format=name, **given)
    g = upstream(out).cpu().double()
    out.backward(upstream(out))
    values, want = oracle.quantized(x.double(), layer.fmt.activation), torch.zeros(w.shape, dtype=torch.float64)
    if layer.fmt.activation is not None and layer.fmt.activation.block == (0, 0):
        used = sorted({int(i) // 2 for i in order[: offsets[-1]]})
        values[used] = oracle.quantized(x.double()[used], layer.fmt.activation)
    for e in range(3):
        mine = slice(int(offsets[e]), int(offsets[e + 1]))
        want[e] = g[mine].T @ values[order[mine].cpu().long() // 2]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (w.grad.cpu().double() - want).norm() <= tolerance * want.norm()

    one = FORMATS[name].weight.quantize(layer.floats[1][0][0])
    (w,) = leaves(layer.floats[1][0][0], device=device)
    parts = [None if t is None else t.to(device) for t in (one.qdata, one.scale, one.global_scale)]
    codes, given = (parts[0], {"weight_master": w}) if layer.fmt.quantized else (w, {})
    rows = x[:8].view(2, 4, k)
    out = OPS.linear(rows.to(device), codes, *parts[1:], format=name, **given)
    out.backward(upstream(out))
    values = oracle.quantized(x[:8].double(), layer.fmt.activation)
    want = upstream(out).cpu().double().flatten(0, 1).T @ values
    assert (w.grad.cpu().double() - want).norm() <= tolerance * want.norm()


def along_rows(x, codec):
    """x (R, C) of one expert as it is when its columns are quantized, in the codec's groups or each with a scale."""
    unit = codec.block[1] or max(len(x), 1)
    if codec.block == (0, 0):  # a scale for every column all the same
        codec = FORMATS["fp8"].activation
    return torch.cat([oracle.quantized(part.T.contiguous(), codec).T for part in x.split(unit)]) if len(x) else x


@pytest.mark.parametrize("name", IN_CODES)
@pytest.mark.parametrize("gathered", [False, True])
def test_wgrad_in_codes(name, gathered, device):
    """Rows of three experts, of 0, less than 1 and 2 and a half blocks, and rows that nobody owns, which hold NaN."""
    codec, g = FORMATS[name].activation, torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 0, 97, 400], dtype=torch.int32)
    grad, x = torch.randn(420, 40, generator=g) * 1e-3, torch.randn(210 if gathered else 420, 72, generator=g)
    read = torch.randperm(420, generator=g).int() if gathered else None
    rows = x if read is None else x[read.long() // 2]
    rows, grad[400:] = rows.clone(), torch.nan
    want = torch.stack([along_rows(grad[a:b].double(), codec).T @ along_rows(rows[a:b].double(), codec)
                        for a, b in ((0, 0), (0, 97), (97, 400))])  # fmt: skip
    dtype = torch.float32
    read = None if read is None else read.to(device)
    got = OPS.grouped_wgrad(grad.to(device, dtype), x.to(device, dtype), offsets.to(device), None, read,
                            top_k=2 if gathered else 1, codec=codec.name)  # fmt: skip
    assert (got.cpu().double() - want).norm() <= (1e-5 if device == "cpu" else 2e-3) * want.norm()
    assert not got[0].any()


@pytest.mark.parametrize("name", [name for name in IN_CODES if FORMATS[name].activation.block != (0, 0)])
def test_gradients_in_codes(name, device):
    """Every product of the backward on codes of both operands along its contraction, by an emulation in float64."""
    dtype = working(name, device)
    layer = Leaves(name, 3, 72, 40, bias=False, dtype=dtype)
    x, ids, weights = inputs(12, 72, 2, 3, dtype, dropped=False)
    args, trained = arguments(layer, device)
    (xd,) = leaves(x, device=device)
    out = OPS.experts(xd, ids.to(device), weights.to(device), *args, **layer.options(), grad_format=name)
    g = upstream(out)
    out.backward(g)
    act, g = FORMATS[name].activation, g.cpu().double()
    turned = [oracle.weights_of(w.mT, FORMATS[name].weight).mT for w, _ in layer.floats]  # W^T along its rows
    order, offsets = OPS.sort_by_expert(ids, 3, "reference")
    token, w = order.long() // 2, weights.flatten()[order.long()].double()[:, None]
    gq = oracle.quantized(g, act)[token]
    wide = oracle.quantized(x.double(), act)[token]
    dx = torch.zeros_like(g)
    want_up, want_down = (torch.zeros(t.shape, dtype=torch.float64) for t in trained)
    for e in range(3):
        mine = slice(int(offsets[e]), int(offsets[e + 1]))
        up = layer._values[0][e].double()
        pre = (wide[mine] @ up.T).requires_grad_()
        h = oracle.activation("silu", pre, True)
        dh = gq[mine] @ turned[1][e]
        (dpre,) = torch.autograd.grad(h, pre, dh * w[mine])
        hq = oracle.quantized(h.detach(), act) * w[mine]
        want_down[e] = along_rows(g[token[mine]], act).T @ along_rows(hq, act)
        want_up[e] = along_rows(dpre, act).T @ along_rows(wide[mine], act)
        dx.index_add_(0, token[mine], oracle.quantized(dpre, act) @ turned[0][e])
    for got, want in ((trained[0].grad, want_up), (trained[1].grad, want_down), (xd.grad, dx)):
        # Codes near a tie turn over where fp32 and float64 differ, half a unit of three bits each. bf16 rounds what is
        # encoded by 2^-9 first: that turns one of 16 codes over, at three places one after the other.
        assert (got.cpu().double() - want).norm() <= (3e-3 if dtype == torch.float32 else 5e-2) * want.norm()


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].quantized])
def test_quantize_weight(name, device):
    codec, g = FORMATS[name].weight, torch.Generator().manual_seed(0)
    w = torch.randn(3, 32, fit(name, 136)[0], generator=g)
    turned = torch.randn(3, fit(name, 200)[0], 80, generator=g).mT  # as it lies, or copied: the same codes
    for w, shards in ((w, 2), (turned, 1)):
        q, there = quantize_weight(codec, w, shards), w.mT.contiguous().to(device).mT if w is turned else w.to(device)
        got = OPS.quantize_weight(there, codec.name, shards)
        for a, b in zip(got, (q.qdata, q.scale, q.global_scale), strict=True):
            if b is not None:
                assert a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_refusals():
    layer = Layer("fp8", 3, 16, 8)
    x, ids, weights = inputs(4, 16, 2, 3)
    args, options = layer.tensors(), layer.options()
    up, down = (w for w, _ in layer.floats)
    with pytest.raises(ValueError, match=r"a master is the float weight \(3, 16, 16\), got torch.float32 \(3, 16, 8\)"):
        OPS.experts(x, ids, weights, *args, up[..., :8], down, **options)
    with pytest.raises(ValueError, match="gradients are not multiplied in 'int8'; allowed: fp8, "):
        OPS.experts(x, ids, weights, *args, up, down, **options, grad_format="int8")
    with pytest.raises(ValueError, match="grad_format needs masters"):
        OPS.experts(x, ids, weights, *args, **options, grad_format="fp8")
    args[0] = args[0].requires_grad_()
    with pytest.raises(ValueError, match="codes of format 'fp8' have no gradient"):
        OPS.experts(x, ids, weights, *args, **options)
    with torch.no_grad():
        OPS.experts(x, ids, weights, *args, **options)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="8-bit floats, not in 'int8_row'"):
        OPS.grouped_wgrad(x, x, offsets, codec="int8_row")
    with pytest.raises(ValueError, match=r"as many, got \(4, 16\) and \(3, 16\)"):
        OPS.grouped_wgrad(x, x[:3], offsets)
    with pytest.raises(ValueError, match=r"of one float type, got torch.float32 and torch.bfloat16"):
        OPS.grouped_wgrad(x, x.bfloat16(), offsets)

"""Every op against an independent float64 definition (oracle.py), over all formats, gates, biases and scales.

The bound is what plain torch reaches in the same dtype, times two.
"""

import json
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Layer, assert_as_good, inputs

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, dequantize_weight, quantize_weight

OPS = torch.ops.moe_ops
VECTORS = json.loads((Path(__file__).parent / "data" / "format_vectors.json").read_text())
QUANTIZED_ACTIVATIONS = [name for name in FORMATS if FORMATS[name].activation is not None]
LAYERS = {
    "silu": {"bias": False},
    "silu_interleaved": {"interleaved": True},
    "swiglu_oai": {"activation": "swiglu_oai", "interleaved": True},
    "swiglu_oai_limit": {"activation": "swiglu_oai", "numbers": {"limit": 1.0}},
    "clamped_silu": {"numbers": {"limit": 0.5}},
    "alpha_beta": {"numbers": {"alpha": 1.3, "beta": 0.25}, "bias": False},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh", "bias": False},
    "relu2_plain": {"activation": "relu2", "gated": False},
    "silu_plain": {"activation": "silu", "gated": False, "bias": False},
    "gelu_plain_clamped": {"activation": "gelu", "gated": False, "numbers": {"limit": 1.0}},
}
SIZES = [(72, 40), (160, 136)]  # (H, I): odd ones, and both above a tile of 128


def working(name, dtype, device):
    """The tensor cores add fp8 products in fewer bits than fp32: there a half is the working dtype."""
    return torch.bfloat16 if device == "cuda" and FORMATS[name].activation else dtype


def layer_for(name, hidden, intermediate, num_experts=5, **options):
    fmt = FORMATS[name]
    reason = fmt.check(2 * intermediate, hidden) or fmt.check(hidden, intermediate)
    if reason:
        pytest.skip(reason)
    return Layer(name, num_experts, hidden, intermediate, **options)


def run(layer, x, ids, weights, device, **options):
    moved = (t.to(device) for t in (x, ids, weights))
    return OPS.experts(*moved, *layer.tensors(device), **layer.options(), **options)


def check_experts(layer, x, ids, weights, device, on_input=False, **options):
    got = run(layer, x, ids, weights, device, router_weight_on_input=on_input, **options)
    truth = oracle.experts(layer, x, ids, weights, on_input=on_input)
    plain = oracle.experts(layer, x, ids, weights, x.dtype, on_input=on_input)
    assert got.dtype == x.dtype
    assert_as_good(got, truth, plain)
    return got


@pytest.mark.parametrize("on_input", [False, True], ids=["", "on_input"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, kind, on_input, device):
    number = list(LAYERS).index(kind) + on_input
    hidden, intermediate = SIZES[number % 2]
    dtype = working(name, [torch.float32, torch.bfloat16, torch.float16][number % 3], device)
    layer = layer_for(name, hidden, intermediate, dtype=dtype, **LAYERS[kind])
    check_experts(layer, *inputs(16, hidden, 3, 5, dtype), device, on_input)


@pytest.mark.parametrize("on_input", [False, True], ids=["", "on_input"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_experts_with_static_scales(name, gated, on_input, device):
    activation = "silu" if gated else "relu2"
    dtype = working(name, torch.float32, device)
    layer = layer_for(name, 72, 40, gated=gated, activation=activation, static=True, dtype=dtype)
    x, ids, weights = inputs(7, 72, 3, 5, dtype)
    static = check_experts(layer, x, ids, weights, device, on_input)
    layer.input_scales = (None, None)
    assert not torch.equal(static, run(layer, x, ids, weights, device, router_weight_on_input=on_input))


@pytest.mark.parametrize("name", FORMATS)
def test_backends_agree(name, device):
    layer = layer_for(name, 72, 40, dtype=torch.bfloat16)
    x, ids, weights = inputs(60, 72, 3, 5, torch.bfloat16)
    truth, plain = (oracle.experts(layer, x, ids, weights, work) for work in (torch.float64, torch.bfloat16))
    for backend in ("auto", "reference"):
        assert_as_good(run(layer, x, ids, weights, device, backend=backend), truth, plain, backend)


# ---- grouped_mm

PRODUCTS = {
    "plain": {},
    "gather": {"read": True},
    "scatter": {"write": True, "weigh": True, "bias": True},
    "gated": {"read": True, "activation": "silu", "bias": True, "shards": 2},
    "gated_weighted": {"read": True, "write": True, "weigh": True, "activation": "gelu", "shards": 2},
    "not_gated": {"write": True, "activation": "relu2", "gated": False, "bias": True},
    "two_shards": {"shards": 2, "bias": True},
}


def product_truth(x, w, ids, kind, tensors, codec, top_k, work):
    """Rows in slot order (R, N): the same product by loops. x is quantized only if `codec` is given."""
    owned = [0 <= int(e) < w.shape[0] for e in ids]
    used = [i // top_k if kind.get("read") else i for i, own in enumerate(owned) if own]
    values = dict(zip(used, oracle.quantized(x[used].to(work), codec)))
    if codec is not None and codec.block == (0, 0):  # a row read twice counts once: the maximum is the same
        assert len(used) == len(owned) - owned.count(False)
    rows = []
    for slot, e in enumerate(int(i) for i in ids):
        bias = tensors.get("bias")
        n = w.shape[1] // 2 if kind.get("activation") and kind.get("gated", True) else w.shape[1]
        if not owned[slot]:
            rows.append(torch.zeros(n, dtype=work))
            continue
        y = w[e].to(work) @ values[slot // top_k if kind.get("read") else slot]
        y = y if bias is None else y + bias[e].to(work)
        if kind.get("activation"):
            y = oracle.activation(kind["activation"], y, kind.get("gated", True))
        rows.append(y * tensors["row_weights"][slot].to(work) if kind.get("weigh") else y)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm(name, kind, device):
    kind, fmt = PRODUCTS[kind], FORMATS[name]
    dtype = working(name, torch.float32, device)
    experts, n, k, tokens, top_k, shards = 4, 80, 96, 6, 2, kind.get("shards", 1)
    g = torch.Generator().manual_seed(0)
    q = quantize_weight(fmt.weight, (torch.randn(experts, n, k, generator=g) / 10).to(dtype), shards)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=g)
    order, offsets = OPS.sort_by_expert(ids, experts)
    rows = tokens * top_k
    x = torch.randn(tokens if kind.get("read") else rows, k, generator=g).to(dtype)  # slot order unless gathered
    tensors = {"bias": torch.randn(experts, n, generator=g).to(dtype)} if kind.get("bias") else {}
    if kind.get("weigh"):
        tensors["row_weights"] = torch.randn(rows, generator=g)
    index = {"rows_in": order if kind.get("read") else None, "rows_out": order if kind.get("write") else None}
    given = x if kind.get("read") else x[order.long()]
    got = OPS.grouped_mm(
        given.to(device), q.qdata.to(device), offsets.to(device), None if q.scale is None else q.scale.to(device),
        **{k: v.to(device) for k, v in (tensors | index).items() if v is not None}, format=name, shards=shards,
        top_k=top_k if kind.get("read") else 1, gated=kind.get("gated", True),
        activation=kind.get("activation", "none"),
    ).cpu()  # fmt: skip
    if not kind.get("write"):
        got = torch.empty_like(got).index_copy_(0, order.long(), got)
    w = dequantize_weight(q, shards)
    args = (x, w, ids.flatten(), kind, tensors, fmt.activation, top_k)
    truth = product_truth(*args, torch.float64)
    assert_as_good(got, truth, product_truth(*args, dtype))
    dropped = (ids.flatten() < 0) | (ids.flatten() >= experts)
    assert dropped.any() and (got[dropped] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm_transposed(name, device):
    """The product of a gradient: x . W[e], weights dequantized, x never quantized."""
    g = torch.Generator().manual_seed(0)
    q = quantize_weight(FORMATS[name].weight, torch.randn(3, 80, 96, generator=g) / 9, 2)
    x, offsets = torch.randn(9, 80, generator=g), torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    args = [t if t is None else t.to(device) for t in (x, q.qdata, offsets, q.scale)]
    got = OPS.grouped_mm(*args, format=name, shards=2, transpose=True)
    w = dequantize_weight(q, 2)
    truth, plain = (torch.cat([x[:4].to(d) @ w[0].to(d), x[4:8].to(d) @ w[2].to(d), torch.zeros(1, 96, dtype=d)])
                    for d in (torch.float64, torch.float32))  # fmt: skip
    assert_as_good(got, truth, plain)


@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_codes_may_be_given(name, device):
    codec = FORMATS[name].activation
    g = torch.Generator().manual_seed(0)
    q = quantize_weight(FORMATS[name].weight, torch.randn(2, 48, 160, generator=g) / 12)
    x, offsets = torch.randn(8, 160, generator=g).bfloat16(), torch.tensor([0, 5, 8], dtype=torch.int32)
    x, codes, scale, offsets = (t.to(device) for t in (x, q.qdata, q.scale, offsets))
    x_codes, x_scale = OPS.quantize(x, None, codec.name)
    given = OPS.grouped_mm(x_codes, codes, offsets, scale, x_scale=x_scale, format=name)
    assert given.dtype == torch.bfloat16
    assert torch.equal(given, OPS.grouped_mm(x, codes, offsets, scale, format=name))


def test_order_of_operations(device):
    """formats.md 4.3: scales, then bias, then the router's weight, then one cast."""
    v = VECTORS["epilogue"]
    codes = torch.zeros(3, 16)
    for row, parts in enumerate(([448, 448, 104], [-256, -1], [3])):
        codes[row, : len(parts)] = torch.tensor(parts, dtype=torch.float32)
    assert codes.sum(1).tolist() == v["acc"]
    options = {"format": "fp8", "out_dtype": torch.bfloat16}
    for x_scale, w_scale in ((1.0, v["dequant_scale"]), (v["dequant_scale"], 1.0)):
        got = OPS.grouped_mm(
            torch.ones(1, 16).to(torch.float8_e4m3fn).to(device), codes.to(torch.float8_e4m3fn)[None].to(device),
            torch.tensor([0, 1], dtype=torch.int32, device=device), torch.full((1, 3, 1), w_scale, device=device),
            bias=torch.tensor([v["bias"]], device=device), x_scale=torch.full((1, 1), x_scale, device=device),
            row_weights=torch.tensor([v["router_weight"]], device=device), **options)  # fmt: skip
        assert got[0].tolist() == v["expected"]


@pytest.mark.parametrize("kind", [k for k in VECTORS["activation"] if k not in ("limit", "gate", "up", "swiglu_step")])
def test_activation_vectors(kind, device):
    v = VECTORS["activation"]
    pre = torch.tensor([v["gate"] + v["up"]])  # through a product with the unit matrix
    plain = kind.endswith("_of_gate")
    name, limit = kind.removesuffix("_of_gate").removesuffix("_clamped"), v["limit"] if "clamped" in kind else None
    pre = pre[:, :7] if plain else pre
    unit = torch.eye(pre.shape[1])[None]
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)
    options = {"format": "bf16", "activation": name, "gated": not plain, "limit": limit}
    got = OPS.grouped_mm(pre.to(device), unit.to(device), offsets, **options)
    torch.testing.assert_close(got[0].cpu(), torch.tensor(v[kind]))


# ---- linear, quantize, routing


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_linear(name, static, bias, device):
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    if static and fmt.activation is None:
        pytest.skip("no quantized activations")
    dtype = working(name, torch.float32, device)
    w, x = torch.randn(40, 72, generator=g).to(dtype) / 8, torch.randn(2, 3, 72, generator=g).to(dtype)
    b = torch.randn(40, generator=g).to(dtype) if bias else None
    q = fmt.weight.quantize(w)
    scale = torch.tensor(0.01) if static else None
    args = [t if t is None else t.to(device) for t in (x, q.qdata, q.scale, None, None, b, scale)]
    got = OPS.linear(*args, format=name)
    rows, spread = x.reshape(6, 72), None if scale is None else scale.expand(6, 1)
    wf = fmt.weight.dequantize(q)
    truth, plain = ((oracle.quantized(rows.to(d), fmt.activation, spread) @ wf.to(d).T + (0 if b is None else b.to(d))
                     ).view(2, 3, 40) for d in (torch.float64, dtype))  # fmt: skip
    assert_as_good(got, truth, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_quantize_is_the_codec(name, dtype, device):
    codec = FORMATS[name].activation
    x = (torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0, 1] = 0
    want = codec.quantize(x.view(10, 300))
    codes, scale = OPS.quantize(x.to(device), None, codec.name)
    assert torch.equal(codes.cpu().view(torch.uint8), want.qdata.view(x.shape).view(torch.uint8))
    assert torch.equal(scale.cpu(), want.scale.view(2, 5, -1) if want.scale.ndim else want.scale)


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_quantize_static(name, shape, device):
    x = torch.randn(2, 3, 72, generator=torch.Generator().manual_seed(0))
    x = x.view(6, 72) if shape == (6, 1) else x
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 100 + 0.001
    codes, returned = OPS.quantize(x.to(device), scale.to(device), FORMATS[name].activation.name)
    want = oracle.encode_e4m3(x / scale)
    assert torch.equal(codes.cpu().view(torch.uint8), want.view(x.shape)) and torch.equal(returned.cpu(), scale)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens,top_k,num_experts", [(1, 1, 1), (7, 3, 5), (40, 4, 3), (3, 2, 200)])
def test_sort_by_expert(tokens, top_k, num_experts, dtype, device):
    ids = inputs(tokens, 1, top_k, num_experts)[1].to(dtype)
    order, offsets = OPS.sort_by_expert(ids.to(device), num_experts)
    flat = [e if 0 <= e < num_experts else num_experts for e in ids.flatten().tolist()]
    assert order.dtype == offsets.dtype == torch.int32
    assert order.tolist() == sorted(range(len(flat)), key=flat.__getitem__)
    assert offsets.tolist() == [sum(e < bound for e in flat) for bound in range(num_experts + 1)]


def test_permute_unpermute(device):
    x, ids, _ = inputs(6, 24, 3, 4)
    order, _ = OPS.sort_by_expert(ids.to(device), 4)
    rows = OPS.permute(x.to(device), order, 3)
    assert torch.equal(rows.cpu(), x[order.cpu().long() // 3])
    assert torch.equal(OPS.unpermute(rows, order).cpu(), x.repeat_interleave(3, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 2, 8, 11])
def test_combine_adds_in_order(top_k, dtype, device):
    rows = torch.randn(5 * top_k, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.zeros(5, 70)
    for a in range(top_k):
        want += rows.view(5, top_k, 70)[:, a].float()
    assert torch.equal(OPS.combine(rows.to(device), top_k).cpu(), want.to(dtype))

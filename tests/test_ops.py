"""Every op against an independent float64 definition (oracle.py), over all formats, gates, biases and scales.

The bound is what plain torch reaches in the same dtype, times two.
"""

import json
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Layer, assert_as_good, fit, inputs, takes_static

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, quantize_weight

OPS = torch.ops.moe_ops
VECTORS = json.loads((Path(__file__).parent / "data" / "format_vectors.json").read_text())
QUANTIZED_ACTIVATIONS = [name for name in FORMATS if FORMATS[name].activation is not None]
STATIC = [name for name in FORMATS if takes_static(FORMATS[name].activation)]
CODECS = {f.activation.name: f.activation for f in FORMATS.values() if f.activation is not None}
STATIC_CODECS = [name for name, codec in CODECS.items() if takes_static(codec)]
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
SIZES = [(72, 40), (160, 136)]  # (H, I): odd ones, and both above a tile of 128; more where groups must be full


def working(name, dtype, device):
    """The tensor cores add fp8 products in fewer bits than fp32: there a half is the working dtype."""
    return torch.bfloat16 if device == "cuda" and FORMATS[name].activation else dtype


def layer_for(name, hidden, intermediate, num_experts=5, **options):
    return Layer(name, num_experts, *fit(name, hidden, intermediate), **options)


def run(layer, x, ids, weights, device, **options):
    moved = (t.to(device) for t in (x, ids, weights))
    return OPS.experts(*moved, *layer.tensors(device), **layer.options(), **options)


def check_experts(layer, x, ids, weights, device, on_input=False, **options):
    got = run(layer, x, ids, weights, device, router_weight_on_input=on_input, **options)
    truth = lambda nudge=0.0: oracle.experts(layer, x, ids, weights, on_input=on_input, nudge=nudge)  # noqa: E731
    plain = oracle.experts(layer, x, ids, weights, x.dtype, on_input=on_input)
    assert got.dtype == x.dtype
    assert_as_good(got, truth(), plain, nudged=truth)
    return got


@pytest.mark.parametrize("on_input", [False, True], ids=["", "on_input"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, kind, on_input, device):
    number = list(LAYERS).index(kind) + on_input
    hidden, intermediate = SIZES[number % 2]
    dtype = working(name, [torch.float32, torch.bfloat16, torch.float16][number % 3], device)
    layer = layer_for(name, hidden, intermediate, dtype=dtype, **LAYERS[kind])
    check_experts(layer, *inputs(16, layer.hidden, 3, 5, dtype), device, on_input)


@pytest.mark.parametrize("on_input", [False, True], ids=["", "on_input"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", STATIC)
def test_experts_with_static_scales(name, gated, on_input, device):
    activation = "silu" if gated else "relu2"
    dtype = working(name, torch.float32, device)
    layer = layer_for(name, 72, 40, gated=gated, activation=activation, static=True, dtype=dtype)
    x, ids, weights = inputs(7, layer.hidden, 3, 5, dtype)
    static = check_experts(layer, x, ids, weights, device, on_input)
    layer.input_scales = (None, None)
    assert not torch.equal(static, run(layer, x, ids, weights, device, router_weight_on_input=on_input))


@pytest.mark.parametrize("name", FORMATS)
def test_backends_agree(name, device):
    layer = layer_for(name, 72, 40, dtype=torch.bfloat16)
    x, ids, weights = inputs(60, layer.hidden, 3, 5, torch.bfloat16)
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


def scales(q, device="cpu"):
    """scale and global_scale of a quantized weight, as ops take them."""
    return [t if t is None else t.to(device) for t in (q.scale, q.global_scale)]


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm(name, kind, device):
    kind, fmt = PRODUCTS[kind], FORMATS[name]
    dtype = working(name, torch.float32, device)
    experts, n, (k,), tokens, top_k, shards = 4, 80, fit(name, 96), 6, 2, kind.get("shards", 1)
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(experts, n, k, generator=g) / 10).to(dtype)
    q = quantize_weight(fmt.weight, w, shards)
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
        given.to(device), q.qdata.to(device), offsets.to(device), *scales(q, device),
        **{k: v.to(device) for k, v in (tensors | index).items() if v is not None}, format=name, shards=shards,
        top_k=top_k if kind.get("read") else 1, gated=kind.get("gated", True),
        activation=kind.get("activation", "none"),
    ).cpu()  # fmt: skip
    if not kind.get("write"):
        got = torch.empty_like(got).index_copy_(0, order.long(), got)
    args = (x, oracle.weights_of(w, fmt.weight, shards), ids.flatten(), kind, tensors, fmt.activation, top_k)
    truth = product_truth(*args, torch.float64)
    assert_as_good(got, truth, product_truth(*args, dtype))
    dropped = (ids.flatten() < 0) | (ids.flatten() >= experts)
    assert dropped.any() and (got[dropped] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm_transposed(name, device):
    """The product of a gradient: x . W[e], weights dequantized, x never quantized."""
    g, (k,) = torch.Generator().manual_seed(0), fit(name, 96)
    w = torch.randn(3, 80, k, generator=g) / 9
    q = quantize_weight(FORMATS[name].weight, w, 2)
    x, offsets = torch.randn(9, 80, generator=g), torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    args = [t.to(device) for t in (x, q.qdata, offsets)]
    got = OPS.grouped_mm(*args, *scales(q, device), format=name, shards=2, transpose=True)
    w = oracle.weights_of(w, FORMATS[name].weight, 2)
    truth, plain = (torch.cat([x[:4].to(d) @ w[0].to(d), x[4:8].to(d) @ w[2].to(d), torch.zeros(1, k, dtype=d)])
                    for d in (torch.float64, torch.float32))  # fmt: skip
    assert_as_good(got, truth, plain)


@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_codes_may_be_given(name, device):
    codec = FORMATS[name].activation
    g = torch.Generator().manual_seed(0)
    q = quantize_weight(FORMATS[name].weight, torch.randn(2, 48, 160, generator=g) / 12)
    x, offsets = torch.randn(8, 160, generator=g).bfloat16(), torch.tensor([0, 5, 8], dtype=torch.int32)
    x, codes, offsets = (t.to(device) for t in (x, q.qdata, offsets))
    x_codes, x_scale, whole = OPS.quantize(x, None, codec.name)
    more = {"x_scale": x_scale, "x_global_scale": whole if codec.global_scale else None, "format": name}
    given = OPS.grouped_mm(x_codes, codes, offsets, *scales(q, device), **more)
    assert given.dtype == torch.bfloat16
    assert torch.equal(given, OPS.grouped_mm(x, codes, offsets, *scales(q, device), format=name))
    rows = torch.tensor([3, 1, 1, 7, 0], dtype=torch.int32, device=device)  # scales of a row go where it goes
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    given = OPS.grouped_mm(x_codes, codes, offsets, *scales(q, device), rows_in=rows, **more)
    apart = OPS.grouped_mm(x[rows.long()], codes, offsets, *scales(q, device), format=name)
    assert torch.equal(given, apart) or codec.block == (0, 0)  # of other rows the largest is another


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
@pytest.mark.parametrize("name,static", [*((name, False) for name in FORMATS), *((name, True) for name in STATIC)])
def test_linear(name, static, bias, device):
    fmt, g = FORMATS[name], torch.Generator().manual_seed(0)
    dtype, (k,) = working(name, torch.float32, device), fit(name, 72)
    w, x = torch.randn(40, k, generator=g).to(dtype) / 8, torch.randn(2, 3, k, generator=g).to(dtype)
    b = torch.randn(40, generator=g).to(dtype) if bias else None
    q = fmt.weight.quantize(w)
    scale = torch.tensor(4.5 / oracle.top_of(fmt.activation)) if static else None
    args = [t if t is None else t.to(device) for t in (x, q.qdata, q.scale, q.global_scale, None, b, scale)]
    got = OPS.linear(*args, format=name)
    rows, spread = x.reshape(6, k), None if scale is None else scale.expand(6, 1)
    wf = oracle.weights_of(w[None], fmt.weight)[0]
    truth, plain = ((oracle.quantized(rows.to(d), fmt.activation, spread) @ wf.to(d).T + (0 if b is None else b.to(d))
                     ).view(2, 3, 40) for d in (torch.float64, dtype))  # fmt: skip
    assert_as_good(got, truth, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_quantize(codec, dtype, device):
    """Codes times scales, exactly; partial groups included where codes are not packed."""
    codec, k = CODECS[codec], 288 if CODECS[codec].packed else 300
    x = (torch.randn(2, 5, k, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0, 1] = 0
    codes, scale, whole = OPS.quantize(x.to(device), None, codec.name)
    assert codes.shape == (2, 5, codec.stored(k)) and codes.dtype == codec.element.storage
    groups = -(-k // codec.block[1]) if codec.block[1] else 1
    assert scale.shape == ((2, 5, groups) if codec.block[0] else ()) and scale.dtype == codec.scale_dtype
    assert whole.shape == ((2, 5, 1) if codec.global_scale else (0,)) and whole.dtype == torch.float32
    spread = scale.cpu().double()
    if codec.block[0]:
        spread = spread.repeat_interleave(codec.block[1] or k, -1)[..., :k]
    got = oracle.decoded(codes, codec) * spread * (whole.cpu().double() if codec.global_scale else 1)
    assert torch.equal(got.view(10, k), oracle.values_of(x.view(10, k), codec, rows=True))


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("codec", STATIC_CODECS)
def test_quantize_static(codec, shape, device):
    codec, k = CODECS[codec], 80
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(0))
    x = x.view(6, k) if shape == (6, 1) else x
    given = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1) * 4 / oracle.top_of(codec)
    codes, scale, whole = OPS.quantize(x.to(device), given.to(device), codec.name)
    spread = given.expand(*x.shape[:-1], 1).reshape(6, 1)  # one for each row
    if codec.global_scale:  # it is the global one, and the groups have theirs
        assert torch.equal(whole.cpu().view(6, 1), spread)
        spread = scale.cpu().double().repeat_interleave(codec.block[1], -1).view(6, k) * spread.double()
    else:
        assert torch.equal(scale.cpu(), given) and whole.shape == (0,)
    got = oracle.decoded(codes, codec).view(6, k) * spread.double()
    want = oracle.values_of(x.view(6, k), codec, given.expand(*x.shape[:-1], 1).reshape(6, 1), rows=True)
    assert torch.equal(got, want)


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

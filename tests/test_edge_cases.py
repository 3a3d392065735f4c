"""What the contract says at its edges (formats.md 4.2): sizes, routings, values, layouts, and what is refused."""

import oracle
import pytest
import torch
from oracle import Layer, assert_as_good, inputs

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS

OPS = torch.ops.moe_ops
E, H, I = 5, 72, 40  # noqa: E741
DTYPE = torch.bfloat16
CODECS = list(dict.fromkeys(f.activation.name for f in FORMATS.values() if f.activation is not None))
# One scale for the whole batch: a token's result depends on the others.
INDEPENDENT = [n for n, f in FORMATS.items() if f.activation is None or f.activation.block != (0, 0)]


def layer_of(name, num_experts=E, hidden=H, intermediate=I, **options):
    reason = FORMATS[name].check(intermediate, hidden) or FORMATS[name].check(hidden, intermediate)
    if reason:
        pytest.skip(reason)
    return Layer(name, num_experts, hidden, intermediate, dtype=DTYPE, **options)


def run(layer, x, ids, weights, **options):
    return OPS.experts(x, ids, weights, *layer.tensors(x.device), **layer.options(), **options)


def check(layer, x, ids, weights, device):
    """Right for these inputs, which may lie in memory as they like."""
    got = run(layer, *(t.to(device) for t in (x, ids, weights)))
    truth, plain = (oracle.experts(layer, x, ids, weights, work) for work in (torch.float64, x.dtype))
    assert_as_good(got, truth, plain)
    return got


# ---- sizes


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_no_tokens(name, top_k, device):
    layer = layer_of(name)
    x, weights = torch.zeros(0, H, dtype=DTYPE, device=device), torch.zeros(0, top_k, device=device)
    x.requires_grad_(), weights.requires_grad_()
    biases = [layer.up_bias.to(device).requires_grad_(), layer.down_bias.to(device).requires_grad_()]
    args = layer.tensors(device)
    args[8:10] = biases
    out = OPS.experts(x, torch.zeros(0, top_k, dtype=torch.int64, device=device), weights, *args, **layer.options())
    assert out.shape == (0, H) and out.dtype == DTYPE
    out.sum().backward()
    assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
    assert all((b.grad == 0).all() for b in biases)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_in_the_parts(name, device):
    layer = layer_of(name)
    codes, scale = layer.down.qdata.to(device), layer.down.scale
    scale = None if scale is None else scale.to(device)
    empty = torch.zeros(0, I, dtype=DTYPE, device=device, requires_grad=True)
    order, offsets = OPS.sort_by_expert(torch.zeros(0, 2, dtype=torch.int64, device=device), E)
    assert order.shape == (0,) and offsets.tolist() == [0] * (E + 1)
    out = OPS.grouped_mm(empty, codes, offsets, scale, format=name)
    assert out.shape == (0, H)
    one = None if scale is None else scale[0] if scale.ndim == 3 else scale[0, 0]
    flat = OPS.linear(empty.view(0, 4, I), codes[0], one, format=name)
    assert flat.shape == (0, 4, H)
    (out.sum() + flat.sum()).backward()
    assert empty.grad.shape == empty.shape
    rows = OPS.permute(empty, order, 2)
    assert OPS.combine(OPS.unpermute(rows, order), 2).shape == (0, I)


@pytest.mark.parametrize("codec", CODECS)
def test_quantize_no_rows(codec, device):
    codes, scale = OPS.quantize(torch.zeros(0, 3, 160, dtype=DTYPE, device=device), None, codec)
    assert codes.shape == (0, 3, 160) and scale.isfinite().all()
    assert scale.shape in ((), (0, 3, 1), (0, 3, 2))


@pytest.mark.parametrize(
    "tokens,top_k,num_experts", [(1, 1, 1), (1, 2, 5), (33, 1, 1), (3, 5, 5), (2, 2, 40), (65, 2, 3)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_few_and_many(name, tokens, top_k, num_experts, device):
    """One row is no sample: a code that rounds the other way moves it by an eighth. Small ones are drawn again."""
    layer, results = layer_of(name, num_experts), []
    for seed in range(max(1, 24 // tokens)):
        args = inputs(tokens, H, top_k, num_experts, DTYPE, seed=seed, dropped=False)
        truth, plain = (oracle.experts(layer, *args, work) for work in (torch.float64, DTYPE))
        results.append((run(layer, *(t.to(device) for t in args)), truth, plain))
    assert_as_good(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("hidden,intermediate", [(360, 72), (8, 8), (129, 257), (1, 1)])
@pytest.mark.parametrize("name", FORMATS)
def test_odd_sizes(name, hidden, intermediate, device):
    """2880 is neither a power of two nor a multiple of 128: neither are these."""
    check(layer_of(name, 3, hidden, intermediate), *inputs(5, hidden, 2, 3, DTYPE), device)


# ---- routings

ROUTINGS = {
    "all_to_one": torch.full((6, 1), 2),
    "all_to_the_last": torch.full((6, 2), E - 1),
    "every_expert": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i)) for i in range(4)]),
    "twice_in_a_row": torch.tensor([[1, 1], [3, 3], [0, 4]]),
    "half_dropped": torch.tensor([[0, -1], [E, 2], [-1, -1], [2**31 + 1, 1], [-(2**40), 3]]),
    "first_and_last_empty": torch.tensor([[1, 2], [3, 2], [2, 1]]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_routings(name, routing, device):
    ids = ROUTINGS[routing]
    x, _, weights = inputs(len(ids), H, ids.shape[1], E, DTYPE)
    got = check(layer_of(name), x, ids, weights, device)
    for t, row in enumerate(ids.tolist()):
        assert any(0 <= e < E for e in row) or (got[t] == 0).all()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("unknown", [-1, E, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("name", FORMATS)
def test_all_dropped_is_exactly_zero(name, unknown, on_input, device):
    """Biases included; and gradients are zero, not what was in memory."""
    layer = layer_of(name)
    x, ids, weights = (t.to(device) for t in inputs(4, H, 2, E, DTYPE))
    x.requires_grad_(), weights.requires_grad_()
    out = run(layer, x, torch.full_like(ids, unknown), weights, router_weight_on_input=on_input)
    assert (out == 0).all()
    out.backward(torch.ones_like(out))
    assert (x.grad == 0).all() and (weights.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize("name", FORMATS)
def test_types_of_ids(name, dtype, device):
    layer = layer_of(name)
    x, ids, weights = (t.to(device) for t in inputs(4, H, 2, E, DTYPE, dropped=False))
    assert torch.equal(run(layer, x, ids.to(dtype), weights), run(layer, x, ids, weights))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_shares_of_the_experts_add_up(name, device):
    """Expert parallelism: ids of other ranks map to -1; the sum over ranks is the whole."""
    layer = layer_of(name)
    x, ids, weights = inputs(6, H, 3, E, DTYPE)
    whole = run(layer, x.to(device), ids.to(device), weights.to(device)).cpu()
    parts = []
    for first, last in ((0, 2), (2, E)):
        args = [t if t is None else t[first:last] for t in layer.tensors(device)]
        local = torch.where((ids >= first) & (ids < last), ids - first, -1)
        parts.append(OPS.experts(x.to(device), local.to(device), weights.to(device), *args, **layer.options()).cpu())
    truth, plain = (oracle.experts(layer, x, ids, weights, work) for work in (torch.float64, DTYPE))
    assert_as_good(sum(parts), truth, plain)
    assert_as_good(whole, truth, plain)


# ---- values and layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_router_weights(name, dtype, device):
    """Zero, negative, not normalised, of any float type: computed in fp32."""
    x, ids, weights = inputs(6, H, 3, E, DTYPE)
    weights = (weights * 4 - 2).to(dtype)
    weights[0], weights[1, 0] = 0, 7
    got = check(layer_of(name), x, ids, weights, device)
    assert (got[0] == 0).all()
    as_float = run(layer_of(name), x.to(device), ids.to(device), weights.float().to(device))
    assert torch.equal(got, as_float)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every_second_row": lambda t: t.repeat_interleave(2, 0)[::2],
    "column_slice": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "every_second_column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_strides(name, layout, device):
    """x, ids and weights as slices of something else, and the gradient that comes back as well."""
    layer, view = layer_of(name), LAYOUTS[layout]
    plain = [t.to(device) for t in inputs(6, H, 3, E, DTYPE)]
    results = []
    for args in (plain, [view(t) for t in plain]):
        x, ids, weights = (t.detach().requires_grad_(t.is_floating_point()) for t in args)
        out = run(layer, x, ids, weights)
        out.backward(args[0])
        results.append((out, x.grad, weights.grad))
    assert not view(plain[0]).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_strides_in_the_parts(device):
    rows, order = torch.randn(6, H, device=device), torch.randperm(6, device=device).int()
    strided = rows.T.contiguous().T
    assert torch.equal(OPS.combine(strided, 2), OPS.combine(rows, 2))
    assert torch.equal(OPS.permute(strided, order, 1), OPS.permute(rows, order, 1))
    assert torch.equal(OPS.unpermute(strided, order), OPS.unpermute(rows, order))
    x, weight = rows.bfloat16().view(2, 3, H).transpose(0, 1), torch.randn(8, H, device=device).bfloat16()
    assert torch.equal(OPS.linear(x, weight, format="bf16"), OPS.linear(x.contiguous(), weight, format="bf16"))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_that_nobody_reads_does_not_count(name, on_input, device):
    """NaN, infinity or a huge value in it changes nothing: not the amax of a dynamic scale, not a gradient."""
    layer = layer_of(name)
    x, ids, weights = (t.to(device) for t in inputs(6, H, 3, E, DTYPE, dropped=False))
    ids[2], results = torch.tensor([-1, E, -1]), []
    for value in (0.0, float("nan"), float("inf"), 1e30):
        a, w = x.clone(), weights.clone().requires_grad_()
        a[2] = value
        a.requires_grad_()
        out = run(layer, a, ids, w, router_weight_on_input=on_input)
        out.backward(torch.ones_like(out))
        assert (out[2] == 0).all() and (a.grad[2] == 0).all() and (w.grad[2] == 0).all()
        results.append((out, a.grad, w.grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_nan_stays_in_its_token(name, device):
    layer = layer_of(name)
    x, ids, weights = (t.to(device) for t in inputs(6, H, 3, E, DTYPE, dropped=False))
    clean = run(layer, x, ids, weights)
    x[2, 5] = float("nan")
    got = run(layer, x, ids, weights)
    assert got[2].isnan().all()
    others = torch.arange(6, device=device) != 2
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("name", FORMATS)
def test_nan_of_a_gradient_stays_in_its_expert(name, device):
    layer = layer_of(name)
    x, _, weights = (t.to(device) for t in inputs(2, H, 1, E, DTYPE))
    args = layer.tensors(device)
    args[9].requires_grad_()
    out = OPS.experts(x, torch.tensor([[0], [1]], device=device), weights, *args, **layer.options())
    grad = torch.ones_like(out)
    grad[0] = float("nan")
    out.backward(grad)
    assert args[9].grad[0].isnan().all() and args[9].grad[1:].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros(name, device):
    x, ids, weights = inputs(4, H, 2, E, DTYPE)
    layer = layer_of(name, bias=False)
    assert (run(layer, x.to(device).zero_(), ids.to(device), weights.to(device)) == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_are_left_alone(name, device):
    layer = layer_of(name)
    args = [t.to(device) for t in inputs(4, H, 2, E, DTYPE)] + layer.tensors(device)
    before = [None if t is None else t.clone() for t in args]
    OPS.experts(*args, **layer.options())
    same = (a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(args, before))
    assert all(same)


# ---- refusals


def arguments(name="fp8", **changes):
    layer = Layer(name, E, H, I, dtype=DTYPE)
    x, ids, weights = inputs(4, H, 2, E, DTYPE)
    names = ["gate_up_proj", "down_proj", "gate_up_proj_scale", "down_proj_scale", "g1", "g2", "z1", "z2",
             "gate_up_proj_bias", "down_proj_bias", "gate_up_proj_input_scale", "down_proj_input_scale"]  # fmt: skip
    call = {"x": x, "topk_ids": ids, "topk_weights": weights} | dict(zip(names, layer.tensors()))
    call = {k: v for k, v in call.items() if k not in ("g1", "g2", "z1", "z2")}
    return call | layer.options() | changes


REFUSED = {
    "x in float64": ({"x": torch.zeros(4, H, dtype=torch.float64)}, "float64"),
    "x of another width": ({"x": torch.zeros(4, H + 1)}, rf"\(T, {H}\)"),
    "x with three dims": ({"x": torch.zeros(2, 2, H)}, r"\(2, 2, 72\)"),
    "ids of other tokens": ({"topk_ids": torch.zeros(3, 2, dtype=torch.int64)}, "topk_ids and topk_weights"),
    "weights of another width": ({"topk_weights": torch.zeros(4, 3)}, "topk_ids and topk_weights"),
    "masks as ids": ({"topk_ids": torch.zeros(4, 2, dtype=torch.bool)}, "integers"),
    "float ids": ({"topk_ids": torch.zeros(4, 2)}, "integers"),
    "no scale": ({"down_proj_scale": None}, "down_proj_scale is missing"),
    "a scale of another shape": ({"gate_up_proj_scale": torch.ones(E, 2)}, r"up_proj_scale .* must be \(5, 80, 1\)"),
    "weights that are not codes": ({"down_proj": torch.zeros(E, H, I)}, "down_proj .* must hold torch.float8_e4m3fn"),
    "a down_proj that does not fit": ({"gated": False}, "down_proj must be"),
    "a bias of another shape": ({"down_proj_bias": torch.zeros(E, I)}, "bias of down_proj"),
    "an unknown activation": ({"activation": "swish"}, "known: silu"),
    "no activation": ({"activation": "none"}, "needs an activation"),
    "alpha for gelu": ({"activation": "gelu", "alpha": 1.0}, "no alpha"),
    "an unknown format": ({"format": "fp9"}, "known: bf16, fp8"),
    "an unknown backend": ({"backend": "cuda"}, "known: auto, triton, reference"),
    "a weight-only format with input scales": (
        {"format": "fp8/bf16", "gate_up_proj_input_scale": torch.ones(E)}, "quantized activations"),
    "one input scale for all": ({"down_proj_input_scale": torch.ones(1)}, r"must be \(5,\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    changes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        OPS.experts(**arguments(**changes))


def test_no_scale_for_plain_weights():
    with pytest.raises(ValueError, match="gate_up_proj_scale is not used"):
        OPS.experts(**arguments("bf16", gate_up_proj_scale=torch.ones(E, 1, 1)))


def test_batch_invariance_needs_independent_scales():
    with pytest.raises(ValueError, match="cannot be batch-invariant"):
        OPS.experts(**arguments("fp8_tensor", batch_invariant=True))
    x = torch.zeros(2, H, dtype=DTYPE)
    layer = Layer("fp8_tensor", 1, H, I, dtype=DTYPE, gated=False)
    with pytest.raises(ValueError, match="cannot be batch-invariant"):
        OPS.linear(x, layer.up.qdata[0], layer.up.scale[0, 0], format="fp8_tensor", batch_invariant=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        OPS.experts(**arguments(backend="triton"))
    assert torch.isfinite(OPS.experts(**arguments(backend="reference"))).all()


def test_parts_refuse():
    x, codes = torch.zeros(4, 16), torch.zeros(2, 8, 16)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    for wrong, message in (
        ({"offsets": offsets.long()}, "int32"),
        ({"offsets": offsets[:2]}, r"\(3,\)"),
        ({"x": x[:, :8]}, r"\(rows, 16\)"),
        ({"x": x.double()}, "float64"),
        ({"rows_out": offsets}, "rows_out"),
        ({"row_weights": x[0]}, "row_weights"),
        ({"transpose": True, "bias": torch.zeros(2, 8), "x": x[:, :8]}, "neither bias"),
        ({"weight": codes[0]}, "weight must"),
        ({"x_scale": torch.ones(4, 1)}, "x_scale"),
        ({"weight": codes.int()}, "int32"),
        ({"shards": 3}, "not 3 matrices"),
        ({"shards": 0}, "not 0 matrices"),
        ({"top_k": 0}, "at least 1"),
        ({"rows_in": offsets.float()}, "rows_in must be a vector of int32"),
        ({"rows_in": torch.zeros(4, 1, dtype=torch.int32)}, "rows_in must be a vector"),
        ({"rows_out": torch.zeros(4)}, "rows_out must be a vector of int32"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.grouped_mm(**({"x": x, "weight": codes, "offsets": offsets, "format": "bf16"} | wrong))
    with pytest.raises(ValueError, match="at least 1"):
        OPS.sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="integers"):
        OPS.sort_by_expert(x, 3)
    with pytest.raises(ValueError, match="multiple of top_k"):
        OPS.combine(x, 3)
    with pytest.raises(ValueError, match="known: "):
        OPS.quantize(x, None, "e4m3")
    with pytest.raises(ValueError, match="nothing to quantize"):
        OPS.quantize(x, None, "bf16")
    with pytest.raises(ValueError, match="one value or"):
        OPS.quantize(x, torch.ones(2), CODECS[0])
    with pytest.raises(ValueError, match="single number"):
        OPS.quantize(x[0, 0], None, CODECS[0])
    for wrong in (codes[0, :, :8], codes):
        with pytest.raises(ValueError, match="do not fit"):
            OPS.linear(x, wrong, format="bf16")
    with pytest.raises(ValueError, match="do not fit"):
        OPS.linear(x[0, 0], codes[0], format="bf16")
    with pytest.raises(ValueError, match="at least 1"):
        OPS.permute(x, offsets, 0)


def test_scales_of_activations_must_fit():
    layer = Layer("fp8_block", 2, 256, 128, dtype=DTYPE, gated=False)
    x, scale = torch.zeros(4, 256).to(layer.up.qdata.dtype), layer.up.scale
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    for shape in ((4, 3), (3, 2), (4,), (1, 1)):
        with pytest.raises(ValueError, match=r"x_scale must be one value, \(4, 1\) or \(4, 2\)"):
            OPS.grouped_mm(x, layer.up.qdata, offsets, scale, x_scale=torch.ones(shape), format="fp8_block")
    with pytest.raises(ValueError, match="input_scale must be one value"):
        OPS.linear(x.to(DTYPE), layer.up.qdata[0], scale[0], input_scale=torch.ones(2), format="fp8_block")

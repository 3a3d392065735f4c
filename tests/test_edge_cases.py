"""What the contract says at its edges (formats.md 4.2): sizes, routings, values, layouts."""

import oracle
import pytest
import torch
from oracle import Layer, assert_as_good, fit, inputs

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS

OPS = torch.ops.moe_ops
E, H, I = 5, 72, 40  # noqa: E741  (H and I: the next ones that the groups of a packed format fill)
DTYPE = torch.bfloat16
CODECS = {f.activation.name: f.activation for f in FORMATS.values() if f.activation is not None}
# One scale for the whole batch: a token's result depends on the others.
INDEPENDENT = [n for n, f in FORMATS.items() if f.activation is None or f.activation.block != (0, 0)]


def layer_of(name, num_experts=E, hidden=H, intermediate=I, **options):
    return Layer(name, num_experts, *fit(name, hidden, intermediate), dtype=DTYPE, **options)


def random(layer, tokens, top_k, device="cpu", **options):
    """x, ids, weights for a layer."""
    return [t.to(device) for t in inputs(tokens, layer.hidden, top_k, layer.num_experts, DTYPE, **options)]


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
    x, weights = torch.zeros(0, layer.hidden, dtype=DTYPE, device=device), torch.zeros(0, top_k, device=device)
    x.requires_grad_(), weights.requires_grad_()
    biases = [layer.up_bias.to(device).requires_grad_(), layer.down_bias.to(device).requires_grad_()]
    args = layer.tensors(device)
    args[8:10] = biases
    out = OPS.experts(x, torch.zeros(0, top_k, dtype=torch.int64, device=device), weights, *args, **layer.options())
    assert out.shape == (0, layer.hidden) and out.dtype == DTYPE
    out.sum().backward()
    assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
    assert all((b.grad == 0).all() for b in biases)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_in_the_parts(name, device):
    layer = layer_of(name)
    (h, i), codes = (layer.hidden, layer.intermediate), layer.down.qdata.to(device)
    scales = [t if t is None else t.to(device) for t in (layer.down.scale, layer.down.global_scale)]
    empty = torch.zeros(0, i, dtype=DTYPE, device=device, requires_grad=True)
    order, offsets = OPS.sort_by_expert(torch.zeros(0, 2, dtype=torch.int64, device=device), E)
    assert order.shape == (0,) and offsets.tolist() == [0] * (E + 1)
    out = OPS.grouped_mm(empty, codes, offsets, *scales, format=name)
    assert out.shape == (0, h)
    one = [None if t is None else t[0] if t.ndim == 3 else t[0, 0] for t in scales]
    flat = OPS.linear(empty.view(0, 4, i), codes[0], *one, format=name)
    assert flat.shape == (0, 4, h)
    (out.sum() + flat.sum()).backward()
    assert empty.grad.shape == empty.shape
    rows = OPS.permute(empty, order, 2)
    assert OPS.combine(OPS.unpermute(rows, order), 2).shape == (0, i)


@pytest.mark.parametrize("name", FORMATS)
def test_no_experts_per_token(name, device):
    """A = 0: nothing is added, and gradients are zero."""
    layer = layer_of(name)
    x, ids, weights = random(layer, 3, 0, device)
    x.requires_grad_(), weights.requires_grad_()
    out = run(layer, x, ids, weights)
    assert out.shape == x.shape and (out == 0).all()
    out.sum().backward()
    assert (x.grad == 0).all() and weights.grad.shape == (3, 0)


@pytest.mark.parametrize("codec", CODECS)
def test_quantize_no_rows(codec, device):
    codes, scale, whole = OPS.quantize(torch.zeros(0, 3, 160, dtype=DTYPE, device=device), None, codec)
    codec = CODECS[codec]
    assert codes.shape == (0, 3, codec.stored(160)) and scale.float().isfinite().all()
    groups = -(-160 // codec.block[1]) if codec.block[1] else 1
    assert scale.shape == ((0, 3, groups) if codec.block[0] else ())
    assert whole.shape == ((0, 3, 1) if codec.global_scale else (0,))


@pytest.mark.parametrize(
    "tokens,top_k,num_experts", [(1, 1, 1), (1, 2, 5), (33, 1, 1), (3, 5, 5), (2, 2, 40), (65, 2, 3)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_few_and_many(name, tokens, top_k, num_experts, device):
    """One row is no sample: a code that rounds the other way moves it by an eighth. Small ones are drawn again."""
    layer, results = layer_of(name, num_experts), []
    for seed in range(max(1, 24 // tokens)):
        args = random(layer, tokens, top_k, seed=seed, dropped=False)
        truth, plain = (oracle.experts(layer, *args, work) for work in (torch.float64, DTYPE))
        results.append((run(layer, *(t.to(device) for t in args)), truth, plain))
    assert_as_good(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("hidden,intermediate", [(360, 72), (8, 8), (129, 257), (1, 1)])
@pytest.mark.parametrize("name", FORMATS)
def test_odd_sizes(name, hidden, intermediate, device):
    """2880 is neither a power of two nor a multiple of 128: neither are these."""
    layer = layer_of(name, 3, hidden, intermediate)
    check(layer, *random(layer, 5, 2), device)


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
    ids, layer = ROUTINGS[routing], layer_of(name)
    x, _, weights = random(layer, *ids.shape)
    got = check(layer, x, ids, weights, device)
    for t, row in enumerate(ids.tolist()):
        assert any(0 <= e < E for e in row) or (got[t] == 0).all()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("unknown", [-1, E, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("name", FORMATS)
def test_all_dropped_is_exactly_zero(name, unknown, on_input, device):
    """Biases included; and gradients are zero, not what was in memory."""
    layer = layer_of(name)
    x, ids, weights = random(layer, 4, 2, device)
    x.requires_grad_(), weights.requires_grad_()
    out = run(layer, x, torch.full_like(ids, unknown), weights, router_weight_on_input=on_input)
    assert (out == 0).all()
    out.backward(torch.ones_like(out))
    assert (x.grad == 0).all() and (weights.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize("name", FORMATS)
def test_types_of_ids(name, dtype, device):
    layer = layer_of(name)
    x, ids, weights = random(layer, 4, 2, device, dropped=False)
    assert torch.equal(run(layer, x, ids.to(dtype), weights), run(layer, x, ids, weights))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_shares_of_the_experts_add_up(name, device):
    """Expert parallelism: ids of other ranks map to -1; the sum over ranks is the whole."""
    layer = layer_of(name)
    x, ids, weights = random(layer, 6, 3)
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
    layer = layer_of(name)
    x, ids, weights = random(layer, 6, 3)
    weights = (weights * 4 - 2).to(dtype)
    weights[0], weights[1, 0] = 0, 7
    got = check(layer, x, ids, weights, device)
    assert (got[0] == 0).all()
    as_float = run(layer, x.to(device), ids.to(device), weights.float().to(device))
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
    plain = random(layer, 6, 3, device)
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
    x, ids, weights = random(layer, 6, 3, device, dropped=False)
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
    x, ids, weights = random(layer, 6, 3, device, dropped=False)
    clean = run(layer, x, ids, weights)
    x[2, 5] = float("nan")
    got = run(layer, x, ids, weights)
    assert got[2].isnan().all()
    others = torch.arange(6, device=device) != 2
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("name", FORMATS)
def test_nan_of_a_gradient_stays_in_its_expert(name, device):
    layer = layer_of(name)
    x, _, weights = random(layer, 2, 1, device)
    args = layer.tensors(device)
    args[9].requires_grad_()
    out = OPS.experts(x, torch.tensor([[0], [1]], device=device), weights, *args, **layer.options())
    grad = torch.ones_like(out)
    grad[0] = float("nan")
    out.backward(grad)
    assert args[9].grad[0].isnan().all() and args[9].grad[1:].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros(name, device):
    layer = layer_of(name, bias=False)
    x, ids, weights = random(layer, 4, 2, device)
    assert (run(layer, x.zero_(), ids, weights) == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_are_left_alone(name, device):
    layer = layer_of(name)
    args = random(layer, 4, 2, device) + layer.tensors(device)
    before = [None if t is None else t.clone() for t in args]
    OPS.experts(*args, **layer.options())
    same = (a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(args, before))
    assert all(same)

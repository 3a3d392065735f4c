"""Modules in every format: what they store and compute, against definitions of others, and what that survives."""

import copy
import io
import pickle

import oracle
import pytest
import torch
from torch import nn
from toy_moe import EXPERTS_AT, HIDDEN, INTERMEDIATE, LAYOUTS, ToyModel, bits, call_args, experts, same, tokens
from toy_moe import relative_error as rel

from moe_ops import FORMATS, QuantizedLinear, dequantize_, quantize_, summary
from moe_ops.quantize import skeleton_

SIZES = {name: dict(zip(("hidden", "intermediate"), oracle.fit(name, HIDDEN, INTERMEDIATE))) for name in FORMATS}


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    m, codec = experts("biases", **SIZES[name]), FORMATS[name].activation
    q = quantize_(copy.deepcopy(m), name)
    assert q.format == name and q.quantization is FORMATS[name]
    for w, got, shards in zip((m.gate_up_proj, m.down_proj), q.dequantize(), (2, 1)):
        want = oracle.weights_of(w, FORMATS[name].weight, shards)
        torch.testing.assert_close(got.double(), want, rtol=2**-22, atol=0)
    args, floats = call_args(hidden=SIZES[name]["hidden"]), dequantize_(copy.deepcopy(q))
    got, rows = q(*args), floats._linear
    if codec is None or codec.block != (0, 0):  # else the scale is that of all rows
        floats._linear = lambda name, e, x: rows(name, e, oracle.quantized(x, codec))
    # A code at the edge of two may turn over with the order of a sum, and moves one token by its step.
    assert rel(got, floats(*args)) < (2e-5 if codec is None else 0.1 if codec.block == (0, 0) else 0.01)
    if name == "bf16":
        assert torch.equal(q.gate_up_proj, m.gate_up_proj) and torch.equal(q.down_proj, m.down_proj)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", oracle.STORED)
def test_layouts(name, kind):
    """Each stored as the codes of its canonical weights; the class's own loop on their values is what must come out."""
    m, name = experts(kind, **SIZES[name]), f"{name}/bf16"
    q = quantize_(copy.deepcopy(m), name)
    for key, got, shards in zip(q.weight_names(), q.dequantize(), (q.spec.shards, 1)):
        w = q.spec.canonical(key, m.get_parameter(key))
        torch.testing.assert_close(
            got.double(), oracle.weights_of(w, FORMATS[name].weight, shards), rtol=2**-22, atol=0
        )
    args = call_args(hidden=q.spec.hidden_size)
    torch.testing.assert_close(q(*args), dequantize_(copy.deepcopy(q))(*args), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "own gate, everything"])
@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if oracle.takes_static(fmt.activation)])
def test_static_scales_of_activations(name, kind):
    """Those of each row's expert, with the gate in the op and outside of it."""
    codec, q = FORMATS[name].activation, quantize_(experts(kind), name)
    scales = torch.tensor([[0.5, 1.0, 1.5, 2.0], [0.9, 0.6, 0.3, 0.7]]) * 4 / oracle.top_of(codec)
    scales = dict(zip(q.weight_names(), scales))
    for name, scale in scales.items():
        q._parameters[f"{name}_input_scale"] = nn.Parameter(scale, requires_grad=False)
    args, floats = call_args(), dequantize_(copy.deepcopy(q))
    rows = floats._linear
    floats._linear = lambda name, e, x: rows(name, e, oracle.quantized(x, codec, scales[name][e].expand(len(x), 1)))
    assert rel(q(*args), floats(*args)) < 0.01
    copied = pickle.loads(pickle.dumps(q))
    assert torch.equal(copied(*args), q(*args)) and same(copied, q)
    grads = []
    for module in (q, floats):  # straight through the codes, inside of the op and outside
        x = args[0].clone().requires_grad_()
        with torch.enable_grad():
            module(x, *args[1:]).square().sum().backward()
        grads.append(x.grad)
    assert rel(*grads) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_linear(name):
    torch.manual_seed(0)
    fmt, k = FORMATS[name], SIZES[name]["hidden"]
    m = nn.Linear(k, 48)
    q = QuantizedLinear.from_float(m, name)
    assert isinstance(q, nn.Linear) and q.bias is m.bias and (q.in_features, q.out_features) == (k, 48)
    want = oracle.weights_of(m.weight[None], fmt.weight)[0]
    torch.testing.assert_close(q.dequantize().double(), want, rtol=2**-22, atol=0)
    x = torch.randn(2, 5, k)
    seen = oracle.quantized(x.view(10, k).double(), fmt.activation).view(x.shape)
    torch.testing.assert_close(q(x).double(), seen @ want.T + m.bias, rtol=1e-4, atol=1e-5)
    assert name in repr(q)
    back = dequantize_(copy.deepcopy(q))
    assert type(back) is nn.Linear and torch.equal(back.weight, q.dequantize()) and set(vars(back)) == set(vars(m))


@torch.no_grad()
@pytest.mark.parametrize("name", oracle.STORED)
def test_formats_survive(name):
    """Copies, files, a state dict loaded in place, casts of all else, a device move, and the way back."""
    sizes, ids = SIZES[name], tokens()
    model = quantize_(ToyModel(bias=True, **sizes), name)
    want, file = model(ids), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert same(other, model) and torch.equal(other(ids), want) and str(summary(other)) == str(summary(model))
    other = ToyModel(bias=True, **sizes)
    for p in other.parameters():
        p.normal_()
    quantize_(other, name).load_state_dict(model.state_dict())
    assert same(other, model) and torch.equal(other(ids), want)
    assert same(quantize_(ToyModel(bias=True, **sizes), name, device="cpu"), model)
    assert all(p.device.type == "meta" for p in copy.deepcopy(model).to("meta").parameters())
    before = {n: p for n, p in model.named_parameters() if "proj" in n and not n.endswith("bias")}
    half = copy.deepcopy(model).half()
    for n, p in before.items() if FORMATS[name].quantized else ():
        got = half.get_parameter(n)
        assert got.dtype == p.dtype and torch.equal(bits(got), bits(p))
    assert half(ids).isfinite().all() and {p.dtype for p in dequantize_(half).parameters()} == {torch.float16}
    up, down = model.get_submodule(EXPERTS_AT[0]).dequantize()
    floats = dequantize_(model).get_submodule(EXPERTS_AT[0])
    assert torch.equal(floats.gate_up_proj, up) and torch.equal(floats.down_proj, down)
    assert set(floats.state_dict()) == set(ToyModel(bias=True).layers[0]["mlp"].experts.state_dict())


@torch.no_grad()
def test_scales_do_not_load_as_other_numbers():
    """A copy would take exponents for numbers, and round numbers to powers of two."""
    model = quantize_(ToyModel(), "mxfp4")
    key = f"{EXPERTS_AT[0]}.down_proj_scale"
    for wrong, message in (
        (lambda t: t.view(torch.uint8), "is torch.uint8, this module stores torch.float8_e8m0fnu .* view the bytes as"),
        (lambda t: t.float(), "is torch.float32, this module stores torch.float8_e8m0fnu .* belong to another format"),
    ):
        state, before = model.state_dict(), copy.deepcopy(model)
        state[key] = wrong(state[key])
        with pytest.raises(RuntimeError, match=rf"{key} {message}"):
            model.load_state_dict(state)
        assert same(model, before)
    fp8 = quantize_(ToyModel(), "fp8")
    state = {k: v.bfloat16() if k.endswith("_scale") else v for k, v in fp8.state_dict().items()}
    fp8.load_state_dict(state)
    assert fp8.get_parameter(key).dtype == torch.float32 and torch.equal(fp8.get_parameter(key), state[key].float())


@pytest.mark.parametrize("name", FORMATS)
def test_skeleton_has_the_storage_of_the_quantized_model(name):
    sizes = dict(zip(("hidden", "intermediate"), oracle.fit(name, HIDDEN, INTERMEDIATE)))
    want = quantize_(ToyModel(**sizes), name)
    with torch.device("meta"):
        got = skeleton_(ToyModel(**sizes), name)
    shapes = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (got, want)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in got.parameters())
    assert [type(m) for m in got.modules()] == [type(m) for m in want.modules()]
    assert [r.note for r in summary(got).rows] == [r.note for r in summary(want).rows]
    got.to_empty(device="cpu").load_state_dict(want.state_dict())
    with torch.no_grad():
        assert torch.equal(got(tokens()), want(tokens()))

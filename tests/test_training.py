"""prepare_training_, convert_, requantize_: modules that train their float weights through quantized products."""

import copy

import pytest
import torch
import toy_moe as toy
from torch.nn.functional import cross_entropy

from moe_ops import QuantizedExperts, dequantize_, quantize_, summary, training
from moe_ops.formats import FORMATS, quantize_weight

STRAIGHT = [name for name in FORMATS if FORMATS[name].quantized]
MOVED = [".gate_up_proj", ".down_proj", ".gate_up_proj_bias"]  # of what is transposed and interleaved
LOW = ["fp8", "fp8_tensor", "fp8_block", "mxfp8"]


def build(kind="plain", **sizes):
    make, options = toy.LAYOUTS[kind]
    return toy.ToyModel(make, **options, **sizes)


def step(model, tokens=None):
    """Loss and gradients by parameter."""
    tokens = toy.tokens(24) if tokens is None else tokens
    model.zero_grad()
    loss = cross_entropy(model(tokens), tokens.roll(1))
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def near(got, want, error):
    return (got.double() - want.double()).norm() <= error * want.double().norm()


@pytest.mark.parametrize("kind", toy.LAYOUTS)
def test_straight_through(kind):
    """The loss of `quantize_`'s model; gradients of the float model that holds the values of its codes, one for one."""
    model = build(kind)
    quantized = quantize_(copy.deepcopy(model), "int8")
    values = dequantize_(copy.deepcopy(quantized))
    mine = training.prepare_training_(copy.deepcopy(model), "int8")
    loss, grads = step(mine)
    truth, wanted = step(values)
    assert torch.equal(loss, cross_entropy(quantized(toy.tokens(24)), toy.tokens(24).roll(1)))
    assert near(loss.detach(), truth.detach(), 1e-5) and grads.keys() == wanted.keys()
    for name, grad in grads.items():
        module, _, key = name.rpartition(".")
        m, want = mine.get_submodule(module), wanted[name]
        if isinstance(m, QuantizedExperts) and want.ndim == 3:
            want = torch.stack([m.canonical(key, w) for w in want])
        elif isinstance(m, QuantizedExperts) and key.endswith("_bias"):
            want = m.spec.canonical_bias(key.removesuffix("_bias"), want)
        assert near(grad, want, 1e-4), name


@pytest.mark.parametrize("name", STRAIGHT)
def test_every_format(name):
    """The same loss as `quantize_`'s model; gradients in codes are near the straight-through ones (test_wgrad.py)."""
    model = build(hidden=128, intermediate=128)
    _, wanted = step(training.prepare_training_(copy.deepcopy(model), name, gradients=None))
    mine = training.prepare_training_(copy.deepcopy(model), name)
    loss, grads = step(mine)
    tokens = toy.tokens(24)
    assert torch.equal(loss, cross_entropy(quantize_(copy.deepcopy(model), name)(tokens), tokens.roll(1)))
    for key, grad in grads.items():
        assert grad.any() and near(grad, wanted[key], 0.08 if name in LOW else 0), key
    made = {m.trained.gradients for m in mine.modules() if getattr(m, "trained", None)}
    assert made == {name if name in LOW else None}


def test_gradients_in_another_format():
    model = build()
    _, exact = step(training.prepare_training_(copy.deepcopy(model), "fp8", gradients=None))
    _, low = step(training.prepare_training_(copy.deepcopy(model), "mxfp4", gradients="mxfp8"))
    _, straight = step(training.prepare_training_(copy.deepcopy(model), "mxfp4"))
    _, fp8 = step(training.prepare_training_(copy.deepcopy(model), "fp8"))
    key = toy.EXPERTS_AT[0] + ".down_proj"
    assert near(low[key], straight[key], 0.1) and not torch.equal(low[key], straight[key])
    assert near(fp8[key], exact[key], 0.1) and not torch.equal(fp8[key], exact[key])


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "int4_g32"])
def test_a_run_and_its_conversion(name):
    """Twelve steps come as far as the float model's within a tenth; the codes of the end are what was trained."""
    model = build()
    mine = training.prepare_training_(copy.deepcopy(model), name)
    ends = []
    for m in (model, mine):
        optimizer = torch.optim.Adam(m.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            losses.append(step(m)[0].item())
            optimizer.step()
        ends.append((losses[0], losses[-1]))
    (first, want), (_, got) = ends
    assert want < 0.5 * first and got - want < 0.1 * (first - want)
    with torch.no_grad():
        before = mine(toy.tokens())
        floats = dequantize_(copy.deepcopy(mine))
        assert f"trained: quantized to {name}" in str(summary(mine))
        assert training.convert_(mine) is mine
        assert torch.equal(mine(toy.tokens()), before) and "trained" not in str(summary(mine))
    assert toy.same(mine, quantize_(floats, name))
    assert not any(p.requires_grad for n, p in mine.named_parameters() if "experts" in n)


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_masters_are_the_models_weights(kind):
    """Parameters that are stored as they were are themselves, for optimizers; the others hold the same numbers."""
    model = build(kind)
    old, original = dict(model.named_parameters()), copy.deepcopy(model)
    model.layers[0]["proj"].weight.requires_grad_(False)
    training.prepare_training_(model, "mxfp8")
    new = dict(model.named_parameters())
    assert new.keys() == old.keys()
    for name, p in new.items():
        as_it_was = kind == "plain" or name not in [at + key for at in toy.EXPERTS_AT for key in MOVED]
        assert (p is old[name]) == as_it_was and p.requires_grad == (name != "layers.0.proj.weight")
    restored = dequantize_(model)
    assert toy.same(restored, original)
    assert type(restored.layers[0]["mlp"].experts) is type(original.layers[0]["mlp"].experts)
    assert all(p.requires_grad for n, p in restored.named_parameters() if n != "layers.0.proj.weight")


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_autocast_and_compile(name):
    """fp32 masters under bf16 autocast get fp32 gradients; the compiled step is one graph and gives the same."""
    model = training.prepare_training_(build(), name)
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = step(model)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    loss, grads = step(model)
    compiled = torch.compile(model, fullgraph=True)
    tokens = toy.tokens(24)
    model.zero_grad()
    again = cross_entropy(compiled(tokens), tokens.roll(1))
    again.backward()
    assert near(again.detach(), loss.detach(), 1e-6)
    assert all(near(p.grad, grads[name], 1e-2) for name, p in model.named_parameters())


def test_no_tokens():
    model = training.prepare_training_(build(), "fp8")
    model(toy.tokens(0)).sum().backward()
    grad = model.get_submodule(toy.EXPERTS_AT[0]).gate_up_proj.grad
    assert grad is not None and not grad.any()


@pytest.mark.parametrize("kind", ["plain", "everything", "no gate"])
@pytest.mark.parametrize("name", ["fp8", "fp8_block", "mxfp4", "nvfp4"])
def test_requantize(name, kind):
    model, other = build(kind), build(kind)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5).add_(0.01)
    mine = quantize_(copy.deepcopy(model), name)
    where = {n: p.data_ptr() for n, p in mine.named_parameters()}
    new = {n: p for n, p in other.state_dict().items() if n.endswith("_proj") or ("proj.weight" in n)}
    assert training.requantize_(mine, new) is mine
    assert {n: p.data_ptr() for n, p in mine.named_parameters()} == where
    want = quantize_(copy.deepcopy(other), name).state_dict()
    stored = [n for n in mine.state_dict() if any(n.startswith(key) for key in new) and "bias" not in n]
    assert len(stored) > len(new) - 1
    assert all(torch.equal(toy.bits(mine.state_dict()[n]), toy.bits(want[n])) for n in stored)


def test_refusals():
    model = build()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="gradients are not multiplied in 'mxfp4'; allowed: fp8, "):
        training.prepare_training_(model, "fp8", gradients="mxfp4")
    with pytest.raises(ValueError, match="unknown format 'fp9'"):
        training.prepare_training_(model, "fp9")
    with pytest.raises(ValueError, match="no module of the model is trained"):
        training.convert_(model)
    with pytest.raises(ValueError, match="none of these is the weight of a quantized module: a"):
        training.requantize_(model, {"a": torch.ones(1)})
    assert toy.same(model, before)
    quantize_(model, "fp8")
    codes, key = copy.deepcopy(model), toy.EXPERTS_AT[1] + ".down_proj"
    good = before.state_dict()
    for bad, words in (
        (good[key][:, :3], rf"{key} must be floats \(4, 64, 32\), got torch.float32 \(4, 3, 32\)"),
        (torch.full_like(good[key], torch.nan), f"{key} has non-finite values"),
        (good[key].int(), "got torch.int32"),
    ):
        with pytest.raises(ValueError, match=words):
            training.requantize_(model, good | {key: bad})
    with pytest.raises(ValueError, match="quantized to fp8"):
        training.prepare_training_(model, "mxfp8")
    assert toy.same(model, codes)
    mine = training.prepare_training_(before, "fp8")
    with pytest.raises(ValueError):
        quantize_(mine, "fp8")


def test_quantize_weight_is_the_formats_own():
    """What the forward multiplies is what quantize_ stores, to the bit."""
    w = torch.randn(3, 32, 128)
    for name in STRAIGHT:
        codec = FORMATS[name].weight
        q, scale, _ = torch.ops.moe_ops.quantize_weight(w, codec.name, 2)
        want = quantize_weight(codec, w, 2)
        assert torch.equal(toy.bits(q), toy.bits(want.qdata)) and torch.equal(toy.bits(scale), toy.bits(want.scale))

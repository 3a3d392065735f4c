"""Every MoE family of the installed transformers: experts are found by structure, swapped, and compute what they did.

The oracle of the layout is the family's own class: `dequantize_` gives it the weights that the codes stand for, and its
own eager loop must agree with our op to fp32 rounding when activations are not quantized.
"""

import copy

import pytest
import tiny_models as tiny
import torch
from oracle import STORED
from tiny_models import relative_error

import moe_ops
from moe_ops import QuantizedExperts

pytestmark = pytest.mark.swap

# e4m3 has 3 mantissa bits: an error of at most 2^-4, 2^-4 / sqrt(3) = 3.6 % at the edge of a binade and 2.6 % on
# average over it. x is rounded once, which reaches gate and up, then h: sqrt(2.6^2 * 2 + 2.6^2) = 4.5 %.
FP8_ACTIVATIONS = 0.08
ROUNDING = 2e-5  # fp32 sums in another order

# One family for each structure, and one whose gate no entry of ACTIVATIONS describes.
ONE_EACH = ["qwen3_moe", "deepseek_v4", "inkling2", "aria", "gpt_oss", "nemotron_h", "muse_spark"]


def routed(name):
    """The family's model, or a skip where its class does not carry the flags yet in this transformers."""
    if name not in tiny.INSTALLED:
        pytest.skip("not in this transformers")
    model = tiny.build(name)
    if not tiny.routed_experts(model):
        pytest.skip("not decorated in this transformers")
    return model


def record_calls(model):
    """{name: (args, output)} of every experts module in one forward."""
    calls, names = {}, {m: n for n, m in tiny.routed_experts(model).items()}

    def record(m, args, out):
        calls.setdefault(names[m], (args, out))

    handles = [m.register_forward_hook(record) for m in names]
    out = tiny.run(model)
    for h in handles:
        h.remove()
    assert calls, "the forward reaches no experts"
    return calls, out


def assert_weights_close(module, before, after):
    """Each weight within half a unit in the last place of e4m3, with one scale per output channel."""
    for name, p in before.named_parameters(recurse=False):
        got = after.get_parameter(name)
        assert got.shape == p.shape and got.dtype == p.dtype and got.requires_grad == p.requires_grad
        if p.ndim < 3:
            assert torch.equal(got, p), name
            continue
        scale = p.abs().amax(1 if module.is_transposed else 2, keepdim=True) / 448
        bound = torch.maximum(p.abs() * 2**-4, scale * 2**-10) * 1.0001
        assert bool(((got - p).abs() <= bound).all()), name


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ROUTED)
def test_swapped_experts_compute_what_they_did(name):
    model = routed(name)
    calls, want = record_calls(model)
    weight_only = moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8/bf16"})
    floats = moe_ops.dequantize_(copy.deepcopy(weight_only))
    both = moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8"})

    for at, (args, out) in calls.items():
        old, new, restored = model.get_submodule(at), weight_only.get_submodule(at), floats.get_submodule(at)
        assert isinstance(new, QuantizedExperts) and isinstance(new, type(old))
        assert new.is_transposed is False and getattr(new, "is_concatenated", True) is True
        assert type(restored) is type(old) and restored.is_transposed == old.is_transposed
        assert_weights_close(old, old, restored)
        own = restored(*args)  # the class's own loop on the same values
        assert relative_error(new(*args), own) < ROUNDING
        assert relative_error(both.get_submodule(at)(*args), own) < FP8_ACTIVATIONS
        assert relative_error(own, out) < 0.15  # sanity: the weights are the model's own

    assert relative_error(tiny.run(weight_only), tiny.run(floats)) < 10 * ROUNDING
    assert set(weight_only.state_dict()) > set(model.state_dict())
    assert set(floats.state_dict()) == set(model.state_dict())
    assert want.shape == tiny.run(both).shape


@torch.no_grad()
@pytest.mark.parametrize("stored", [name for name in STORED if name not in ("bf16", "fp8")])
@pytest.mark.parametrize("name", ONE_EACH)
def test_every_way_to_store_weights(name, stored):
    """In every structure; or one error that says which module cannot."""
    model, stored = routed(name), f"{stored}/bf16"
    calls, _ = record_calls(model)
    for at, (args, _) in calls.items():
        old = model.get_submodule(at)
        sizes = [n for p in old.parameters(recurse=False) if p.ndim == 3 for n in p.shape[1:]]
        if any(moe_ops.FORMATS[stored].check(1, n) for n in sizes):
            with pytest.raises(ValueError, match=rf"{at}: .*\(.*\) does not fit format '{stored}': .* not a multiple"):
                moe_ops.quantize_(model, {"experts": stored})
            return
    moe_ops.quantize_(model, {"experts": stored})
    floats = moe_ops.dequantize_(copy.deepcopy(model))
    for at, (args, _) in calls.items():
        new, restored = model.get_submodule(at), floats.get_submodule(at)
        assert isinstance(new, QuantizedExperts) and relative_error(new(*args), restored(*args)) < ROUNDING
    assert relative_error(tiny.run(model), tiny.run(floats)) < 10 * ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ROUTED)
def test_whole_model(name):
    """Experts and Linears: routers, embeddings and heads stay; every row of the summary says why."""
    model = routed(name)
    before = copy.deepcopy(model.state_dict())
    moe_ops.quantize_(model, "fp8")
    rows = moe_ops.summary(model).rows
    assert {r.name for r in rows if r.kind == "experts" and r.format == "fp8"} == set(tiny.routed_experts(model))
    assert all(r.note for r in rows if r.format is None)
    assert not any("router" in r.name or r.name.endswith((".gate", "lm_head")) for r in rows if r.format)
    assert torch.isfinite(tiny.run(model)).all()
    again = {n: id(m) for n, m in model.named_modules()}
    moe_ops.quantize_(model, "fp8")  # the second call changes nothing
    assert {n: id(m) for n, m in model.named_modules()} == again
    moe_ops.dequantize_(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(after[k].shape == v.shape and after[k].dtype == v.dtype for k, v in before.items())


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.OTHER)
def test_other_layouts_are_refused_or_reported(name):
    """Families that do not carry the flags: an error that names the module, or a line in the summary; never silence."""
    model = tiny.build(name)
    if name == "doge":  # its experts are rows of embeddings: a dense model to us (and 5.17 cannot run it)
        moe_ops.quantize_(model, "fp8")
        assert any("router" in r.name and r.format is None for r in moe_ops.summary(model).rows)
        return
    want, before = tiny.run(model), {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"experts|stacks of matrices"):
        moe_ops.quantize_(model, "fp8")
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert torch.equal(tiny.run(model), want)
    moe_ops.quantize_(model, "fp8", strict=False)
    left = [r for r in moe_ops.summary(model).rows if r.kind == "experts"]
    assert left and all(r.format is None and "flags" in r.note for r in left)
    assert torch.isfinite(tiny.run(model)).all()


def compiles(model):
    torch._dynamo.reset()
    try:
        return tiny.run(torch.compile(model, backend="aot_eager", fullgraph=True), **tiny.inputs(model))
    except (torch._dynamo.exc.TorchDynamoException, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        return None


def check_fullgraph(name):
    model = moe_ops.quantize_(routed(name), "fp8")
    got = compiles(model)
    if got is None:  # then the model itself must be what cannot be one graph
        floats = tiny.build(name)
        floats.set_experts_implementation("batched_mm")
        assert compiles(floats) is None, "the float model compiles and the quantized one does not"
        return
    torch.testing.assert_close(got, tiny.run(model), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_EACH)
def test_fullgraph(name):
    check_fullgraph(name)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in tiny.ROUTED if n not in ONE_EACH])
def test_fullgraph_of_every_other_family(name):
    check_fullgraph(name)

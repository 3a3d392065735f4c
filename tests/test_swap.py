"""Every MoE family of the installed transformers: experts are found by structure, swapped, and compute what they did.

The oracle of the layout is the family's own class: `dequantize_` gives it the weights that the codes stand for, and its
own eager loop must agree with our op to fp32 rounding when activations are not quantized.
"""

import copy
from itertools import cycle, product

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
FLAGGED = ["qwen3_moe", "deepseek_v4", "inkling2", "aria", "gpt_oss", "nemotron_h", "muse_spark"]
ONE_EACH = [*FLAGGED, *(n for n in tiny.UNFLAGGED if n != "aria")]
WAYS = [name for name in STORED if name not in ("bf16", "fp8")]


def built(name):
    if name not in tiny.INSTALLED:
        pytest.skip("not in this transformers")
    return tiny.build(name)


def record_calls(name, model):
    """{name: (args, output)} in one forward, of each experts module, or of the block whose experts run on every row."""
    calls, found = {}, tiny.experts_at(name, model)
    at = {n.rpartition(".")[0] for n in found} if tiny.FAMILIES[name]["structure"] == "U3" else found
    names = {model.get_submodule(n): n for n in at}

    def record(m, args, out):
        calls.setdefault(names[m], (args, out))

    handles = [m.register_forward_hook(record) for m in names]
    out = tiny.run(model)
    for h in handles:
        h.remove()
    assert set(calls) == at, "the forward reaches all experts"
    return calls, out


def first(out):
    return out[0] if isinstance(out, tuple) else out


def assert_weights_close(before, after):
    """Each weight within half a unit in the last place of e4m3, with one scale per output channel."""
    for name, p in before.named_parameters():
        got = after.get_parameter(name)
        assert got.shape == p.shape and got.dtype == p.dtype and got.requires_grad == p.requires_grad
        if p.ndim < 2 or name.endswith("bias"):
            assert torch.equal(got, p), name
            continue
        if name == "gate_up_proj" and (n := getattr(before, "num_routed_experts", None)):
            assert not got[n:].any()  # rows for experts that return their input: never read
            got, p = got[:n], p[:n]
        channel = torch.maximum(p.abs().amax(-1, keepdim=True), p.abs().amax(-2, keepdim=True))  # whichever is out
        bound = torch.maximum(p.abs() * 2**-4, channel / 448 * 2**-10) * 1.0001
        assert bool(((got - p).abs() <= bound).all()), name


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.WITH_EXPERTS)
def test_swapped_experts_compute_what_they_did(name):
    model = built(name)
    calls, want = record_calls(name, model)
    weight_only = moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8/bf16"})
    floats = moe_ops.dequantize_(copy.deepcopy(weight_only))
    both = moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8"})

    for at in tiny.experts_at(name, model):
        old, new, restored = model.get_submodule(at), weight_only.get_submodule(at), floats.get_submodule(at)
        assert isinstance(new, QuantizedExperts) and isinstance(new, type(old))
        assert new.spec.checked
        if hasattr(old, "is_transposed"):
            assert new.is_transposed is False and getattr(new, "is_concatenated", True) is True
            assert restored.is_transposed == old.is_transposed
        assert_weights_close(old, restored)
    for at, (args, out) in calls.items():
        new, own = weight_only.get_submodule(at), first(floats.get_submodule(at)(*args))  # the class's own loop
        assert relative_error(first(new(*args)), own) < ROUNDING
        assert relative_error(first(both.get_submodule(at)(*args)), own) < FP8_ACTIVATIONS
        assert relative_error(own, first(out)) < 0.15  # sanity: the weights are the model's own

    assert relative_error(tiny.run(weight_only), tiny.run(floats)) < 10 * ROUNDING
    assert [(n, type(m)) for n, m in floats.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert list(floats.state_dict()) == list(model.state_dict())
    assert want.shape == tiny.run(both).shape


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stored"), [*product(FLAGGED, WAYS), *zip(ONE_EACH[len(FLAGGED) :], cycle(WAYS), strict=False)]
)
def test_every_way_to_store_weights(name, stored):
    """In every structure; or one error that says which module cannot."""
    model, stored = built(name), f"{stored}/bf16"
    calls, _ = record_calls(name, model)
    for at in tiny.experts_at(name, model):
        named = model.get_submodule(at).named_parameters()
        sizes = [n for name, p in named if p.ndim > 1 and not name.endswith("bias") for n in p.shape[-2:]]
        if any(moe_ops.FORMATS[stored].check(1, n) for n in sizes):
            with pytest.raises(ValueError, match=rf"{at}: .*\(.*\) does not fit format '{stored}': .* not a multiple"):
                moe_ops.quantize_(model, {"experts": stored})
            return
    moe_ops.quantize_(model, {"experts": stored})
    floats = moe_ops.dequantize_(copy.deepcopy(model))
    for at, (args, _) in calls.items():
        new, restored = model.get_submodule(at), floats.get_submodule(at)
        assert relative_error(first(new(*args)), first(restored(*args))) < ROUNDING
    assert relative_error(tiny.run(model), tiny.run(floats)) < 10 * ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.WITH_EXPERTS)
def test_whole_model(name):
    """Experts and Linears: routers, embeddings and heads stay; every row of the summary says why."""
    model = built(name)
    wanted = tiny.experts_at(name, model)
    before = copy.deepcopy(model.state_dict())
    moe_ops.quantize_(model, "fp8")
    rows = moe_ops.summary(model).rows
    assert {r.name for r in rows if r.kind == "experts" and r.format == "fp8"} == wanted
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
def test_what_is_no_product_of_matrices_stays():
    model = moe_ops.quantize_(built("doge"), "fp8")  # 5.17 cannot run it
    rows = {r.name: r for r in moe_ops.summary(model).rows}
    for name in ("down_embed", "up_embed"):
        assert rows[f"model.layers.0.mlp.{name}"].note.startswith("experts that are rows of an embedding")
    assert rows["model.layers.0.mlp.router_gate"].note == "router" and rows["model.embed_tokens"].note == "embedding"
    assert rows["model.layers.1.mlp.up_proj"].format == "fp8"


@torch.no_grad()
def test_experts_that_are_single_linears_are_quantized_as_such():
    model = built("vitpose_backbone")
    before, want = [type(m) for m in model.modules()], tiny.run(model)
    for _ in range(2):  # the second call changes nothing
        moe_ops.quantize_(model, {"experts": "fp8"})
        rows = {r.name: r for r in moe_ops.summary(model).rows}
        opened = rows["encoder.layer.0.mlp.experts"]
        assert opened.kind == "experts' Linears" and opened.note.startswith("its Linears one by one: VitPoseNaiveMoe")
        assert {rows[f"encoder.layer.{i}.mlp.experts.{e}"].format for i in range(2) for e in range(4)} == {"fp8"}
        assert rows["encoder.layer.0.mlp.fc1"].format is None
    assert relative_error(tiny.run(model), want) < FP8_ACTIVATIONS
    assert [type(m) for m in moe_ops.dequantize_(model).modules()] == before


def compiles(module, args, kwargs):
    torch._dynamo.reset()
    try:
        return torch.compile(module, backend="aot_eager", fullgraph=True)(*args, **kwargs)
    except (torch._dynamo.exc.TorchDynamoException, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        return None


def block_calls(model):
    """{name: (args, kwargs)} of the first block of each class that holds experts."""
    parents = {name.rpartition(".")[0] for name in tiny.routed_experts(model)}
    found, calls = {type(model.get_submodule(n)): n for n in sorted(parents, reverse=True)}, {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, kwargs, n=n: calls.setdefault(n, (args, kwargs)) and None, with_kwargs=True)
        for n in found.values()
    ]  # fmt: skip
    tiny.run(model)
    for h in handles:
        h.remove()
    assert calls
    return calls


def check_fullgraph(name, calls_of):
    """What quantized modules are part of is one graph, unless the float modules cannot be one."""
    model, floats = moe_ops.quantize_(built(name), "fp8"), tiny.build(name)
    if floats._can_set_experts_implementation():
        floats.set_experts_implementation("batched_mm")
    for at, (args, kwargs) in calls_of(model).items():
        module = model.get_submodule(at)
        got = compiles(module, args, kwargs)
        if got is None:
            why = "the float module compiles and the quantized one does not"
            assert compiles(floats.get_submodule(at), args, kwargs) is None, why
            continue
        want = module(*args, **kwargs)
        torch.testing.assert_close(main(got), main(want), rtol=1e-4, atol=1e-4)


def main(out):
    """The tensor that a block or a model returns first."""
    return out if isinstance(out, torch.Tensor) else tiny.main_output(out)


def whole(model):
    return {"": ((), tiny.inputs(model))}


@torch.no_grad()
@pytest.mark.parametrize("name", [*ONE_EACH, "vitpose_backbone"])
def test_fullgraph(name):
    check_fullgraph(name, whole)


OTHERS = [n for n in tiny.INSTALLED if n not in ONE_EACH]


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in OTHERS if n in tiny.WITH_EXPERTS])
def test_fullgraph_of_the_blocks_of_every_other_family(name):
    """Routers and experts, and all that a block does with them; of one structure there is a whole model above."""
    check_fullgraph(name, block_calls)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_fullgraph_of_every_other_family(name):
    check_fullgraph(name, whole)

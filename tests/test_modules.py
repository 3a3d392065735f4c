"""What a quantized module computes, in every layout, and what it survives: copies, casts, hooks, state dicts."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from toy_moe import (
    EXPERTS,
    EXPERTS_AT,
    HIDDEN,
    INTERMEDIATE,
    LAYOUTS,
    ToyModel,
    bits,
    call_args,
    experts,
    same,
    tokens,
)
from toy_moe import relative_error as rel

import moe_ops
from moe_ops import QuantizedExperts, QuantizedLinear, dequantize_, quantize_, summary
from moe_ops.backends import resolve

# ---- layouts


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind):
    """The class's own loop on the dequantized weights, in the original layout, is what the op must compute."""
    m = experts(kind)
    q = quantize_(copy.deepcopy(m), "fp8/bf16")
    assert isinstance(q, QuantizedExperts) and isinstance(q, type(m))
    restored = dequantize_(copy.deepcopy(q))
    assert type(restored) is type(m) and set(vars(restored)) == set(vars(m))
    for (name, old), (name2, new) in zip(m.named_parameters(), restored.named_parameters(), strict=True):
        assert name == name2 and old.shape == new.shape and new.is_contiguous() and new.requires_grad
        assert torch.equal(old, new) if old.ndim < 3 else rel(new, old) < 0.04
    args = call_args()
    want = restored(*args)
    torch.testing.assert_close(q(*args), want, rtol=1e-4, atol=1e-5)
    both = quantize_(copy.deepcopy(m), "fp8")
    assert rel(both(*args), want) < 0.08


@torch.no_grad()
def test_ids_out_of_range_contribute_zero():
    q = quantize_(experts("biases", post_norm=True), "fp8/bf16")
    hidden, ids, weights = call_args()
    gone = ids.clone()
    gone[::2, 1], gone[1::3, 0], gone[4] = EXPERTS, -1, 10**6
    zeroed = torch.where((gone >= 0) & (gone < EXPERTS), weights, 0.0)
    torch.testing.assert_close(q(hidden, gone, weights), q(hidden, ids, zeroed), rtol=1e-5, atol=1e-6)
    assert not q(hidden, gone, weights)[4].any()


@torch.no_grad()
def test_num_experts_is_read_at_call_time():
    q = quantize_(experts(), "fp8/bf16")
    hidden, ids, weights = call_args()
    q.num_experts = 2
    want = dequantize_(copy.deepcopy(q))
    want.num_experts = 2
    torch.testing.assert_close(q(hidden, ids, weights), want(hidden, ids, weights), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "own gate"])
def test_argument_types_and_shapes(kind):
    q = quantize_(experts(kind), "fp8")
    hidden, ids, weights = call_args(12)
    want = q(hidden, ids, weights)
    assert torch.equal(q(hidden, ids.int(), weights), want)
    assert torch.equal(q(hidden, ids, weights.double()), want)
    assert torch.equal(q(hidden.view(3, 4, -1), ids.view(3, 4, -1), weights.view(3, 4, -1)), want.view(3, 4, -1))
    assert q(*call_args(0)).shape == (0, HIDDEN)
    assert torch.equal(q(*call_args(5, top_k=0)), torch.zeros(5, HIDDEN))
    assert q(*call_args(0, top_k=0)).shape == (0, HIDDEN)
    half = q(hidden.bfloat16(), ids, weights.bfloat16())
    assert half.dtype == torch.bfloat16 and rel(half, want) < 0.06
    with pytest.raises(ValueError, match="rows of 64, got"):
        q(hidden[:, :32], ids, weights)
    with pytest.raises(ValueError, match="topk_ids"):
        q(hidden, ids[:5], weights[:5])
    with pytest.raises(ValueError, match="topk_weights"):
        q(hidden, ids, weights[:, :1])


# ---- from_float


@torch.no_grad()
def test_from_float_takes_every_layout():
    m = experts("clamped, interleaved by its gate")
    q = QuantizedExperts.from_float(
        m.gate_up_proj, m.down_proj, "fp8/bf16", gate_up_bias=m.gate_up_proj_bias, down_bias=m.down_proj_bias,
        activation="swiglu_oai", interleaved=True, transposed=True,
    )  # fmt: skip
    args = call_args()
    torch.testing.assert_close(q(*args), quantize_(m, "fp8/bf16")(*args))
    up, down = q.dequantize(torch.bfloat16)
    assert up.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN) and down.shape == (EXPERTS, HIDDEN, INTERMEDIATE)
    assert up.dtype == down.dtype == torch.bfloat16


@torch.no_grad()
def test_from_float_is_in_canonical_layout():
    g = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, EXPERTS, INTERMEDIATE, HIDDEN, generator=g)
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=g)
    pairs = torch.stack([gate, up], 2).flatten(1, 2)  # rows alternate
    q = QuantizedExperts.from_float(pairs, down, "bf16", interleaved=True)
    assert torch.equal(q.dequantize()[0], torch.cat([gate, up], 1)) and torch.equal(q.dequantize()[1], down)


def test_from_float_errors():
    up, down = torch.randn(4, 64, 64), torch.randn(4, 64, 32)
    for args, message in [
        ((up, down[:, :, :16], "fp8"), "do not fit together"),
        ((up[0], down, "fp8"), r"\(E, N, K\) float tensors"),
        ((up.int(), down, "fp8"), r"\(E, N, K\) float tensors"),
        ((up, down, "fp9"), "unknown format 'fp9'; known: bf16, fp8"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedExperts.from_float(*args)
    with pytest.raises(ValueError, match="unknown activation"):
        QuantizedExperts.from_float(up, down, activation="sin")
    with pytest.raises(ValueError, match="both biases or neither"):
        QuantizedExperts.from_float(up, down, down_bias=torch.zeros(4, 64))
    for wrong in ({"gate_up_bias": torch.zeros(4, 3)}, {"down_bias": torch.zeros(64)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            biases = {"gate_up_bias": torch.zeros(4, 64), "down_bias": torch.zeros(4, 64)}
            QuantizedExperts.from_float(up, down, **biases | wrong)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        QuantizedExperts.from_float(up, down, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        QuantizedLinear.from_float(nn.Linear(64, 64), backend="cuda")
    for module in (nn.Conv2d(3, 3, 1), QuantizedLinear.from_float(nn.Linear(64, 64))):
        with pytest.raises(ValueError, match=f"takes a float nn.Linear, got {type(module).__name__}"):
            QuantizedLinear.from_float(module)
    with pytest.raises(ValueError, match="no float class"):
        dequantize_(nn.Sequential(QuantizedExperts.from_float(up, down)))


# ---- what a swapped module survives


@torch.no_grad()
def test_hooks_children_and_attributes_are_carried_over():
    m = experts("post norm")
    m.tag, seen = "mine", []
    handle = m.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    m.register_forward_pre_hook(lambda m, a: seen.append("before"))
    norm = m.post_expert_norm
    model = quantize_(nn.Sequential(m), "fp8")
    q = model[0]
    q(*call_args(3))
    assert seen == ["before", (3, HIDDEN)] and q.tag == "mine" and q.post_expert_norm is norm
    assert q.is_transposed is False and q.is_concatenated is True
    handle.remove()
    q(*call_args(3))
    assert seen[2:] == ["before"]


@torch.no_grad()
def test_accelerate_hooks_are_put_on_again():
    hooks = pytest.importorskip("accelerate.hooks")
    model = ToyModel()
    for m in (model.layers[0]["proj"], model.layers[0]["mlp"].experts):
        hooks.add_hook_to_module(m, hooks.AlignDevicesHook(execution_device="cpu"))
    plain = quantize_(ToyModel(), "fp8")
    quantize_(model, "fp8")
    assert hasattr(model.layers[0]["proj"], "_hf_hook")
    assert torch.equal(model(tokens()), plain(tokens()))
    dequantize_(model)
    assert torch.equal(model(tokens()), dequantize_(plain)(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["everything", "own gate", "no gate"])
def test_deepcopy_pickle_and_save(kind):
    model = quantize_(ToyModel(lambda: experts(kind)), "fp8")
    want = model(tokens())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens()), want) and same(other, model)
        e = other.get_submodule(EXPERTS_AT[0])
        assert type(e) is type(model.get_submodule(EXPERTS_AT[0])) and e.down_proj.dtype == torch.float8_e4m3fn
        assert all(p._is_hf_initialized for p in e.parameters(recurse=False))
        assert str(summary(other)) == str(summary(model))
    plain = QuantizedExperts.from_float(torch.randn(4, 64, 64), torch.randn(4, 64, 32))  # of no other class
    assert torch.equal(pickle.loads(pickle.dumps(plain))(*call_args()), plain(*call_args()))


@torch.no_grad()
def test_state_dict():
    model, other = quantize_(ToyModel(), "fp8"), ToyModel()
    for p in other.parameters():
        p.normal_()
    quantize_(other, "fp8")
    kept = other.get_submodule(EXPERTS_AT[0]).gate_up_proj
    other.load_state_dict(model.state_dict())
    assert same(other, model) and torch.equal(other(tokens()), model(tokens()))
    assert other.get_submodule(EXPERTS_AT[0]).gate_up_proj is kept  # in place
    keys = [k.rpartition(".")[2] for k in model.state_dict() if EXPERTS_AT[0] in k]
    assert sorted(keys) == ["down_proj", "down_proj_scale", "gate_up_proj", "gate_up_proj_scale"]
    before = copy.deepcopy(other)
    with pytest.raises(RuntimeError, match=r"gate_up_proj is torch.float32, this module stores torch.float8_e4m3fn"):
        other.load_state_dict(ToyModel().state_dict(), strict=False)
    assert same(other.layers[0]["mlp"].experts, before.layers[0]["mlp"].experts)
    plain = quantize_(ToyModel(), "bf16")
    with pytest.raises(RuntimeError, match=r"gate_up_proj is torch.float8_e4m3fn.*\(bf16\): codes load into"):
        plain.load_state_dict(model.state_dict(), strict=False)
    plain.bfloat16().load_state_dict(quantize_(ToyModel(), "bf16").state_dict())  # floats are cast, as usual


@torch.no_grad()
@pytest.mark.parametrize("cast", ["to", "half", "float", "double", "bfloat16"])
def test_casts_leave_codes_and_scales(cast):
    model = quantize_(ToyModel(bias=True, post_norm=True), "fp8")
    before = copy.deepcopy(model)
    (model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)())
    dtype = {"to": torch.bfloat16, "half": torch.float16, "float": torch.float32, "double": torch.float64,
             "bfloat16": torch.bfloat16}[cast]  # fmt: skip
    e, old = model.get_submodule(EXPERTS_AT[0]), before.get_submodule(EXPERTS_AT[0])
    for name in ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"):
        assert torch.equal(bits(e.get_parameter(name)), bits(old.get_parameter(name)))
        assert e.get_parameter(name).dtype == old.get_parameter(name).dtype
    assert e.gate_up_proj_bias.dtype == e.post_expert_norm.weight.dtype == model.embed.weight.dtype == dtype
    linear = model.layers[0]["proj"]
    assert linear.weight.dtype == torch.float8_e4m3fn and linear.weight_scale.dtype == torch.float32
    if cast != "double":
        assert torch.isfinite(model(tokens())).all()
    floats = dequantize_(model)
    assert {p.dtype for p in floats.parameters()} == {dtype}


@torch.no_grad()
def test_device_moves():
    model = quantize_(ToyModel(), "fp8")
    moved = copy.deepcopy(model).to("meta")
    assert all(p.device.type == "meta" for p in moved.parameters())
    assert moved.layers[0]["proj"].weight.dtype == torch.float8_e4m3fn
    assert same(quantize_(ToyModel(), "fp8", device="cpu"), model)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantizing_on_a_gpu():
    model = quantize_(ToyModel(post_norm=True, bias=True), "fp8", device="cuda")
    e = model.get_submodule(EXPERTS_AT[0])
    assert {p.device.type for p in e.parameters()} == {"cuda"} and model.embed.weight.device.type == "cpu"
    assert same(model.cpu(), quantize_(ToyModel(post_norm=True, bias=True), "fp8"))


def test_weights_are_frozen_and_biases_are_not():
    model = quantize_(ToyModel(bias=True), "fp8")
    e = model.get_submodule(EXPERTS_AT[0])
    assert {n for n, p in e.named_parameters() if p.requires_grad} == {"gate_up_proj_bias", "down_proj_bias"}
    assert model.layers[0]["proj"].bias.requires_grad and not model.layers[0]["proj"].weight.requires_grad
    frozen = ToyModel(bias=True).requires_grad_(False)
    assert not any(p.requires_grad for p in dequantize_(quantize_(frozen, "fp8")).parameters())


def test_backend_of_a_module(monkeypatch):
    e = quantize_(experts(), "fp8", backend="reference")
    assert e.backend == "reference" and "backend='reference'" in repr(e)
    e.backend = "nonsense"
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        e(*call_args())
    e.backend = None
    with moe_ops.use_backend("reference"), torch.no_grad():
        assert torch.isfinite(e(*call_args())).all()


def test_threads_may_leave_use_backend_in_any_order():
    """Of two threads inside, the first to enter leaves first: nothing of either may stay behind."""
    ours = moe_ops.use_backend("reference"), moe_ops.use_backend("reference", batch_invariant=True)
    before = resolve(None)
    with moe_ops.use_backend("auto", batch_invariant=True):
        around = resolve(None)
        for step, active in (
            (ours[0].__enter__, ("reference", False)),
            (ours[1].__enter__, ("reference", True)),
            (lambda: ours[0].__exit__(None, None, None), ("reference", True)),
            (lambda: ours[1].__exit__(None, None, None), around),
        ):
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
            assert resolve(None) == active
    assert resolve(None) == before

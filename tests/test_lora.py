"""LoRA on quantized experts through PEFT, against PEFT's own on the float model that the codes stand for."""

import copy
import pickle

import lora_cases as cases
import pytest
import tiny_models as tiny
import torch

import moe_ops

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.swap,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*", "ignore:.*Could not find a config file.*"),
]


@pytest.mark.parametrize("family", [name for name in cases.FAMILIES if name in tiny.INSTALLED])
def test_same_step_and_same_files_as_on_the_float_model(family, tmp_path):
    """Logits, every gradient, names and shapes; through a file from quantized to float, and back."""
    model = cases.quantized(family)
    floats = cases.same_in_float(model)
    mine = cases.adapted(model)
    theirs = cases.carried_over(mine, floats, tmp_path / "there")
    x = tiny.inputs(model)
    cases.assert_same_step(mine, theirs, x)
    back = cases.carried_over(cases.fill_(theirs, seed=5), cases.quantized(family), tmp_path / "back")
    cases.assert_same_step(back, theirs, x)


@pytest.mark.parametrize("fmt", cases.WEIGHT_ONLY)
def test_every_format(fmt, tmp_path):
    model = cases.quantized("qwen3_moe", fmt, hidden_size=128, moe_intermediate_size=128)
    floats = cases.same_in_float(model)
    mine = cases.adapted(model)
    theirs = cases.carried_over(mine, floats, tmp_path)
    cases.assert_same_step(mine, theirs, tiny.inputs(model))


@pytest.mark.parametrize("family", ["dbrx", "nllb_moe", "switch_transformers"])
def test_experts_stored_under_names_of_our_own(family):
    """PEFT has no layer to compare with here; weights to which the products were added by hand are the same."""
    mine = cases.adapted(cases.quantized(family, "bf16")).eval()
    by_hand = copy.deepcopy(mine)
    layers = [m for m in by_hand.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)]
    with torch.no_grad():
        for layer in layers:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (E * r, in), (out, r * E)
            weight = getattr(layer.get_base_layer(), layer.parameter_name)  # (E, out, in)
            e = weight.shape[0]
            weight += 2.0 * torch.einsum("ore,eri->eoi", b.unflatten(1, (4, e)), a.unflatten(0, (e, 4)))
    x = tiny.inputs(by_hand.get_base_model())
    want, bare = tiny.run(by_hand.unload(), **x), tiny.run(copy.deepcopy(mine).unload(), **x)
    assert len(layers) >= 2 and tiny.relative_error(want, bare) > 0.01
    assert tiny.relative_error(tiny.run(mine, **x), want) < 1e-5


def test_scales_several_adapters_and_none():
    """use_rslora, rank and alpha patterns, two adapters at once, set_, disable_ and delete_adapter, unload."""
    model = cases.quantized("qwen3_moe")
    floats = cases.same_in_float(model)
    x, bare = tiny.inputs(model), tiny.run(model)
    pair = []
    for base in (model, floats):
        first = cases.config(base, use_rslora=True, alpha_pattern={"down_proj": 3}, rank_pattern={"gate_up_proj": 2})
        made = peft.get_peft_model(base, first)
        made.add_adapter("other", cases.config(base, r=2))
        pair.append(cases.fill_(made))
    mine, theirs = pair
    layer = mine.get_base_model().model.layers[0].mlp.experts
    assert (layer.r, layer.base_layer.r) == ({"default": 4, "other": 2}, {"default": 2, "other": 2})
    assert layer.scaling == {"default": 3 / 2, "other": 4.0}
    for active in ("default", "other", ["default", "other"]):
        for made in pair:
            made.base_model.set_adapter(active)
        cases.assert_same_step(mine, theirs, x)
    with mine.disable_adapter():
        assert torch.equal(tiny.run(mine, **x), bare)
    for made in pair:
        made.base_model.set_adapter("other")
        made.delete_adapter("default")
    cases.assert_same_step(mine, theirs, x)
    assert torch.equal(tiny.run(mine.unload(), **x), bare)
    assert not any(m.adapters for m in model.modules() if isinstance(m, moe_ops.QuantizedExperts))


def test_dropout():
    """Rows are dropped, the same ones for every expert; evaluation is without."""
    model = cases.quantized("qwen3_moe")
    mine = cases.adapted(model, lora_dropout=0.5)
    plain = cases.adapted(cases.quantized("qwen3_moe"))
    x = tiny.inputs(model)
    want = tiny.run(plain.eval(), **x)
    assert torch.equal(tiny.run(mine.eval(), **x), want)
    mine.train()
    torch.manual_seed(3)
    one, other = tiny.run(mine, **x), tiny.run(mine, **x)
    assert tiny.relative_error(one, want) > 0.01 and tiny.relative_error(one, other) > 0.01
    torch.manual_seed(3)
    assert torch.equal(tiny.run(mine, **x), one)
    layer = next(m for m in mine.modules() if isinstance(m, peft.tuners.lora.ParamWrapper))
    rows, offsets = torch.ones(400, layer.in_features), torch.tensor([0, 100, 200, 300, 400], dtype=torch.int32)
    seen = []
    layer.lora_dropout["default"].register_forward_hook(lambda m, args, out: seen.append(out))
    layer.added(rows, offsets, {})
    (kept,) = seen
    assert set(kept.unique().tolist()) == {0.0, 2.0} and 0.45 < float((kept > 0).float().mean()) < 0.55


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compiled_and_checkpointed(family):
    model = cases.quantized(family, num_hidden_layers=1)
    mine = cases.adapted(model, target_modules=["q_proj"])
    x = tiny.inputs(model)
    mine.train()
    want, grads = cases.gradients(mine, x)
    for checkpointed, compiled in ((False, True), (True, False), (True, True)):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # a hook of transformers that Dynamo does not take
        torch._dynamo.reset()
        again = torch.compile(mine, backend="aot_eager", fullgraph=True) if compiled else mine
        out, found = cases.gradients(again, x)
        found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
        torch.testing.assert_close(out, want)
        assert set(found) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad)


def test_in_bf16_and_autocast():
    """Factors stay in fp32, products run in the type of the rows: as exact as PEFT's own in that type."""
    size = {"hidden_size": 128, "num_hidden_layers": 1}
    exact = cases.adapted(cases.quantized("qwen3_moe", **size))
    x = tiny.inputs(exact.get_base_model())
    want, grads = cases.gradients(exact, x)
    model = moe_ops.quantize_(tiny.build("qwen3_moe", **size).bfloat16(), {"experts": "fp8/bf16"})
    theirs = cases.adapted(cases.same_in_float(model))
    mine = cases.adapted(model)
    assert {p.dtype for name, p in mine.named_parameters() if "lora_" in name} == {torch.float32}
    for wrapped in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=wrapped):
            out, found = cases.gradients(mine, x)
            their_out, their_grads = cases.gradients(theirs, x)
        assert out.dtype == torch.bfloat16
        assert tiny.relative_error(out, want) < 1.5 * tiny.relative_error(their_out, want)
        for name, grad in grads.items():
            assert found[name].dtype == torch.float32
            assert tiny.relative_error(found[name], grad) < 1.5 * tiny.relative_error(their_grads[name], grad) + 1e-3
    other = cases.config(model)
    mine.add_adapter("cast", other, autocast_adapter_dtype=False)
    assert {p.dtype for name, p in mine.named_parameters() if ".cast." in name} == {torch.bfloat16}


@pytest.mark.parametrize("fmt", ["fp8_tensor", "int8/int8", "nvfp4"])
def test_static_scales_of_activations(fmt):
    """As checkpoints have them: what the fused layer gives without an adapter, gradients straight through."""
    model = cases.quantized("qwen3_moe", fmt, num_hidden_layers=1)
    experts = model.model.layers[0].mlp.experts
    for name, scale in (("gate_up_proj", 0.01), ("down_proj", 0.003)):
        scales = torch.full((4,), scale) * torch.arange(1, 5)
        experts._parameters[f"{name}_input_scale"] = torch.nn.Parameter(scales, requires_grad=False)
    ids = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0], [2, 0], [1, 3]])
    x, weights = torch.randn(6, 64), torch.rand(6, 2)

    def step(module):
        rows, shares = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = module(rows, ids, shares)
        (out * torch.arange(64)).sum().backward()
        return out.detach(), rows.grad, shares.grad

    want = step(experts)
    made = cases.adapted(model)
    layer = model.model.layers[0].mlp.experts
    moved = step(layer)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    for got, other, wanted in zip(step(layer), moved, want):
        assert tiny.relative_error(got, wanted) < 1e-4 < tiny.relative_error(other, wanted)
    assert layer.lora_B["default"].weight.grad.norm() > 0 and layer.base_layer.lora_B["default"].weight.grad.norm() > 0


def test_copies_and_pickles():
    mine = cases.adapted(cases.quantized("qwen3_moe"))
    x = tiny.inputs(mine.get_base_model())
    want = tiny.run(mine, **x)
    for made in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(tiny.run(made, **x), want)
        with torch.no_grad():
            for name, p in made.named_parameters():
                if "lora_B" in name:
                    p.mul_(2.0)
        assert not torch.equal(tiny.run(made, **x), want) and torch.equal(tiny.run(mine, **x), want)


def test_no_matrix_of_an_expert_is_made():
    """A step's largest tensor is a matter of rows and factors, and not of the experts' weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not str(func).startswith("moe_ops"):
                floats = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
                self.seen = max([self.seen, *(t.numel() for t in floats if t.is_floating_point())])
            return out

    def largest(base):
        layers = cases.adapted(base, r=2).get_base_model().model.layers
        with Largest() as mode:
            layers[0].mlp(torch.randn(1, 8, 64, requires_grad=True)).sum().backward()
        return mode.seen

    model = cases.quantized("qwen3_moe", moe_intermediate_size=512)
    weight = 4 * 1024 * 64
    floats = cases.same_in_float(model)
    assert largest(model) < weight / 8 < weight <= largest(floats)


def test_quantized_under_adapters_that_were_there():
    """quantize_ of a model that PEFT has wrapped: its layers become ours, and PEFT's again after dequantize_."""
    model = tiny.build("gpt_oss")
    mine = cases.adapted(model, target_modules=["q_proj"])
    kinds = [type(m) for m in mine.modules()]
    x = tiny.inputs(model)
    moe_ops.quantize_(mine, "fp8/bf16")
    theirs = moe_ops.dequantize_(copy.deepcopy(mine))
    assert [type(m) for m in theirs.modules()] == kinds
    for a, b in zip(mine.modules(), theirs.modules()):
        if isinstance(a, peft.tuners.lora.ParamWrapper):  # PEFT's own words for what is added: (E, out, in) on codes
            torch.testing.assert_close(a.get_delta_weight("default").mT, b.get_delta_weight("default"))
    cases.assert_same_step(mine, theirs, x)
    want, bare = tiny.run(mine, **x), tiny.run(copy.deepcopy(mine).unload(), **x)
    with pytest.warns(UserWarning, match="into 6 quantized weights"):
        merged = tiny.run(mine.merge_and_unload(), **x)
    assert tiny.relative_error(merged, want) < tiny.relative_error(bare, want) / 3


def test_transformers_own_way_to_add_adapters(tmp_path):
    """model.add_adapter, save_pretrained, load_adapter: PEFT without its wrapper around the model."""
    model = cases.quantized("qwen3_moe")
    x, bare = tiny.inputs(model), tiny.run(model)
    model.add_adapter(cases.config(model))
    cases.fill_(model)
    want = tiny.run(model, **x)
    assert tiny.relative_error(want, bare) > 0.01
    model.save_pretrained(tmp_path)
    again = cases.quantized("qwen3_moe")
    again.load_adapter(str(tmp_path))
    assert torch.equal(tiny.run(again, **x), want)


def test_adapters_for_experts_that_were_modules_of_their_own(tmp_path):
    """Files made with transformers 4, an adapter for each expert's w1, w2 and w3: PEFT converts them."""
    from safetensors.torch import save_file

    model = cases.quantized("mixtral")
    floats = cases.same_in_float(model)
    h, i, layers, experts = 64, 32, 2, model.config.num_local_experts
    i = model.config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, n, k in (("w1", i, h), ("w3", i, h), ("w2", h, i)):
        for layer in range(layers):
            for e in range(experts):
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, k, generator=generator) * k**-0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(n, 4, generator=generator) * 0.5
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["w1", "w2", "w3"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    x, bare = tiny.inputs(model), tiny.run(model)
    mine, theirs = (peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True) for base in (model, floats))
    cases.assert_same_step(mine, theirs, x)
    assert tiny.relative_error(tiny.run(mine, **x), bare) > 0.01

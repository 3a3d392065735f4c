"""What families do beyond the product of routed experts: routers and their losses, checkpointing, ids of no expert,
experts that return their input, weights on the input, dropout.
"""

import copy

import pytest
import tiny_models as tiny
import torch
from tiny_models import relative_error as rel

import moe_ops
from moe_ops.blocks import RoutedBlock

pytestmark = pytest.mark.swap

TRAINED = ["qwen3_moe", "gpt_oss", "llama4", "dbrx", "jetmoe", "longcat_flash", "step3p7"]


def built(name, **config):
    if name not in tiny.INSTALLED:
        pytest.skip("not in this transformers")
    return tiny.build(name, **config)


def pair(name, fmt="int8", **config):
    """Quantized experts, and the family's own code on the same values."""
    new = moe_ops.quantize_(built(name, **config), {"experts": fmt})
    return new, moe_ops.dequantize_(copy.deepcopy(new))


def experts(name, model):
    return model.get_submodule(sorted(tiny.experts_at(name, model))[0])


def rows(num_tokens, hidden=64, seed=0):
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(seed))


# ---- ids


@torch.no_grad()
def test_experts_that_return_their_input():
    new, floats = pair("longcat_flash", "fp8/bf16")
    q, own = experts("longcat_flash", new), experts("longcat_flash", floats)
    num_experts, identities = own.num_routed_experts, own.zero_expert_num
    x, weights = rows(9), torch.rand(9, 2)
    ids = torch.arange(18).view(9, 2) % (num_experts + identities)
    torch.testing.assert_close(q(x, ids, weights), own(x, ids, weights), rtol=1e-4, atol=1e-5)
    same = torch.full_like(ids, num_experts + identities - 1)
    assert torch.equal(q(x, same, weights), x * weights.sum(-1, keepdim=True))
    assert not q(x, same + 1, weights).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "aria", "step3p7", "dbrx", "longcat_flash", "nemotron_h"])
def test_ids_of_other_devices_contribute_zero(name):
    """Expert parallelism gives the id num_experts to what is not here, and lowers num_experts of a shard."""
    new = moe_ops.quantize_(built(name), {"experts": "fp8/bf16"})
    m = experts(name, new)
    if m.spec.call != "topk":
        pytest.skip("called with sorted rows in this transformers")
    spec = m.spec
    x, weights = rows(6, spec.hidden_size), torch.rand(6, 2) + 0.1
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    gone, none = ids.clone(), spec.num_experts + spec.identities
    gone[1, 0], gone[3] = none, torch.tensor([none, none + 5])
    kept = weights.clone()
    kept[1, 0], kept[3] = 0.0, 0.0
    torch.testing.assert_close(m(x, gone, weights), m(x, ids, kept), rtol=1e-5, atol=1e-6)
    assert not m(x, gone, weights)[3].any()
    if spec.identities:
        return
    m.num_experts = 2
    got = m(x, ids, weights)
    m.num_experts = spec.num_experts
    torch.testing.assert_close(got, m(x, ids, torch.where(ids < 2, weights, 0.0)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_beyond_the_capacity_of_an_expert():
    """A router that drops them hands in rows of zeros instead of a one-hot id."""
    new, floats = pair("switch_transformers", "fp8/bf16")
    q, own = experts("switch_transformers", new), experts("switch_transformers", floats)
    x, weights = rows(8), torch.rand(8, 1) + 0.1
    mask = torch.nn.functional.one_hot(torch.arange(8)[:, None] % 4, 4)
    mask[2:4] = 0
    torch.testing.assert_close(q(x, mask, weights), own(x, mask, weights), rtol=1e-4, atol=1e-5)
    assert not q(x, mask, weights)[2:4].any()


# ---- weights on the input


@torch.no_grad()
def test_only_routed_rows_are_computed():
    """An expert of NaN that no token is routed to: the family's own code runs it on rows of zeros, and sums NaN."""
    new, floats = pair("llama4", "bf16")
    block, own = (m.model.layers[0].feed_forward for m in (new, floats))
    assert isinstance(block, RoutedBlock) and not isinstance(own, RoutedBlock)
    x = rows(40)
    top = own(x[None])[1].topk(own.top_k, -1).indices
    x = x[(top != 3).all(-1)][None]
    want = own(x)[0]
    assert 5 < x.shape[1] < 35
    for experts in (block.experts, own.experts):
        experts.gate_up_proj[3] = float("nan")
    assert torch.isnan(own(x)[0]).all()
    torch.testing.assert_close(block(x)[0], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dense_call():
    """The experts alone still take the rows of every expert, as the block gave them to the float module."""
    new, floats = pair("llama4", "fp8/bf16")
    q, own = experts("llama4", new), experts("llama4", floats)
    x = rows(own.num_experts * 5)
    torch.testing.assert_close(q(x), own(x), rtol=1e-4, atol=1e-5)
    assert rel(q(x), own(x.roll(5, 0)).roll(-5, 0)) > 0.5  # each expert its own


# ---- training


def gradients(model, checkpointing=False):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tiny.run(model, **tiny.inputs(model)).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_and_checkpointing(name):
    """Of routers, embeddings and whatever is below the experts: as in the family's own code, checkpointed or not."""
    new, floats = pair(name)
    again = copy.deepcopy(new)
    got, want = gradients(new), gradients(floats)
    own = [(at, floats.get_submodule(at)) for at in tiny.experts_at(name, floats)]
    weights = {f"{at}.{n}" for at, m in own for n, _ in m.named_parameters()}
    assert set(want) - set(got) == {n for n in weights if not n.endswith("bias")}
    assert any("embed" in n or "wte" in n for n in got) and any("router" in n or "gate." in n for n in got)
    for n, g in got.items():
        w = torch.cat([want[n][:, ::2], want[n][:, 1::2]], -1) if n.endswith("gate_up_proj_bias") else want[n]
        assert rel(g, w) < 1e-3 or w.norm() < 1e-7, n
    if not new.supports_gradient_checkpointing:
        return
    checkpointed = gradients(again, checkpointing=True)
    assert set(checkpointed) == set(got)
    for n, g in got.items():
        torch.testing.assert_close(checkpointed[n], g, rtol=1e-4, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("name", ["switch_transformers", "nllb_moe"])
def test_dropout_in_experts(name):
    """In training as in the family's own code: random, and the same on average."""
    new, floats = pair(name, "fp8/bf16")
    m, own = experts(name, new), experts(name, floats)
    assert (m.spec.dropout, m.spec.row_dropout) == ((0.1, 0.0) if name == "switch_transformers" else (0.0, 0.2))
    x, ids, weights = rows(12), torch.arange(12)[:, None] % 2, torch.rand(12, 1) + 0.5
    args = (x, torch.nn.functional.one_hot(ids, 4), weights) if m.spec.call == "mask" else (x, ids, weights)
    torch.testing.assert_close(m(*args), own(*args), rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    drawn, want = (torch.stack([e.train()(*args) for _ in range(300)]) for e in (m, own))
    assert rel(drawn[0], drawn[1]) > 0.2 and rel(drawn.mean(0), want.mean(0)) < 0.07
    assert float(drawn.std(0).mean()) == pytest.approx(float(want.std(0).mean()), rel=0.05)


# ---- routers


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "jetmoe", "llama4", "dbrx"])
def test_router_logits_and_auxiliary_loss(name):
    """Hooks on routers, and on blocks that return logits, still see them; losses are those of the family's code."""
    new, floats = pair(name, "fp8/bf16", output_router_logits=True)
    args = {**tiny.inputs(new), "labels": tiny.inputs(new)["input_ids"]}
    try:
        want = floats(**args)
    except AttributeError:
        pytest.skip("this transformers' own code fails")
    got = new(**args)
    if getattr(want, "router_logits", None) is None:
        pytest.skip("this transformers records none")
    assert len(got.router_logits) == len(want.router_logits) > 0
    for g, w in zip(got.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)
    if getattr(want, "aux_loss", None) is not None and torch.is_tensor(want.aux_loss):
        assert float(want.aux_loss) > 0
        torch.testing.assert_close(got.aux_loss, want.aux_loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=1e-4)


# ---- published meaning


@torch.no_grad()
def test_interleaved_clamped_gates_with_biases_mean_what_was_published():
    """gate and up alternate; (clamp(up) + 1) * gate * sigmoid(1.702 gate), at most 7; against the float weights."""
    model = built("gpt_oss")
    old = experts("gpt_oss", model)
    for name, p in old.named_parameters():
        p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    new = experts("gpt_oss", moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8/bf16"}))
    x, weights, ids = rows(10) * 3, torch.rand(10, 2), torch.arange(20).view(10, 2) % old.num_experts
    want, clamped = torch.zeros_like(x, dtype=torch.float64), 0
    for t in range(10):
        for a in range(2):
            e = int(ids[t, a])
            h = x[t].double() @ old.gate_up_proj[e].double() + old.gate_up_proj_bias[e].double()
            gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
            clamped += int((h[::2] > 7).sum())
            y = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ old.down_proj[e].double()
            want[t] += weights[t, a].double() * (y + old.down_proj_bias[e].double())
    assert clamped > 10 and rel(old(x, ids, weights), want) < 1e-5
    assert 1e-3 < rel(new(x, ids, weights), want) < 0.05
    both = experts("gpt_oss", moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8"}))
    assert rel(both(x, ids, weights), want) < 0.08


@torch.no_grad()
def test_a_clamp_after_the_activation_is_a_gate_of_its_own():
    model = built("step3p7")
    experts("step3p7", model).limit = 0.05
    new = moe_ops.quantize_(model, {"experts": "fp8/bf16"})
    floats = moe_ops.dequantize_(copy.deepcopy(new))
    q, own = experts("step3p7", new), experts("step3p7", floats)
    assert q.spec.gate is None and q.spec.checked
    x, ids, weights = rows(8) * 30, torch.arange(16).view(8, 2) % 4, torch.rand(8, 2)
    torch.testing.assert_close(q(x, ids, weights), own(x, ids, weights), rtol=1e-4, atol=1e-5)
    own.limit = float("inf")
    assert rel(own(x, ids, weights), q(x, ids, weights)) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["afmoe", "qwen2_moe", "deepseek_v3", "llama4", "step3p7"])
def test_shared_experts_and_dense_mlps_are_quantized_linears(name):
    model = moe_ops.quantize_(built(name), "fp8")
    linears = {n for n, m in model.named_modules() if isinstance(m, moe_ops.QuantizedLinear)}
    shared = {n for n in linears if ".shared_expert" in n}
    assert len(shared) >= 3 and all(n.endswith(("gate_proj", "up_proj", "down_proj")) for n in shared)
    assert not [n for n in linears if "router" in n or n.endswith(".gate")]
    assert torch.isfinite(tiny.run(model)).all()


# ---- what a loader sees: the same reading, before any weight is there


@pytest.mark.parametrize("name", [n for n in tiny.OTHER if n in tiny.UNFLAGGED])
def test_reading_without_weights(name):
    model = built(name)
    with_weights = moe_ops.quantize_(copy.deepcopy(model), {"experts": "fp8"})
    empty = moe_ops.quantize.skeleton_(model.to("meta"), {"experts": "fp8"})
    assert [(n, type(m)) for n, m in empty.named_modules()] == [(n, type(m)) for n, m in with_weights.named_modules()]
    want = {n: (p.shape, p.dtype) for n, p in with_weights.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == want


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in tiny.UNFLAGGED if n in tiny.OTHER and n != "longcat_flash"])
def test_loaded_quantized_and_saved(name, tmp_path):
    """Streamed from a float checkpoint as quantized in memory; and from what it saves, bit for bit."""
    from moe_ops.huggingface import MoeOpsConfig

    model = built(name)
    model.save_pretrained(tmp_path / "float")
    want = moe_ops.quantize_(copy.deepcopy(model), "fp8").state_dict()
    config = MoeOpsConfig("fp8")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "quantized")
    for m in (loaded, type(model).from_pretrained(tmp_path / "quantized")):
        got = m.state_dict()
        assert set(got) == set(want)
        assert all(torch.equal(got[k].view(torch.uint8), v.view(torch.uint8)) for k, v in want.items())

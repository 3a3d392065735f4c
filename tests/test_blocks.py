"""Experts in lists: read by running the block with stand-ins for them, stacked, and routed by their own router."""

import copy
import pickle

import pytest
import torch
from torch import nn
from toy_moe import EXPERTS, HIDDEN, ListBlock, Mlp, SortedBlock, bits
from toy_moe import relative_error as rel

from moe_ops import QuantizedExperts, QuantizedLinear, dequantize_, quantize_, summary
from moe_ops.adapters import read, read_routing
from moe_ops.blocks import RoutedBlock

BLOCKS = {
    "softmax, normalised": {},
    "softmax": {"normalised": False},
    "top-k first": {"routing": "topk first"},
    "sigmoid": {"routing": "sigmoid"},
    "sigmoid, not normalised": {"routing": "sigmoid", "normalised": False},
    "a module that returns ids and weights": {"routing": "module", "shared": "added"},
    "corrected for the choice": {"routing": "corrected"},
    "shared, weighed": {"shared": "gated", "returns": "tensor"},
    "biases": {"bias": True},
    "a factor beside the router": {"factor": 2.5, "shared": "added", "routing": "sigmoid"},
    "squares": {"intermediate": HIDDEN},
    "identities": {"identities": 2},
    "gelu": {"act_fn": nn.GELU()},
    "own activation": {"act_fn": nn.Softsign(), "routing": "module"},
}


def block(**kwargs):
    torch.manual_seed(0)
    return ListBlock(**kwargs).eval()


def rows(dtype=torch.float32):
    return torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


@torch.no_grad()
@pytest.mark.parametrize("kind", BLOCKS)
def test_lists_of_experts(kind):
    """The block's own loop on the dequantized weights is what the op must compute, and what else it returns."""
    old = block(**BLOCKS[kind])
    new = quantize_(copy.deepcopy(old), {"experts": "fp8/bf16"})
    assert isinstance(new, RoutedBlock) and isinstance(new, ListBlock)
    assert isinstance(new.experts, QuantizedExperts) and isinstance(new.experts, nn.ModuleList)
    assert len(new.experts) == EXPERTS and new.experts.gate_up_proj.shape[::2] == (EXPERTS, HIDDEN)
    assert [r.name for r in summary(new).rows if r.format] == ["experts"]

    floats = dequantize_(copy.deepcopy(new))
    assert [(n, type(m)) for n, m in floats.named_modules()] == [(n, type(m)) for n, m in old.named_modules()]
    for (name, p), (name2, q) in zip(old.named_parameters(), floats.named_parameters(), strict=True):
        assert name == name2 and p.shape == q.shape and q.requires_grad and rel(q, p) < 0.04
    got, want = outputs(new(rows())), outputs(floats(rows()))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert rel(outputs(quantize_(copy.deepcopy(old), {"experts": "fp8"})(rows()))[0], want[0]) < 0.08

    torch._dynamo.reset()
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)(rows())
    torch.testing.assert_close(outputs(compiled)[0], got[0], rtol=1e-4, atol=1e-5)
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert type(again) is type(new) and torch.equal(outputs(again(rows()))[0], got[0])


@pytest.mark.parametrize("kind", ["softmax, normalised", "shared, weighed", "a module that returns ids and weights"])
def test_gradients(kind):
    """To the input, the router and the shared expert, as through the block's own loop on the same weights."""
    new = quantize_(block(**BLOCKS[kind]), {"experts": "int8"}).train()
    floats = dequantize_(copy.deepcopy(new))
    grads = []
    for m in (new, floats):
        x = rows().requires_grad_()
        outputs(m(x))[0].square().sum().backward()
        own = {n: p.grad for n, p in m.named_parameters() if p.grad is not None and not n.startswith("experts")}
        grads.append({"x": x.grad, **own})
    assert set(grads[0]) == set(grads[1]) and len(grads[0]) > 1
    for name, g in grads[0].items():
        assert rel(g, grads[1][name]) < 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("router", [torch.bfloat16, torch.float32])
def test_low_precision_models(router):
    """The routing is read in fp32, and runs in what the model has; a router kept in fp32 is given fp32."""
    old = block(shared="gated").bfloat16()
    old.gate.to(router)
    new = quantize_(copy.deepcopy(old), {"experts": "fp8/bf16"})
    assert isinstance(new, RoutedBlock) and new.gate.weight.dtype == router
    floats = dequantize_(copy.deepcopy(new))
    got, want = new(rows(torch.bfloat16)), floats(rows(torch.bfloat16))
    assert got[0].dtype == torch.bfloat16 and rel(got[0], want[0]) < 0.01
    assert got[1].dtype == router and torch.equal(got[1], want[1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"routing": "threshold"}, "gives tokens different numbers of experts"),
        ({"routing": "squared"}, "the routing of ListBlock is none of those that are known"),
    ],
)
def test_routing_that_is_not_known(broken, why):
    """Then its Linears are quantized one by one, in the format of experts, and the summary says why."""
    old = block(**broken)
    new = quantize_(copy.deepcopy(old), {"experts": "fp8/bf16"})
    assert type(new) is ListBlock and type(new.experts) is nn.ModuleList
    assert all(isinstance(m, QuantizedLinear) for e in new.experts for m in (e.w1, e.w2, e.w3))
    notes = {r.name: r.note for r in summary(new).rows}
    assert notes["experts"] == f"its Linears one by one: ListBlock {why}" or notes["experts"].endswith(why)
    again = {n: id(m) for n, m in new.named_modules()}
    quantize_(new, {"experts": "fp8/bf16"})
    assert {n: id(m) for n, m in new.named_modules()} == again
    assert rel(new(rows())[0], old(rows())[0]) < 0.08
    assert type(dequantize_(new).experts[0].w1) is nn.Linear


def test_what_is_other_in_training_is_not_computed_in_silence():
    new = quantize_(block(noise=0.1), {"experts": "fp8"})
    assert torch.isfinite(new(rows())[0]).all()
    with pytest.raises(NotImplementedError, match=r"ListBlock does something else in training.*\.eval\(\)"):
        new.train()(rows())
    assert torch.isfinite(quantize_(block(), {"experts": "fp8"}).train()(rows())[0]).all()


def test_dropout_between_the_projections():
    """Only in training, and then its mean is what comes without."""
    old = block(dropout=0.5).train()  # what is read does not depend on it
    new = quantize_(old, {"experts": "fp8/bf16"})
    assert isinstance(new, RoutedBlock) and new.training and new.experts.spec.dropout == 0.5
    new.eval()
    plain = quantize_(block(), {"experts": "fp8/bf16"})
    with torch.no_grad():
        want = plain(rows())[0]
        torch.testing.assert_close(new(rows())[0], want)
        torch.manual_seed(0)
        drawn = torch.stack([new.train()(rows())[0] for _ in range(400)])
        assert rel(drawn[0], want) > 0.2 and rel(drawn.mean(0), want) < 0.15


class Odd(Mlp):
    """A gate that no entry of ACTIVATIONS describes, and that mixes nothing."""

    def forward(self, x):
        return self.w2(self.w1(x).square() * self.w3(x).tanh())


class Normed(Mlp):
    """Not an MLP between Linears alone: a norm before them."""

    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, (HIDDEN,)))


class Mixed(Mlp):
    """Reads its input twice."""

    def forward(self, x):
        return super().forward(x) + x


class Backwards(nn.Module):
    """Square, without a gate, its Linears held in the other order than they run in."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.last(self.first(x).relu().square())


class DroppedLater(Mlp):
    """Its dropout is of the output, and not between the projections."""

    def __init__(self):
        super().__init__(dropout=0.1)

    def forward(self, x):
        return self.dropout(self.w2(self.act_fn(self.w1(x)) * self.w3(x)))


@torch.no_grad()
def test_experts_are_compared_before_they_are_believed():
    old = block()
    old.experts = nn.ModuleList(Odd() for _ in range(EXPERTS))
    new = quantize_(copy.deepcopy(old), {"experts": "fp8/bf16"})
    assert new.experts.spec.gate is None
    torch.testing.assert_close(new(rows())[0], dequantize_(copy.deepcopy(new))(rows())[0], rtol=1e-4, atol=1e-5)
    old.experts = nn.ModuleList(Backwards() for _ in range(EXPERTS))
    new = quantize_(copy.deepcopy(old), {"experts": "fp8/bf16"})
    assert isinstance(new, RoutedBlock) and new.experts.spec.gate.activation == "relu2"
    torch.testing.assert_close(new(rows())[0], dequantize_(copy.deepcopy(new))(rows())[0], rtol=1e-4, atol=1e-5)
    for kind in (Normed, Mixed, DroppedLater):
        old.experts = nn.ModuleList(kind() for _ in range(EXPERTS))
        new = quantize_(copy.deepcopy(old), {"experts": "fp8"})
        assert type(new) is ListBlock and isinstance(new.experts[0].w1, QuantizedLinear)
        note = {r.name: r.note for r in summary(new).rows}["experts"]
        assert note.startswith("its Linears one by one: ")


@torch.no_grad()
def test_patterns_name_the_experts():
    model = nn.ModuleDict({"a": block(), "b": block()})
    quantize_(model, "fp8", ignore="a.experts")
    assert type(model["a"]) is ListBlock and isinstance(model["b"], RoutedBlock)
    notes = {r.name: r.note for r in summary(model).rows}
    assert notes["a.experts"] == "ignored (a.experts)" and notes["a.gate"] == notes["b.gate"] == "router"
    assert not any(isinstance(m, QuantizedLinear) for m in model["a"].modules())


@torch.no_grad()
def test_state_dict_and_hooks():
    new, other = (quantize_(block(), {"experts": "fp8"}) for _ in range(2))
    state = new.state_dict()
    assert {"experts.gate_up_proj", "experts.gate_up_proj_scale", "gate.weight"} <= set(state)
    for p in other.parameters():
        bits(p.data).zero_()
    other.load_state_dict(state)
    assert torch.equal(other(rows())[0], new(rows())[0])
    seen = []
    new.gate.register_forward_hook(lambda m, args, out: seen.append(out))
    logits = new(rows())[1]
    assert len(seen) == 1 and torch.equal(seen[0], logits) and logits.shape == (14, EXPERTS)


@torch.no_grad()
def test_a_block_with_a_hook_keeps_it_and_one_with_a_forward_of_its_own_is_not_read():
    old, seen = block(), []
    old.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    quantize_(old, {"experts": "fp8"})(rows())
    assert len(seen) == 1 and issubclass(seen[0], RoutedBlock)
    other = block()
    other.forward = lambda x: ListBlock.forward(other, x)
    quantize_(other, {"experts": "fp8"})
    assert type(other) is ListBlock and isinstance(other.experts[0].w1, QuantizedLinear)


@torch.no_grad()
def test_remote_code_that_sorts_rows():
    torch.manual_seed(0)
    old = SortedBlock().eval()
    new = quantize_(copy.deepcopy(old), {"experts": "fp8/bf16"})
    assert isinstance(new, RoutedBlock)
    want = dequantize_(copy.deepcopy(new))(rows())
    torch.testing.assert_close(new(rows()), want, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(new, backend="aot_eager", fullgraph=True)(rows()), new(rows()))
    with pytest.raises(NotImplementedError, match="SortedBlock does something else in training"):
        new.train()(rows())


@torch.no_grad()
def test_a_hook_of_accelerate_moves_over():
    hooks = pytest.importorskip("accelerate.hooks")

    class Twice(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (2 * args[0],), kwargs

    plain = quantize_(block(), {"experts": "fp8/bf16"})
    hooked = block()
    hooks.add_hook_to_module(hooked, Twice())
    quantize_(hooked, {"experts": "fp8/bf16"})
    assert isinstance(hooked, RoutedBlock)
    torch.testing.assert_close(hooked(rows())[0], plain(2 * rows())[0])
    dequantize_(hooked)
    assert type(hooked) is ListBlock
    torch.testing.assert_close(hooked(rows())[0], plain(2 * rows())[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reading_leaves_no_trace():
    """Neither in random numbers nor in modules; experts, big as they are, are not run."""
    old, state, calls = block(shared="gated"), torch.get_rng_state(), []
    before = copy.deepcopy(old.state_dict())
    for m in old.modules():
        m.register_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    spec = read(old.experts)
    assert set(calls) <= {"Linear", "SiLU", "Dropout", "Mlp"} and len(calls) < 60  # two experts, compared
    calls.clear()
    read_routing(old, "experts", spec)
    assert not calls and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(old.state_dict()[k], v) for k, v in before.items())

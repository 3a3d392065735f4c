"""Experts without flags: what their shapes leave open is found by evaluating them. The oracle is their own loop."""

import copy
import pickle

import pytest
import torch
from toy_moe import EXPERTS, HIDDEN, RowsOfAllExperts, UnflaggedExperts, call_args
from toy_moe import relative_error as rel

from moe_ops import dequantize_, quantize_, summary
from moe_ops.adapters import CannotAdapt, read

KINDS = {
    "silu, nowhere but in the code": {},
    "transposed": {"transposed": True},
    "biases": {"bias": True, "transposed": True},
    "an activation as a module": {"gate": "module"},
    "alternating columns, clamped": {"gate": "oai", "bias": True},
    "no gate": {"gate": "relu2"},
    "a weight for every expert": {"call": "scores"},
    "a weight for every expert, first": {"call": "swapped scores", "gate": "oai"},
    "experts that return their input": {"identities": 3},
    "the second projection is named first": {"names": ("z_up", "a_down")},
}


def made(**kwargs):
    torch.manual_seed(0)
    return UnflaggedExperts(**kwargs)


def arguments(m, dtype=torch.float32):
    hidden, ids, weights = call_args(num_experts=EXPERTS + m.identities, dtype=dtype)
    if m.call == "topk":
        return {"hidden": hidden, "second": ids, "third": weights}
    scores = torch.zeros(len(ids), EXPERTS).scatter(1, ids, weights)
    return {"hidden": hidden, **dict(zip(("second", "third"), (ids, scores)[:: 1 if m.call == "scores" else -1]))}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_shapes_leave_open(kind):
    old = made(**KINDS[kind])
    new = quantize_(copy.deepcopy(old), "fp8/bf16")
    assert new.spec.checked and new.spec.gate is not None and isinstance(new, UnflaggedExperts)
    floats = dequantize_(copy.deepcopy(new))
    assert type(floats) is UnflaggedExperts
    for (name, p), (name2, q) in zip(old.named_parameters(), floats.named_parameters(), strict=True):
        used = slice(EXPERTS if p.ndim > 2 else None)
        assert name == name2 and p.shape == q.shape and rel(q[used], p[used]) < 0.04
    args = arguments(old)
    torch.testing.assert_close(new(**args), floats(**args), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new(*args.values()), new(**args))
    assert rel(quantize_(copy.deepcopy(old), "fp8")(**args), floats(**args)) < 0.08
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert type(again) is type(new) and torch.equal(again(**args), new(**args))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_misreading(dtype):
    for kind in KINDS:
        spec = read(made(**KINDS[kind]).to(dtype))
        assert spec.checked and spec == read(made(**KINDS[kind])), kind


@torch.no_grad()
def test_experts_that_are_run_on_every_row():
    torch.manual_seed(0)
    old = RowsOfAllExperts(gate="module", transposed=True)
    new = quantize_(copy.deepcopy(old), "fp8/bf16")
    floats = dequantize_(copy.deepcopy(new))
    x = torch.randn(EXPERTS * 3, HIDDEN)
    torch.testing.assert_close(new(x), floats(x), rtol=1e-4, atol=1e-4)
    assert summary(new).rows[0].note == "every expert runs on every row: the block's routing was not read"


@torch.no_grad()
def test_nothing_to_compare_with():
    """On meta, or weights of zeros: the reading of the shapes stands, and the summary says so; a guess does not."""
    zeros = made(gate="module")
    zeros.w13.zero_()
    assert summary(quantize_(zeros, "fp8")).rows[0].note.startswith("read from shapes alone")
    spec, on_meta = read(made(gate="module")), read(made(gate="module").to("meta"))
    assert spec.checked and not on_meta.checked and on_meta.gate == spec.gate
    with pytest.raises(CannotAdapt, match="no activation, and on the meta device none can be tried"):
        read(made().to("meta"))


@torch.no_grad()
def test_reading_leaves_no_trace():
    """Neither in the random numbers of the caller, nor in the module; and it does not depend on defaults."""
    m = made(gate="module")
    before, state = copy.deepcopy(m.state_dict()), torch.get_rng_state()
    calls = []
    m.register_forward_hook(lambda *args: calls.append(args))
    spec = read(m)
    assert torch.equal(torch.get_rng_state(), state) and not calls
    assert all(torch.equal(m.state_dict()[k], v) for k, v in before.items())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert read(m) == spec
    finally:
        torch.set_default_dtype(torch.float32)

"""compare() on what it cannot measure, or in part: bad batches, models that differ, layers that are not there."""

import copy
import math

import pytest
import torch
import toy_moe as toy
from torch import nn
from toy_lm import LAYERS, Lm, ids
from toy_moe import VOCAB

import moe_ops
from moe_ops import compare

GOOD = {"input_ids": ids(2)}
BAD = {
    "there are no batches": [],
    "batch 1 has no tokens": [ids(2), ids(0)],
    "batch 0 has no token to predict": [ids(2, 1)],
    "batch 1 has no token to predict": [GOOD, GOOD | {"attention_mask": torch.zeros(2, 9, dtype=torch.long)}],
    r"batch 1: labels \(2, 8\), input_ids \(2, 9\)": [GOOD, GOOD | {"labels": ids(2, 8)}],
    r"batch 0: attention_mask \(2, 8\), input_ids \(2, 9\)": [GOOD | {"attention_mask": ids(2, 8)}],
    r"batch 0 must be token ids \(B, T\), .* got torch.int64 \(9,\)": [ids(2)[0]],
    "batch 1 must be token ids .* got torch.float32": [ids(2), torch.ones(2, 3)],
    "batch 0 must be token ids .* got NoneType": [{"tokens": ids(2)}],
    "iterable of batches, got one torch.int64": ids(2),
    "iterable of batches, got one dict": GOOD,
    "batch 0 has token ids 0 to 128, the models have 0 to 127": [torch.tensor([[0, 128]])],
    "batch 0 has labels outside 0 to 127": [GOOD | {"labels": ids(2) + 100}],
}


class Config:
    vocab_size = VOCAB


@pytest.mark.parametrize("message", BAD)
def test_bad_batches(message):
    """Found before anything runs."""
    model = Lm(layers=1)
    model.config = Config
    with pytest.raises(ValueError, match=message):
        compare(model, model, BAD[message])
    assert model.runs == 0


def test_bad_models():
    model, other = Lm(layers=1), Lm(layers=1, vocab=64)
    with pytest.raises(ValueError, match=r"logits of the reference are \(2, 9, 64\), of the model \(2, 9, 128\)"):
        compare(other, model, [ids(2) % 64])
    model.config, other.config = Config, type("C", (), {"vocab_size": 64})
    runs = model.runs
    with pytest.raises(ValueError, match="vocabulary of the reference has 64 tokens, the model's 128"):
        compare(other, model, [ids(2)])
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: 4 experts of hidden size 64 .*, 8 of 64 in the model"):
        compare(model, Lm(lambda: toy.Block(toy.ToyExperts(8)), layers=1), [ids(2)])
    for arguments, message in [
        (("a path", model), "must be a model or a function, got str"), ((model, len), "must be an nn.Module"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            compare(*arguments, [ids(2)])
    for given in ({"num_bytes": 0}, {"worst": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be at least"):
            compare(model, model, [ids(2)], **given)
    assert model.runs == runs
    with pytest.raises(ValueError, match=r"must give logits \(B, S, V\) .* it gave \(18, 128\)"):
        compare(lambda x: model(x).flatten(0, 1), model, [ids(2)])


def test_infinite_logits():
    model = Lm(layers=1)
    logits = model(ids(2)).detach().index_fill(-1, torch.tensor(3), math.inf)
    with pytest.raises(ValueError, match=r"logits of the reference are not finite in batch 0 .*position 0; 16 of"):
        compare(lambda x: logits, model, [ids(2)])


def test_without_experts():
    model = Lm(lambda: nn.Linear(toy.HIDDEN, toy.HIDDEN))
    report = compare(model, moe_ops.quantize_(copy.deepcopy(model), "fp8"), [ids()])
    assert report.rows == () and report.notes == () and report.kl > 0 and "SNR" not in str(report)


def test_layers_of_one_model_only():
    report = compare(Lm(layers=2), Lm(layers=3), [ids()])
    assert [row.name for row in report.rows] == LAYERS[:2]
    assert report.notes == (f"{LAYERS[2]}: experts in only one of the two models",) and LAYERS[2] in str(report)


def test_experts_that_are_not_called():
    """By a block that computes with their weights, say: a row of nothing, and a note."""
    model = Lm(layers=1)
    model.layers[0].mlp.forward = lambda x: x
    report = compare(model, model, [ids()])
    assert [(row.error, row.flips) for row in report.rows] == [(None, None)]
    assert report.notes == (f"{LAYERS[0]}: called 0 times in the reference, 0 in the model",)


@pytest.mark.parametrize("show", [True, False])
def test_progress(capsys, show):
    compare(Lm(layers=1), Lm(layers=1), [ids(1), ids(1)], progress=show)
    assert ("compare: " in capsys.readouterr().err) == show

"""compare(): its numbers against numpy and against counting by hand; streams, bad input, pages, the command."""

import base64
import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import tiny_models as tiny
import torch
import toy_moe as toy
from torch import nn
from toy_moe import VOCAB
from trained_model import MODELS, needs_model, quickstart

import moe_ops
from moe_ops import compare
from moe_ops.__main__ import main
from moe_ops.quality import combine
from moe_ops.quality.sums import TokenSums
from moe_ops.quality.taps import CHOSEN, find_taps
from moe_ops.quality.text import Bytes, cut

LAYERS = ["layers.0.mlp.experts", "layers.1.mlp.experts", "layers.2.mlp.experts"]


class Layer(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.proj, self.mlp = nn.Linear(toy.HIDDEN, toy.HIDDEN), block

    def forward(self, x):
        return x + self.mlp(self.proj(x))


class Lm(nn.Module):
    """(B, S) -> logits (B, S, VOCAB). No token sees another: what a batch holds beside it cannot matter."""

    def __init__(self, make=lambda: toy.Block(toy.ToyExperts()), layers=3, vocab=VOCAB):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, toy.HIDDEN)
        self.layers = nn.ModuleList(Layer(make()) for _ in range(layers))
        self.lm_head, self.dropout = nn.Linear(toy.HIDDEN, vocab, bias=False), nn.Dropout(0.5)
        self.runs = 0
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        self.runs += 1
        x = self.embed(input_ids.flatten())
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.dropout(x)).view(*input_ids.shape, -1)


def items():
    block = toy.ListBlock(returns="tensor")
    for expert in block.experts:
        expert.w2.weight.data *= 30  # or it would be little beside the residual stream
    return block


def routed(block, x):
    """What `Block` or `ListBlock` gives its experts."""
    if isinstance(block, toy.ListBlock):
        return block.route(x)[:2]
    weights, ids = block.gate(x).softmax(-1).topk(toy.TOP_K)
    return ids, weights


def ids(rows=6, length=9, seed=0):
    """No token twice: two of them would tie."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[: rows * length].view(rows, length)


@pytest.fixture(scope="module", params=[None, items], ids=["called", "run by their block"])
def pair(request):
    reference = Lm(request.param) if request.param else Lm()
    model = moe_ops.quantize_(copy.deepcopy(reference), {"experts": "mxfp4", "linear": "fp8"})
    with torch.no_grad():  # routes change more than a format would make them
        for layer in model.layers:
            layer.mlp.gate.weight += torch.randn(layer.mlp.gate.weight.shape) * 0.05
    return reference, model


@pytest.fixture(scope="module")
def report(pair):
    return compare(*pair, list(ids().split(4)), num_bytes=100, worst=5)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).double().numpy()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_losses_and_kl(pair, report):
    """All from logits, in float64 numpy."""
    p, q = (log_softmax(logits(m, ids())[:, :-1]) for m in pair)
    targets = ids()[:, 1:].numpy()[..., None]
    losses = [-np.take_along_axis(x, targets, -1).mean() for x in (p, q)]
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert (report.tokens, report.tokens_read) == (48, 54)
    assert [report.reference_loss, report.loss] == pytest.approx(losses, rel=1e-6)
    assert report.perplexity == pytest.approx(np.exp(losses[1]), rel=1e-6)
    assert report.bits_per_token == pytest.approx(losses[1] / np.log(2), rel=1e-6)
    assert report.bits_per_byte == pytest.approx(losses[1] / np.log(2) * 54 / 100, rel=1e-6)
    assert report.kl == pytest.approx(kl.mean(), rel=1e-5) and kl.mean() > 1e-3
    assert report.kl_p99 == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=0.006)
    assert report.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean() < 1
    edges, counts = zip(*report.kl_histogram, strict=True)
    assert counts == tuple(np.histogram(kl, [0, *edges])[0]) and sum(counts) == 48


def test_worst_tokens(pair, report):
    p, q = (log_softmax(logits(m, ids())[:, :-1]) for m in pair)
    kl = (np.exp(p) * (p - q)).sum(-1)
    order = np.argsort(-kl, axis=None)[:5]
    assert [w.kl for w in report.worst] == pytest.approx(list(kl.flatten()[order]), rel=1e-4)
    for w, flat in zip(report.worst, order, strict=True):
        row, position = divmod(int(flat), 8)
        assert (w.sequence, w.batch, w.row, w.position) == (row, row // 4, row % 4, position + 1)
        assert w.token_id == ids()[row, position + 1] and w.context_ids == tuple(ids()[row, : position + 1].tolist())
        assert (w.reference_top1, w.model_top1) == (p[row, position].argmax(), q[row, position].argmax())


@torch.no_grad()
def test_layers(pair, report):
    """Flips counted by hand along the models; errors by their definition, of experts fed by hand."""
    reference, model = pair
    x = y = reference.embed(ids().flatten())
    assert [row.name for row in report.rows] == LAYERS
    for row, want, got in zip(report.rows, reference.layers, model.layers, strict=True):
        hidden, (chosen, weights) = want.proj(x), routed(want.mlp, want.proj(x))
        mine = routed(got.mlp, got.proj(y))[0]
        flipped = [set(a) != set(b) for a, b in zip(chosen.tolist(), mine.tolist(), strict=True)]
        assert row.flips == sum(flipped) / 54 > 0
        call = got.mlp.experts.routed if isinstance(want.mlp, toy.ListBlock) else got.mlp.experts
        out = call(hidden, chosen, weights).double()
        exact = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for a, e in enumerate(chosen[t].tolist()):
                experts = want.mlp.experts
                expert = experts[e] if isinstance(experts, nn.ModuleList) else lambda v: experts.one(e, v)
                exact[t] += weights[t, a] * expert(hidden[t : t + 1])[0]
        x, y = want(x), got(y)
        for error, decibel, a, b in [(row.error, row.snr_db, exact, out), (row.stream_error, row.stream_snr_db, x, y)]:
            a, b = a.double(), b.double()
            assert error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
            assert decibel == pytest.approx(10 * math.log10(float(a.square().sum() / (a - b).square().sum())), rel=1e-4)


def test_the_order_of_the_chosen_is_no_flip():
    class Backwards(toy.Block):
        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).topk(toy.TOP_K)
            return super().forward(x) * 0 + self.experts(x, chosen.flip(-1), weights.flip(-1))

    reference, model = (Lm(lambda make=make: make(toy.ToyExperts())) for make in (toy.Block, Backwards))
    assert compare(reference, model, [ids()]).rows[0].flips == 0


@pytest.mark.parametrize("make", [None, items])
def test_equal_models(make):
    model = Lm(make) if make else Lm()
    report = compare(model, model, [ids()])
    assert (report.kl, report.kl_p99, report.top1_agreement, report.loss) == (0, 0, 1, report.reference_loss)
    for row in report.rows:
        assert (row.error, row.stream_error, row.flips) == (0, 0, 0) and row.snr_db == row.stream_snr_db == math.inf
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert data["rows"][0] == {"name": LAYERS[0], "error": 0, "stream_error": 0, "flips": 0, "snr_db": None,
                               "stream_snr_db": None}  # fmt: skip
    assert "inf dB" in str(report) and report.size == report.reference_size == sum(
        p.numel() * 4 for p in model.parameters())  # fmt: skip


def test_a_spoilt_layer_is_found_where_it_is():
    reference = Lm()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj *= 1.5
    report = compare(reference, model, [ids()])
    assert [row.error for row in report.rows] == pytest.approx([0, 0.5, 0], abs=1e-6)
    assert report.rows[0].stream_error == 0 < min(row.stream_error for row in report.rows[1:])


def plain(report):
    data = report.as_dict()
    for token in data["worst"]:
        del token["batch"], token["row"]
    return {f"{path}": value for path, value in walk(data)}


def walk(value, path=""):
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from [(path, value)] if not isinstance(value, dict | list) else []
    for key, part in parts:
        yield from walk(part, f"{path}.{key}")


@pytest.mark.parametrize("size", [1, 4, 6])
def test_batches_of_any_size(pair, report, size):
    again = plain(compare(*pair, (b for b in ids().split(size)), num_bytes=100, worst=5))
    for path, value in plain(report).items():
        assert again[path] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-4)), path


def test_padding_and_labels_that_do_not_count(pair, report):
    """Rows of other lengths, padded on both sides, are worth what they are alone."""
    padded = torch.zeros(6, 14, dtype=torch.long)
    mask = torch.zeros(6, 14, dtype=torch.long)
    for row, (start, tokens) in enumerate(zip((0, 1, 2, 3, 4, 5), ids(), strict=True)):
        padded[row, start : start + 9], mask[row, start : start + 9] = tokens, 1
    got = compare(*pair, [{"input_ids": padded, "attention_mask": mask}], num_bytes=100, worst=5)
    for name in ("tokens", "tokens_read", "loss", "kl", "top1_agreement", "bits_per_byte"):
        assert getattr(got, name) == pytest.approx(getattr(report, name), rel=1e-5), name
    for row, want in zip(got.rows, report.rows, strict=True):
        assert dataclasses.astuple(row)[1:] == pytest.approx(dataclasses.astuple(want)[1:], rel=1e-4)
    labels = torch.where(torch.arange(9) < 5, -100, ids())
    got = compare(*pair, [{"input_ids": ids(), "labels": labels}])
    q = log_softmax(logits(pair[1], ids())[:, 4:-1])
    assert got.tokens == 24
    assert got.loss == pytest.approx(-np.take_along_axis(q, ids()[:, 5:].numpy()[..., None], -1).mean(), rel=1e-6)


def test_the_sketch_of_kl():
    """Quantiles of a wide distribution, within its bins; zero and infinity are kept apart."""
    kl = torch.exp(torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 4 - 5).double()
    sums = TokenSums(0)
    for value in (kl, torch.tensor([0.0]), torch.tensor([math.inf])):
        bins = ((value.double().log2() + 40) * 64).floor().clamp(-1, 3200) + 1
        sums.counts += bins.long().bincount(minlength=len(sums.counts))
        sums.tokens += len(value)
    every = np.concatenate([kl.numpy(), [0.0, np.inf]])
    for q in (0.01, 0.5, 0.9, 0.99):
        assert sums.quantile(q) == pytest.approx(np.quantile(every, q, method="inverted_cdf"), rel=0.0055)
    assert (sums.quantile(0), sums.quantile(1)) == (0, math.inf)


def test_tokens_that_cannot_come():
    """-inf in both is nothing; where the model rules out what the reference expects, KL is infinite."""
    base = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    ruled_out = base.clone()
    ruled_out[..., 7] = -math.inf
    model = Lm(vocab=8)
    tokens = torch.tensor([[0, 1, 2, 3]])
    model.forward = lambda x: ruled_out
    assert compare(lambda x: ruled_out, model, [tokens]).kl == 0
    report = compare(lambda x: base, model, [tokens])
    assert report.kl == report.kl_p99 == math.inf and report.as_dict()["kl"] is None


def test_reference_that_is_a_function(pair, report):
    got = compare(lambda tokens: pair[0](tokens), pair[1], [ids()])
    assert (got.kl, got.loss) == pytest.approx((report.kl, report.loss), rel=1e-5)
    assert got.rows == () and got.reference_size is None and "layer" not in str(got)


def test_models_are_left_as_they_were():
    reference, model = Lm().train(), Lm()
    model.layers[1].train()
    model.dropout.train()
    modes = [[m.training for m in each.modules()] for each in (reference, model)]
    report = compare(reference, torch.compile(model, backend="eager"), [ids()])
    assert report.kl == 0 and [row.name for row in report.rows] == LAYERS  # without dropout, and by their own names
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match=r"logits of the model are not finite in batch 1 .*row 0, position 0; 16 of"):
        compare(reference, model, Second(model, ids(2)))
    assert [[m.training for m in each.modules()] for each in (reference, model)] == modes
    hooks = [h for each in (reference, model) for m in each.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


class Second:
    """Two batches; the model is spoilt before the second."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens

    def __iter__(self):
        weight = self.model.lm_head.weight.data
        weight[3] = 0
        yield self.tokens
        weight[3] = math.nan
        yield self.tokens


@torch.no_grad()
def test_nan_of_padding_is_nothing():
    class Holes(Lm):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids).masked_fill(attention_mask[..., None] == 0, math.nan)

    mask = (torch.arange(9) < 6).long().expand(6, 9)
    model = Holes()
    assert compare(model, model, [{"input_ids": ids(), "attention_mask": mask}]).tokens == 30


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


def test_the_residual_stream_leaves_the_outermost_layer():
    class Nested(Layer):
        def __init__(self):
            super().__init__(None)
            self.parts = nn.ModuleList([toy.Block(toy.ToyExperts())])

    model = nn.Sequential()
    model.layers = nn.ModuleList([Nested()])
    (tap,) = find_taps(model)[0].values()
    assert (tap.name, tap.layer) == ("layers.0.parts.0.experts", "layers.0")


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


# ---- families


class Head(nn.Module):
    """A family's model; one without logits of its own gets some."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        inputs = tiny.inputs(self.inner) | {"input_ids": input_ids}
        inputs |= {"decoder_input_ids": input_ids} if "decoder_input_ids" in inputs else {}
        out = tiny.run(self.inner, **inputs).float()
        g = torch.Generator().manual_seed(0)
        return out if out.shape[-1] >= 100 else out @ torch.randn(out.shape[-1], 100, generator=g)


@pytest.mark.swap
@pytest.mark.parametrize("name", tiny.WITH_EXPERTS)
@torch.no_grad()
def test_families(name):
    """Layers of every family are found, in float and quantized; on equal values they agree, routes too."""
    model = Head(tiny.build(name))
    if "pixel_values" in tiny.inputs(model.inner):
        pytest.skip("not a language model")
    quantized = moe_ops.quantize_(copy.deepcopy(model), {"experts": "int8"})
    floats = moe_ops.dequantize_(copy.deepcopy(quantized))
    tokens = tiny.inputs(model.inner)["input_ids"]
    names = [r.name for r in moe_ops.summary(quantized).rows if r.kind == "experts"]
    for reference, bound in ((floats, 1e-3), (model, 0.05)):
        report = compare(reference, quantized, [tokens])
        assert [row.name for row in report.rows] == names and names
        for row in report.rows:
            assert row.error < bound and row.stream_error < bound, row
            sorted_rows = row.name.endswith(("output_linear", "fc2"))  # of no token's values
            assert row.flips is None if sorted_rows else row.flips <= bound * 2
        if reference is model:
            assert min(row.error for row in report.rows) > 1e-5 and report.kl > 0


@pytest.mark.swap
@pytest.mark.parametrize("name", ["qwen3_moe", "nllb_moe"])
@torch.no_grad()
def test_loss_is_transformers(name):
    """With and without an encoder: labels are shifted as the model's own loss has it."""
    model, tokens = tiny.build(name), tiny.inputs(tiny.build(name))["input_ids"]
    labels = torch.where(torch.arange(8) == 3, -100, tokens)
    report = compare(model, model, [{"input_ids": tokens, "labels": labels}])
    config = model.config
    logits = model(input_ids=tokens, labels=labels).logits
    shift = 0 if config.is_encoder_decoder else 1
    want = nn.functional.cross_entropy(logits[:, : 8 - shift].flatten(0, 1), labels[:, shift:].flatten())
    assert report.loss == pytest.approx(float(want), rel=1e-5) and report.tokens == 2 * (7 - shift)
    assert all((row.error, row.stream_error, row.flips) == (0, 0, 0) for row in report.rows) and report.rows
    if config.is_encoder_decoder:
        with pytest.raises(ValueError, match="a model with an encoder needs labels"):
            compare(model, model, [tokens])


CALLS = {
    "topk": (torch.tensor([[0, 2], [3, 9], [-1, 1]]), None),
    "scores": (torch.tensor([[0, 2], [3, 9], [-1, 1]]), torch.rand(3, 4)),
    "swapped scores": (torch.rand(3, 4), torch.tensor([[0, 2], [3, 9], [-1, 1]])),
    "mask": (torch.tensor([[[1, 0, 0, 0], [0, 0, 1, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]], [[0, 1, 0, 0], [0, 0, 0, 0]]]),
             None),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_which_experts_a_call_chooses(call):
    tap = find_taps(Lm(layers=1))[0][LAYERS[0]]
    got = CHOSEN[call](tap, (torch.rand(3, 64), *CALLS[call]))
    assert [row[:4].nonzero().flatten().tolist() for row in got] == [[0, 2], [3], [1]]


def test_which_experts_sorted_rows_chose():
    """By their values; the block around them knows the tokens, the one further out does not."""
    tap = find_taps(Lm(layers=1))[0][LAYERS[0]]
    x = torch.randn(3, 64)
    chosen = [[0, 2], [1, 2], [0, 3]]
    owners = sorted((e, t) for t, each in enumerate(chosen) for e in each)
    rows, sizes = x[[t for _, t in owners]], [2, 1, 2, 1]
    tap.inputs = dict.fromkeys(tap.around, torch.randn(2, 64)) | {"layers.0": x}
    got = CHOSEN["sizes"](tap, (rows, sizes))
    assert [row[:4].nonzero().flatten().tolist() for row in got] == chosen
    tap.inputs["layers.0"] = torch.randn(3, 64)
    assert CHOSEN["sizes"](tap, (rows, sizes)) is None


# ---- the trained model


@needs_model
def test_trained_model():
    """Bits per byte are those of the loop that quickstart.py and test_quality.py use."""
    reference = quickstart.load(str(MODELS / "tiny-qwen3-moe"))[0]
    text = quickstart.read_text(str(MODELS / "val.bin"), 6 * quickstart.WINDOW)
    windows, num_bytes = quickstart.cut(text, quickstart.Bytes())
    want, reports = quickstart.bits_per_byte(reference, windows, num_bytes), {}
    for name in ("fp8", "mxfp4"):
        model = moe_ops.quantize_(copy.deepcopy(reference), name)
        reports[name] = compare(reference, model, windows.split(8), num_bytes=num_bytes)
        assert reports[name].bits_per_byte == pytest.approx(quickstart.bits_per_byte(model, windows, num_bytes), 1e-5)
        assert reports[name].reference_bits_per_byte == pytest.approx(want, 1e-5)
    fp8, mxfp4 = reports.values()
    assert abs(fp8.bits_per_byte / want - 1) < 0.003 < mxfp4.bits_per_byte / want - 1 < 0.03
    assert 0 < 2 * fp8.kl < mxfp4.kl and fp8.top1_agreement > mxfp4.top1_agreement > 0.9
    for a, b in zip(fp8.rows, mxfp4.rows, strict=True):
        assert a.snr_db > b.snr_db + 6 > 20 and a.stream_snr_db > b.stream_snr_db and 0 < a.flips < b.flips < 0.5


def test_windows_are_the_start_of_the_text():
    windows, num_bytes = cut(b"\0\1\2\3\4\5\6", Bytes(), 3)
    assert (windows.tolist(), num_bytes) == ([[0, 1, 2], [3, 4, 5]], 6)


# ---- tables, pages, the command


def png(text):
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', text)
    assert all(base64.b64decode(data).startswith(b"\x89PNG\r\n") for _, data in found)
    return [name for name, _ in found]


def test_plots_and_page(report, tmp_path):
    assert [p.name for p in report.plot(tmp_path / "new")] == ["error_by_layer.png", "router_flips.png",
                                                               "kl_histogram.png"]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "new").iterdir())
    text = report.html(tmp_path / "page.html", decode=lambda ids: f"<{len(ids)}>").read_text()
    assert png(text) == ["error by layer", "router flips", "kl histogram"]
    assert "http" not in text and "&#x27;&lt;1&gt;&#x27;" in text
    for cell in (f"{report.bits_per_byte:.4f}", f"{report.kl:.3g}", f"{report.rows[1].snr_db:.1f} dB",
                 f"{report.rows[2].flips:.2%}", LAYERS[2], f"{report.worst[0].kl:.3g}"):  # fmt: skip
        assert f"<td>{cell}</td>" in text
        assert cell in str(report) or cell == f"{report.worst[0].kl:.3g}"


def test_combine(pair, report, tmp_path):
    better = compare(pair[0], pair[0], list(ids().split(4)), num_bytes=100)
    both = combine({"mxfp4": report, "as it is": better})
    assert [(r["format"], r["kl"], r["size"]) for r in both.rows] == [
        ("mxfp4", report.kl, report.size), ("as it is", 0, report.reference_size)]  # fmt: skip
    assert json.loads(json.dumps(both.as_dict(), allow_nan=False))["mxfp4"]["loss"] == report.loss
    lines = str(both).splitlines()
    assert [line.split()[0] for line in lines] == ["format", "reference", "mxfp4", "as"]
    assert f"{report.bits_per_byte / report.reference_bits_per_byte - 1:+.2%}" in lines[2] and "inf dB" in lines[3]
    assert both.plot(tmp_path)[0].stem == "size_and_quality"
    with pytest.raises(ValueError, match="no reports"):
        combine({})
    with pytest.raises(ValueError, match="b was measured on 8 tokens of None bytes, a on 48 of 100"):
        combine({"a": report, "b": compare(*pair, [ids(1)])})
    with pytest.raises(ValueError, match="b was measured against a reference with loss"):
        other = copy.deepcopy(pair[0])
        other.lm_head.weight.data *= 1.1
        combine({"a": report, "b": compare(other, other, list(ids().split(4)), num_bytes=100)})


def test_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for write in (report.html, report.plot):
        with pytest.raises(ImportError, match=r"pip install 'quantized-moe-ops\[plots\]'"):
            write(tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models")
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path / "float")
    moe_ops.quantize_(model, "int8").save_pretrained(path / "saved-int8")
    (path / "text").write_text("In the beginning was the Word. " * 40)
    return path


@pytest.mark.swap
def test_command(folder, tmp_path, capsys):
    formats = f"int8,{folder / 'saved-int8'},mxfp4/fp8"
    arguments = ["--text", str(folder / "text"), "--bytes", "300", "--window", "64", "--device", "cpu", "--quiet"]
    pages = ["--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "data.json")]
    assert main(["compare", str(folder / "float"), "--formats", formats, *arguments, *pages]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["format", "reference", "int8", "saved-int8", "mxfp4/fp8"]
    assert lines[2][1:] == lines[3][1:]  # the same codes, from memory and from disk
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["int8"]["tokens_read"] == 256 and data["int8"]["num_bytes"] == 256
    assert 7 < data["int8"]["bits_per_byte"] < 9 and f"{data['int8']['bits_per_byte']:.4f}" == lines[2][1]
    assert data["mxfp4/fp8"]["size"] < data["int8"]["size"] < data["int8"]["reference_size"]
    assert len(png((tmp_path / "page.html").read_text())) == 4
    assert main(["compare", str(folder / "float"), *arguments]) == 0
    assert "model.layers.1.mlp.experts" in capsys.readouterr().out  # one format alone: its layers too


@pytest.mark.swap
@pytest.mark.parametrize(("change", "message"), [
    ({"--formats": "int9"}, "unknown format 'int9'"),
    ({"--formats": "int8,int8"}, "int8 is there twice"),
    ({"--formats": " ,"}, "--formats is empty"),
    ({"--formats": "int8,int4_g128"}, "int4_g128: "),
    ({"--text": "{new}"}, "cannot read"),
    ({"--bytes": "20"}, "the text has 20 tokens; one window takes 64"),
    ({"--window": "1"}, "at least 2 tokens"),
    ({"--device": "cuda:77"}, "cannot use device 'cuda:77'"),
    ({"--html": "{new}/page.html"}, "there is no such folder"),
    ({"model": "{new}"}, "is not a checkpoint: it has no config.json"),
])  # fmt: skip
def test_command_errors(folder, tmp_path, capsys, monkeypatch, change, message):
    """One line each, before a model runs."""
    monkeypatch.setattr("moe_ops.quality.command.compare", lambda *a, **k: pytest.fail("it ran"))
    given = {"--text": f"{folder / 'text'}", "--window": "64", "--device": "cpu", "model": f"{folder / 'float'}"}
    given |= {k: v.format(new=tmp_path / "new") for k, v in change.items()}
    assert main(["compare", given.pop("model"), *(word for pair in given.items() for word in pair)]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.splitlines()[-1].startswith("python -m moe_ops compare: ") and out == ""

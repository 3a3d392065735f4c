"""compare(): its numbers against numpy and against counting by hand; streams, tables and pages."""

import base64
import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import toy_moe as toy
from torch import nn
from toy_lm import LAYERS, Layer, Lm, ids, items

import moe_ops
from moe_ops import compare
from moe_ops.quality import combine
from moe_ops.quality.sums import TokenSums
from moe_ops.quality.taps import find_taps


def routed(block, x):
    """What `Block` or `ListBlock` gives its experts."""
    if isinstance(block, toy.ListBlock):
        return block.route(x)[:2]
    weights, ids = block.gate(x).softmax(-1).topk(toy.TOP_K)
    return ids, weights


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


def test_the_residual_stream_leaves_the_outermost_layer():
    class Nested(Layer):
        def __init__(self):
            super().__init__(None)
            self.parts = nn.ModuleList([toy.Block(toy.ToyExperts())])

    model = nn.Sequential()
    model.layers = nn.ModuleList([Nested()])
    (tap,) = find_taps(model)[0].values()
    assert (tap.name, tap.layer) == ("layers.0.parts.0.experts", "layers.0")


# ---- tables and pages


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

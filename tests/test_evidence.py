"""examples/evidence.py and train_small_moe.py: what they write is what compare, the loss and PEFT give."""

import argparse
import json
import math
import sys

import pytest
import small_checkpoint
import torch
from torch.nn.functional import cross_entropy
from trained_model import quickstart

pytest.importorskip("matplotlib")
import _evidence_report as report
import evidence
import train_small_moe
from transformers import AutoModelForCausalLM

import moe_ops
from moe_ops.quality.text import bits_per_byte, cut

LENGTH = 1 << 16
QUICK = ["--steps", "3", "--lora-steps", "3", "--batch", "2", "--bytes", "1024"]


@pytest.fixture(autouse=True)
def little_held_out(monkeypatch):
    monkeypatch.setattr(train_small_moe, "HELD_OUT", 2048)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a text, another text."""
    folder = tmp_path_factory.mktemp("files")
    text = (small_checkpoint.WORDS.encode() * LENGTH)[:LENGTH]
    (folder / "text").write_bytes(text)
    (folder / "other").write_bytes(bytes(reversed(text)))
    small_checkpoint.save(folder / "model")
    return folder


def run(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    module.main()


def collect(monkeypatch, files, output, *args):
    given = ["--model", files / "model", "--text", files / "text", "--finetune", files / "other", *QUICK, *args]
    run(monkeypatch, evidence, "--output", output, *given)
    return json.loads((output / "evidence.json").read_text())


def cells(markdown, first):
    """{name: cells} of the lines of the table whose first column is headed so."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line[0] == first)
    rows = {}
    for name, *numbers in lines[start + 2 :]:
        if len(numbers) != len(lines[start]) - 1 or set(name) == {"-"}:
            break
        rows[name] = numbers
    return rows


def test_quality_is_what_compare_gives(monkeypatch, files, tmp_path, capsys):
    names = ["fp8", "bf16", "int4_g128", "mxfp4/mxfp4"]
    found = collect(monkeypatch, files, tmp_path, "--parts", "quality", "--formats", ",".join(names))
    formats, refused = (found["quality"]["results"][key] for key in ("formats", "refused"))
    assert list(formats) == ["fp8", "bf16", "mxfp4/mxfp4"] and list(refused) == ["int4_g128"]
    assert "groups of 128" in refused["int4_g128"]

    text = (files / "text").read_bytes()[:1024]
    windows, num_bytes = cut(text, quickstart.Bytes())
    reference = quickstart.load(files / "model")[0]
    table = cells((tmp_path / "evidence.md").read_text(), "format")
    assert list(table) == list(formats)
    for name, got in formats.items():
        model = moe_ops.quantize_(quickstart.load(files / "model")[0], name)
        want = moe_ops.compare(reference, model, [windows], num_bytes=num_bytes)
        assert got["bits_per_byte"] == pytest.approx(bits_per_byte(model, windows, num_bytes), rel=1e-5)
        assert got["kl"] == pytest.approx(want.kl, rel=1e-5)
        assert got["top1_agreement"] == want.top1_agreement
        assert [row["flips"] for row in got["rows"]] == [row.flips for row in want.rows]
        assert got["quantizable_bytes"] == small_checkpoint.sizes()[name]
        change = want.bits_per_byte / want.reference_bits_per_byte - 1
        assert table[name] == [
            f"{want.bits_per_byte:.4f}", f"{change:+.2%}", f"{want.kl:.2e}", f"{want.top1_agreement:.2%}",
            f"{want.rows[0].flips:.2%}", f"{small_checkpoint.sizes()[name]:,}",
        ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "groups of 128" in printed and printed.count("| mxfp4/mxfp4") == 2  # when it was found, and at the end


def test_curve_of_training(monkeypatch, files, tmp_path, capsys):
    args = ["--precision", "bf16", "--batch", 2, "--window", 32, "--text", files / "text"]
    curves = []
    for name, more in {"a": [1, 12], "again": [1, 12], "other": [0, 2]}.items():
        file = tmp_path / f"{name}.json"
        seed, steps = more
        run(monkeypatch, train_small_moe, *args, "--seed", seed, "--steps", steps, "--json", file,
            "--save", tmp_path / name)  # fmt: skip
        curves.append(json.loads(file.read_text()))
    bits = curves[0]["bits_per_byte"]
    assert len(bits) == 12 and 7 < bits[0] < 9 and min(bits[-3:]) < bits[0] - 1.5
    assert curves[1]["bits_per_byte"] == bits and curves[2]["bits_per_byte"][0] != bits[0]
    assert f"{curves[0]['held_out_bits_per_byte']:.4f}" in capsys.readouterr().out

    # The first loss is that of the untrained model on the seed's windows, in the dtype of the name.
    train_small_moe.small_model(1).save_pretrained(tmp_path / "untrained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "untrained", dtype=torch.bfloat16).to(quickstart.DEVICE)
    ids = torch.tensor(list((files / "text").read_bytes()[: -train_small_moe.HELD_OUT]))
    starts = torch.randint(len(ids) - 32, (2, 1), generator=torch.Generator().manual_seed(1)).flatten()
    given = torch.stack([ids[start : start + 32] for start in starts]).to(quickstart.DEVICE)
    logits = model(given).logits[:, :-1].float()
    assert bits[0] == pytest.approx(cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten()).item() / math.log(2))

    # What is saved is what was measured, on text that training did not see.
    saved, tokenizer = quickstart.load(tmp_path / "a")
    held_out = (files / "text").read_bytes()[-train_small_moe.HELD_OUT :]
    want = bits_per_byte(saved, *cut(held_out, tokenizer))
    assert curves[0]["held_out_bits_per_byte"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp8", "mxfp8", "mxfp4"])
def test_low_precision(files, precision):
    texts, options = [(files / "text").read_bytes()], {"steps": 12, "batch": 2, "window": 32}
    want = train_small_moe.train("bf16", texts, **options)[1]["bits_per_byte"]
    model, curve = train_small_moe.train(precision, texts, **options)
    got = curve["bits_per_byte"]
    assert got != want and got[0] == pytest.approx(want[0], rel=0.02)  # quantized, and nothing else
    assert min(got[-3:]) < got[0] - 1.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not [m for m in model.modules() if type(m).__module__.startswith("moe_ops")]


@pytest.mark.parametrize("targets", ["attention", "experts"])
def test_lora(monkeypatch, files, tmp_path, targets):
    pytest.importorskip("peft")
    args = ["--lora-formats", "fp8", "--lora-targets", targets, "--lora-rate", "0.05"]
    found = collect(monkeypatch, files, tmp_path, "--parts", "lora", *args)
    results = found["lora"]["results"]
    assert list(results) == ["bf16", "fp8"]
    s = small_checkpoint
    features = {
        "attention": [s.HIDDEN + s.HEADS * s.HEAD, *2 * [s.HIDDEN + s.KV_HEADS * s.HEAD], s.HEADS * s.HEAD + s.HIDDEN],
        "experts": s.EXPERTS * [s.HIDDEN + 2 * s.INTERMEDIATE, s.INTERMEDIATE + s.HIDDEN],
    }
    held_out = (files / "other").read_bytes()[-train_small_moe.HELD_OUT :][:1024]
    table = cells((tmp_path / "evidence.md").read_text(), "weights")
    for name, row in results.items():
        assert row["trained_parameters"] == 8 * sum(features[targets])
        model = quickstart.load(files / "model")[0]
        model = model if name == "bf16" else moe_ops.quantize_(model, name)
        before = bits_per_byte(model, *cut(held_out, quickstart.Bytes()))
        assert row["held_out_bits_per_byte_before"] == pytest.approx(before, rel=1e-5)
        assert row["held_out_bits_per_byte"] < before and len(row["bits_per_token"]) == 3
        change = row["held_out_bits_per_byte"] / results["bf16"]["held_out_bits_per_byte"] - 1
        assert table[name][:3] == [f"{before:.4f}", f"{row['held_out_bits_per_byte']:.4f}", f"{change:+.2%}"]
    assert results["fp8"]["bits_per_token"] != results["bf16"]["bits_per_token"]


def test_parts_are_kept_and_drawn_again(monkeypatch, files, tmp_path):
    from PIL import Image

    collect(monkeypatch, files, tmp_path, "--parts", "quality", "--formats", "bf16,fp8")
    found = collect(monkeypatch, files, tmp_path, "--parts", "training", "--precisions", "fp32,bf16")
    assert list(found) == ["quality", "training"]
    assert list(found["training"]["results"]) == ["fp32", "bf16"]
    ends = [  # a tenth of three steps is the last
        (curve["bits_per_byte"][-1], curve["held_out_bits_per_byte"]) for curve in found["training"]["results"].values()
    ]
    rows = cells((tmp_path / "evidence.md").read_text(), "precision")
    for row, got in zip(rows.values(), ends, strict=True):
        changes = [f"{x / first - 1:+.2%}" for x, first in zip(got, ends[0], strict=True)]
        assert row == [f"{got[0]:.4f}", changes[0], f"{got[1]:.4f}", changes[1]]

    before = (tmp_path / "evidence.md").read_text()
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"quality.png", "quality_by_layer.png", "training.png"}
    for name in [*pictures, "evidence.md"]:
        (tmp_path / name).unlink()
    run(monkeypatch, evidence, "--output", tmp_path, "--parts", "none")
    assert (tmp_path / "evidence.md").read_text() == before
    for name, data in pictures.items():
        assert (tmp_path / name).read_bytes() == data
        colours = Image.open(tmp_path / name).convert("RGB").getcolors(1 << 24)
        assert len(colours) > 50  # something is drawn


def test_texts(files):
    """A model made here is measured on the end of its text, or on another; LoRA always trains on another."""
    text, other = ((files / name).read_bytes() for name in ("text", "other"))
    end = train_small_moe.HELD_OUT
    for model, train, measured in [
        (None, None, text[-end:][:100]), (None, "other", text[:100]), ("model", None, text[:100]),
        ("model", "other", text[:100]),
    ]:  # fmt: skip
        args = argparse.Namespace(
            text=files / "text", model=model, train=train and files / train, finetune=files / "other", bytes=100
        )
        material = evidence.Material(args)
        assert material.measured() == measured
        assert material.pretraining() == [other if train else text]
        assert material.finetuning() == (other[:-end], other[-end:])


def test_means():
    assert report.smooth([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    assert report.last_tenth([*range(18), 30.0, 40.0]) == 35.0 and report.last_tenth([3.0, 2.0]) == 2.0
    layers = [{"flips": flips} for flips in (0.25, None, 0.75)]
    assert report.mean_flips({"rows": layers}) == 0.5 and report.mean_flips({"rows": []}) is None


MISTAKES = {
    "fp7": ["--formats", "fp7"],
    "fp9": ["--lora-formats", "fp9"],
    "fp5": ["--precisions", "bf16,fp5"],
    "no 'qualty'": ["--parts", "qualty"],
    "no config.json": ["--model", "/"],
    "--steps must be at least 1": ["--steps", "0"],
    "no 'router'": ["--lora-targets", "experts,router"],
    "--lora-steps must be at least 1": ["--lora-steps", "0"],
    "cannot read /nowhere": ["--text", "/nowhere"],
}


@pytest.mark.parametrize("reason", MISTAKES)
def test_mistakes(monkeypatch, files, tmp_path, reason):
    with pytest.raises(SystemExit) as stop:
        collect(monkeypatch, files, tmp_path, "--parts", "quality", *MISTAKES[reason])
    assert stop.value.code.startswith("evidence: ") and reason in stop.value.code and "\n" not in stop.value.code


def test_without_peft(monkeypatch, files, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"evidence: .*pip install peft"):
        collect(monkeypatch, files, tmp_path, "--parts", "lora")


TRAINING_MISTAKES = {
    "fp7": ["--precision", "fp7"],
    "no such folder": ["--json", "/nowhere/curve.json"],
    "--window must be at least 2": ["--window", "1"],
    "at least 4096 bytes": ["--text", small_checkpoint.__file__],
}


@pytest.mark.parametrize("reason", TRAINING_MISTAKES)
def test_training_mistakes(monkeypatch, files, reason):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, train_small_moe, "--text", files / "text", *TRAINING_MISTAKES[reason])
    assert stop.value.code.startswith("train_small_moe: ") and reason in stop.value.code


def test_a_loss_that_is_not_finite_stops(files):
    model = train_small_moe.small_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"fit: the loss of step 1 is nan"):
        train_small_moe.fit(model, torch.arange(256), steps=2, window=32, label="fit")


def test_weights_that_the_loss_does_not_reach_stop():
    model = train_small_moe.small_model().requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_())
    with pytest.raises(ValueError, match="fit: nothing that is to be trained has a gradient"):
        train_small_moe.fit(model, torch.arange(256), steps=2, window=32, label="fit")

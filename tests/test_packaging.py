"""What is shipped, what an import loads, and the rules of the source tree: layers, sizes, one file per format name."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import moe_ops
from moe_ops.formats import FORMATS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for top in ("moe_ops", "lowering") for path in (ROOT / top).rglob("*.py"))
# Imports point one way: a module may import its own layer and those before it.
LAYERS = (
    ("formats", "activation", "routing"),
    ("kernels",),
    ("backends",),
    ("ops",),
    ("adapters", "storage", "experts", "calls", "blocks", "linear", "streaming", "tuning"),
    ("rules", "targets", "summary", "quantize"),
    ("tensor_files", "streaming"),
    ("huggingface", "peft", "checkpoints", "quality", "sharding", "kv_cache", "training"),
    ("convert", "export_words", "export", "inspection", "__main__"),
    ("lowering",),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def run(*args, cwd):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind, source, out):
    """Calls the build backend as pip does, but without the network: its name is the file that it wrote."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    return out / run("-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not a source tree")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("moe_ops", "lowering"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def python_files(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


def test_wheel_holds_every_module_once(wheel):
    files = python_files(wheel)
    shipped = {str(path.relative_to(ROOT)) for path in SOURCES if path.is_relative_to(ROOT / "moe_ops")}
    shipped |= {"moe_ops/" + str(path.relative_to(ROOT)) for path in SOURCES if path.is_relative_to(ROOT / "lowering")}
    assert files == shipped
    assert "moe_ops/lowering/__init__.py" in files


def test_wheel_imports_from_anywhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
sys.path[:] = [{str(tmp_path / "site")!r}] + [p for p in sys.path if p and p != {str(ROOT)!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import moe_ops, moe_ops.lowering
print(moe_ops.__file__, moe_ops.lowering.__file__)
"""
    for path in run("-c", code, cwd=tmp_path).splitlines()[-1].split():
        assert Path(path).is_relative_to(tmp_path / "site")


def test_sdist_gives_the_same_wheel(source, wheel, tmp_path):
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() for member in archive.getmembers())
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert python_files(build("wheel", unpacked, tmp_path / "again")) == python_files(wheel)


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import moe_ops
heavy = ("triton", "torch._inductor", "torch._dynamo", "transformers", "peft", "moe_ops.lowering", "moe_ops.kernels")
print([name for name in set(sys.modules) - before if name in heavy or name.startswith(tuple(h + "." for h in heavy))])
"""
    assert run("-c", code, cwd=ROOT).strip() == "[]"


def test_bare_lowering_does_not_register_twice():
    code = """
import moe_ops.lowering, sys
try:
    import lowering
except ImportError:
    sys.exit()
assert lowering.register is moe_ops.lowering.register
"""
    run("-c", code, cwd=ROOT)


def package_of(path):
    """moe_ops/ops/linear.py -> ("moe_ops", "ops"): what a relative import in that file starts from."""
    parts = path.relative_to(ROOT).parts[:-1]
    return ("moe_ops", *parts) if parts[0] == "lowering" else parts


def imported(path, nodes):
    """Names that these statements of the file import, as tuples: ("moe_ops", "ops", "linear")."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = (*package_of(path), path.stem)[1]
    if own == "__init__":
        return  # moe_ops/__init__.py collects the public names
    assert own in LAYER, f"say in LAYERS where {own} stands"
    tree = ast.parse(path.read_text())
    lazy = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        for name in imported(path, [node]):
            if name[0] == "lowering":
                pytest.fail(f"line {node.lineno}: import moe_ops.lowering, not lowering")
            if name[0] != "moe_ops" or len(name) < 2 or name[1] not in LAYER:
                continue
            if name[1] == "lowering" and id(node) in lazy:
                continue  # how moe_ops registers its lowerings
            assert LAYER[name[1]] <= LAYER[own], f"line {node.lineno}: {own} imports {'.'.join(name)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size_budget(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    assert text.isascii()
    budget = 120 if "kernels" in path.parts else 50
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= budget, f"line {node.lineno}: {node.name}"


def test_no_rooms_for_leftovers():
    assert not [path for path in SOURCES if path.stem in ("utils", "common", "helpers")]


NAMES = [name for name in FORMATS if name not in ("bf16", "fp8", "int8")]  # which are also plain names of dtypes


@pytest.mark.parametrize("name", NAMES)
def test_format_name_stands_in_one_file(name):
    word = re.compile(rf"(?<![\w/]){re.escape(name)}(?![\w/])")
    files = [path for path in SOURCES if "checkpoints" not in path.parts and word.search(path.read_text())]
    assert not [path for path in files if "formats" not in path.parts]
    assert len(files) <= 1  # none: an OCP pair, composed of two names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_branches_on_a_format_or_model_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            names = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            assert not names & set(NAMES), f"line {node.lineno} branches on a format name"
            assert "model_type" not in ast.dump(node), f"line {node.lineno} branches on a model's name"


def test_public_names():
    assert len(moe_ops.__all__) <= 14
    assert all(hasattr(moe_ops, name) for name in moe_ops.__all__)

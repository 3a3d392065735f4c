"""Where ops stay whole, what register() does and when, and that a changed lowering is compiled anew."""

import ast
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fake_gpu import extern_calls, fake_gpu, generated
from lowering_cases import some_experts
from oracle import Layer, inputs
from torch._inductor.utils import fresh_cache, run_and_get_code

import moe_ops
import moe_ops.lowering
from moe_ops.lowering import _compat, cache

ROOT = Path(__file__).parents[1]
INSIDE = {"auto": nullcontext, "reference": lambda: moe_ops.use_backend("reference"), "whole": moe_ops.lowering.whole}
moe_ops.lowering.register()


# ---- stay whole


@pytest.mark.parametrize("name,inside", [("fp8", "reference"), ("mxfp4", "whole"), ("bf16", "auto")])
def test_on_a_cpu_the_op_is_called(name, inside):
    """Through Inductor, and run: the op, and nothing of ours beside it; the values of eager, to the bit.

    Where another backend is asked for, it is to stay whole, or weights are floats; else see test_lowering_cpu.py.
    """
    layer = Layer(name, 4, 64, 32, dtype=torch.bfloat16, bias=True)
    biases = {"gate_up_bias": layer.up_bias, "down_bias": layer.down_bias}
    module = moe_ops.QuantizedExperts.from_float(layer.floats[0][0], layer.floats[1][0], name, **biases)
    x, ids, weights = inputs(5, 64, 2, 4, torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad(), INSIDE[inside](), fresh_cache():
        got, (code,) = run_and_get_code(torch.compile(module, fullgraph=True), x, ids, weights)
        assert torch.equal(got, module(x, ids, weights))
    assert code.count("torch.ops.moe_ops.experts.default(") == 1
    assert not any(f"moe_ops.{op}" in code for op in ("_product", "quantize", "combine", "sort_by_expert"))


@pytest.mark.parametrize("inside", INSIDE)
def test_on_a_gpu_the_op_is_called_where_that_is_asked_for(inside):
    with fake_gpu(90), INSIDE[inside]():
        backend = moe_ops.backends.resolve(None)[0]
        fn, make = some_experts(8)
        called = extern_calls(generated(fn, make)) if inside != "reference" else extern_calls(_named(backend))
    assert ("torch.ops.moe_ops.experts.default" in called) == (inside != "auto")
    assert len(called) == (inside != "auto")


def _named(backend):
    """The layer, on a backend that was asked for by name."""
    experts = torch.ops.moe_ops.experts

    with pytest.MonkeyPatch.context() as patch:
        named = lambda *args, **kwargs: experts(*args, **kwargs, backend=backend)  # noqa: E731
        patch.setattr("lowering_cases.OPS", type("Ops", (), {"experts": staticmethod(named)}))
        return generated(*some_experts(8))


def test_a_whole_graph_has_a_cache_key_of_its_own():
    before = torch.compiler.config.cache_key_tag
    with moe_ops.lowering.whole():
        inside = torch.compiler.config.cache_key_tag
        with moe_ops.lowering.whole():
            assert torch.compiler.config.cache_key_tag == inside
        assert torch.compiler.config.cache_key_tag == inside
    assert inside == before + "-whole" and torch.compiler.config.cache_key_tag == before


# ---- register()


def run(code, root=ROOT, **env):
    """What a new process prints."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); sys.path.insert(0, {str(ROOT / 'tests')!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


_TABLES = """
def tables():
    from torch._inductor import decomposition, lowering
    opened = {str(op) for op in decomposition.decompositions if str(op).startswith("moe_ops.")}
    return opened, "moe_ops._product.default" in map(str, lowering.lowerings)
"""
ORDERS = {
    "the compiler first": "import torch._inductor.compile_fx\nimport moe_ops.lowering\nmoe_ops.lowering.register()",
    "the compiler later": "import moe_ops.lowering\nmoe_ops.lowering.register()\n"
    "assert 'torch._inductor' not in sys.modules and 'triton' not in sys.modules\nimport torch._inductor.compile_fx",
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_registered_once_in_any_order(order):
    code = f"""{ORDERS[order]}{_TABLES}
from torch._inductor import decomposition
first = {{str(op): fn for op, fn in decomposition.decompositions.items()}}
assert tables()[1]
for _ in range(2):
    moe_ops.lowering.register()
assert {{str(op): fn for op, fn in decomposition.decompositions.items()}} == first
print(*sorted(tables()[0]))
"""
    (opened,) = run(code)
    names = {"experts", "experts_backward", "grouped_mm", "grouped_mm_backward", "linear", "linear_backward",
             "quantize", "sort_by_expert", "combine", "permute", "unpermute"}  # fmt: skip
    assert set(opened.split()) == {f"moe_ops.{name}.default" for name in names}


def private_names():
    """(module, name) of everything of the compiler that _compat.py imports."""
    tree = ast.parse(Path(_compat.__file__).read_text())
    found = {(node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
             for alias in node.names}  # fmt: skip
    return sorted(pair for pair in found if pair[0].startswith(("torch._inductor", "torch._higher", "torch.fx")))


def test_a_torch_that_lacks_a_name():
    """One warning; the op stays opaque, on a GPU too, and computes what it did. Whichever name it is."""
    names = [(m, n) for m, n in private_names() if m != "torch._inductor"]  # those are modules
    assert ("torch._inductor.select_algorithm", "TritonTemplate") in names and len(names) > 8
    code = f"""
import importlib, warnings
import torch, torch._inductor.compile_fx
import moe_ops, moe_ops.ops, moe_ops.lowering
from fake_gpu import extern_calls, fake_gpu, generated
from lowering_cases import some_experts
from torch._inductor import decomposition, lowering
{_TABLES}
for module, name in {names!r}:
    owner = importlib.import_module(module)
    kept = getattr(owner, name)
    delattr(owner, name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        moe_ops.lowering._open()
    setattr(owner, name, kept)
    said = [str(w.message) for w in seen if "moe_ops.lowering" in str(w.message)]
    assert len(said) == 1 and name in said[0], (name, said)
    assert tables() == (set(), False), name
del torch._inductor.select_algorithm.SymbolicGridFn
with fake_gpu(90):
    (called,) = extern_calls(generated(*some_experts(8)))
print(called)
x, ids, weights = torch.randn(3, 8), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
args = (x, ids, weights, torch.randn(2, 8, 8), torch.randn(2, 8, 4))
fn = lambda *a: torch.ops.moe_ops.experts(*a, format="bf16")
print(torch.equal(torch.compile(fn, fullgraph=True)(*args), fn(*args)))
"""
    assert run(code) == ["torch.ops.moe_ops.experts.default", "True"]


# ---- the caches

_CHANGED = """
import torch, torch._inductor.compile_fx
import moe_ops, moe_ops.ops, moe_ops.lowering
from moe_ops.lowering import routing
from torch._dynamo.utils import counters
routing.DECOMPOSITIONS[torch.ops.moe_ops.combine.default] = routing.combine  # on the CPU too
moe_ops.lowering.register()
salted = torch.compiler.config.cache_key_tag
for tag in (salted, "constant"):
    torch._dynamo.reset()
    torch.compiler.config.cache_key_tag = tag
    moe_ops.lowering.cache.register = lambda: None
    f = torch.compile(lambda rows: torch.ops.moe_ops.combine(rows, 2), fullgraph=True)
    counters.clear()
    print(f(torch.ones(6, 8)).sum().item(), counters["inductor"]["fxgraph_cache_hit"])
"""


def test_a_changed_lowering_is_compiled_anew(tmp_path):
    """In a new process with the same cache folder; with a constant in place of our salt the stale code is found."""
    shutil.copytree(ROOT / "moe_ops", tmp_path / "moe_ops", ignore=shutil.ignore_patterns("__pycache__"))
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    salted, constant = run(_CHANGED, tmp_path, **env)
    assert salted == constant == "48.0 0"
    lowering = tmp_path / "moe_ops" / "lowering" / "routing.py"
    assert not lowering.is_symlink() and not lowering.parent.is_symlink()
    before = lowering.read_text()
    lowering.write_text(before.replace("return routing.combine(rows, top_k).to(dtype)",
                                       "return routing.combine(rows, top_k).to(dtype) * 10"))  # fmt: skip
    assert lowering.read_text() != before
    salted, constant = run(_CHANGED, tmp_path, **env)
    assert salted == "480.0 0"
    assert constant == "48.0 1"  # what would be without the salt: a hit, and wrong


def test_the_same_source_is_found_again(tmp_path):
    assert cache.salt() == run("import moe_ops.lowering; print(moe_ops.lowering.cache.salt())")[0]

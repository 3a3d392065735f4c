"""Registration with transformers, in either order, without importing it; old versions; reloads."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import auto

import moe_ops
from moe_ops import huggingface
from moe_ops.huggingface import watch

pytestmark = pytest.mark.swap

CHECK = """
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
import inspect, moe_ops, transformers.quantizers.auto as auto
assert AUTO_QUANTIZATION_CONFIG_MAPPING["moe_ops"] is moe_ops.MoeOpsConfig
assert AUTO_QUANTIZER_MAPPING["moe_ops"].__name__ == "MoeOpsQuantizer"
assert "moe_ops" in ALL_EXPERTS_FUNCTIONS
assert "def register_quantizer" in inspect.getsource(auto)
assert not type(auto.__spec__.loader).__module__.startswith("moe_ops")
"""
MOE_OPS_FIRST = """
import importlib, os, sys, moe_ops
assert "transformers" not in sys.modules
for name in {names}:
    if not (child := os.fork()):
        importlib.import_module(name)
        exec({check!r})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_moe_ops_first():
    """Then any module: half of it may be imported when transformers asks for the rest."""
    ours = [f"moe_ops.huggingface.{name}" for name in ("quantizer", "conversion", "reload")]
    python(MOE_OPS_FIRST.format(names=[*ours, "transformers.core_model_loading"], check=CHECK))


def test_transformers_first():
    python(f"import transformers.modeling_utils\nimport moe_ops\n{CHECK}")


def test_reload_registers_again(monkeypatch):
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    importlib.reload(huggingface)
    importlib.reload(moe_ops.huggingface.watch)
    huggingface.install()
    assert before == auto.AUTO_QUANTIZER_MAPPING
    assert sum(hasattr(f, watch._MARK) for f in sys.meta_path) == 1
    method = transformers.PreTrainedModel.set_experts_implementation
    assert not hasattr(method.__wrapped__, "__wrapped__") or method.__wrapped__.__wrapped__ is None
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "moe_ops")
    importlib.reload(auto)  # transformers' own module, found and run again: its tables are new
    assert auto.AUTO_QUANTIZER_MAPPING["moe_ops"] is before["moe_ops"]


def test_a_module_that_is_imported_later(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 1\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('its own')\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    watch.after_import("late_module", lambda: seen.append(sys.modules["late_module"].value))
    watch.after_import("broken_module", lambda: seen.append("broken"))
    assert not seen
    late = importlib.import_module("late_module")
    assert seen == [1] and late.__spec__.loader is late.__loader__
    assert type(late.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(late)
    assert seen == [1, 1]
    with pytest.raises(RuntimeError, match="its own"):
        importlib.import_module("broken_module")
    assert seen == [1, 1]
    watch.after_import("late_module", lambda: seen.append("there"))
    assert seen[-1] == "there"


def test_public_name():
    assert moe_ops.MoeOpsConfig is huggingface.MoeOpsConfig
    assert "MoeOpsConfig" in moe_ops.__all__ and "MoeOpsConfig" in dir(moe_ops)
    with pytest.raises(AttributeError):
        moe_ops.MoeOpsConfigs


@pytest.mark.parametrize("version", ["4.57.1", "5.16.9"])
def test_an_old_transformers_is_named(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which is not always what was imported
    config = moe_ops.MoeOpsConfig
    with pytest.raises(ImportError, match=f"needs transformers 5.17 or later, this is {version}.*quantize_"):
        config("fp8")
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", {})
    huggingface.install()
    assert not auto.AUTO_QUANTIZER_MAPPING


def test_without_transformers(monkeypatch):
    """The name is there, as `from moe_ops import *` needs, and says what it lacks."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="MoeOpsConfig needs transformers"):
        moe_ops.MoeOpsConfig("fp8")


def test_experts_are_registered():
    assert ALL_EXPERTS_FUNCTIONS["moe_ops"].__module__ == "moe_ops.huggingface.experts"


def test_modules_that_the_readme_names_need_no_import_of_their_own():
    code = "import sys, moe_ops; assert 'transformers' not in sys.modules; moe_ops.sharding.shard_module;"
    subprocess.run([sys.executable, "-c", code + " moe_ops.kv_cache.Fp8Cache, moe_ops.kv_cache.kv_scales"], check=True)

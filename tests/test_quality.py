"""A trained model keeps its quality: bits per byte of held-out text, whole model quantized."""

import pytest
import torch
from trained_model import MODELS, needs_model, quickstart

import moe_ops

pytestmark = needs_model
WINDOWS = 256 if torch.cuda.is_available() else 24


def load():
    return quickstart.load(str(MODELS / "tiny-qwen3-moe"))[0]


def bits_per_byte(model):
    text = quickstart.read_text(str(MODELS / "val.bin"), WINDOWS * quickstart.WINDOW)
    return quickstart.bits_per_byte(model, *quickstart.cut(text, quickstart.Bytes()))


@pytest.fixture(scope="module")
def reference():
    return bits_per_byte(load())


@pytest.mark.parametrize("name,bound", [("bf16", 0.0005), ("fp8/bf16", 0.001), ("fp8", 0.003), ("fp8_block", 0.003)])
def test_bits_per_byte(name, bound, reference):
    """Of the start of the text; over all of it fp8 weights cost 0.04 %, and another order of rounding none."""
    model = moe_ops.quantize_(load(), name)
    assert abs(bits_per_byte(model) / reference - 1) < bound
    if moe_ops.FORMATS[name].quantized:
        left = {row.name for row in moe_ops.summary(model).rows if row.format is None and row.kind == "linear"}
        assert left == {"lm_head"}

"""Every family whose published checkpoints hold experts one by one: quantized per expert, put into the right places."""

import json

import checkpoint_writer as w
import pytest
import test_checkpoints_schemes as s
import tiny_models
import torch
import transformers
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

import moe_ops
from moe_ops import QuantizedExperts

pytestmark = pytest.mark.swap


def is_expert(key):
    parts = key.split(".")
    return key.endswith(".weight") and "experts" in parts and parts[parts.index("experts") + 1].isdigit()


@pytest.mark.parametrize("name", tiny_models.ROUTED)
def test_experts_of_a_family(name, tmp_path):
    """The oracle: transformers' own conversion of the dequantized matrices."""
    model = tiny_models.build(name)
    disk = {k: t.contiguous().clone() for k, t in revert_weight_conversion(model, dict(model.state_dict())).items()}
    if not any(is_expert(k) for k in disk):
        pytest.skip("its checkpoints hold fused experts")
    tensors, values = w.quantized(disk, s.QUARK["ptpc_fp8"][1], is_expert)
    fp8 = s.QUARK["ptpc_fp8"][0]["global_quant_config"]
    settings = s.quark(None, None, layer_quant_config={"*experts.*": fp8}, exclude=["*shared_experts*"])
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [type(model).__name__], "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    given = tiny_models.build(name)
    got = moe_ops.load_quantized(tmp_path, model=given)
    restored = {k: values[k.removesuffix(".weight")] if is_expert(k) else t for k, t in disk.items()}
    want = as_transformers_loads(name, restored, tmp_path / "float")
    blocks = [(n, m) for n, m in got.named_modules() if isinstance(m, QuantizedExperts)]
    assert blocks
    for n, m in blocks:
        for leaf, value in zip(m.weight_names(), m.dequantize(), strict=True):
            assert torch.equal(m.spec.original(leaf, value), want[f"{n}.{leaf}"]), f"{n}.{leaf}"
    if type(model).__name__ not in dir(transformers):
        return  # a part of a larger model: config.json cannot lead to it
    built = moe_ops.load_quantized(tmp_path)
    tensors, want = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (built, got))
    assert type(built).__name__ == type(got).__name__ and tensors.keys() == want.keys()
    for n, t in tensors.items():  # all of it: what no file holds, too
        assert t.dtype == want[n].dtype and torch.equal(as_bytes(t), as_bytes(want[n])), n


def as_bytes(t):
    return t.contiguous().view(-1).view(torch.uint8)


def as_transformers_loads(name, tensors, path):
    path.mkdir()
    model = tiny_models.build(name)
    model.config.save_pretrained(path)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(path, dtype=torch.float32).state_dict()

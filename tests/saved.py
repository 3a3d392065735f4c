"""Models on disk and what they hold, for tests of loading and saving.

    python tests/saved.py FOLDER    writes what is kept in data/saved, with numbers that do not depend on the version
"""

import json
import sys
from pathlib import Path

import tiny_models as tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moe_ops


def save(name, path, dtype=torch.bfloat16, **config):
    """A family's tiny random model in a folder, as transformers writes it; returns its class."""
    model = tiny.build(name, **config).to(dtype)
    model.save_pretrained(path)
    return type(model)


def load(cls, path, format=None, dtype=torch.bfloat16, **kwargs):
    config = {} if format is None else {"quantization_config": moe_ops.MoeOpsConfig(format)}
    return cls.from_pretrained(path, dtype=dtype, **config, **kwargs)


def tensors(path):
    """{file: {key: tensor}} of a folder."""
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found[file.name] = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def change(path, edit):
    """Rewrite a folder's files: edit({key: tensor}) changes all of them together, in place."""
    found = tensors(path)
    everything = {key: t for part in found.values() for key, t in part.items()}
    home = {key: file for file, part in found.items() for key in part}
    edit(everything)
    for file in found:
        part = {key: t.contiguous() for key, t in everything.items() if home.get(key, next(iter(found))) == file}
        save_file(part, Path(path) / file, metadata={"format": "pt"})


def change_config(path, edit):
    file = Path(path) / "config.json"
    said = json.loads(file.read_text())
    edit(said["quantization_config"])
    file.write_text(json.dumps(said))


def raw(t):
    """Bytes of a tensor: comparison of codes, NaN and the sign of zero included."""
    t = t.detach().contiguous()
    return t.reshape(-1).view(torch.uint8)


def assert_same(got, want):
    """Two models hold the same tensors, bit for bit, under the same names."""
    got, want = got.state_dict(), want.state_dict()
    assert set(got) == set(want)
    for key, t in want.items():
        assert got[key].dtype == t.dtype and got[key].shape == t.shape, key
        assert torch.equal(raw(got[key]).cpu(), raw(t).cpu()), key


# One format of each way to store codes and scales, and one module that is in float.
KEPT = {
    "qwen3_moe": {
        "experts": "mxfp4", "model.layers.1.mlp.experts": "nvfp4", "linear": "fp8", "*.k_proj": "mxfp8",
        "*.v_proj": "int8", "*.o_proj": "int4_g32", "model.layers.0.self_attn.q_proj": None,
    },
    "gpt_oss": {
        "experts": "mxfp6_e2m3", "model.layers.1.mlp.experts": "fp8_tensor", "linear": "fp8_block", "*.k_proj": "bf16",
    },
}  # fmt: skip


@torch.no_grad()
def write_kept(path):
    for name, formats in KEPT.items():
        model = tiny.build(name, vocab_size=128).to(torch.bfloat16)
        for key, p in sorted(model.named_parameters()):
            numbers = torch.arange(p.numel(), dtype=torch.float64) * (1 + sum(map(ord, key)) % 97)
            p.copy_(0.1 * torch.sin(numbers).view(p.shape) + (1.0 if key.endswith("norm.weight") else 0.0))
        moe_ops.quantize_(model, formats).save_pretrained(path / name)
        (path / name / "generation_config.json").unlink(missing_ok=True)
        (path / name / "expected.json").write_text(json.dumps(tiny.run(model)[0, :, :8].float().tolist()))


if __name__ == "__main__":
    write_kept(Path(sys.argv[1]))

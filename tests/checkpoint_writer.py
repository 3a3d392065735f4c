"""Small checkpoints in the layouts of their producers, and the values that their bytes stand for.

Codes and scales are random; values come from the tables below, in float64, rounded once: no code of the package, and no
quantization of anything. A scheme is a function (generator, N, K) -> (tensors by ending of their name, values (N, K)).
"""

import functools
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from moe_ops import QuantizedExperts, QuantizedLinear

transformers.logging.set_verbosity_error()
FIXTURES = Path(__file__).parent / "data" / "fixtures"
QWEN, QWEN_WIDE, GPT_OSS = "ct_qwen3_moe_fp8_dynamic", "hf_qwen3_moe_fp8_block128", "quark_gpt_oss_mxfp4_fp8"


def _minifloat(exponent_bits, mantissa_bits, bias):
    """Value of each code: sign, exponent, mantissa, with subnormals and without infinities."""
    values = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        e, m = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        values.append((m / 2**mantissa_bits + (e > 0)) * 2.0 ** (max(e, 1) - bias))
    return torch.tensor(values + [-v for v in values], dtype=torch.float64)


FP4, FP6 = _minifloat(2, 1, 1), {"e2m3": _minifloat(2, 3, 1), "e3m2": _minifloat(3, 2, 3)}
FP8 = torch.tensor(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))


def ints(g, low, high, *shape):
    return torch.randint(low, high, shape, generator=g)


def fp4(g, n, k):
    codes = ints(g, 0, 16, n, k)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), FP4[codes]


def fp6(name):
    def make(g, n, k):
        a, b, c, d = (codes := ints(g, 0, 64, n, k)).unflatten(1, (-1, 4)).unbind(-1)
        word = a | b << 6 | c << 12 | d << 18
        return torch.stack([word & 255, word >> 8 & 255, word >> 16], -1).flatten(1).to(torch.uint8), FP6[name][codes]

    return make


def fp8(g, n, k):
    codes = ints(g, 0, 127, n, k) + 128 * ints(g, 0, 2, n, k)  # without NaN, 0x7f and 0xff
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), FP8[codes]


def int8(g, n, k):
    codes = ints(g, -128, 128, n, k).to(torch.int8)
    return codes, codes.double()


def int8_words(g, n, k):
    """compressed-tensors' pack_to_int32 of 8 bits: q + 128, four to a word, the first lowest."""
    codes, values = int8(g, n, k)
    words = (codes.int() + 128).unflatten(1, (-1, 4)) << torch.arange(0, 32, 8)
    return words.sum(-1).to(torch.int32), values


def int4_words(g, n, k):
    codes = ints(g, -8, 8, n, k)
    words = (codes + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return words.sum(-1).to(torch.int32), codes.double()


def e8m0(g, *shape, dtype=torch.uint8):
    byte = ints(g, 118, 130, *shape)
    stored = byte.to(torch.uint8)
    stored = (2.0 ** (byte - 127)).float() if dtype == torch.float32 else stored.view(dtype)
    return stored, 2.0 ** (byte.double() - 127)


def number(g, *shape, dtype=torch.float32):
    stored = (torch.rand(shape, generator=g) * 0.02 + 0.001).to(dtype)
    return stored, stored.double()


def spread(scale, n, k, block):
    bn, bk = block[0] or n, block[1] or k
    scale = scale.reshape(-(-n // bn), -(-k // bk))
    return scale.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:n, :k]


def scheme(codes, scale, block, names=("weight", "weight_scale"), shape=None, extra=None):
    """shape: of the scale as it is stored, if not that of the grid of blocks. extra: more tensors and their factor."""

    def make(g, n, k):
        stored, values = codes(g, n, k)
        grid = (-(-n // (block[0] or n)), -(-k // (block[1] or k)))
        scales, factors = scale(g, *grid)
        scales = scales if shape is None else scales.reshape(shape if shape != "rows" else (n,))
        more, factor = extra(g) if extra else ({}, 1.0)
        value = values * spread(factors, n, k, block)
        return {names[0]: stored, names[1]: scales, **more}, (value * factor).float()

    return make


def input_scale(dtype=torch.float32, name="input_scale", shape=()):
    return lambda g: ({name: number(g, *shape, dtype=dtype)[0]}, 1.0)


def config_of(base):
    config = json.loads((FIXTURES / base / "config.json").read_text())
    config.pop("quantization_config")
    return config


@functools.cache
def float_tensors(base):
    """A random model's tensors under the names of its published checkpoints, bf16."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**config_of(base))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.1) if p.ndim > 1 else p.normal_(1.0, 0.1)
    return {k: t.contiguous() for k, t in revert_weight_conversion(model, dict(model.state_dict())).items()}


def unfused(tensors):
    """GPT-OSS as producers unfuse it: one Linear (out, in) for each expert and projection, rows as they were."""
    out = {}
    for key, t in tensors.items():
        module, _, leaf = key.rpartition(".")
        if not module.endswith("experts"):
            out[key] = t
            continue
        for e, one in enumerate(t):
            name = f"{module}.{e}.{leaf.removesuffix('_bias')}"
            out[f"{name}.bias" if leaf.endswith("_bias") else f"{name}.weight"] = one if one.ndim == 1 else one.mT
    return {k: t.contiguous() for k, t in out.items()}


def is_linear(key):
    return key.endswith("_proj.weight")


def quantized(tensors, make, choose=is_linear):
    """Tensors with matrices replaced, and {module on disk: values}. make: a scheme, or (by_module) module -> scheme."""
    g = torch.Generator().manual_seed(1)
    out, values = {}, {}
    for key, t in tensors.items():
        module = key.removesuffix(".weight")
        one = make(module) if getattr(make, "by_module", False) else make
        if not choose(key) or one is None:
            out[key] = t
            continue
        parts, values[module] = one(g, *t.shape)
        out |= {f"{module}.{ending}": part.contiguous() for ending, part in parts.items()}
    return out, values


def write(path, base, tensors, quantization, files=None, **config):
    """quantization: what config.json says of it, None to leave it out; files: more JSON files."""
    settings = {} if quantization is None else {"quantization_config": quantization}
    Path(path).mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config_of(base), **settings, **config}))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def assert_values(model, values, atol=0.0):
    """Every quantized module of the model holds these values, and there is none for which there are no values."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            seen.add(name)
            assert_equal(module.dequantize(), values[name], atol, name)
        elif isinstance(module, QuantizedExperts):
            up, down = module.dequantize()
            for e in range(len(up)):
                seen |= {key for key in values if key.startswith(f"{name}.{e}.")}
                assert_equal(up[e], gate_and_up(values, f"{name}.{e}"), atol, name)
                assert_equal(down[e], values[f"{name}.{e}.down_proj"], atol, name)
    assert seen == set(values)


def gate_and_up(values, expert):
    if f"{expert}.gate_up_proj" in values:  # rows alternate
        both = values[f"{expert}.gate_up_proj"]
        return torch.cat([both[0::2], both[1::2]])
    return torch.cat([values[f"{expert}.gate_proj"], values[f"{expert}.up_proj"]])


def assert_equal(got, want, atol, name):
    assert got.shape == want.shape, name
    assert torch.equal(got, want) if not atol else torch.allclose(got, want, rtol=atol, atol=0), name

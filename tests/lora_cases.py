"""LoRA on quantized models beside PEFT's own LoRA on the float models that their codes stand for."""

import copy
import re
import warnings

import tiny_models as tiny
import torch

import moe_ops
from moe_ops.formats import FORMATS

# One family of each structure (see tiny_models.py) whose weights have the same names when they are quantized.
FAMILIES = [
    "qwen3_moe", "mixtral", "deepseek_v4", "aria", "gpt_oss", "nemotron_h", "muse_spark", "longcat_flash", "llama4",
    "jetmoe",
]  # fmt: skip
WEIGHT_ONLY = [name for name in (*FORMATS, "fp8/bf16", "nvfp4/bf16") if FORMATS[name].activation is None]


def targets(model):
    """Full names of the experts' projections, which are those that they have in the float model."""
    found = []
    for name, m in model.named_modules():
        for key, p in m.named_parameters(recurse=False):
            if p.ndim == 3 and "conv" not in name and (key == "weight" or re.fullmatch("(gate_up|up|down)_proj", key)):
                found.append(f"{name}.{key}".replace(".base_layer", "").removeprefix("base_model.model."))
    return found


def config(model, **kwargs):
    from peft import LoraConfig

    given = {"r": 4, "lora_alpha": 8, "target_parameters": targets(model), "target_modules": [], **kwargs}
    return LoraConfig(**given)


def fill_(model, seed=0):
    """Random factors, large enough to be seen in what a model returns."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model


def quantized(family, fmt="fp8/bf16", **overrides):
    return moe_ops.quantize_(tiny.build(family, **overrides), {"experts": fmt})


def same_in_float(model):
    return moe_ops.dequantize_(copy.deepcopy(model))


def adapted(model, **kwargs):
    from peft import get_peft_model

    return fill_(get_peft_model(model, config(model, **kwargs)))


def carried_over(model, base, tmp_path):
    """Another base with the same adapter, through PEFT's files. Whatever PEFT has to say of them fails."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (".*is_gradient_checkpointing.*", ".*Could not find a config file.*"):
            warnings.filterwarnings("ignore", known)
        model.save_pretrained(tmp_path)
        return PeftModel.from_pretrained(base, tmp_path, is_trainable=True)


def gradients(model, x, seed=1):
    """Logits, and gradients of everything that has some: a step of training."""
    logits = tiny.run(model, **x)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), grads


def assert_same_step(got, want, x, tolerance=2e-6):
    out, grads = gradients(got, x)
    true_out, true_grads = gradients(want, x)
    assert tiny.relative_error(out, true_out) < tolerance
    assert set(grads) == set(true_grads) and grads
    for name, grad in true_grads.items():
        assert grad.norm() > 0, name
        assert tiny.relative_error(grads[name], grad) < 10 * tolerance, name


def raw(model):
    """Every tensor's bytes: comparison of codes."""
    return {key: t.detach().contiguous().reshape(-1).view(torch.uint8).clone() for key, t in model.state_dict().items()}

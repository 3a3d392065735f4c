"""Tiny random models of every MoE family that the installed transformers has (data/tiny_families.json).

`structure` of a family: S1 concatenated gate and up; S2 the same with a gate of its own; S3 transposed; S4 transposed,
with biases; S5 no gate; S6 a norm after each expert; U1 to U7 layouts that do not carry the experts interface's flags:
U1 otherwise as S1; U2 with experts that return their input; U3 every expert run on every row; U4 matrices above each
other; U5 one projection alone, of sorted rows; U6 MLPs in a dict; U7 no products of matrices, or no more than Linears.
"""

import importlib
import json
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

transformers.logging.set_verbosity_error()
FAMILIES = json.loads((Path(__file__).parent / "data" / "tiny_families.json").read_text())


def model_class(name):
    """The family's model class, None where this transformers lacks it."""
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        return None
    return getattr(module, FAMILIES[name]["model"], None)


def _installed():
    root = Path(transformers.__file__).parent / "models"
    return [n for n in FAMILIES if (root / n / f"modeling_{n}.py").exists()]


INSTALLED = _installed()  # by file: importing sixty modelling files would slow collection down
ROUTED = [n for n in INSTALLED if FAMILIES[n]["structure"].startswith("S")]
OTHER = [n for n in INSTALLED if FAMILIES[n]["structure"].startswith("U")]
WITH_EXPERTS = [n for n in INSTALLED if FAMILIES[n]["structure"] != "U7"]
UNFLAGGED = {  # where families whose experts carry no flags hold them; the last, only in older transformers
    "dbrx": r"transformer\.blocks\.[01]\.ffn\.experts",
    "jetmoe": r"model\.layers\.[01]\.(mlp|self_attention\.experts)\.(in|out)put_linear",
    "llama4": r"model\.layers\.[01]\.feed_forward\.experts",
    "longcat_flash": r"model\.layers\.0\.mlp\.experts",
    "nllb_moe": r"model\.(en|de)coder\.layers\.1\.ffn\.experts",
    "step3p7": r"layers\.1\.mlp\.experts",
    "switch_transformers": r"(en|de)coder\.block\.1\.layer\.[12]\.mlp\.experts",
    "aria": r"model\.layers\.[01]\.mlp\.experts\.fc[12]",
}


def build(name, **config):
    """Random model in eval mode, fp32; the same at every call."""
    cls = model_class(name)
    if cls is None:
        raise ImportError(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**FAMILIES[name]["config"], **config})).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # some families leave weights empty or zero
            if p.ndim >= 2 and (not torch.isfinite(p).all() or p.abs().max() == 0 or p.abs().max() > 1e3):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the class's own forward: the plainest loop over experts
    return model


def inputs(model, batch=2, seq=8):
    generator = torch.Generator().manual_seed(0)
    if "pixel_values" in model.main_input_name:
        pixels = torch.randn(batch, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.zeros(batch, dtype=torch.long)}
    ids = torch.randint(3, 100, (batch, seq), generator=generator)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    return {"input_ids": ids, **more}


def run(model, **kwargs):
    """Main output tensor of a forward."""
    return main_output(model(**(kwargs or inputs(model))))


def main_output(out):
    for key in ("logits", "last_hidden_state", "feature_maps"):
        value = getattr(out, key, None)
        if value is not None:
            return value[0] if isinstance(value, tuple | list) else value
    return out[0]


def routed_experts(model):
    """{name: module} of the modules that carry the flags of the experts interface."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "has_bias")}


def experts_at(name, model):
    """Names of the modules of a family that hold experts."""
    flagged = set(routed_experts(model))
    return flagged or {n for n, _ in model.named_modules() if re.fullmatch(UNFLAGGED[name], n)}


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())

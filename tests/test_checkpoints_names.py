"""Which tensors on disk make up which parameter: every family against transformers' own way back, and refusals."""

import pytest
import tiny_models
import torch
from transformers.core_model_loading import revert_weight_conversion

from moe_ops.checkpoints.names import Source, merge, sources

pytestmark = pytest.mark.swap


def on_disk(model):
    """The state dict under the names, and in the shapes, of the model's published checkpoints."""
    return revert_weight_conversion(model, dict(model.state_dict()))


def assemble(model, found, disk, parameter):
    like = model.state_dict()[parameter]
    if any(s.conversion for s in found):
        return merge(model, found, disk.__getitem__)
    value = torch.full_like(like, torch.nan) if like.is_floating_point() else torch.empty_like(like)
    for s in found:
        place = value if s.expert is None else value[s.expert]
        if s.shard is not None:
            rows = 1 if s.expert is None else 0
            place = place.unflatten(rows, (2, -1)).select(rows, s.shard)
        place.copy_(disk[s.key])
    return value


@pytest.mark.parametrize("name", tiny_models.INSTALLED)
def test_every_family_is_put_together_again(name):
    model = tiny_models.build(name)
    disk = on_disk(model)
    found = sources(model, disk)
    for parameter, tensors in found.items():
        assert torch.equal(assemble(model, tensors, disk, parameter), model.state_dict()[parameter]), parameter
    used = {s.key for tensors in found.values() for s in tensors}
    assert used == set(disk)


@pytest.fixture(scope="module")
def qwen():
    return tiny_models.build("qwen3_moe").to("meta")


@pytest.fixture(scope="module")
def keys():
    return list(on_disk(tiny_models.build("qwen3_moe")))


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


def test_experts_have_an_address(qwen, keys):
    found = sources(qwen, reversed(keys))["model.layers.0.mlp.experts.gate_up_proj"]
    experts = qwen.config.num_experts if hasattr(qwen.config, "num_experts") else qwen.config.num_local_experts
    assert [(s.expert, s.shard) for s in found] == [(e, s) for e in range(experts) for s in (0, 1)]
    assert found[3] == Source(EXPERT, "model.layers.0.mlp.experts.gate_up_proj", 1, 1)


def test_parts_follow_their_parameter(qwen, keys):
    def split(key):
        return (key.removesuffix("_scale"), "scale") if key.endswith("_scale") else (key, "")

    found = sources(qwen, [*keys, *(f"{k}_scale" for k in keys if "experts" in k)], split)
    parts = [(s.part, s.expert, s.shard) for s in found["model.layers.0.mlp.experts.down_proj"]]
    assert parts[0] == ("", 0, None) and ("scale", 1, None) in parts


@pytest.mark.parametrize("change, message", [
    (lambda keys: [k for k in keys if k != EXPERT], r"no tensor .* model.layers.0.mlp.experts.gate_up_proj\[1\] .up"),
    (lambda keys: [k for k in keys if "layers.0.mlp.experts" not in k], "no tensor .*layers.0.mlp.experts.gate_up"),
    (lambda keys: [k for k in keys if k != "model.norm.weight"], "no tensor in the checkpoint for model.norm.weight"),
    (lambda keys: [*keys, "model.norm.wieght"], "nothing in the model takes model.norm.wieght"),
    (lambda keys: [*keys, EXPERT.replace(".1.", ".77.")], r"experts, which leaves no place for .*experts.77.up_proj"),
    (lambda keys: [*keys, EXPERT.replace("up_proj", "w3")], "nothing in the model takes|given twice"),
    (lambda keys: [*keys, "model.layers.0.mlp.experts.gate_up_proj"], "given twice|some experts|one by one"),
], ids=["expert", "block", "parameter", "unknown", "beyond", "duplicate", "stack_and_single"])  # fmt: skip
def test_what_does_not_fit_is_named(qwen, keys, change, message):
    with pytest.raises(ValueError, match=message):
        sources(qwen, change(keys))


def test_tied_weights_need_one_tensor():
    model = tiny_models.build("qwen3_moe", tie_word_embeddings=True)
    keys = [k for k in on_disk(model) if k != "lm_head.weight"]
    assert "lm_head.weight" not in sources(model, keys)


def test_names_of_unfused_experts_are_read_by_structure():
    """Quark's GPT-OSS: per expert, gate and up in one matrix, with biases; transformers' mapping does not have it."""
    model = tiny_models.build("gpt_oss")
    keys = [k for k in on_disk(model) if ".experts." not in k]
    prefix, count = "model.layers.{}.mlp.experts", model.config.num_local_experts
    for layer in range(model.config.num_hidden_layers):
        for e in range(count):
            stem = f"{prefix.format(layer)}.{e}"
            keys += [f"{stem}.{p}_proj.{leaf}" for p in ("gate_up", "down") for leaf in ("weight", "bias")]
    found = sources(model, keys)
    bias = found["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert [(s.expert, s.shard) for s in bias] == [(e, None) for e in range(count)]

"""Merging an adapter into codes: what is stored then, what it is said to cost, and the way back."""

import copy
import re
import warnings

import lora_cases as cases
import pytest
import tiny_models as tiny
import torch

import moe_ops
from moe_ops.formats import FORMATS, quantize_weight
from moe_ops.streaming import streams

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*", "ignore:.*Could not find a config file.*"
)
QUIET = pytest.mark.filterwarnings("ignore:.*merged an adapter.*")
SIZE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}


def adapted(family="qwen3_moe", fmt="fp8", **kwargs):
    """An adapter on every experts' projection and on a Linear."""
    model = moe_ops.quantize_(tiny.build(family, **SIZE), fmt)
    return cases.adapted(model, target_modules=["q_proj"], **kwargs)


def storage(model):
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def stored(model):
    """The quantized modules of a model with or without adapters, by name."""
    return {name.replace(".base_layer", ""): m for name, m in streams(model)}


def weights(module):
    """{name: canonical fp32 (E, S*N, K)}, S of each."""
    if isinstance(module, moe_ops.QuantizedLinear):
        return {"weight": (module.dequantize()[None], 1)}
    return {name: (w, s) for w, (name, s, *_) in zip(module.dequantize(), module.spec.matrices)}


@pytest.mark.parametrize(
    "family, fmt", [*(("qwen3_moe", fmt) for fmt in FORMATS), *(("gpt_oss", fmt) for fmt in ("bf16", "fp8", "nvfp4"))]
)
def test_merged(family, fmt):
    """dequantize + what PEFT merges into the float model, quantized again, in the same storage."""
    mine = adapted(family, fmt)
    theirs = moe_ops.dequantize_(copy.deepcopy(mine)).merge_and_unload()  # PEFT's own sum, in the float layout
    codec = FORMATS[fmt].weight
    places = storage(mine)
    count = 3 if FORMATS[fmt].quantized else 2  # a Linear stays one of PEFT's own then
    with pytest.warns(UserWarning, match=f"merged an adapter into {count} quantized weights") as said:
        merged = mine.merge_and_unload()
    assert set(storage(merged).values()) <= set(places.values())
    wanted = off = 0.0
    for name, m in stored(merged).items():
        if "experts" not in name and "q_proj" not in name:
            continue
        summed = stored(moe_ops.quantize_(copy.deepcopy(theirs), "bf16")).get(name) or theirs.get_submodule(name)
        is_linear = isinstance(summed, torch.nn.Linear)
        exact = {"weight": (summed.weight[None], 1)} if is_linear else weights(summed)
        for key, (got, shards) in weights(m).items():
            q = quantize_weight(codec, exact[key][0].detach(), shards)
            if codec.block is not None:
                want = moe_ops.formats.dequantize_weight(q, shards)
                # Sums of another order may fall on the other side of a tie: to the next code, and few of them.
                assert (got != want).float().mean() < 2e-3
                torch.testing.assert_close(got, want, atol=float(want.abs().max()) / 8, rtol=0.3)
            off += float((got - exact[key][0]).double().square().sum())
            wanted += float(exact[key][0].double().square().sum())
    error = (off / wanted) ** 0.5
    (text,) = [str(w.message) for w in said if "merged an adapter" in str(w.message)]
    assert float(re.search(r"relative error of ([\d.]+)%", text)[1]) == pytest.approx(100 * error, rel=0.01, abs=0.006)
    assert (error > 0.005) == FORMATS[fmt].quantized or fmt == "int8"
    assert tiny.run(merged, **tiny.inputs(merged)).isfinite().all()


@QUIET
@pytest.mark.parametrize("fmt", FORMATS)
def test_unmerged_bit_for_bit(fmt):
    mine = adapted(fmt=fmt) if FORMATS[fmt].quantized else cases.adapted(cases.quantized("qwen3_moe", fmt))
    x = tiny.inputs(mine.get_base_model())
    before, places, want = cases.raw(mine), storage(mine), tiny.run(mine, **x)
    mine.merge_adapter()
    assert storage(mine) == places
    assert torch.equal(tiny.run(mine, **x), tiny.run(copy.deepcopy(mine).unload(), **x))  # and not added once more
    changed = {key for key, t in cases.raw(mine).items() if not torch.equal(t, before[key])}
    assert {key.split(".")[-1].split("_")[0] for key in changed} >= {"gate", "down"}
    assert not any("lora_" in key for key in changed)
    assert not torch.equal(tiny.run(mine, **x), want)
    mine.unmerge_adapter()
    after = cases.raw(mine)
    assert set(after) == set(before) and all(torch.equal(t, before[key]) for key, t in after.items())
    assert storage(mine) == places and torch.equal(tiny.run(mine, **x), want)


@QUIET
def test_merged_one_after_another_and_disabled():
    mine = adapted()
    mine.add_adapter("other", cases.config(mine, target_modules=["q_proj"]))
    cases.fill_(mine)
    x, before = tiny.inputs(mine.get_base_model()), cases.raw(mine)
    bare = tiny.run(copy.deepcopy(mine).unload(), **x)
    mine.merge_adapter(["default"])
    one = cases.raw(mine)
    mine.merge_adapter(["other"])
    assert any(not torch.equal(t, one[key]) for key, t in cases.raw(mine).items())
    mine.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in cases.raw(mine).items())
    mine.merge_adapter(["default"])
    assert all(torch.equal(t, one[key]) for key, t in cases.raw(mine).items())
    with mine.disable_adapter():  # PEFT takes a merged adapter out, then
        assert torch.equal(tiny.run(mine, **x), bare)
    assert all(torch.equal(t, before[key]) for key, t in cases.raw(mine).items())


@QUIET
def test_what_is_merged_together_is_rounded_once():
    """Two adapters that cancel each other: no value moves, where one after the other would move many."""
    mine = adapted(fmt="mxfp8")  # numbers that it stores are stored as themselves again
    mine.add_adapter("other", cases.config(mine, target_modules=["q_proj"]))
    for layer in [m for m in mine.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]:
        layer.lora_B["other"].weight.data.copy_(-layer.lora_B["default"].weight)
        layer.lora_A["other"].weight.data.copy_(layer.lora_A["default"].weight)
    before = {name: weights(m) for name, m in stored(mine).items()}
    moved = {}
    for names in (["default", "other"], ["default"], ["other"]):
        mine.merge_adapter(names)
        pairs = [(name, weights(m), before[name]) for name, m in stored(mine).items()]
        moved[len(names)] = [n for n, now, was in pairs if any(not torch.equal(now[k][0], was[k][0]) for k in was)]
        if len(names) == 2:
            mine.unmerge_adapter()
    assert not moved[2] and len(moved[1]) == 2


@pytest.mark.parametrize("safe", [False, True])
def test_broken_factors_leave_the_codes(safe):
    mine = adapted()
    layer = mine.get_base_model().model.layers[0].mlp.experts  # the outer one: down_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, -1] = torch.nan  # of the last expert
    before = cases.raw(layer)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj \(expert 3\) has non-finite values"):
        layer.merge(safe_merge=safe)
    assert all(torch.equal(t, before[key]) for key, t in cases.raw(layer).items()) and not layer.merged


def test_one_warning_for_a_call_and_one_for_a_layer():
    mine = adapted()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mine.merge_adapter()
        mine.unmerge_adapter()
        mine.get_base_model().model.layers[0].self_attn.q_proj.merge()
    texts = [str(w.message) for w in said if "merged" in str(w.message)]
    assert len(texts) == 2 and "3 quantized weights (fp8)" in texts[0] and "1 quantized weight (fp8)" in texts[1]


@QUIET
def test_merged_model_is_saved_as_a_quantized_one(tmp_path):
    merged = adapted("gpt_oss").merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float32)
    x = tiny.inputs(merged)
    assert torch.equal(tiny.run(again, **x), tiny.run(merged, **x))


def test_merged_before_it_was_quantized():
    """There are no codes of before to go back to."""
    model = tiny.build("qwen3_moe", **SIZE)
    mine = cases.adapted(model, target_modules=["q_proj"])
    mine.merge_adapter()
    moe_ops.quantize_(mine, "fp8")
    with pytest.raises(ValueError, match="default: merged before the weight was quantized"):
        mine.unmerge_adapter()


@QUIET
def test_codes_that_were_replaced_since():
    mine = adapted()
    layer = mine.get_base_model().model.layers[0].self_attn.q_proj
    layer.merge()
    layer.base_layer = moe_ops.QuantizedLinear.from_float(torch.nn.Linear(128, 64), "int8")
    with pytest.raises(ValueError, match="weight was replaced since the merge"):
        layer.unmerge()

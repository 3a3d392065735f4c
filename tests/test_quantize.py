"""quantize_ and dequantize_: what they choose, what they say about it, and that each module changes in one step."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from oracle import STORED, fit
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from toy_moe import (
    EXPERTS,
    EXPERTS_AT,
    HIDDEN,
    INTERMEDIATE,
    Block,
    ToyExperts,
    ToyModel,
    experts,
    same,
    tokens,
)
from toy_moe import relative_error as rel

import moe_ops
from moe_ops import FORMATS, QuantizedExperts, QuantizedLinear, dequantize_, quantize_, summary


def snapshot(model):
    return {n: (id(m), type(m)) for n, m in model.named_modules()}, {n: id(p) for n, p in model.named_parameters()}


def formats(model):
    return {r.name: r.format for r in summary(model).rows}


# ---- what is chosen


def test_bare_name_covers_experts_and_linears():
    model = quantize_(ToyModel(), "fp8")
    got = formats(model)
    for i in (0, 1):
        assert (
            got[f"layers.{i}.mlp.experts"] == got[f"layers.{i}.proj"] == got[f"layers.{i}.mlp.shared_expert.0"] == "fp8"
        )
        assert got[f"layers.{i}.mlp.gate"] is got[f"layers.{i}.mlp.shared_expert_gate"] is None
    assert got["lm_head"] is got["embed"] is None
    notes = {r.name: r.note for r in summary(model).rows}
    assert (
        notes["lm_head"] == "output head" and notes["embed"] == "embedding" and notes["layers.0.mlp.gate"] == "router"
    )
    assert notes["layers.0.mlp.shared_expert_gate"] == "1 x 64 is not a multiple of 16"


def test_precedence_of_patterns():
    wanted = {
        "linear": "fp8_block",
        "experts": "fp8",
        "re:.*layers\\.0\\..*": None,
        "layers.*.proj": "fp8/bf16",
        "layers.0.mlp.experts": "fp8_tensor",
        "layers.1.mlp": "bf16",
    }
    got = formats(quantize_(ToyModel(), wanted, ignore=["*.shared_expert.2"]))
    assert got["layers.0.mlp.experts"] == "fp8_tensor"  # an exact name beats a regular expression
    assert got["layers.0.proj"] is None  # the first of two patterns wins
    assert got["layers.1.proj"] == "fp8/bf16"  # a pattern beats a class
    assert got["layers.1.mlp.experts"] == "bf16"  # an exact name covers what is under it
    assert got["layers.1.mlp.shared_expert.0"] is None  # bf16 leaves a Linear as it is
    assert got["layers.1.mlp.shared_expert.2"] is None


def test_ignore_takes_one_string_and_covers_what_is_under_it():
    got = formats(quantize_(ToyModel(), "fp8", ignore="layers.0"))
    assert not any(fmt for name, fmt in got.items() if name.startswith("layers.0"))
    assert got["layers.1.proj"] == "fp8"


def test_a_dict_covers_what_it_names():
    got = formats(quantize_(ToyModel(), {"experts": "fp8"}))
    assert {n for n, f in got.items() if f} == set(EXPERTS_AT)
    got = formats(quantize_(ToyModel(), {"linear": "fp8"}))
    assert not any(got[n] for n in EXPERTS_AT) and got["layers.0.proj"] == "fp8"


def test_shared_expert_as_wide_as_there_are_experts():
    """512 experts and a shared expert of 512: its first Linear has a row per expert, but another one leads back."""
    torch.manual_seed(0)
    block = Block(ToyExperts(num_experts=32), shared=32)
    block.mixer = nn.Linear(HIDDEN, 32)  # rows per expert and no way back: a router by any other name
    got = formats(quantize_(block, "fp8"))
    assert got["shared_expert.0"] == got["shared_expert.2"] == "fp8" and got["mixer"] is None


def test_heads_adapters_and_weights_that_the_code_reads_stay():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.wi, self.wo = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.wo(self.wi(x).to(self.wo.weight.dtype))

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.lora_A = nn.Linear(64, 64), nn.Linear(64, 16)

    model = nn.ModuleDict({
        "embed": nn.Embedding(64, 64), "tied": nn.Linear(64, 64, bias=False), "reads": Reads(), "adapted": Adapted(),
        "router_head": nn.Linear(64, 64), "odd": nn.Linear(64, 30), "head": nn.Linear(64, 64),
    })  # fmt: skip
    model["tied"].weight = model["embed"].weight
    model.get_output_embeddings = lambda: model["head"]
    quantize_(model, "fp8")
    notes = {r.name: r.note for r in summary(model).rows}
    assert notes["tied"] == notes["head"] == "output head" and notes["router_head"] == "router"
    assert notes["reads.wo"] == "the code of Reads reads wo.weight" and formats(model)["reads.wi"] == "fp8"
    assert notes["adapted.lora_A"] == "adapter" and formats(model)["adapted.base_layer"] == "fp8"
    assert "30 x 64" in notes["odd"]


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, partial(l1_unstructured, name="weight", amount=0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_linear_with_a_computed_weight_stays(norm):
    """A hook assigns its weight before each forward: codes would be overwritten."""
    model = nn.Sequential(norm(nn.Linear(64, 64)), nn.Linear(64, 64)).eval()
    x = torch.randn(4, 64)
    want = model(x)
    assert rel(quantize_(model, "fp8")(x), want) < 0.08
    (left, done) = summary(model).rows
    assert left.format is None and left.note.startswith("its weight is computed") and done.format == "fp8"


def test_subclasses_of_linear_stay_and_are_listed():
    class Own(nn.Linear):
        pass

    rows = summary(quantize_(nn.Sequential(Own(64, 64), nn.Linear(64, 64)), "fp8")).rows
    assert [r.format for r in rows] == [None, "fp8"] and rows[0].note == "Own is a class of its own, not nn.Linear"


def test_a_dense_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(4, 64)
    want = model(x)
    assert rel(quantize_(model, "fp8")(x), want) < 0.08
    assert [r.format for r in summary(model).rows] == ["fp8", "fp8"]
    assert not summary(quantize_(nn.Sequential(nn.ReLU()))).rows


def test_the_model_itself_may_be_the_module():
    m = nn.Linear(64, 64)
    assert quantize_(m, "fp8") is m and type(m) is QuantizedLinear
    assert dequantize_(m) is m and type(m) is nn.Linear
    e = experts()
    assert quantize_(e, "fp8") is e and isinstance(e, QuantizedExperts)


def test_a_second_call():
    model = quantize_(ToyModel(), "fp8")
    before = snapshot(model)
    quantize_(model, "fp8")
    assert snapshot(model) == before
    with pytest.raises(
        ValueError, match=r"layers.0.proj is already quantized to fp8, not fp8_block: dequantize_ first"
    ):
        quantize_(model, "fp8_block")
    assert snapshot(model) == before
    quantize_(dequantize_(model), "fp8_block")
    assert set(formats(model).values()) == {"fp8_block", None}


# ---- summary


def test_summary():
    model = ToyModel()
    bytes_before = sum(p.numel() * 4 for n, p in model.named_parameters() if n.endswith(("_proj", "proj.weight")))
    quantize_(model, {"experts": "fp8", "linear": "fp8"}, backend="reference", ignore="*.shared_expert")
    s = summary(model)
    done = [r for r in s.rows if r.format]
    assert sum(r.bytes_before for r in done) == bytes_before
    e = model.layers[0]["mlp"].experts
    numel = e.gate_up_proj.numel() + e.down_proj.numel()
    scales = 4 * (EXPERTS * 2 * INTERMEDIATE + EXPERTS * HIDDEN)
    row = next(r for r in s.rows if r.name == EXPERTS_AT[0])
    assert (row.kind, row.backend, row.bytes_before, row.bytes_after) == (
        "experts",
        "reference",
        4 * numel,
        numel + scales,
    )
    assert s.bytes_before == sum(r.bytes_before for r in s.rows) > s.bytes_after
    text = str(s)
    assert "layers.*.mlp.experts" in text and "x 2" in text and "ignored (*.shared_expert)" in text and "total" in text
    assert not summary(ToyModel()).rows and "(the model)" in str(summary(quantize_(nn.Linear(64, 64))))
    assert not summary(dequantize_(model)).rows


@pytest.mark.parametrize("name", STORED)
def test_summary_counts_what_is_stored(name):
    """Bits of an element, and its share of the scales."""
    codec, (h, i) = FORMATS[name].weight, fit(name, HIDDEN, INTERMEDIATE)
    model = quantize_(ToyModel(hidden=h, intermediate=i), name)
    rows = {r.name: r for r in summary(model).rows}
    numel = EXPERTS * 3 * h * i
    assert (rows[EXPERTS_AT[0]].format, rows[EXPERTS_AT[0]].bytes_before) == (name, 4 * numel)
    if not FORMATS[name].quantized:
        assert rows[EXPERTS_AT[0]].bytes_after == 4 * numel
        return
    bn, bk = codec.block
    scales = sum(s * -(-n // (bn or n)) * -(-k // (bk or k)) for s, n, k in ((2, i, h), (1, h, i)))
    want = numel * codec.element.bits // 8 + EXPERTS * (scales * codec.scale_dtype.itemsize + 12 * codec.global_scale)
    assert rows[EXPERTS_AT[0]].bytes_after == want
    proj = h * h * codec.element.bits // 8 + codec.scale_dtype.itemsize * -(-h // (bn or h)) * -(-h // (bk or h))
    assert rows["layers.0.proj"].bytes_after == proj + 4 * codec.global_scale


# ---- in one step


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupt_leaves_whole_modules_and_a_second_call_finishes(monkeypatch, error):
    want = quantize_(ToyModel(), "fp8")
    real, calls = moe_ops.experts._quantize, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second projection of the second layer
            raise error
        return real(*args, **kwargs)

    model = ToyModel()
    floats = copy.deepcopy(model)
    monkeypatch.setattr(moe_ops.experts, "_quantize", fails)
    with pytest.raises(error):
        quantize_(model, "fp8")
    monkeypatch.undo()
    first, second = (model.get_submodule(n) for n in EXPERTS_AT)
    assert isinstance(first, QuantizedExperts) and type(second) is ToyExperts
    assert same(second, floats.get_submodule(EXPERTS_AT[1])) and set(vars(second)) == set(vars(ToyExperts()))
    assert torch.isfinite(model(tokens())).all()
    assert same(quantize_(model, "fp8"), want)


class Interrupting(dict):
    """A table of children whose next store is interrupted."""

    armed = True

    def __setitem__(self, key, value):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        super().__setitem__(key, value)


def test_a_shared_module_stays_shared():
    for interrupt in (False, True):
        model = ToyModel()
        model.layers[1]["mlp"].experts = model.layers[0]["mlp"].experts
        if interrupt:
            mlp = model.layers[1]["mlp"]
            mlp._modules = Interrupting(mlp._modules)
            with pytest.raises(KeyboardInterrupt):
                quantize_(model, "fp8")
            assert isinstance(model.layers[0]["mlp"].experts, QuantizedExperts)
            assert type(mlp.experts) is ToyExperts
        quantize_(model, "fp8")
        assert model.layers[0]["mlp"].experts is model.layers[1]["mlp"].experts
        assert isinstance(model.layers[0]["mlp"].experts, QuantizedExperts)
        dequantize_(model)
        assert model.layers[0]["mlp"].experts is model.layers[1]["mlp"].experts
        assert type(model.layers[0]["mlp"].experts) is ToyExperts


def test_float_weights_are_freed_one_module_at_a_time(monkeypatch):
    model = ToyModel()
    weights = [weakref.ref(model.get_submodule(n).gate_up_proj) for n in EXPERTS_AT]
    real, alive, largest = moe_ops.experts._quantize, [], []

    def watch(*args, **kwargs):
        gc.collect()
        alive.append(sum(w() is not None for w in weights))
        return real(*args, **kwargs)

    inner = moe_ops.experts.write_matrix

    def one_matrix(q, e, s, matrix, shards):
        largest.append(tuple(matrix.qdata.shape))
        inner(q, e, s, matrix, shards)

    monkeypatch.setattr(moe_ops.experts, "_quantize", watch)
    monkeypatch.setattr(moe_ops.experts, "write_matrix", one_matrix)
    quantize_(model, "fp8")
    gc.collect()
    assert alive == [2, 2, 1, 1] and not any(w() is not None for w in weights)
    assert set(largest) == {(INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)}


def test_a_format_that_names_nothing_is_refused():
    with pytest.raises(ValueError, match="format is an empty dict"):
        quantize_(ToyModel(), {})


def test_progress(capsys):
    pytest.importorskip("tqdm")
    quantize_(ToyModel(), "fp8", progress=True)
    assert "8/8" in capsys.readouterr().err
    quantize_(ToyModel(), "fp8")
    assert not capsys.readouterr().err

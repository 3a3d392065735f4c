"""What quantize_ refuses: a ValueError that says why, and a model that is as it was."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_moe import (
    EXPERTS,
    EXPERTS_AT,
    HIDDEN,
    INTERMEDIATE,
    ToyModel,
    experts,
)

from moe_ops import FORMATS, QuantizedExperts, QuantizedLinear, dequantize_, quantize_, summary


def snapshot(model):
    return {n: (id(m), type(m)) for n, m in model.named_modules()}, {n: id(p) for n, p in model.named_parameters()}


def formats(model):
    return {r.name: r.format for r in summary(model).rows}


# ---- refusals: a ValueError that says why, and a model that is as it was


class Opaque(torch.Tensor):
    """Stands for another library's tensor subclass."""


def refused(model, message, *args, **kwargs):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, *args, **kwargs)
    assert snapshot(model) == before and not summary(model).rows


def test_refuses_bad_arguments():
    refused(ToyModel(), r"unknown format 'fp7'; known: bf16, fp8, fp8_tensor, fp8_block", "fp7")
    refused(ToyModel(), "unknown format 'fp7'", {"experts": "fp8", "linear": "fp7"})
    refused(ToyModel(), "match no module: 'layers.7', '\\*.nope'", "fp8", ignore=["layers.7", "*.nope", "embed"])
    refused(ToyModel(), "match no module: 'layer.0'", {"experts": "fp8", "layer.0": None})
    refused(ToyModel(), "not a regular expression", "fp8", ignore="re:(")
    refused(ToyModel(), "lm_head.* is always left in float: output head", {"lm_head": "fp8"})
    refused(ToyModel(), "unknown backend 'cuda'; known: auto", "fp8", backend="cuda")
    refused(ToyModel(), "meta device", "fp8", device="meta")
    refused(ToyModel(), "cannot use device 'gpu'", "fp8", device="gpu")
    refused(ToyModel(), "cannot use device 'cuda:99'", "fp8", device="cuda:99")
    refused(ToyModel(), "ignore is a pattern or several, got None", "fp8", ignore=None)
    refused(ToyModel(), "a format is a name", {"linear": 8})
    for call in (quantize_, dequantize_):
        with pytest.raises(ValueError, match=r"must be an nn.Module, got dict"):
            call({})


def test_refuses_non_finite_weights_by_name():
    model = ToyModel()
    with torch.no_grad():
        model.layers[1]["mlp"].experts.down_proj[3, 5, 6] = float("inf")
        model.layers[0]["proj"].weight[0, 0] = float("nan")
    refused(model, r"layers.0.proj.weight has non-finite values\nlayers.1.mlp.experts.down_proj .* \(experts 3\)")
    quantize_(model, "fp8", ignore=["layers.0.proj", EXPERTS_AT[1]])


def test_refuses_meta_compiled_offloaded_and_replaced():
    refused(ToyModel().to("meta"), r"layers.0.proj is on the meta device \(weight\)")
    refused(torch.compile(ToyModel()), "the model is compiled")
    model = ToyModel()
    model.layers[0]["mlp"].compile()
    refused(model, "layers.0.mlp is compiled")
    model = ToyModel()
    model.layers[0]["proj"].forward = lambda x: x
    refused(model, "layers.0.proj has its forward replaced")
    compiled = torch.compile(quantize_(ToyModel()))
    with pytest.raises(ValueError, match="is compiled"):
        dequantize_(compiled)


def test_refuses_offloaded_modules():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(ToyModel(), execution_device=torch.device("cpu"))
    refused(model, "layers.0.proj is offloaded")


def test_refuses_what_another_library_quantized():
    model = ToyModel()
    w = model.layers[0]["proj"].weight
    model.layers[0]["proj"].weight = nn.Parameter(w.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, r"layers.0.proj holds weight \(Tensor, float8_e4m3fn\): quantized or sharded by another library")
    model.layers[0]["proj"].weight = nn.Parameter(w.detach().as_subclass(Opaque), requires_grad=False)
    refused(model, r"holds weight \(Opaque, float32\)")

    class Linear4bit(nn.Linear):
        pass

    model.layers[0]["proj"] = Linear4bit(64, 64)
    model.layers[0]["proj"].weight = nn.Parameter(torch.zeros(2048, 1, dtype=torch.uint8), requires_grad=False)
    refused(model, r"layers.0.proj \(.*Linear4bit\) holds weight \(Parameter|Tensor, uint8\)")
    quantize_(model, "fp8", ignore="layers.0.proj")
    assert formats(model)[EXPERTS_AT[0]] == "fp8"


def test_refuses_torchao():
    ao = pytest.importorskip("torchao.quantization")
    model = ToyModel()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    refused(model, r"layers.0.proj holds weight \(.*Int8.*quantized or sharded by another library")


def test_strict():
    class WeirdExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = EXPERTS
            self.w1, self.w2 = nn.Parameter(torch.randn(4, 64, 32)), nn.Parameter(torch.randn(4, 32, 64))

    for made, message in [
        (WeirdExperts(), r"WeirdExperts holds stacks of matrices \(w1 \(4, 64, 32\), w2 \(4, 32, 64\)\)"),
        (nn.ModuleList(nn.Linear(64, 8) for _ in range(4)), "ModuleList is held as `experts`, in a layout that"),
    ]:
        model = ToyModel()
        model.layers[0]["mlp"].experts = made
        refused(model, f"layers.0.mlp.experts: {message}.*strict=False leaves")
        quantize_(model, "fp8", strict=False)
        got = {r.name: r for r in summary(model).rows}
        assert got[EXPERTS_AT[0]].format is None and re.match(message, got[EXPERTS_AT[0]].note)
        assert got[EXPERTS_AT[1]].format == "fp8" and type(made) is type(model.layers[0]["mlp"].experts)
        assert not any(isinstance(m, QuantizedLinear) for m in made.modules())


@pytest.mark.parametrize("change", ["gate", "product", "raises"])
def test_experts_that_compute_something_else_than_their_shapes_say(change):
    """Without flags, a reading is believed when it computes what the module does, and not before."""

    class PlainExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / 8)
            self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / 8)
            self.act_fn, self.change = nn.SiLU(), change

        def forward(self, hidden, ids, weights):
            out = torch.zeros_like(hidden)
            for t, a in ((t, a) for t in range(len(hidden)) for a in range(ids.shape[1])):
                g, u = (self.gate_up_proj[ids[t, a]] @ hidden[t]).chunk(2)
                if self.change == "raises":
                    raise RuntimeError("not today")
                h = self.act_fn(u) * g if self.change == "gate" else self.act_fn(g) * u
                out[t] += weights[t, a] * (self.down_proj[ids[t, a]] @ h) * (1.1 if self.change == "product" else 1)
            return out

    torch.manual_seed(0)
    why = r"PlainExperts holds stacks of matrices .*, but no reading of them computes what it does"
    near = r" \(the nearest differs by 9\.\d%\)" if change == "product" else ""
    model = ToyModel(layers=1)
    model.layers[0]["mlp"].experts = PlainExperts()
    refused(model, why + near)
    model.layers[0]["mlp"].experts.change = None
    assert formats(quantize_(model, "fp8"))[EXPERTS_AT[0]] == "fp8"


def test_shapes_that_contradict_the_flags():
    broken = experts()
    broken.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 48))
    refused(nn.Sequential(broken), r"gate_up_proj \(4, 64, 64\) and down_proj \(4, 64, 48\) do not fit together")
    more = experts()
    more.extra_scale = nn.Parameter(torch.ones(EXPERTS))
    refused(nn.Sequential(more), "parameters that no rule explains: extra_scale")
    less = experts()
    del less.down_proj
    refused(nn.Sequential(less), "down_proj must be a 3-D parameter, got absent")


def test_dimensions_that_the_format_cannot_take(monkeypatch):
    codec = type(FORMATS["fp8"].weight)
    monkeypatch.setattr(codec, "check", lambda self, n, k: f"{k} is odd" if k == INTERMEDIATE else None)
    why = "(4, 64, 32) does not fit format 'fp8': 32 is odd"
    refused(ToyModel(), rf"layers.0.mlp.experts: down_proj {re.escape(why)}.*strict=False")
    model = quantize_(ToyModel(), "fp8", strict=False)
    notes = {r.name: r.note for r in summary(model).rows}
    assert notes[EXPERTS_AT[0]] == f"down_proj {why}"
    assert notes["layers.0.mlp.shared_expert.2"] == "weight (64, 32) does not fit format 'fp8': 32 is odd"
    assert formats(model)["layers.0.proj"] == "fp8"
    with pytest.raises(ValueError, match=r"weight .* 32 is odd"):
        QuantizedLinear.from_float(nn.Linear(32, 64), "fp8")


def test_groups_that_do_not_fill_a_row():
    """One error that names the module, the shape and the format, whichever of the two projections it is."""
    model = lambda: ToyModel(intermediate=48)  # noqa: E731
    why = r"down_proj \(4, 64, 48\) does not fit format 'mxfp4': mxfp4 packs 4-bit codes in groups of 32: 48 is not"
    refused(model(), rf"layers.0.mlp.experts: {why}", "mxfp4")
    refused(model(), r"experts: down_proj .* format 'fp8/mxfp4': mxfp4 packs .* 48 is not", "fp8/mxfp4")
    refused(ToyModel(), r"experts: gate_up_proj \(4, 64, 64\) .* 'int4_g128': .* groups of 128: 64 is not", "int4_g128")
    left = {r.name: r for r in summary(quantize_(model(), "mxfp4", strict=False)).rows}
    assert left[EXPERTS_AT[0]].format is None and re.match(why, left[EXPERTS_AT[0]].note)
    assert left["layers.0.proj"].format == "mxfp4"
    dense = quantize_(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)), "mxfp4")
    notes = [(r.format, r.note) for r in summary(dense).rows]
    assert notes[0] == ("mxfp4", "") and notes[1][1].startswith("weight (64, 48) does not fit format 'mxfp4'")
    e = model().layers[0]["mlp"].experts
    with pytest.raises(ValueError, match=why):
        QuantizedExperts.from_float(e.gate_up_proj, e.down_proj, "mxfp4")
    with pytest.raises(ValueError, match=r"weight \(64, 48\) does not fit format 'mxfp4'"):
        QuantizedLinear.from_float(nn.Linear(48, 64), "mxfp4")
    assert formats(quantize_(model(), "mxfp8"))[EXPERTS_AT[0]] == "mxfp8"  # a code is a byte: the last group is short


def test_refuses_weights_that_no_op_computes_in():
    """The module would be swapped, and then its first call would fail."""
    why = "its weights are torch.float64: ops compute in torch.bfloat16, torch.float16, torch.float32"
    refused(ToyModel().double(), f"layers.0.mlp.experts: {why}", "fp8")
    refused(ToyModel().double(), why, {"experts": "bf16"})
    model = quantize_(ToyModel().double(), "fp8", strict=False)
    notes = {r.name: r.note for r in summary(model).rows}
    assert set(formats(model).values()) == {None} and notes["layers.0.proj"].startswith(why)
    assert notes[EXPERTS_AT[0]].startswith(why)
    with pytest.raises(ValueError, match=why):
        QuantizedLinear.from_float(nn.Linear(64, 64).double())
    with pytest.raises(ValueError, match=why):
        QuantizedExperts.from_float(torch.randn(2, 64, 32).double(), torch.randn(2, 32, 32).double())


def test_a_format_object_must_be_the_registered_one():
    """Modules keep the name: another format of that name would be quantized one way and computed another."""
    fp8, other = FORMATS["fp8"], replace(FORMATS["fp8_tensor"], name="fp8")
    message = "another format is registered as 'fp8'"
    refused(ToyModel(), message, other)
    refused(ToyModel(), message, {"experts": other})
    with pytest.raises(ValueError, match=message):
        QuantizedLinear.from_float(nn.Linear(64, 64), other)
    with pytest.raises(ValueError, match=message):
        QuantizedExperts.from_float(torch.randn(2, 64, 32), torch.randn(2, 32, 32), other)
    with pytest.raises(ValueError, match="a format is a name or a Format, got 8"):
        QuantizedLinear.from_float(nn.Linear(64, 64), 8)
    assert QuantizedLinear.from_float(nn.Linear(64, 64), fp8).format == "fp8"

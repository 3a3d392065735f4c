"""compare() on models of transformers and the trained one, which experts a call chooses, and the command."""

import copy
import json

import pytest
import tiny_models as tiny
import torch
from test_compare import png
from torch import nn
from toy_lm import LAYERS, Lm
from trained_model import MODELS, needs_model, quickstart

import moe_ops
from moe_ops import compare
from moe_ops.__main__ import main
from moe_ops.quality.taps import CHOSEN, find_taps
from moe_ops.quality.text import Bytes, cut


class Head(nn.Module):
    """A family's model; one without logits of its own gets some."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        inputs = tiny.inputs(self.inner) | {"input_ids": input_ids}
        inputs |= {"decoder_input_ids": input_ids} if "decoder_input_ids" in inputs else {}
        out = tiny.run(self.inner, **inputs).float()
        g = torch.Generator().manual_seed(0)
        return out if out.shape[-1] >= 100 else out @ torch.randn(out.shape[-1], 100, generator=g)


@pytest.mark.swap
@pytest.mark.parametrize("name", tiny.WITH_EXPERTS)
@torch.no_grad()
def test_families(name):
    """Layers of every family are found, in float and quantized; on equal values they agree, routes too."""
    model = Head(tiny.build(name))
    if "pixel_values" in tiny.inputs(model.inner):
        pytest.skip("not a language model")
    quantized = moe_ops.quantize_(copy.deepcopy(model), {"experts": "int8"})
    floats = moe_ops.dequantize_(copy.deepcopy(quantized))
    tokens = tiny.inputs(model.inner)["input_ids"]
    names = [r.name for r in moe_ops.summary(quantized).rows if r.kind == "experts"]
    for reference, bound in ((floats, 1e-3), (model, 0.05)):
        report = compare(reference, quantized, [tokens])
        assert [row.name for row in report.rows] == names and names
        for row in report.rows:
            assert row.error < bound and row.stream_error < bound, row
            sorted_rows = row.name.endswith(("output_linear", "fc2"))  # of no token's values
            assert row.flips is None if sorted_rows else row.flips <= bound * 2
        if reference is model:
            assert min(row.error for row in report.rows) > 1e-5 and report.kl > 0


@pytest.mark.swap
@pytest.mark.parametrize("name", ["qwen3_moe", "nllb_moe"])
@torch.no_grad()
def test_loss_is_transformers(name):
    """With and without an encoder: labels are shifted as the model's own loss has it."""
    model, tokens = tiny.build(name), tiny.inputs(tiny.build(name))["input_ids"]
    labels = torch.where(torch.arange(8) == 3, -100, tokens)
    report = compare(model, model, [{"input_ids": tokens, "labels": labels}])
    config = model.config
    logits = model(input_ids=tokens, labels=labels).logits
    shift = 0 if config.is_encoder_decoder else 1
    want = nn.functional.cross_entropy(logits[:, : 8 - shift].flatten(0, 1), labels[:, shift:].flatten())
    assert report.loss == pytest.approx(float(want), rel=1e-5) and report.tokens == 2 * (7 - shift)
    assert all((row.error, row.stream_error, row.flips) == (0, 0, 0) for row in report.rows) and report.rows
    if config.is_encoder_decoder:
        with pytest.raises(ValueError, match="a model with an encoder needs labels"):
            compare(model, model, [tokens])


CALLS = {
    "topk": (torch.tensor([[0, 2], [3, 9], [-1, 1]]), None),
    "scores": (torch.tensor([[0, 2], [3, 9], [-1, 1]]), torch.rand(3, 4)),
    "swapped scores": (torch.rand(3, 4), torch.tensor([[0, 2], [3, 9], [-1, 1]])),
    "mask": (torch.tensor([[[1, 0, 0, 0], [0, 0, 1, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]], [[0, 1, 0, 0], [0, 0, 0, 0]]]),
             None),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_which_experts_a_call_chooses(call):
    tap = find_taps(Lm(layers=1))[0][LAYERS[0]]
    got = CHOSEN[call](tap, (torch.rand(3, 64), *CALLS[call]))
    assert [row[:4].nonzero().flatten().tolist() for row in got] == [[0, 2], [3], [1]]


def test_which_experts_sorted_rows_chose():
    """By their values; the block around them knows the tokens, the one further out does not."""
    tap = find_taps(Lm(layers=1))[0][LAYERS[0]]
    x = torch.randn(3, 64)
    chosen = [[0, 2], [1, 2], [0, 3]]
    owners = sorted((e, t) for t, each in enumerate(chosen) for e in each)
    rows, sizes = x[[t for _, t in owners]], [2, 1, 2, 1]
    tap.inputs = dict.fromkeys(tap.around, torch.randn(2, 64)) | {"layers.0": x}
    got = CHOSEN["sizes"](tap, (rows, sizes))
    assert [row[:4].nonzero().flatten().tolist() for row in got] == chosen
    tap.inputs["layers.0"] = torch.randn(3, 64)
    assert CHOSEN["sizes"](tap, (rows, sizes)) is None


# ---- the trained model


@needs_model
def test_trained_model():
    """Bits per byte are those of the loop that quickstart.py and test_quality.py use."""
    reference = quickstart.load(str(MODELS / "tiny-qwen3-moe"))[0]
    text = quickstart.read_text(str(MODELS / "val.bin"), 6 * quickstart.WINDOW)
    windows, num_bytes = quickstart.cut(text, quickstart.Bytes())
    want, reports = quickstart.bits_per_byte(reference, windows, num_bytes), {}
    for name in ("fp8", "mxfp4"):
        model = moe_ops.quantize_(copy.deepcopy(reference), name)
        reports[name] = compare(reference, model, windows.split(8), num_bytes=num_bytes)
        assert reports[name].bits_per_byte == pytest.approx(quickstart.bits_per_byte(model, windows, num_bytes), 1e-5)
        assert reports[name].reference_bits_per_byte == pytest.approx(want, 1e-5)
    fp8, mxfp4 = reports.values()
    assert abs(fp8.bits_per_byte / want - 1) < 0.003 < mxfp4.bits_per_byte / want - 1 < 0.03
    assert 0 < 2 * fp8.kl < mxfp4.kl and fp8.top1_agreement > mxfp4.top1_agreement > 0.9
    for a, b in zip(fp8.rows, mxfp4.rows, strict=True):
        assert a.snr_db > b.snr_db + 6 > 20 and a.stream_snr_db > b.stream_snr_db and 0 < a.flips < b.flips < 0.5


def test_windows_are_the_start_of_the_text():
    windows, num_bytes = cut(b"\0\1\2\3\4\5\6", Bytes(), 3)
    assert (windows.tolist(), num_bytes) == ([[0, 1, 2], [3, 4, 5]], 6)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models")
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path / "float")
    moe_ops.quantize_(model, "int8").save_pretrained(path / "saved-int8")
    (path / "text").write_text("In the beginning was the Word. " * 40)
    return path


@pytest.mark.swap
def test_command(folder, tmp_path, capsys):
    formats = f"int8,{folder / 'saved-int8'},mxfp4/fp8"
    arguments = ["--text", str(folder / "text"), "--bytes", "300", "--window", "64", "--device", "cpu", "--quiet"]
    pages = ["--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "data.json")]
    assert main(["compare", str(folder / "float"), "--formats", formats, *arguments, *pages]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["format", "reference", "int8", "saved-int8", "mxfp4/fp8"]
    assert lines[2][1:] == lines[3][1:]  # the same codes, from memory and from disk
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["int8"]["tokens_read"] == 256 and data["int8"]["num_bytes"] == 256
    assert 7 < data["int8"]["bits_per_byte"] < 9 and f"{data['int8']['bits_per_byte']:.4f}" == lines[2][1]
    assert data["mxfp4/fp8"]["size"] < data["int8"]["size"] < data["int8"]["reference_size"]
    assert len(png((tmp_path / "page.html").read_text())) == 4
    assert main(["compare", str(folder / "float"), *arguments]) == 0
    assert "model.layers.1.mlp.experts" in capsys.readouterr().out  # one format alone: its layers too


@pytest.mark.swap
@pytest.mark.parametrize(("change", "message"), [
    ({"--formats": "int9"}, "unknown format 'int9'"),
    ({"--formats": "int8,int8"}, "int8 is there twice"),
    ({"--formats": " ,"}, "--formats is empty"),
    ({"--formats": "int8,int4_g128"}, "int4_g128: "),
    ({"--text": "{new}"}, "cannot read"),
    ({"--bytes": "20"}, "the text has 20 tokens; one window takes 64"),
    ({"--window": "1"}, "at least 2 tokens"),
    ({"--device": "cuda:77"}, "cannot use device 'cuda:77'"),
    ({"--html": "{new}/page.html"}, "there is no such folder"),
    ({"model": "{new}"}, "is not a checkpoint: it has no config.json"),
])  # fmt: skip
def test_command_errors(folder, tmp_path, capsys, monkeypatch, change, message):
    """One line each, before a model runs."""
    monkeypatch.setattr("moe_ops.quality.command.compare", lambda *a, **k: pytest.fail("it ran"))
    given = {"--text": f"{folder / 'text'}", "--window": "64", "--device": "cpu", "model": f"{folder / 'float'}"}
    given |= {k: v.format(new=tmp_path / "new") for k, v in change.items()}
    assert main(["compare", given.pop("model"), *(word for pair in given.items() for word in pair)]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.splitlines()[-1].startswith("python -m moe_ops compare: ") and out == ""

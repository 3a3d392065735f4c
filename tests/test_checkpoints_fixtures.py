"""Checkpoints that the producers' own tools wrote (data/fixtures): loaded, they are worth what those tools say."""

import copy

import checkpoint_writer as w
import pytest
import torch
import transformers
from safetensors.torch import load_file

import moe_ops
from moe_ops import QuantizedExperts
from moe_ops.checkpoints.kv import kv_scales
from moe_ops.huggingface import reload_
from moe_ops.inspection import inspect
from moe_ops.storage import QuantizedModule

pytestmark = pytest.mark.swap
# Relative error that the activation format costs at most; None: weights only.
FIXTURES = {
    "ct_mixtral_mxfp4": None, "ct_qwen3_moe_fp8_dynamic": 0.1, "hf_qwen3_moe_fp8_block128": 0.1,
    "modelopt_qwen3_moe_nvfp4": 0.4, "openai_gpt_oss_mxfp4": None, "quark_gpt_oss_mxfp4_fp8": 0.2,
    "quark_mixtral_mxfp4": 0.4,
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module", params=FIXTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return moe_ops.load_quantized(w.FIXTURES / name)


def experts_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


def test_experts_are_what_the_producer_says(name, model):
    expected = load_file(w.FIXTURES / name / "expected.safetensors")
    checked = 0
    for module_name, module in experts_of(model).items():
        layer = f"layers.{module_name.split('.')[2]}"
        for leaf, value in zip(module.weight_names(), module.dequantize(), strict=True):
            assert torch.equal(value, expected[f"{layer}.{leaf}"])
            checked += 1
            if f"{layer}.{leaf}_bias" in expected:
                assert torch.equal(module._parameters[f"{leaf}_bias"].float(), expected[f"{layer}.{leaf}_bias"])
                checked += 1
    assert checked == len(expected)


def test_logits(name, model):
    """Weights only: equal to the dequantized model's. Else as near as the activation format lets them be."""
    model = copy.deepcopy(model).to(torch.float32)
    got, want = model(IDS).logits, moe_ops.dequantize_(copy.deepcopy(model))(IDS).logits
    error = ((got - want).norm() / want.norm()).item()
    assert error < (FIXTURES[name] or 1e-5)
    if FIXTURES[name]:
        assert error > 1e-4  # activations are quantized


@pytest.mark.parametrize("name, settings", [
    ("openai_gpt_oss_mxfp4", lambda: transformers.Mxfp4Config(dequantize=True)),
    ("ct_mixtral_mxfp4", lambda: transformers.CompressedTensorsConfig(dequantize=True)),
])  # fmt: skip
def test_logits_of_another_loader(name, settings):
    """transformers' dequantizing load of the same folder: an independent path for every tensor, buffer and bias."""
    path = w.FIXTURES / name
    try:
        want = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=settings(), dtype="bfloat16")
    except (TypeError, ImportError) as e:
        pytest.skip(f"this transformers cannot: {e}")
    got = moe_ops.load_quantized(path)
    names = dict(got.named_parameters()) | dict(got.named_buffers())
    for n, t in (*want.named_parameters(), *want.named_buffers()):
        if n in names and names[n].shape == t.shape and names[n].dtype == t.dtype and "experts" not in n:
            assert torch.equal(names[n], t), n
    a, b = got.to(torch.float32)(IDS).logits, want.float().eval()(IDS).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_is_ready_to_run(name, model):
    """In evaluation mode, nothing on meta, codes and scales frozen."""
    assert not model.training
    assert all(not t.is_meta for t in (*model.parameters(), *model.buffers()))
    for m in model.modules():
        if isinstance(m, QuantizedModule):
            assert all(not m._parameters[n].requires_grad for n in m._protected() if m._parameters.get(n) is not None)


KV = {"quark_gpt_oss_mxfp4_fp8": "output_scale", "quark_mixtral_mxfp4": "output_scale"}


def test_kv_scales(name, model):
    want = {}
    if name in KV:
        tensors = load_file(w.FIXTURES / name / "model.safetensors")
        want = {
            f"model.layers.{i}.self_attn":
                tuple(tensors[f"model.layers.{i}.self_attn.{p}_proj.output_scale"].item() for p in "kv")
            for i in (0, 1)
        }  # fmt: skip
    assert kv_scales(model) == want == model.moe_ops_kv_scales
    assert kv_scales(copy.deepcopy(model).to(torch.float32)) == want


def test_kv_scales_survive_the_disk(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    for _ in range(2):  # saved again from what was loaded
        again = type(model).from_pretrained(tmp_path)
        assert kv_scales(again) == kv_scales(model)
        again.save_pretrained(tmp_path)
    assert inspect(tmp_path).kv_scales == 2 * len(kv_scales(model))
    below = again.base_model.__class__.from_pretrained(tmp_path)
    assert list(kv_scales(below).values()) == list(kv_scales(model).values())
    again.moe_ops_kv_scales = {}
    reload_(again, tmp_path)
    assert kv_scales(again) == kv_scales(model)


def build(name, device):
    config = transformers.AutoConfig.from_pretrained(w.FIXTURES / name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_into_a_model(name, model, device):
    """The same as without one, buffers that no file holds (inv_freq) included; the object that was passed."""
    given = build(name, device)
    got = moe_ops.load_quantized(w.FIXTURES / name, model=given)
    assert got is given
    same(got, model)


def test_again_into_the_same_storage(name, model):
    twice = moe_ops.load_quantized(w.FIXTURES / name)
    where = {n: p.data_ptr() for n, p in twice.named_parameters()}
    with torch.no_grad():
        for p in twice.parameters():
            p.view(torch.uint8).zero_() if p.ndim else p.zero_()
    moe_ops.load_quantized(w.FIXTURES / name, model=twice)
    assert {n: p.data_ptr() for n, p in twice.named_parameters()} == where
    same(twice, model)


def same(got, want):
    a, b = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (got, want))
    assert a.keys() == b.keys()
    for n, t in b.items():
        assert a[n].dtype == t.dtype and a[n].shape == t.shape, n
        assert torch.equal(a[n].contiguous().view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8)), n
    assert torch.equal(got(IDS).logits, want(IDS).logits)
    assert kv_scales(got) == kv_scales(want)



def test_summary_says_what_is_float_and_why():
    rows = {r.name: r for r in moe_ops.summary(moe_ops.load_quantized(w.FIXTURES / "openai_gpt_oss_mxfp4")).rows}
    assert rows["model.layers.0.self_attn.q_proj"].note == "float in the checkpoint"
    assert rows["model.layers.0.mlp.router"].note == "router"
    assert rows["model.layers.0.mlp.experts"].format == "mxfp4"


def test_generation(tmp_path):
    model = moe_ops.load_quantized(w.FIXTURES / "quark_mixtral_mxfp4")
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_a_checkpoint_of_our_own(tmp_path):
    pytest.importorskip("moe_ops.huggingface")
    model = moe_ops.load_quantized(w.FIXTURES / "openai_gpt_oss_mxfp4")
    model.save_pretrained(tmp_path)
    same(moe_ops.load_quantized(tmp_path), model)
    with pytest.raises(ValueError, match="saved by moe_ops"):
        moe_ops.load_quantized(tmp_path, model=model)

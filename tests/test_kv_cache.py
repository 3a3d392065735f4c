"""The fp8 key-value cache: generation with it is generation with keys and values rounded by somebody else's e4m3."""

import ml_dtypes
import numpy as np
import pytest
import torch
from tiny_models import INSTALLED, build
from transformers import DynamicCache, StaticCache, cache_utils

import moe_ops
from moe_ops.kv_cache import Fp8Cache, kv_scales

pytestmark = pytest.mark.swap
CASES = [n for n in ("qwen3_moe", "gpt_oss", "mixtral", "qwen3_next", "deepseek_v3") if n in INSTALLED]
PROMPT = torch.tensor([[5, 17, 40, 99, 3, 64, 21, 8], [7, 7, 90, 11, 56, 32, 2, 70]])
GENERATE = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


def e4m3(x, scale):
    """ml_dtypes' rounding, in numpy."""
    codes = (x.float().numpy() / np.float32(scale)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float32) * np.float32(scale)).to(x.dtype)


def own_scales(x):
    return np.maximum(x.abs().amax(-1, keepdim=True).float().numpy() / np.float32(448), np.float32(1e-38))


class Simulated(DynamicCache):
    """transformers' own cache, in float."""

    def update(self, k, v, layer_idx, *args, **kwargs):
        pair = self.scales(layer_idx) if self.scales else (own_scales(k), own_scales(v))
        return super().update(*(e4m3(t, s) for t, s in zip((k, v), pair, strict=True)), layer_idx, *args, **kwargs)


def simulated(model, scales):
    cache = Simulated(config=model.config)
    cache.scales = scales
    return cache


def attentions(model):
    return {n: m.layer_idx for n, m in model.named_modules() if n.endswith("attn") and hasattr(m, "layer_idx")
            and hasattr(m, "o_proj")}  # fmt: skip


def with_scales(model):
    """Scales that differ by layer, and between keys and values; some saturate."""
    model.moe_ops_kv_scales = {n: (0.002 * (i + 1), 0.0007 * (i + 1)) for n, i in attentions(model).items()}
    return lambda i: (0.002 * (i + 1), 0.0007 * (i + 1))


def generate(model, cache, **options):
    out = model.generate(PROMPT, past_key_values=cache, return_dict_in_generate=True, output_scores=True,
                         **{**GENERATE, **options})  # fmt: skip
    return out.sequences, torch.stack(out.scores)


@pytest.mark.parametrize("dynamic", [False, True], ids=["scales", "dynamic"])
@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
@pytest.mark.parametrize("name", CASES)
def test_generate_is_that_of_rounded_keys_and_values(name, length, dynamic):
    model = build(name)
    scales = None if dynamic else with_scales(model)
    want_ids, want = generate(model, simulated(model, scales))
    got_ids, got = generate(model, Fp8Cache.for_model(model, max_cache_len=length, dynamic=dynamic))
    assert torch.equal(got_ids, want_ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    plain = generate(model, DynamicCache(config=model.config))[1]
    assert (plain[0] - want[0]).nan_to_num().abs().max() > 1e-3  # the rounding is there to be seen


@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
def test_beams(length):
    model = build("qwen3_moe")
    scales = with_scales(model)
    want = generate(model, simulated(model, scales), num_beams=3, num_return_sequences=2)[0]
    got = generate(model, Fp8Cache.for_model(model, max_cache_len=length), num_beams=3, num_return_sequences=2)[0]
    assert torch.equal(got, want)


def layer(**options):
    return Fp8Cache(build("qwen3_moe").config, **options).layers[0]


def states(*shape, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * spread


def test_codes_saturate_and_scales_multiply():
    cache = layer(scales={0: (2.0, 0.5)})
    k = torch.tensor([1.0, 896.0, 1000.0, -1e9, 2.125, 2.375, -0.0, 3e-3]).view(1, 1, 1, 8)
    got, v = cache.update(k, k)
    assert got.flatten().tolist() == [1.0, 896.0, 896.0, -896.0, 2.0, 2.5, -0.0, 0.00390625]
    assert v.flatten()[1:4].tolist() == [224.0, 224.0, -224.0]
    assert cache.keys.dtype == torch.uint8 and cache.keys.flatten()[:3].tolist() == [0x30, 0x7E, 0x7E]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_each_position_is_rounded_once(dtype, dynamic):
    """What is read back later is what was handed out first, in the dtype that came in."""
    cache, k, v = layer(dynamic=dynamic), states(2, 2, 5, 16).to(dtype), states(2, 2, 5, 16, seed=1).to(dtype)
    first = cache.update(k, v)
    again = cache.update(k[:, :, :1], v[:, :, :1])
    for before, after in zip(first, again, strict=True):
        assert after.dtype == dtype and torch.equal(after, torch.cat([before, before[:, :, :1]], 2))
    assert torch.equal(first[0], e4m3(k, own_scales(k) if dynamic else 1.0))


def test_a_position_of_zeros_and_one_of_large_numbers():
    k = torch.zeros(1, 1, 2, 16)
    k[0, 0, 1] = torch.linspace(-1e6, 1e6, 16)
    got, _ = layer(dynamic=True).update(k, k)
    assert not got[0, 0, 0].any() and torch.allclose(got, k, rtol=2**-4)
    assert (layer().update(k, k)[0].abs() <= 448).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_crop_select_repeat_reorder_reset(dynamic):
    cache, plain = Fp8Cache(build("qwen3_moe").config, dynamic=dynamic), DynamicCache()
    k, v = states(2, 2, 6, 16), states(2, 2, 6, 16, seed=1)
    rounded = [e4m3(t, own_scales(t) if dynamic else 1.0) for t in (k, v)]
    for i in range(2):
        cache.update(k, v, i)
        plain.update(*rounded, i)
    for c in (cache, plain):
        c.crop(-2)
        c.batch_repeat_interleave(2)
        c.reorder_cache(torch.tensor([3, 0, 2, 1]))
        c.batch_select_indices(torch.tensor([0, 2]))
    assert cache.get_seq_length() == 4
    got, want = cache.update(k, v, 0), plain.update(*rounded, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    cache.reset()
    if cache.get_seq_length() == 0:  # 5.17 keeps zeroed positions
        assert torch.equal(cache.update(k, v, 0)[0], rounded[0])


def test_reset_of_static_tensors_keeps_them():
    cache = Fp8Cache(build("qwen3_moe").config, max_cache_len=8)
    k = states(1, 2, 3, 16)
    cache.update(k, k, 0)
    address = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert cache.layers[0].keys.data_ptr() == address and not cache.layers[0].keys.any()
    assert torch.equal(cache.update(k, k, 0)[0][:, :, :3], e4m3(k, 1.0)) and int(cache.get_seq_length()) == 3


@pytest.mark.parametrize("length", [None, 32], ids=["growing", "static"])
@pytest.mark.parametrize(("dynamic", "ratio"), [(False, 0.5), (True, (16 + 4) / 32)])
def test_memory(dynamic, ratio, length):
    """Against transformers' own in bf16; heads of 16, of which 4 bytes of a scale are a quarter."""
    config, k = build("qwen3_moe").config, states(2, 2, 16, 16).bfloat16()
    plain = DynamicCache(config=config) if length is None else StaticCache(config, length)
    sizes = []
    for cache in (Fp8Cache(config, max_cache_len=length, dynamic=dynamic), plain):
        cache.update(k, k, 0)
        sizes.append(sum(t.untyped_storage().nbytes() for t in (cache.layers[0].keys, cache.layers[0].values)))
    assert sizes[0] == ratio * sizes[1]


def test_early_initialization():
    """What generate does for static caches, before any state is there."""
    cache = Fp8Cache(build("qwen3_moe").config, max_cache_len=8, dynamic=True)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.layers[0].keys.shape == (2, 2, 8, 20) and cache.layers[0].keys.dtype == torch.uint8


def test_static_step_compiles_to_one_graph():
    model = moe_ops.quantize_(build("qwen3_moe"), "bf16")  # the float experts of this class loop over data
    with_scales(model)
    caches = [Fp8Cache.for_model(model, max_cache_len=16) for _ in range(2)]
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got, want = [], []
        for out, run, cache in ((want, model, caches[0]), (got, step, caches[1])):
            model(PROMPT, past_key_values=cache)
            for i in range(3):
                at = torch.full((2, 1), 8 + i)
                out.append(run(PROMPT[:, i : i + 1], past_key_values=cache, position_ids=at).logits)
    torch.testing.assert_close(torch.stack(got), torch.stack(want))


def test_transformers_still_makes_its_own_layers(monkeypatch):
    """Its tables take in subclasses that name a layer type, as those of some models do."""
    table = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    monkeypatch.setitem(table, "full_attention", type("Named", (cache_utils.DynamicLayer,), {"_layer_type": "named"}))
    monkeypatch.setitem(table, "named", table["named"])  # what is in there now goes away with this test
    assert type(Fp8Cache(build("qwen3_moe").config).layers[0]).__name__ == "Fp8Named"
    assert table["named"].__name__ == "Named"
    monkeypatch.delitem(table, "named")


def test_scales_of_a_model():
    model = build("qwen3_moe")
    assert kv_scales(model) == {} and kv_scales(torch.nn.Linear(2, 2)) == {}
    assert Fp8Cache.for_model(model).layers[1].fp8_scales == (1.0, 1.0)
    model.moe_ops_kv_scales = {"model.layers.1.self_attn": (torch.tensor(0.25), 0.5)}
    assert kv_scales(model) == {"model.layers.1.self_attn": (0.25, 0.5)}
    assert [x.fp8_scales for x in Fp8Cache.for_model(model).layers] == [(1.0, 1.0), (0.25, 0.5)]
    assert [x.fp8_scales for x in Fp8Cache.for_model(model, dynamic=True).layers] == [None, None]


@pytest.mark.parametrize(("scales", "match"), [
    ({"model.layers.9.self_attn": (1.0, 1.0)}, "layers.9.self_attn', which is none of its modules"),
    ({"model.layers.0.self_attn": (0.0, 1.0)}, r"finite and positive, those of model.layers.0.self_attn are \(0.0"),
    ({"model.layers.0.self_attn": (1.0, float("nan"))}, "finite and positive"),
    ({"model.layers.0.mlp": (1.0, 1.0)}, "model.layers.0.mlp has KV scales but no layer_idx"),
])  # fmt: skip
def test_scales_that_cannot_be(scales, match):
    model = build("qwen3_moe")
    model.moe_ops_kv_scales = scales
    with pytest.raises(ValueError, match=match):
        Fp8Cache.for_model(model)


def test_refusals():
    config = build("qwen3_moe").config
    with pytest.raises(ValueError, match=r"KV scales for layers \[2\]: of 2 layers"):
        Fp8Cache(config, {2: (1.0, 1.0)})
    with pytest.raises(ValueError, match="dynamic scales replace"):
        Fp8Cache(config, {0: (1.0, 1.0)}, dynamic=True)
    with pytest.raises(ValueError, match="finite and positive"):
        Fp8Cache(config, {0: (-1.0, 1.0)})
    if "switch_transformers" in INSTALLED:
        with pytest.raises(ValueError, match="is for decoders"):
            Fp8Cache(build("switch_transformers").config)


class OwnLayer(cache_utils.DynamicLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states


def test_layers_that_store_in_a_way_of_their_own(monkeypatch):
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", OwnLayer)
    with pytest.raises(ValueError, match="OwnLayer stores keys and values in a way of its own"):
        Fp8Cache(build("qwen3_moe").config)

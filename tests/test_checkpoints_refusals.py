"""What is wrong with a checkpoint is said by name, before anything is changed: never a wrong model."""

import copy
import json
import shutil
import weakref

import checkpoint_writer as w
import pytest
import test_checkpoints_schemes as s
import torch
from safetensors.torch import save_file

import moe_ops
from moe_ops.checkpoints import READERS, find_reader
from moe_ops.checkpoints.files import Checkpoint

pytestmark = pytest.mark.swap
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
LINEAR = "model.layers.0.self_attn.q_proj"
MX4 = s.quark(s.spec("fp4"), None)
IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def tensors():
    return w.quantized(w.float_tensors(w.QWEN), s.MX4)[0]


def change(**changes):
    """Settings with one field replaced, at a path of keys separated by two underscores."""
    path, value = next(iter(changes.items()))

    def of(settings):
        settings = copy.deepcopy(settings)
        *parents, last = path.split("__")
        place = settings
        for parent in parents:
            place = place[parent]
        place[last] = value
        return settings

    return of


GROUP, GLOBAL = "config_groups__group_0__", "global_quant_config__"
UNKNOWN = [
    (s.FINE, change(weight_block_size=[64, 64]), r"weight_block_size \[64, 64\]"),
    (s.FINE, change(fmt="e5m2"), "fmt 'e5m2'"),
    (s.FINE, change(activation_scheme="magic"), "activation_scheme 'magic'"),
    (s.FINE, change(expert_dtype="int3"), "expert_dtype 'int3'"),
    (s.FINE, change(scale_fmt="ue7m1"), "scale_fmt 'ue7m1'"),
    (s.preset("FP8"), change(**{f"{GROUP}weights__num_bits": 3}), "weights .*3"),
    (s.preset("FP8"), change(**{f"{GROUP}weights__symmetric": False}), "weights.symmetric False"),
    (s.preset("FP8"), change(**{f"{GROUP}weights__strategy": "diagonal"}), "diagonal"),
    (s.preset("FP8"), change(**{f"{GROUP}format": "marlin-24"}), "format 'marlin-24'"),
    (s.preset("FP8"), change(**{f"{GROUP}output_activations": {"num_bits": 8}}), "output_activations"),
    (s.preset("FP8"), change(**{f"{GROUP}input_activations__num_bits": 5}), "input_activations .*5"),
    (s.preset("FP8"), change(quantization_status="calibration"), "quantization_status 'calibration'"),
    (s.preset("FP8"), change(sparsity_config={"format": "sparse-24"}), "sparse-24"),
    (s.preset("FP8"), change(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    (s.preset("W4A16", group_size=64), change(**{f"{GROUP}weights__type": "int"}), "'int', 4, 'group', 64"),
    (s.preset("W4A16", group_size=32), change(**{f"{GROUP}weights__actorder": "group"}), "actorder 'group'"),
    (s.preset("W4A16_ASYM"), lambda x: x, "symmetric False"),
    (MX4, change(**{f"{GLOBAL}weight__dtype": "int3"}), "weight .*int3"),
    (MX4, change(**{f"{GLOBAL}weight__scale_format": "e4m3"}), "scale_format 'e4m3'"),
    (MX4, change(**{f"{GLOBAL}weight__group_size": 16}), "16"),
    (MX4, change(**{f"{GLOBAL}weight__is_dynamic": True}), "is_dynamic True"),
    (MX4, change(**{f"{GLOBAL}weight__mx_element_dtype": "fp4"}), "mx_element_dtype"),
    (MX4, change(**{f"{GLOBAL}weight": [{}, {}]}), "two-stage weight"),
    (MX4, change(**{f"{GLOBAL}output_tensors": {"dtype": "fp8_e4m3"}}), "output_tensors"),
    (MX4, change(**{f"{GLOBAL}input_tensors": s.spec("fp4")}), "input_tensors .*False"),
    (MX4, change(export__weight_format="fake_quantized"), "weight_format 'fake_quantized'"),
    (s.preset("FP8"), change(kv_cache_scheme={"num_bits": 8, "type": "int", "strategy": "tensor"}), "kv_cache_scheme"),
    (s.quark(s.spec("fp4"), None, export={"kv_cache_group": ["*k_proj"]}, layer_quant_config={
        "*k_proj": {"weight": s.spec("fp4"), "output_tensors": s.spec("int4", "per_tensor")}}), lambda x: x,
     "output_tensors .*int4"),
    (s.modelopt("FP8"), change(quant_algo="W4A8_AWQ"), "quant_algo 'W4A8_AWQ'"),
    (s.modelopt("NVFP4"), change(group_size=32), "group_size 32"),
    (s.modelopt("FP8"), change(kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo 'NVFP4'"),
    ({"quant_method": "gptq", "bits": 4}, lambda x: x, "quantization method 'gptq' is not supported; known: .*Quark"),
    ({"quant_method": "quark", "layer_quant_config": 7, "exclude": 3}, lambda x: x, "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("settings, changed, message", UNKNOWN, ids=[m for *_, m in UNKNOWN])
def test_an_unknown_scheme_is_named(settings, changed, message, tensors, tmp_path):
    path = w.write(tmp_path, w.QWEN, tensors, changed(settings))
    with pytest.raises(ValueError, match=message):
        moe_ops.load_quantized(path)


def test_a_float_checkpoint_is_refused_with_advice(tmp_path):
    path = w.write(tmp_path, w.QWEN, w.float_tensors(w.QWEN), None)
    with pytest.raises(ValueError, match=r"not quantized .*MoeOpsConfig.*quantize_"):
        moe_ops.load_quantized(path)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_knows_its_own_only(reader):
    for method in reader.methods:
        mine = [r for r in READERS if r.find({"quantization_config": {"quant_method": method}}, lambda name: None)]
        assert mine == [reader]
    with pytest.raises(ValueError, match="not supported"):
        find_reader({"quantization_config": {"quant_method": reader.name + "?"}}, lambda name: None)


def drop(*keys):
    return lambda t: {k: v for k, v in t.items() if k not in keys}


def set_to(key, value):
    return lambda t: {**t, key: value(t.get(key))}


WRONG = {
    "an expert's codes": (drop(f"{EXPERT}.weight"), r"mlp.experts.gate_up_proj\[1\] \(up\)"),
    "an expert's scale": (drop(f"{EXPERT}.weight_scale"), r"gate_up_proj\[1\] \(up\) scale"),
    "a Linear's scale": (drop(f"{LINEAR}.weight_scale"), rf"{LINEAR}.weight.* scale"),
    "a norm": (drop("model.norm.weight"), "model.norm.weight"),
    "an unknown tensor": (set_to("model.extra.weight", lambda _: torch.ones(2)), "model.extra.weight"),
    "a zero point": (set_to(f"{LINEAR}.weight_zero_point", lambda _: torch.ones(2)), "weight_zero_point"),
    "a static scale in a dynamic scheme": (set_to(f"{LINEAR}.input_scale", lambda _: torch.ones(())),
                                           f"{LINEAR}.input_scale.* has no input_scale"),
    "a row less": (set_to(f"{EXPERT}.weight", lambda t: t[:-1].contiguous()), rf"{EXPERT}.weight is \(95, 32\)"),
    "transposed": (set_to(f"{EXPERT}.weight", lambda t: t.T.contiguous()), rf"{EXPERT}.weight is \(32, 96\)"),
    "scales of another group": (set_to(f"{EXPERT}.weight_scale", lambda t: t[:, :1].contiguous()),
                                rf"{EXPERT}.weight_scale is \(96, 1\)"),
    "flat scales": (set_to(f"{EXPERT}.weight_scale", lambda t: t.flatten()), rf"{EXPERT}.weight_scale is \(192,\)"),
    "codes of another type": (set_to(f"{EXPERT}.weight", lambda t: t.view(torch.int8)), "weight is torch.int8"),
    "numbers for exponents": (set_to(f"{EXPERT}.weight_scale", lambda t: t.float()), "weight_scale is torch.float32"),
    "float instead of codes": (lambda t: {**drop(f"{LINEAR}.weight_scale")(t), f"{LINEAR}.weight":
                                          torch.zeros(64, 64, dtype=torch.bfloat16)}, "without a scale"),
    "an embedding of another size": (set_to("model.embed_tokens.weight", lambda t: t[:-1].contiguous()),
                                     r"model.embed_tokens.weight is \(127, 64\)"),
    "codes for a norm": (set_to("model.norm.weight", lambda t: torch.ones(64, dtype=torch.uint8)), "norm.weight is"),
    "codes where the config says float": (set_to("lm_head.weight", lambda t: t.view(torch.uint8)), "lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_changed(what, tensors, tmp_path):
    changed, message = WRONG[what]
    path = w.write(tmp_path, w.QWEN, changed(tensors), MX4)
    with pytest.raises(ValueError, match=message):
        moe_ops.load_quantized(path)
    given = float_model()
    before = given(IDS).logits
    with pytest.raises(ValueError, match=message):
        moe_ops.load_quantized(path, model=given)
    assert torch.equal(given(IDS).logits, before)


def float_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**w.config_of(w.QWEN)), dtype=torch.float32).eval()


@pytest.mark.parametrize("part, value", [("weight_scale", float("inf")), ("weight_scale", float("nan")),
                                         ("input_scale", 0.0), ("input_scale", -1.0)])  # fmt: skip
def test_scales_that_cannot_be(part, value, tmp_path):
    tensors, _ = w.quantized(w.float_tensors(w.QWEN), s.MODELOPT["FP8"][1])
    tensors[f"{EXPERT}.{part}"] = torch.tensor(value)
    path = w.write(tmp_path, w.QWEN, tensors, s.modelopt("FP8"))
    with pytest.raises(ValueError, match=rf"{EXPERT}.{part}"):
        moe_ops.load_quantized(path)
    given = float_model()
    with pytest.raises(ValueError, match=rf"{EXPERT}.{part}"):
        moe_ops.load_quantized(path, model=given)
    assert all(p.is_meta for p in given.parameters())  # it gives no numbers


def test_static_scheme_without_any_scale(tensors, tmp_path):
    path = w.write(tmp_path, w.QWEN, tensors, s.QUARK["mxfp4_fp8"][0])
    with pytest.raises(ValueError, match=r"no tensor .* input_scale"):
        moe_ops.load_quantized(path)


def test_int4_scales_that_bf16_cannot_hold(tmp_path):
    make = s.with_shape(w.scheme(w.int4_words, s.number(torch.float16), s.G32, s.PACKED))
    tensors, _ = w.quantized(w.float_tensors(w.QWEN), make)
    with pytest.raises(ValueError, match=r"weight_scale is torch.float16, and its values are not numbers of"):
        moe_ops.load_quantized(w.write(tmp_path, w.QWEN, tensors, s.preset("W4A16", group_size=32)))


def test_blocks_that_mix_gate_and_up(tmp_path):
    """Rows that alternate within a tile share its scale: there is no exact way to two matrices."""
    tensors, _ = w.quantized(w.unfused(w.float_tensors(w.GPT_OSS)), s.FINE_GRAINED["fp32"][1])
    settings = {**s.FINE, "modules_to_not_convert": ["lm_head", "router"]}
    with pytest.raises(ValueError, match="alternate within the blocks"):
        moe_ops.load_quantized(w.write(tmp_path, w.GPT_OSS, tensors, settings))


# --- files ----------------------------------------------------------------------------------------------------------


def shard(path, tensors, count=3):
    """Shards in an order of their own: neighbours are in different files."""
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": {} for i in range(count)}
    names = list(files)
    for i, (key, t) in enumerate(tensors.items()):
        files[names[(i * 7) % count]][key] = t
    for name, part in files.items():
        save_file(part, path / name)
    index = {"metadata": {}, "weight_map": {k: name for name, part in files.items() for k in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    return names


@pytest.fixture
def sharded(tensors, tmp_path):
    path = w.write(tmp_path / "sharded", w.QWEN, tensors, MX4)
    return path, shard(path, tensors)


def test_shards_in_any_order(sharded, tensors, tmp_path):
    whole = moe_ops.load_quantized(w.write(tmp_path / "whole", w.QWEN, tensors, MX4))
    got = moe_ops.load_quantized(sharded[0])
    for (name, a), (_, b) in zip(got.named_parameters(), whole.named_parameters(), strict=True):
        assert equal(a, b), name


def edit_index(path, change):
    file = path / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


def truncate(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


BROKEN = {
    "a shard is missing": (lambda p, names: (p / names[1]).unlink(), r"{1} is missing: .* places .* in it"),
    "a shard is truncated": (
        lambda p, names: truncate(p / names[2], 0.9),
        r"{2} is truncated or corrupt: \S+ and \d+ more tensors are cut off",
    ),
    "a shard is cut in its header": (lambda p, names: truncate(p / names[2], 0.001), "{2} is truncated or corrupt"),
    "a shard is empty": (lambda p, names: truncate(p / names[0], 0), "{0} is truncated or corrupt"),
    "two shards are swapped": (lambda p, names: (shutil.move(p / names[0], p / "x"), shutil.move(p / names[1], p /
                               names[0]), shutil.move(p / "x", p / names[1])), "is not in .*, where .* places it"),
    "the index promises more": (lambda p, names: edit_index(p, lambda m: m.update(ghost=names[0])),
                                "ghost is not in .*{0}"),
    "the index knows less": (lambda p, names: edit_index(p, lambda m: m.pop("model.norm.weight")),
                             "model.norm.weight is in .*, but not in"),
    "the index leads elsewhere": (lambda p, names: edit_index(p, lambda m: m.update(ghost="../x.safetensors")),
                                  "not in the folder"),
    "the index is no index": (lambda p, names: (p / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "the index is no JSON": (lambda p, names: (p / "model.safetensors.index.json").write_text("{"), "is not JSON"),
    "config.json is missing": (lambda p, names: (p / "config.json").unlink(), "no config.json"),
    "config.json is cut": (lambda p, names: truncate(p / "config.json", 0.5), "config.json is not JSON"),
    "no weights at all": (lambda p, names: (p / "model.safetensors.index.json").unlink(), "neither model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(what, sharded):
    path, names = sharded
    damage, message = BROKEN[what]
    damage(path, names)
    with pytest.raises(ValueError, match=message.format(*names)):
        moe_ops.load_quantized(path)


def test_a_file_that_is_cut_while_it_is_read(tensors, tmp_path):
    path = w.write(tmp_path, w.QWEN, tensors, MX4)
    opened = Checkpoint(path)
    last = max(opened, key=lambda key: opened.entries[key].start)
    truncate(path / "model.safetensors", 0.999)
    with pytest.raises(ValueError, match=f"{last} is cut off"):
        opened.get(last)


def test_a_header_that_lies_is_an_error_or_changes_nothing(tensors, tmp_path):
    """Every bit of the header may flip: a ValueError, or the same model (a flip in what nobody reads)."""
    path = w.write(tmp_path, w.QWEN, tensors, MX4)
    file = path / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    want = dict(moe_ops.load_quantized(path).named_parameters())
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for at in [0, 3, 7, *torch.randint(8, end, (200,), generator=generator).tolist()]:
        bit = 1 << int(torch.randint(0, 8, (1,), generator=generator))
        file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        try:
            got = dict(moe_ops.load_quantized(path).named_parameters())
        except ValueError:
            refused += 1
        else:
            assert all(equal(got[k], want[k]) for k in want), f"byte {at}, bit {bit}"
    assert refused > 150


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_one_tensor_is_held_at_a_time(sharded, monkeypatch):
    """No tensor of the file is alive when the next one is read."""
    read, most = [], 0
    get = Checkpoint.get

    def spy(self, key):
        nonlocal most
        most = max(most, sum(r() is not None for r in read))
        t = get(self, key)
        read.append(weakref.ref(t))
        return t

    monkeypatch.setattr(Checkpoint, "get", spy)
    moe_ops.load_quantized(sharded[0])
    assert len(read) == len(Checkpoint(sharded[0])) and most <= 1


def test_what_is_loaded_is_no_view_of_the_file(tensors, tmp_path):
    path = w.write(tmp_path, w.QWEN, tensors, MX4)
    model = moe_ops.load_quantized(path)
    before = model(IDS).logits
    file = path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert torch.equal(model(IDS).logits, before)


def test_a_compiled_model_is_refused(tensors, tmp_path):
    with pytest.raises(ValueError, match="compiled"):
        moe_ops.load_quantized(w.write(tmp_path, w.QWEN, tensors, MX4), model=torch.compile(float_model()))

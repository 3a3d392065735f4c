"""Trainer and accelerate, as they come, on models from quantize_ and from MoeOpsConfig."""

import warnings

import lora_cases as cases
import pytest
import tiny_models as tiny
import torch
from saved import load, save
from torch.utils.data import Dataset

import moe_ops

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

pytestmark = [pytest.mark.swap, pytest.mark.filterwarnings("ignore:.*(quantized modules stay|_checkpointing).*")]
FORMATS = ("fp8", "mxfp4")
FLOATS = {"embed_tokens", "lm_head", "gate", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"}


class Tokens(Dataset):
    """The same few sentences over and over: a loss that goes down is the least to ask for."""

    def __init__(self, labels=lambda ids: ids, rows=4, length=8):
        ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(0))
        self.rows = [{"input_ids": row, "labels": labels(row)} for row in ids]

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.rows[i % len(self.rows)]


def trainer(model, path, data=None, **kwargs):
    options = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "lr_scheduler_type": "constant",
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 3, **kwargs,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(output_dir=str(path), **options), train_dataset=data or Tokens())


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("float")
    return save("qwen3_moe", path, dtype=torch.float32), path


MADE = {
    "quantize_": lambda cls, path, fmt: moe_ops.quantize_(load(cls, path, dtype=torch.float32), fmt),
    "MoeOpsConfig": lambda cls, path, fmt: load(cls, path, fmt, dtype=torch.float32),
}


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("how", MADE)
def test_what_is_float_is_trained_saved_and_resumed(how, fmt, folder, tmp_path):
    make = lambda: MADE[how](*folder, fmt)  # noqa: E731
    model = make()
    before = cases.raw(model)
    whole = trainer(model, tmp_path, save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match=r"the weights of 10 quantized modules stay as they are: 13 float parameters"):
        whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    after = cases.raw(model)
    moved = {key.split(".")[-2] for key in changed(before, after)}
    assert moved == FLOATS
    resumed = make()
    trainer(resumed, tmp_path, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not changed(after, cases.raw(resumed))
    whole.save_model(tmp_path / "final")
    again = load(folder[0], tmp_path / "final", dtype=torch.float32)
    x = tiny.inputs(model)
    assert torch.equal(tiny.run(again.eval(), **x), tiny.run(model.eval(), **x))


@pytest.mark.parametrize("how", MADE)
def test_adapters_are_trained_saved_and_resumed(how, folder, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel, get_peft_model

    def make():
        torch.manual_seed(0)
        base = MADE[how](*folder, "mxfp4")
        return get_peft_model(base, cases.config(base, target_modules=["q_proj"]))

    model = make()
    before = cases.raw(model)
    whole = trainer(model, tmp_path, save_strategy="steps", save_steps=3, learning_rate=2e-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stay as they are.*")  # nobody expected anything else
        whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    after = cases.raw(model)
    moved = changed(before, after)
    assert moved and all("lora_" in key for key in moved)
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in moved} == {"q_proj", "experts", "base_layer"}
    resumed = make()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not changed(after, cases.raw(resumed))
    whole.save_model(tmp_path / "final")
    again = PeftModel.from_pretrained(MADE[how](*folder, "mxfp4"), tmp_path / "final")
    x = tiny.inputs(model.get_base_model())
    assert torch.equal(tiny.run(again.eval(), **x), tiny.run(model.eval(), **x))


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}],
    ids=["checkpointing", "accumulation"],
)
def test_the_same_losses_in_another_way(options, folder, tmp_path):
    pytest.importorskip("peft")
    from peft import get_peft_model

    found = []
    for more in ({}, options):
        base = MADE["quantize_"](*folder, "fp8/bf16")
        torch.manual_seed(0)
        made = get_peft_model(base, cases.config(base))
        done = trainer(made, tmp_path, max_steps=3, **more)
        done.train()
        found.append(losses(done))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_bf16(folder, tmp_path):
    pytest.importorskip("peft")
    from peft import get_peft_model

    base = load(*folder, "fp8", dtype=torch.bfloat16)
    made = get_peft_model(base, cases.config(base))
    done = trainer(made, tmp_path, bf16=True)
    done.train()
    assert losses(done)[-1] < losses(done)[0]
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}


def test_accelerate(folder):
    """A loop of one's own: prepare, accumulate, clip, backward, state of the model."""
    pytest.importorskip("peft")
    from accelerate import Accelerator
    from peft import get_peft_model

    torch.manual_seed(0)
    base = MADE["quantize_"](*folder, "mxfp4")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = get_peft_model(base, cases.config(base, target_modules=["q_proj"]))
    before = cases.raw(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(float(loss))
    assert seen[-1] < seen[0]
    after = cases.raw(accelerator.unwrap_model(model))
    assert changed(before, after) and all("lora_" in key for key in changed(before, after))


# ---- what they would pass over in silence


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_that_were_asked_for_a_gradient(fmt, folder, tmp_path):
    model = MADE["quantize_"](*folder, {"experts": fmt})
    experts = model.model.layers[1].mlp.experts
    for p in experts.parameters():
        p.requires_grad_((p.is_floating_point() and p.dtype.itemsize < 4) or p.dtype == torch.float32)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.gate_up_proj.* cannot be trained"):
        trainer(model, tmp_path).train()
    with pytest.raises(ValueError, match=r"gate_up_proj.* is stored in format .*: codes and scales are frozen"):
        tiny.run(model)
    with torch.no_grad():
        assert tiny.run(model).isfinite().all()


def test_a_linear_that_was_asked_for_a_gradient(folder):
    model = MADE["quantize_"](*folder, {"linear": "fp8"})
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight is stored in format .*: codes and scales are frozen"):
        tiny.run(model)


def test_experts_among_the_modules_to_save(folder):
    """PEFT would train a copy of the whole module."""
    peft = pytest.importorskip("peft")
    model = MADE["quantize_"](*folder, {"experts": "fp8"})
    with pytest.raises(ValueError, match=r"gate_up_proj is stored in format .*: codes and scales are frozen"):
        made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
        tiny.run(made, **tiny.inputs(model))


def test_nothing_to_train(folder, tmp_path):
    model = MADE["quantize_"](*folder, "fp8").requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: the weights of 10 modules are quantized"):
        trainer(model, tmp_path).train()


def test_a_float_model_is_none_of_our_business(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stay as they are.*")
        trainer(load(*folder, dtype=torch.float32), tmp_path, max_steps=1).train()


def test_unquantized_experts_on_our_kernels_may_be_trained_by_adapters_only(folder):
    """The format "bf16" holds no codes: a gradient that is asked for is no error of ours."""
    model = MADE["quantize_"](*folder, {"experts": "bf16"})
    model.requires_grad_(True)
    assert tiny.run(model).requires_grad


# ---- bad input


BAD = {
    "all labels ignored": (Tokens(lambda ids: torch.full_like(ids, -100)), ValueError, "loss of step 1 is (nan|inf)"),
    "an empty batch": (Tokens(length=0), ValueError, r"empty batch: input_ids is \(2, 0\)"),
    "labels of another length": (Tokens(lambda ids: ids[:-1]), ValueError, "batch_size .16. to match target"),
    "labels that are no tokens": (Tokens(lambda ids: ids + 1000), IndexError, "Target 10.. is out of bounds"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_batches(kind, folder, tmp_path):
    data, error, text = BAD[kind]
    model = MADE["quantize_"](*folder, "fp8")
    before = cases.raw(model)
    with pytest.raises(error, match=text):
        trainer(model, tmp_path, data).train()
    assert not changed(before, cases.raw(model))


def test_a_step_that_overflowed(folder, tmp_path):
    model = MADE["quantize_"](*folder, "fp8")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        trainer(model, tmp_path).train()

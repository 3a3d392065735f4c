"""What the README says of quality, measured: a table of every format, curves of training, LoRA on quantized weights.

    python examples/evidence.py --output FOLDER                        on a model that it trains first (minutes)
    python examples/evidence.py --output FOLDER --model PATH --text FILE --finetune FILE     on a local checkpoint
    python examples/evidence.py --output FOLDER --parts lora --quick   one part, small
    python examples/evidence.py --output FOLDER --parts none           draws again what is in FOLDER/evidence.json

quality   the model in each format against itself in bf16, on held-out text: `moe_ops.compare`.
training  a small model from one seed and one order of windows, in each precision (examples/train_small_moe.py).
lora      the model with LoRA on its attention and experts, fine-tuned on another text, over weights in each format.

FOLDER gets evidence.json, evidence.md and plots; parts that are not run again are kept from the JSON that is there.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from _evidence_report import FULL, markdown, plot, quality_lines
from torch import Tensor, nn
from tqdm import tqdm
from train_small_moe import (
    DEVICE,
    FLOATS,
    byte_ids,
    cast_,
    check_count,
    fail,
    fit,
    prepared,
    small_model,
    split,
    texts,
    train,
)
from transformers.utils import logging

import moe_ops
from moe_ops.quality import combine
from moe_ops.quality.plots import figure_class
from moe_ops.quality.text import BATCH, Bytes, Tokenizer, bits_per_byte, cut, load_float, read_text

TARGETS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "experts": ["gate_up_proj", "down_proj"]}
QUICK = {"bytes": 1 << 12, "steps": 20, "lora_steps": 10, "seconds": 20.0, "batch": 2}


class Material:
    """The model and the texts that the options ask for, each made when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._loaded: tuple[nn.Module, Bytes | Tokenizer] | None = None

    def model(self) -> tuple[nn.Module, Bytes | Tokenizer]:
        """In eval mode, and its tokenizer."""
        if self._loaded is None:
            self._loaded = load_float(self.args.model, DEVICE) if self.args.model else (self._trained(), Bytes())
        return self._loaded

    def _trained(self) -> nn.Module:
        model = small_model(self.args.seed)
        text, _ = split(self.pretraining())
        fit(model, byte_ids(text), steps=4000, seconds=self.args.seconds, seed=self.args.seed, label="the model")
        return cast_(model.eval(), torch.bfloat16)

    def pretraining(self) -> list[bytes]:
        """Without --train and --text: the first text of the corpus; the second is for fine-tuning."""
        path = self.args.train or self.args.text
        return [read_text(path)] if path else texts()[:1]

    def measured(self) -> bytes:
        """Not what the model was trained on, which for one that is made here is all but the end of its text."""
        if self.args.text and (self.args.model or self.args.train):
            return read_text(self.args.text, self.args.bytes)
        return split(self.pretraining())[1][: self.args.bytes]

    def finetuning(self) -> tuple[bytes, bytes]:
        """To train on, and held out."""
        return split([read_text(self.args.finetune)] if self.args.finetune else texts()[1:])


# Quality


def quantizable(summary: moe_ops.Summary) -> set[str]:
    """Of a model in FULL: experts, and the linear layers that only this format leaves as they are."""
    return {r.name for r in summary.rows if r.kind == "experts" or r.note == f"{FULL} is not quantized"}


def quality(material: Material) -> dict[str, Any]:
    """{"formats": {name: what compare found, and the bytes of what formats are for}, "refused": {name: why}}"""
    reference, tokenizer = material.model()
    windows, num_bytes = cut(material.measured(), tokenizer)
    plain = moe_ops.summary(moe_ops.quantize_(deepcopy(reference), FULL, progress=False))
    counted = quantizable(plain)
    reports, rows, refused = {}, {}, {}
    tqdm.write("\n".join(quality_lines({})))
    for name in tqdm(material.args.formats, "formats", leave=False):
        try:
            model = moe_ops.quantize_(deepcopy(reference), name, progress=False)
        except ValueError as error:  # the experts do not fit it
            refused[name] = " ".join(str(error).split())
            continue
        reports[name] = moe_ops.compare(
            reference, model, windows.split(BATCH), num_bytes=num_bytes, worst=0, progress=False
        )
        size = sum(row.bytes_after for row in moe_ops.summary(model).rows if row.name in counted)
        rows[name] = {**reports[name].as_dict(), "quantizable_bytes": size}
        tqdm.write(*quality_lines({name: rows[name]}, head=False))
    if not reports:
        raise ValueError("no format fits this model: " + "; ".join(refused.values()))
    combine(reports)  # of one reference, or it raises
    size = sum(row.bytes_before for row in plain.rows if row.name in counted)
    return {"num_bytes": num_bytes, "reference_bytes": size, "formats": rows, "refused": refused}


# Training


def training(material: Material) -> dict[str, Any]:
    """{precision: the curve that `train_small_moe.train` gives}"""
    args, given = material.args, material.pretraining()
    options = {"steps": args.steps, "seed": args.seed, "batch": args.batch}
    return {name: train(name, given, **options)[1] for name in args.precisions}


# LoRA


def adapted(model: nn.Module, parts: Sequence[str], seed: int) -> nn.Module:
    """LoRA of rank 8 on those TARGETS of every layer: Linears, and stacks of them. Same seed, same adapters.

    Raises ValueError where there are none.
    """
    from peft import LoraConfig, get_peft_model

    names = tuple(f".{name}" for part in parts for name in TARGETS[part])
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(names)]
    stacks = [name for name, p in model.named_parameters() if p.ndim == 3 and name.endswith(names)]
    if not linears + stacks:
        raise ValueError(f"--lora-targets {','.join(parts)}: the model has none of {', '.join(names)}")
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=linears, target_parameters=stacks)
    return get_peft_model(model, config)


def finetune(
    reference: nn.Module, name: str, tokens: Tensor, measure: Callable[[nn.Module], float], args: argparse.Namespace
) -> dict[str, Any]:
    """tokens (N,): what LoRA over weights in that format makes of it, and what held-out text costs before and after.

    FULL is the model as it came: transformers' own experts, PEFT's own layers.
    """
    model = deepcopy(reference)
    if name != FULL:
        moe_ops.quantize_(model, name, progress=False)
    before = measure(model)
    model = adapted(model, args.lora_targets, args.seed)
    losses = fit(
        model, tokens, steps=args.lora_steps, batch=args.batch, rate=args.lora_rate, seed=args.seed,
        label=f"LoRA, {name}",
    )  # fmt: skip
    return {
        "targets": args.lora_targets,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "held_out_bits_per_byte_before": before, "held_out_bits_per_byte": measure(model.eval()),
        "bits_per_token": [loss / math.log(2) for loss in losses],
    }  # fmt: skip


def lora(material: Material) -> dict[str, Any]:
    """{format: what `finetune` gives}; FULL first, which the others are measured against."""
    args, (reference, tokenizer) = material.args, material.model()
    text, held_out = material.finetuning()
    windows, num_bytes = cut(held_out[: args.bytes], tokenizer)
    tokens = torch.tensor(tokenizer.encode(text))

    def measure(model: nn.Module) -> float:
        return bits_per_byte(model, windows, num_bytes)

    return {name: finetune(reference, name, tokens, measure, args) for name in args.lora_formats}


# The script

PARTS: dict[str, Callable[[Material], dict[str, Any]]] = {"quality": quality, "training": training, "lora": lora}


def listed(given: str) -> list[str]:
    return [word for word in map(str.strip, given.split(",")) if word]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", required=True, metavar="FOLDER", help="where evidence.json, evidence.md and plots go")
    add("--parts", type=listed, default=list(PARTS), metavar="A,B", help=f"of {','.join(PARTS)}; or none")
    add("--model", metavar="PATH", help="a local checkpoint, instead of training a small model")
    add("--text", metavar="FILE", help="what quality is measured on, instead of the corpus")
    add("--train", metavar="FILE", help="what training trains on, but for its last bytes (what --text names)")
    add("--finetune", metavar="FILE", help="the other text, for LoRA, instead of the corpus")
    add("--formats", type=listed, metavar="A,B", help="of the table (all of moe_ops.FORMATS)")
    add("--precisions", type=listed, default="bf16,fp8,mxfp8,mxfp4", metavar="A,B", help="of training (%(default)s)")
    add("--lora-formats", type=listed, default="fp8,mxfp8,int8,mxfp4,nvfp4", metavar="A,B", help="(%(default)s)")
    add("--lora-targets", type=listed, default=list(TARGETS), metavar="A,B", help=f"of {','.join(TARGETS)}")
    add("--bytes", type=int, default=1 << 17, metavar="N", help="of text that quality is measured on (%(default)s)")
    add("--steps", type=int, default=400, metavar="N", help="of training (%(default)s)")
    add("--lora-steps", type=int, default=200, metavar="N", help="of fine-tuning (%(default)s)")
    add("--lora-rate", type=float, default=2e-3, metavar="X", help="its largest learning rate (%(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="windows in a step (%(default)s)")
    add("--seconds", type=float, default=110, metavar="N", help="train the model for so long (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--quick", action="store_true", help=f"small numbers instead of these: {QUICK}")
    return parser.parse_args()


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """With names spelled out, and everything refused that can be refused before a model runs."""
    args.parts = [] if args.parts == ["none"] else args.parts
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ValueError(f"--parts: there is no {unknown[0]!r}, only {', '.join(PARTS)}, or none")
    if not args.lora_targets or (unknown := [part for part in args.lora_targets if part not in TARGETS]):
        raise ValueError(f"--lora-targets: there is no {unknown[0] if unknown else ''!r}, only {', '.join(TARGETS)}")
    if args.quick:
        vars(args).update(QUICK)
    for name, least in {"bytes": 2, "steps": 1, "lora_steps": 1, "batch": 1}.items():
        check_count("--" + name.replace("_", "-"), getattr(args, name), least)
    args.formats = names(args.formats if args.formats is not None else list(moe_ops.FORMATS))
    args.lora_formats = names([FULL, *args.lora_formats])
    args.precisions = [p if p in FLOATS else names([p])[0] for p in args.precisions]
    figure_class()
    if "lora" in args.parts:
        check_peft()
    for name in args.precisions if "training" in args.parts else ():
        prepared(small_model(), name)  # refuses what does not fit it
    if args.model and "lora" in args.parts and not args.finetune:
        texts()  # or it says what to install
    return args


def check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError("LoRA needs PEFT: pip install peft") from None


def names(given: Sequence[str]) -> list[str]:
    """As FORMATS spells them, each once."""
    if not given:
        raise ValueError("a list of formats is empty: give names with commas between")
    return list(dict.fromkeys(moe_ops.FORMATS[name].name for name in given))


def environment() -> dict[str, Any]:
    import transformers

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", "Dynamo detected")  # a cached function of transformers
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(args.output)
    file = folder / "evidence.json"
    try:
        material = Material(checked(args))
        found = json.loads(file.read_text()) if file.is_file() else {}
        folder.mkdir(parents=True, exist_ok=True)
        for part in args.parts:
            start = time.perf_counter()
            results = PARTS[part](material)
            found[part] = {"run": environment() | {"seconds": time.perf_counter() - start}, "results": results}
            file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    (folder / "evidence.md").write_text(markdown(found))
    for path in plot(found, folder):
        tqdm.write(str(path))
    print(markdown(found))


if __name__ == "__main__":
    main()

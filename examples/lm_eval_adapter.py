"""A quantized, compiled model in EleutherAI's lm-eval, on task files of one's own; formats beside each other.

    pip install lm-eval                            an extra of its own: it brings datasets, scikit-learn and 40 more
    python examples/lm_eval_adapter.py --model PATH --formats bf16,fp8,mxfp4 --tasks examples/lm_eval_tasks

--tasks   folders of lm-eval's YAML files, whose data files are found from their folder: nothing is downloaded. Or names
          of tasks that lm-eval has, whose data it downloads.
--model   a float checkpoint, quantized to each format; `--formats stored` takes it as it is, quantized by whomever.

What is ours is `evaluator`, one call: lm-eval's own class for transformers takes any model that quantize_ gives back.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from quickstart import no_compiler
from train_small_moe import DEVICE, fail
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import moe_ops
from moe_ops.quality.report import aligned
from moe_ops.quality.text import load_float

STORED = "stored"  # in place of a format: the checkpoint as it is


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Of a model whose vocabulary is the 256 bytes, as transformers has tokenizers. Byte 0 ends a text, and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    end = "<|end|>"
    vocabulary = {end if byte == 0 else character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def load(path: str, name: str) -> tuple[Any, Any]:
    """The model in that format on DEVICE, and a tokenizer of transformers. Raises ValueError."""
    if name == STORED:
        model = moe_ops.load_quantized(path, device=DEVICE).eval()
    else:
        model = moe_ops.quantize_(load_float(path, DEVICE)[0], name)
    if model.config.get_text_config().vocab_size == 256 and not list(Path(path).glob("tokenizer*")):
        return model, byte_tokenizer()
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def evaluator(model: Any, tokenizer: Any, batch: int = 8) -> Any:
    """lm-eval's model of it, compiled where there is a compiler. Any length is one graph."""
    from lm_eval.models.huggingface import HFLM

    if not no_compiler():
        model.compile(dynamic=True)  # in place: generate runs the compiled forward too
    # What stands before the first token of a text: a model of bytes was never shown the end of one.
    prefix = ord("\n") if tokenizer.vocab_size == 256 else None
    # Left to itself it adds log-probabilities up in bf16, whose rounding is more than what a format costs.
    exact = {"softmax_dtype": "float32"}
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, prefix_token_id=prefix, **exact)


@contextmanager
def working_in(folder: Path | None) -> Iterator[None]:
    """YAML files name data files from where they are; lm-eval reads them from where the process is."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def evaluate(lm: Any, tasks: list[str], limit: int | None = None) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}; a task is a name that lm-eval has, or a folder. Raises ValueError for unknown ones."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        folder = Path(task).resolve() if Path(task).is_dir() else None
        with working_in(folder):
            manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
            names = manager.all_tasks if folder else [task]
            if not names or not manager.match_tasks(names):
                raise ValueError(f"--tasks {task}: " + ("no YAML files of tasks in it" if folder else "no such task"))
            results = simple_evaluate(lm, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0,
                                      log_samples=False)["results"]  # fmt: skip
        found |= {name: _numbers(row) for name, row in results.items()}
    return found


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Metrics alone: lm-eval calls them "acc,none", after the filter."""
    return {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if "," in key and "_stderr" not in key and isinstance(value, float | int)
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """{format: {task: {metric: value}}}, a line for each metric, a column for each format."""
    metrics = {(task, metric): None for tasks in found.values() for task, row in tasks.items() for metric in row}
    lines = [
        (f"{task}, {metric}", *(f"{tasks[task][metric]:.4f}" for tasks in found.values())) for task, metric in metrics
    ]
    return aligned([("", *found), *lines])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, metavar="PATH", help="a local checkpoint")
    parser.add_argument("--formats", default="bf16,fp8,mxfp4", metavar="A,B", help="%(default)s; or stored")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="folders of YAML files, or lm-eval's own tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task (all)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences run at once (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where to write the numbers too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", "Dynamo detected")  # a cached function of transformers
    logging.disable_progress_bar()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        fail("this needs lm-eval: pip install lm-eval")
    found = {}
    try:
        names = [n if n == STORED else moe_ops.FORMATS[n].name for n in map(str.strip, args.formats.split(","))]
        tasks = [str(Path(t).resolve()) if Path(t).is_dir() else t for t in map(str.strip, args.tasks.split(","))]
        for name in names:
            print(f"{name} ...", file=sys.stderr)
            torch._dynamo.reset()  # forget the model before it
            found[name] = evaluate(evaluator(*load(args.model, name), args.batch), tasks, args.limit)
    except ValueError as error:
        fail(error)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

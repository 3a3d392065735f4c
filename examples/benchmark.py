"""Times whole quantized MoE layers, beside the floors of the machine and what torch and transformers carry.

    python examples/benchmark.py                  # shapes A to D, four formats, M = 1 to 8192, on a GPU
    python examples/benchmark.py --device cpu --shapes tiny --tokens 1 8    # a dry run of everything but CUDA

A cell is one MoE layer after the router: x (M, H) bf16, topk_ids and topk_weights in, y (M, H) bf16 out. Several sets
of inputs and routing are captured back to back in one CUDA graph; the time is the median replay over the number of
sets. Beside it stand its multiples of two floors, from ceilings measured in the same run: roofline (bytes of the
touched experts, x and y at the speed of a streaming read, or the operations at the speed of an 8192-cubed product) and
streaming (two kernels that only read the weights, at the speed that reads of that size reach). Where compute is the
bound the two are one. The error is relative to an fp32 layer on the dequantized weights, over outputs that held NaN
before the checked replay. `vs` divides our multiple of the streaming floor by that of the best shipped kernel in
anchors_h200.json. --markdown FILE writes the table of docs/performance.md.

    python examples/benchmark.py --tune tiles.json --shapes 128x8x2048x768 --formats fp8 --tokens 1 8 64 512

times tile configurations of the grouped products instead, here for a shape of one's own (experts x top_k x hidden x
intermediate), and writes the best with where they were found; moe_ops.tuning.load_tuning("tiles.json") or
MOE_OPS_TUNING=tiles.json in the environment use them. Printed, for each product: how many times the best's time the
package's own rule takes.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

import _bench_peers as peers
import _bench_tune as tiles
import torch
from _bench_table import Cell, ceilings_line, markdown, print_table
from _bench_timing import Ceilings, Floors, Replay, layer_floors, measure_ceilings
from torch import Tensor
from tqdm import tqdm

from moe_ops.formats import FORMATS

CHECKED_TOKENS = 64
TOLERANCE = {16: 0.01, 8: 0.08, 6: 0.1, 4: 0.25}  # relative error, by bits of an activation
ALL = ["bf16", "fp8", "fp8_block", "fp8/bf16", "int8", "int8/int8", "int4_g128", "mxfp4", "mxfp4/fp8"]
Builders = dict[str, Callable[[], peers.Layer]]


class DeviceLost(RuntimeError):
    """A kernel left the CUDA context unusable: nothing more can be measured in this process."""


@dataclass
class Run:
    args: argparse.Namespace
    device: torch.device
    ceilings: Ceilings
    deadline: float
    cells: dict[tuple[str, str, int], Cell] = field(default_factory=dict)
    not_run: dict[str, list[int]] = field(default_factory=dict)
    failures: dict[tuple[str, str, str, str], list[int]] = field(default_factory=dict)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B", "C", "D"], help=f"{', '.join(peers.SHAPES)} or own")
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "fp8_block", "fp8/bf16"], help="names, or all")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="backend of moe_ops")
    parser.add_argument("--compiled", action="store_true", help="also QuantizedExperts under torch.compile")
    parser.add_argument("--no-peers", action="store_true", help="only moe_ops")
    parser.add_argument(
        "--peer-modes",
        nargs="*",
        default=["default"],
        help="torch.compile modes of the peers, without CUDA graphs of their own",
    )
    parser.add_argument("--precompile", type=int, default=0, metavar="N", help="first compile in N parallel processes")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start no new cell after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of docs/performance.md")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="time tile configurations, and keep the best there")
    args = parser.parse_args(argv)
    args.formats = ALL if args.formats == ["all"] else args.formats
    try:
        for format, shape in zip_longest(args.formats, args.shapes):
            FORMATS[format or args.formats[0]]
            peers.shape_of(shape or args.shapes[0])
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu --shapes tiny for a dry run")
    return args


def own_layers(run: Run, floats: tuple[Tensor, Tensor], weights: peers.Weights) -> Builders:
    builders: Builders = {"op": lambda: peers.op_layer(weights, run.args.backend)}
    if run.args.compiled:
        builders["compiled"] = lambda: peers.module_layer(floats, weights.format.name)
    return builders


def other_layers(run: Run, floats: tuple[Tensor, Tensor], weights: peers.Weights) -> Builders:
    return peers.peer_layers(weights, run.args.peer_modes)


PASSES = {"moe_ops": own_layers, "peers": other_layers}  # ours first, so that a budget cuts peers before cells


@contextlib.contextmanager
def attempt(run: Run, label: str, format: str, shape: str, tokens: int, result: dict) -> Iterator[None]:
    """A layer that cannot run costs its cell and one line; a lost device ends the run."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        result.clear()
        result["failed"] = reason
        run.failures.setdefault((label, format, shape, reason), []).append(tokens)
        if run.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{label} {format} {shape} M={tokens}: {reason}") from lost


def floors_of(run: Run, shape: peers.Shape, weights: peers.Weights, tokens: int, touched: float) -> Floors:
    first, second = weights.expert_bytes()
    activation = weights.format.activation
    low = activation is not None and activation.element.bits <= 8
    flop = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    tflops = run.ceilings.fp8_tflops if low else run.ceilings.bf16_tflops
    return layer_floors((first * touched, second * touched), 4 * tokens * shape.hidden, flop, tflops, run.ceilings)


def measure(layer: peers.Layer, sets: list, expected: Tensor) -> dict:
    """us of one layer, and the larger error of a replay before and one after the timing."""
    replay = Replay(layer, sets)

    def error() -> float:
        outputs = replay.poisoned_run()
        if not all(bool(out.isfinite().all()) for out in outputs):
            return math.nan
        return peers.relative_error(outputs[-1][:CHECKED_TOKENS], expected)

    before, us, after = error(), replay.time(), error()
    return {"us": us, "error": max(before, after, key=lambda e: (math.isnan(e), e))}


def run_cell(run: Run, shape_name: str, weights: peers.Weights, tokens: int, layers: dict[str, peers.Layer]) -> None:
    shape, name = peers.shape_of(shape_name), weights.format.name
    sets = peers.random_sets(shape, tokens, run.device)
    key = (name, shape_name, tokens)
    if key not in run.cells:
        touched = peers.touched_experts(sets)
        activation = weights.format.activation
        tolerance = TOLERANCE[16 if activation is None else activation.element.bits]
        run.cells[key] = Cell(*key, touched, floors_of(run, shape, weights, tokens, touched), tolerance)
    x, ids, topk_weights = (t[:CHECKED_TOKENS] for t in sets[-1])
    expected = peers.reference_layer(weights, x, ids, topk_weights)
    for label, layer in layers.items():
        result = run.cells[key].layers.setdefault(label, {})
        with attempt(run, label, name, shape_name, tokens, result):
            result.update(measure(layer, sets, expected))
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # a graph's pool serves nobody else


def build_layers(run: Run, builders: Builders, format: str, shape: str) -> dict[str, peers.Layer]:
    layers = {}
    torch._dynamo.reset()  # every (format, shape) compiles for itself: no recompile limit, no guards of the one before
    for label, build in builders.items():
        with attempt(run, label, format, shape, 0, {}):
            layers[label] = build()
    return layers


def run_pass(run: Run, name: str, make: Callable[..., Builders], progress: tqdm) -> None:
    began = time.monotonic()
    for shape in run.args.shapes:
        floats = peers.random_floats(peers.shape_of(shape), run.device)
        for format in run.args.formats:
            weights = peers.quantized_weights(floats, format)
            layers = None
            for tokens in run.args.tokens:
                progress.update()
                if time.monotonic() > run.deadline:
                    run.not_run.setdefault(f"{name} {format} {shape}", []).append(tokens)
                    continue
                if layers is None:
                    layers = build_layers(run, make(run, floats, weights), format, shape)
                if layers:
                    run_cell(run, shape, weights, tokens, layers)
            save_json(run)
            if progress.disable:
                print(f"{name} {shape} {format}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def precompile_job(args: argparse.Namespace, shape: str, format: str) -> tuple[str, float]:
    """Calls every layer of one (format, shape) once per M, untimed: compiled code lands in the caches on disk."""
    began = time.monotonic()
    quiet()
    run = Run(args, torch.device(args.device), Ceilings(copy_gbs=1, read_gbs=1, bf16_tflops=1, fp8_tflops=1), math.inf)
    floats = peers.random_floats(peers.shape_of(shape), run.device)
    weights = peers.quantized_weights(floats, format)
    with torch.no_grad():
        for make in pass_names(args).values():
            layers = build_layers(run, make(run, floats, weights), format, shape)
            for tokens in args.tokens:
                inputs = peers.random_sets(peers.shape_of(shape), tokens, run.device)[0]
                for label, layer in layers.items():
                    with attempt(run, label, format, shape, tokens, {}):
                        layer(*inputs)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return f"{shape} {format}", time.monotonic() - began


def pass_names(args: argparse.Namespace) -> dict[str, Callable[..., Builders]]:
    return {name: make for name, make in PASSES.items() if name == "moe_ops" or not args.no_peers}


def _few_compile_threads() -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # or each of the processes starts one per core


def precompile(args: argparse.Namespace) -> None:
    began = time.monotonic()
    with ProcessPoolExecutor(args.precompile, get_context("spawn"), initializer=_few_compile_threads) as pool:
        jobs = {pool.submit(precompile_job, args, s, f): f"{s} {f}" for s in args.shapes for f in args.formats}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="compiling", disable=None):
            if job.exception():
                print(f"precompile {jobs[job]}: {str(job.exception())[:160]}", file=sys.stderr)
    print(f"compiled in {args.precompile} processes in {time.monotonic() - began:.0f} s")


def describe(device: torch.device) -> str:
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401  (for its version)
    versions = ", ".join(
        f"{m} {sys.modules[m].__version__}" for m in ("torch", "triton", "transformers") if m in sys.modules
    )
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}: median CUDA-graph replay"
    return f"DRY RUN on a CPU, {versions}: plain calls without CUDA graphs, floors of no meaning"


def run_tuning(args: argparse.Namespace, device: torch.device, deadline: float) -> int:
    import triton

    import moe_ops

    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    provenance = {
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "moe_ops": moe_ops.__version__,
        "date": date.today().isoformat(), "command": " ".join(sys.argv),
    }  # fmt: skip

    def report(done: list[tiles.Timed]) -> None:
        if args.json:
            args.json.write_text(json.dumps([row for timed in done for row in tiles.as_data(timed)]))

    with torch.no_grad():
        missing = tiles.print_rule(tiles.tune(args, device, provenance, deadline, report))
    return 1 if missing else 0


def save_json(run: Run) -> None:
    if run.args.json:
        report = {
            "run": describe(run.device),
            "args": {name: str(value) for name, value in vars(run.args).items()},
            "ceilings": asdict(run.ceilings),
            "cells": [asdict(cell) for cell in run.cells.values()],
            "not_run": run.not_run,
        }
        run.args.json.write_text(json.dumps(report, indent=1))


def _listed(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def print_omissions(run: Run) -> None:
    """Which layers failed, and why; which cells the budget cut."""
    for (label, format, shape, reason), tokens in run.failures.items():
        at = "when built" if tokens == [0] else f"M={_listed(tokens)}"
        print(f"{label} {format} {shape} {at}: {reason}")
    if run.not_run:
        print(
            f"not run, {run.args.budget_seconds:.0f} s were over: "
            + "; ".join(f"{k} M={_listed(v)}" for k, v in run.not_run.items())
        )


def use_backend(name: str) -> contextlib.AbstractContextManager:
    if name == "auto":
        return contextlib.nullcontext()
    import moe_ops

    return moe_ops.use_backend(name)


def quiet() -> None:
    """A layer that fails is one line of the report, not a page of torch.compile's log."""
    torch._logging.set_logs(all=logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began = time.monotonic()
    quiet()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny work on several busy cores waits for the slowest
    if args.tune:
        return run_tuning(args, device, began + args.budget_seconds)
    if args.precompile:
        precompile(args)
    run = Run(args, device, measure_ceilings(device), began + args.budget_seconds)
    print(ceilings_line(run.ceilings), flush=True)
    passes = pass_names(args)
    total = len(passes) * len(args.shapes) * len(args.formats) * len(args.tokens)
    lost = None
    with torch.no_grad(), use_backend(args.backend), tqdm(total=total, desc="cells", disable=None) as progress:
        try:
            for name, make in passes.items():
                run_pass(run, name, make, progress)
        except (DeviceLost, KeyboardInterrupt) as error:
            lost = f"{type(error).__name__}: {error}"
    save_json(run)
    print_omissions(run)
    by_format = sorted(run.cells.values(), key=lambda cell: args.formats.index(cell.format))
    if args.markdown:
        args.markdown.write_text(markdown(by_format, describe(device), run.ceilings))
    wrong = print_table(by_format, describe(device), peers.PEER_LEGEND, device.type == "cuda")
    if lost:
        print(f"the run ended early: {lost}")
    return 1 if wrong or lost else 0


if __name__ == "__main__":
    sys.exit(main())

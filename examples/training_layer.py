"""Times a MoE layer forward and backward, beside transformers' grouped_mm on bf16 weights.

    python examples/training_layer.py                              # shapes A and C, 8192 tokens, on a GPU
    python examples/training_layer.py --shapes tiny --tokens 64    # a dry run on a CPU

The layer after the router: gradients go to x and the router's weights; frozen weights have none, trained ones do. All
layers are compiled. `frozen`: codes made once. `trained`: bf16 masters, quantized at every step, gradients in codes for
formats of 8-bit floats. `hf`: transformers' grouped_mm, `hf max` with max-autotune. Printed are milliseconds, their
ratios to both, the peak of memory above weights and inputs, and the error of the gradient of x against fp32.

Letters: M tokens, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import _bench_peers as peers
import torch
import torch._dynamo
from torch import Tensor, nn

from moe_ops import QuantizedExperts
from moe_ops.formats import FORMATS, dequantize_weight
from moe_ops.ops.training import multiplies_gradients
from moe_ops.storage import Training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Case = tuple[str, bool]  # what: "hf", "hf max" or a format; whether weights are trained


def layer_of(what: str, trained: bool, floats: tuple[Tensor, Tensor]) -> nn.Module:
    if what.startswith("hf"):
        weights = (nn.Parameter(w, requires_grad=trained) for w in floats)
        module = peers._HFExperts(*weights, "grouped_mm_experts_forward")
        return torch.compile(module, mode="max-autotune-no-cudagraphs" if what == "hf max" else None)
    experts = QuantizedExperts.from_float(*floats, "bf16" if trained else what)
    if trained:
        if what != "bf16":
            experts.trained = Training(what, what if multiplies_gradients(FORMATS[what]) else None)
        experts.requires_grad_(True)
    return torch.compile(experts, fullgraph=True)


def step_of(layer: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gradients are made anew. Returns that of x."""

    def step() -> Tensor:
        x.grad = weights.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x, ids, weights).backward(grad)
        assert x.grad is not None
        return x.grad

    return step


def make(shape_name: str, tokens: int, case: Case) -> tuple[nn.Module, Callable[[], Tensor], tuple[Tensor, ...]]:
    shape = peers.SHAPES[shape_name]
    floats = peers.random_floats(shape, torch.device(DEVICE))
    (x, ids, weights), *_ = peers.random_sets(shape, tokens, torch.device(DEVICE))
    x, weights = x.requires_grad_(), weights.bfloat16().requires_grad_()
    grad = torch.randn(x.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3)).to(x.dtype)
    layer = layer_of(*case, floats)
    return layer, step_of(layer, x, ids, weights, grad), (x.detach(), ids, weights.detach(), grad)


def compile_case(shape_name: str, tokens: int, case: Case) -> None:
    torch.set_num_threads(1)
    make(shape_name, tokens, case)[1]()


def true_gradient(case: Case, shape_name: str, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """Of x in fp32, expert by expert, for the first 64 tokens; with the values of codes where weights are frozen."""
    what, trained = case
    x, ids, weights, grad = (t[:64] for t in (x, ids, weights, grad))
    floats = peers.random_floats(peers.SHAPES[shape_name], torch.device(DEVICE))
    made = None if trained or what.startswith("hf") else peers.quantized_weights(floats, what)
    x = x.float().requires_grad_()
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        up, down = (w[e].float() for w in floats)
        if made is not None:
            up, down = (dequantize_weight(q.expert(e), s)[0] for q, s in ((made.gate_up, 2), (made.down, 1)))
        gate, h = (x @ up.T).chunk(2, -1)
        share = (weights.float() * (ids == e)).sum(-1, keepdim=True)
        y = y + share * ((nn.functional.silu(gate) * h) @ down.T)
    (found,) = torch.autograd.grad(y, x, grad.float())
    return found


def measure(shape_name: str, tokens: int, case: Case, seconds: float) -> dict:
    torch._dynamo.reset()
    gc.collect()
    cuda = DEVICE == "cuda"
    layer, step, inputs = make(shape_name, tokens, case)
    got = step()[:64].float()
    truth = true_gradient(case, shape_name, *inputs)
    row = {"shape": shape_name, "tokens": tokens, "what": case[0], "trained": case[1]}
    row["error"] = ((got - truth).norm() / truth.norm()).item()
    layer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times += steps_apart(step) if cuda else steps_on_cpu(step)
    return row | {"ms": median(times)}


def steps_apart(step: Callable) -> list[float]:
    """Of ten steps that follow each other, as in training: the host runs ahead of the GPU."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for event in events:
        event.record()
        step()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]


def steps_on_cpu(step: Callable) -> list[float]:
    begin = time.perf_counter()
    step()
    return [1e3 * (time.perf_counter() - begin)]


def print_table(rows: list[dict]) -> None:
    print("shape  weights  what        ms    /hf  /hf max  peak MB  error of dx")
    for r in rows:
        base = {b["what"]: b["ms"] for b in rows if (b["shape"], b["trained"]) == (r["shape"], r["trained"])}
        ratios = [f"{r['ms'] / base[name]:.2f}" if name in base else "-" for name in ("hf", "hf max")]
        kind = "trained" if r["trained"] else "frozen"
        print(f"{r['shape']:6} {kind:8} {r['what']:10} {r['ms']:7.3f} {ratios[0]:>5} {ratios[1]:>7} "
              f"{r.get('peak_mb', 0):8.0f}  {r['error']:.4f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "C"], choices=list(peers.SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--frozen", nargs="*", default=["hf", "hf max", "bf16", "fp8", "mxfp4"])
    parser.add_argument("--trained", nargs="*", default=["hf", "hf max", "bf16", "fp8", "mxfp8"])
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile everything beforehand")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, for each")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [(w, False) for w in args.frozen] + [(w, True) for w in args.trained]
    if args.jobs:  # not what max-autotune times: nothing else may run beside it
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for shape in args.shapes:
                done = [pool.submit(compile_case, shape, args.tokens, case) for case in cases if case[0] != "hf max"]
                for future in done:
                    future.exception()  # it comes again below, where it is seen
    rows = []
    for shape in args.shapes:
        for case in cases:
            try:
                rows.append(measure(shape, args.tokens, case, args.seconds))
            except Exception as e:  # the others are of use without it
                print(f"{shape} {case}: {type(e).__name__}: {str(e).splitlines()[0][:300]}")
                continue
            if args.json:
                args.json.write_text(json.dumps(rows))
    print_table(rows)


if __name__ == "__main__":
    main()

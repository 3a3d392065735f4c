"""What torch.compile makes of a MoE layer, from the residual stream in to the residual stream out.

    python examples/compiled_layer.py --formats fp8 mxfp4 --shapes A C --tokens 1 8 512

RMSNorm, router (linear, softmax, top-k), experts, residual add; under CUDA graphs, over inputs that touch different
experts. `eager`: PyTorch's ops and ours, one after the other. `whole`: compiled, our op left in one piece. `opened`:
compiled, our op opened into parts that Inductor fuses (moe_ops/lowering); `tuned`: with max_autotune besides. Printed
are kernels per layer, microseconds, and the error of the experts' share against fp32 on the same weights.

Letters: M tokens, H hidden, E experts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import _bench_peers as peers
import torch
import torch._dynamo
from _bench_timing import Replay
from torch import Tensor
from tqdm import tqdm

import moe_ops.lowering

VARIANTS = ("eager", "whole", "opened", "tuned")


def routed(x: Tensor, norm: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, H) -> normed rows (M, H), experts (M, A), weights (M, A), as Qwen3-MoE writes it."""
    xf = x.float()
    h = norm * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    weights, ids = torch.topk(torch.softmax((h @ gate.T).float(), -1), top_k)
    return h, ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


def make_layer(weights: peers.Weights, shape: peers.Shape, device: torch.device) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(1)
    norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
    gate = torch.randn(shape.experts, shape.hidden, dtype=torch.bfloat16, device=device) / shape.hidden**0.5
    experts = peers.op_layer(weights, "auto")

    def layer(x: Tensor) -> Tensor:
        return x + experts(*routed(x, norm, gate, shape.top_k))

    layer.routed = partial(routed, norm=norm, gate=gate, top_k=shape.top_k)  # type: ignore[attr-defined]
    return layer


def build(variant: str, layer: Callable) -> Callable:
    if variant == "eager":
        return layer
    mode = "max-autotune-no-cudagraphs" if variant == "tuned" else "default"
    return torch.compile(layer, fullgraph=True, dynamic=False, mode=mode)


def context(variant: str) -> contextlib.AbstractContextManager:
    return moe_ops.lowering.whole() if variant == "whole" else contextlib.nullcontext()


def inputs(shape: peers.Shape, tokens: int, device: torch.device) -> list[tuple[Tensor]]:
    sets = max(2, min(32, 512 // tokens))
    return [(torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device),) for _ in range(sets)]


def count_kernels(fn: Callable, x: Tensor) -> int:
    if not x.is_cuda:
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn(x)
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device and "Mem" not in event.name for event in profile.events())


def run_cell(format: str, shape_name: str, tokens: int, variants: list[str], timed: bool = True) -> list[dict]:
    shape, device = peers.SHAPES[shape_name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = _weights(format, shape_name, device)
    layer, sets, rows = make_layer(weights, shape, device), inputs(shape, tokens, device), []
    x = sets[0][0]
    expected = peers.reference_layer(weights, *layer.routed(x)) if timed else None  # type: ignore[attr-defined]
    for variant in variants:
        torch._dynamo.reset()
        with torch.no_grad(), context(variant):
            fn = build(variant, layer)
            out = fn(x)
            if expected is None:
                continue
            row = {"format": format, "shape": shape_name, "tokens": tokens, "variant": variant}
            row |= {"error": peers.relative_error(out.float() - x.float(), expected), "kernels": count_kernels(fn, x)}
            rows.append(row | {"us": Replay(fn, sets).time(0.05)})
    return rows


_KEPT: dict[tuple, peers.Weights] = {}


def _weights(format: str, shape_name: str, device: torch.device) -> peers.Weights:
    """Of one (format, shape) at a time."""
    key = format, shape_name
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = peers.quantized_weights(peers.random_floats(peers.SHAPES[shape_name], device), format)
    return _KEPT[key]


def print_table(rows: list[dict]) -> None:
    cells = list(dict.fromkeys((r["format"], r["shape"], r["tokens"]) for r in rows))
    found = {(r["format"], r["shape"], r["tokens"], r["variant"]): r for r in rows}
    variants = [v for v in VARIANTS if any(r["variant"] == v for r in rows)]
    print("format shape M | " + " | ".join(f"{v}: kernels us (ratio) error" for v in variants))
    for cell in cells:
        base, texts = found.get((*cell, "eager")), []
        for variant in variants:
            r = found.get((*cell, variant))
            ratio = f"{r['us'] / base['us']:.2f}" if r and base else "-"
            texts.append(f"{r['kernels']} {r['us']:.1f} ({ratio}) {r['error']:.4f}" if r else "-")
        print(*cell, "|", " | ".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "fp8_block", "mxfp4"])
    parser.add_argument("--shapes", nargs="+", default=list("ABCD"), choices=list(peers.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 2048])
    parser.add_argument("--variants", nargs="+", default=["eager", "whole", "opened"], choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile everything beforehand")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cells = list(product(args.formats, args.shapes, args.tokens))
    if args.jobs:
        ready = partial(run_cell, variants=args.variants, timed=False)
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = [pool.submit(ready, *cell) for cell in cells]
            for future in tqdm(done, desc="compile", disable=None):
                future.exception()  # it comes again below, where it is seen
    rows: list[dict] = []
    for cell in tqdm(cells, desc="cells", disable=None):
        rows += run_cell(*cell, variants=args.variants)
        if args.json:
            args.json.write_text(json.dumps(rows))
    print_table(rows)


if __name__ == "__main__":
    main()

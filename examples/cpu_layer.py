"""A layer of quantized experts on a CPU against Hugging Face's in bf16: time of ours over time of theirs.

    python examples/cpu_layer.py --tokens 1 8 --threads 2
    python examples/cpu_layer.py --formats fp8 mxfp4 --threads 1 --clock cpu    # on a machine that others use too

`eager`: our op as it is, over theirs as it is (their loop over experts). `compiled`: the same under torch.compile, over
theirs as it is, and over the fastest of theirs under torch.compile. All are called in turn, with other experts every
time, so that weights come from memory; the fastest call of each counts.

Letters: M tokens, E experts, H hidden, I intermediate, A experts per token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import moe_ops

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
THEIRS = ("eager", "batched_mm", "grouped_mm")  # ways in which transformers runs experts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quantized = [name for name in moe_ops.FORMATS if moe_ops.FORMATS[name].quantized]
    parser.add_argument("--formats", nargs="+", default=quantized)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of one thread; needs --threads 1")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu sees one thread: use --threads 1")
    return args


def hf_layer(args: argparse.Namespace, way: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=args.hidden, moe_intermediate_size=args.intermediate,
                            num_experts=args.experts, num_experts_per_tok=args.top_k)  # fmt: skip
    config._experts_implementation = way
    with torch.device("meta"):
        return Qwen3MoeExperts(config).to(torch.bfloat16)


def float_weights(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """gate_up (E, 2I, H), down (E, H, I)."""
    e, h, i = args.experts, args.hidden, args.intermediate
    return tuple(torch.randn(e, n, k, dtype=torch.bfloat16) * k**-0.5 for n, k in ((2 * i, h), (h, i)))  # type: ignore[return-value]


def inputs(args: argparse.Namespace, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x (M, H), ids and weights (M, A), of other experts every time."""
    x = torch.randn(tokens, args.hidden, dtype=torch.bfloat16)
    weights = torch.rand(tokens, args.top_k, dtype=torch.bfloat16)
    while True:
        yield x, torch.stack([torch.randperm(args.experts)[: args.top_k] for _ in range(tokens)]), weights


def fastest(calls: dict[str, Callable], args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Milliseconds of each, called in turn."""
    clock, times = CLOCKS[args.clock], {name: [] for name in calls}
    for _, given in zip(range(args.rounds), inputs(args, tokens), strict=False):
        for name, call in calls.items():
            start = clock()
            call(*given)
            times[name].append((clock() - start) * 1e3)
    return {name: min(found[3:]) for name, found in times.items()}


def theirs(args: argparse.Namespace, weights: tuple[Tensor, Tensor]) -> dict[str, nn.Module]:
    layers = {way: hf_layer(args, way) for way in THEIRS}
    for layer in layers.values():
        layer.gate_up_proj, layer.down_proj = (nn.Parameter(w, requires_grad=False) for w in weights)
    return layers


def compiled_theirs(layers: dict[str, nn.Module], args: argparse.Namespace, tokens: int) -> Callable:
    """The fastest of their ways under torch.compile, of those that run."""
    found: dict[str, Callable] = {}
    for way, layer in layers.items():
        call = torch.compile(layer)
        try:
            call(*next(inputs(args, tokens)))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            print(f"transformers' {way} does not compile here: {type(error).__name__}")
            continue
        found[way] = call
    times = fastest(found, args, tokens)
    return found[min(times, key=times.__getitem__)]


def measure(args: argparse.Namespace) -> None:
    weights = float_weights(args)
    layers = theirs(args, weights)
    torch._dynamo.config.recompile_limit = 4 * len(args.formats) + 16  # a module of each format is one more
    print("| format | M | HF eager ms | HF compiled ms | eager ms | compiled ms | eager / HF eager "
          "| compiled / HF eager | compiled / HF compiled |\n" + "|---" * 9 + "|")  # fmt: skip
    for tokens in args.tokens:
        torch._dynamo.reset()
        compiled = compiled_theirs(layers, args, tokens)
        for name in args.formats:
            ours = moe_ops.QuantizedExperts.from_float(*weights, name)
            calls = {"hf": layers["eager"], "hf compiled": compiled, "eager": ours, "compiled": torch.compile(ours)}
            ms = fastest(calls, args, tokens)
            hf, hf_compiled, eager, mine = ms.values()
            print(f"| {name} | {tokens} | {hf:.2f} | {hf_compiled:.2f} | {eager:.2f} | {mine:.2f} | {eager / hf:.2f} "
                  f"| {mine / hf:.2f} | {mine / hf_compiled:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"{options.experts} experts, {options.hidden} x {options.intermediate}, top {options.top_k}; torch "
          f"{torch.__version__}, {options.threads} threads, {options.clock} clock")  # fmt: skip
    with torch.no_grad():
        measure(options)

"""Qwen3-30B-A3B's first layers, random weights, on 1 and on n GPUs: expert and tensor parallel, bf16 and fp8.

    NCCL_NVLS_ENABLE=0 python examples/multi_gpu.py --gpus 2 --out results
    python examples/multi_gpu.py --tiny                                      gloo, two processes, seconds

Against one GPU, and transformers' own tp_plan in bf16, in the same run: decoding for 64 sequences (static cache,
compiled, replayed from a CUDA graph where that works), a prefill of 4 x 2048 tokens, and the share of time in which
communication kernels run. Every phase is processes of its own with a time limit: what it has measured by then counts.
The table is printed last; `--out` gets the details as JSON. `--phases` runs some only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = {  # name: (on one GPU, how, format)
    "one bf16": (True, None, "bf16"),
    "one fp8": (True, None, "fp8"),
    "transformers tp bf16": (False, "transformers", None),
    "ep fp8": (False, "ep", "fp8"),
    "ep bf16": (False, "ep", "bf16"),
    "tp fp8": (False, "tp", "fp8"),
    "tp bf16": (False, "tp", "bf16"),
}
REAL = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_theta": 1e6,
}  # fmt: skip
TINY = REAL | {
    "vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16,
    "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--phases", nargs="*", choices=list(PHASES), default=list(PHASES))
    p.add_argument("--budget", type=float, default=440, help="seconds for everything")
    p.add_argument("--limit", type=float, default=150, help="seconds for a phase")
    p.add_argument("--out", type=Path, default=Path("multi_gpu_results"))
    p.add_argument("--tiny", action="store_true", help="a tiny model, gloo, on the CPU")
    p.add_argument("--eager", action="store_true", help="compile nothing")
    p.add_argument("--phase", help=argparse.SUPPRESS)
    p.add_argument("--store", help=argparse.SUPPRESS)
    return p.parse_args()


# The parent: processes, time limits, the table


def start(args: argparse.Namespace, phase: str, first_gpu: int = 0) -> list[subprocess.Popen]:
    ranks = 1 if PHASES[phase][0] else args.gpus
    store = tempfile.mktemp()
    given = [f"--layers={args.layers}", f"--out={args.out}", f"--gpus={args.gpus}"]
    given += [flag for flag, on in (("--tiny", args.tiny), ("--eager", args.eager)) if on]
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NCCL_NVLS_ENABLE": "0",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        if not args.tiny:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str(first_gpu + r) for r in range(ranks))
        command = [sys.executable, __file__, *given, "--phase", phase, "--store", store]
        log = (args.out / f"{phase.replace(' ', '-')}-{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
    return processes


def finish(processes: list[subprocess.Popen], seconds: float) -> str:
    """Wait for all of them; when one fails or the time is over, end the rest. What happened, in a word."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [p.poll() for p in processes]
        if all(c == 0 for c in codes):
            return "done"
        if any(c for c in codes):
            break
        time.sleep(0.2)
    failed = [r for r, p in enumerate(processes) if p.poll() not in (None, 0)]
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    return f"rank {failed[0]} failed" if failed else f"over its limit of {seconds:.0f} s"


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    end, said = time.monotonic() + args.budget, {}
    left = lambda: min(args.limit, end - time.monotonic())  # noqa: E731
    alone = [p for p in args.phases if PHASES[p][0]]
    if alone and not args.tiny and args.gpus >= len(alone):  # each on a GPU of its own, at the same time
        running = {p: start(args, p, gpu) for gpu, p in enumerate(alone)}
        seconds = left()
        said |= {p: finish(processes, seconds) for p, processes in running.items()}
    for phase in args.phases:
        if phase not in said:
            said[phase] = finish(start(args, phase), left()) if left() > 20 or args.tiny else "no time was left"
        print(f"{phase}: {said[phase]}", flush=True)
    results = {}
    for phase, state in said.items():
        file = args.out / f"{phase.replace(' ', '-')}.json"
        results[phase] = (json.loads(file.read_text()) if file.exists() else {}) | {"state": state}
    (args.out / "multi_gpu.json").write_text(json.dumps(results, indent=1))
    print(table(results))


def table(results: dict) -> str:
    heads = ["phase", "ranks", "decode ms", "x", "comm", "prefill ms", "x", "comm", "error", "state"]
    rows = [heads]
    for phase, r in results.items():
        one = results.get(f"one {phase.split()[-1]}", {})
        row = [phase, str(r.get("ranks", ""))]
        for what in ("decode", "prefill"):
            best, base = r.get(f"{what}_ms"), one.get(f"{what}_ms")
            share = r.get(f"{what}_communication")
            row += [f"{best:.3f}" if best else "-", f"{base / best:.2f}" if best and base else "-"]
            row += [f"{share:.0%}" if share is not None else "-"]
        row += [f"{r['error']:.1e}" if r.get("error") is not None else "-", r["state"]]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# A rank


def rank(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    import transformers

    transformers.logging.set_verbosity_error()
    alone, how, fmt = PHASES[args.phase]
    index, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if args.tiny else torch.device("cuda", index)
    if not args.tiny:
        torch.cuda.set_device(device)
    if not alone:
        dist.init_process_group("gloo" if args.tiny else "nccl", f"file://{args.store}", rank=index, world_size=ranks,
                                device_id=None if args.tiny else device)  # fmt: skip
    begun = time.monotonic()
    model = shared(build(args, device), how, fmt, device)
    measure = Measure(args, device, ranks, begun)
    with torch.no_grad():
        measure.run(model)
    if not alone:
        dist.destroy_process_group()


def build(args: argparse.Namespace, device):
    """The same random weights on every rank, in bf16."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**(TINY if args.tiny else REAL), num_hidden_layers=2 if args.tiny else args.layers)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def shared(model, how: str | None, fmt: str | None, device):
    """The model, quantized, or this rank's part of it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if how == "transformers":
        state, cls, config = model.state_dict(), type(model), model.config
        new = cls.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype, tp_plan="auto")
        for m in new.modules():  # hooks of gradients, which inference has none of and graphs break at
            m._backward_hooks.clear()
            m._backward_pre_hooks.clear()
        return new.eval().requires_grad_(False)
    import moe_ops

    moe_ops.quantize_(model, fmt, progress=False)
    if how is not None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(how,))
        moe_ops.sharding.parallelize_(model, mesh)
    return model


class Measure:
    """Times on this rank, the slowest rank's; written by rank 0 after each, so that a phase that is ended has some."""

    def __init__(self, args: argparse.Namespace, device, ranks: int, begun: float) -> None:
        self.args, self.device, self.ranks, self.begun = args, device, ranks, begun
        self.cuda, self.found = device.type == "cuda", {"ranks": ranks, "layers": 2 if args.tiny else args.layers}
        self.name, self.whole = args.phase.replace(" ", "-"), True

    def run(self, model) -> None:
        import torch

        batch, length, sequences = (4, 16, 2) if self.args.tiny else (64, 2048, 4)
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.config.vocab_size
        prompt = torch.randint(vocabulary, (sequences, length), generator=generator).to(self.device)
        last = torch.randint(vocabulary, (batch, 1), generator=generator).to(self.device)
        self.note(build_s=time.monotonic() - self.begun)

        def prefill(ids):
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        self.compare(prefill(prompt))
        self.note(prefill_eager_ms=self.time(lambda: prefill(prompt)))
        self.note(prefill_ms=self.found["prefill_eager_ms"])
        self.decode(model, last, 32 if self.args.tiny else 1024)
        if self.args.eager:
            self.note(prefill_communication=self.communication(lambda: prefill(prompt)))
            return
        compiled = torch.compile(prefill, fullgraph=self.whole, dynamic=False)
        self.note(prefill_compile_s=self.seconds(lambda: compiled(prompt)))
        self.note(prefill_ms=min(self.time(lambda: compiled(prompt)), self.found["prefill_eager_ms"]))
        self.note(prefill_communication=self.communication(lambda: compiled(prompt)), done=True)

    def decode(self, model, last, length: int) -> None:
        import torch
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=length)
        at = torch.tensor([length // 2], device=self.device)

        def step(ids, position):
            return model(input_ids=ids, past_key_values=cache, cache_position=position, use_cache=True,
                         position_ids=position[None].expand(ids.shape[0], 1), logits_to_keep=1).logits  # fmt: skip

        step(last, at)  # makes the cache, of the heads that this rank has
        self.note(decode_eager_ms=self.time(lambda: step(last, at)))
        self.note(decode_ms=self.found["decode_eager_ms"])
        if self.args.eager:
            return
        compiled = torch.compile(step, fullgraph=True, dynamic=False)
        try:
            self.note(decode_compile_s=self.seconds(lambda: compiled(last, at)), fullgraph=True)
        except Exception as e:
            if "transformers" not in self.args.phase:
                raise
            self.whole = False
            torch._dynamo.reset()
            compiled = torch.compile(step, dynamic=False)
            self.note(fullgraph=False, why=str(e)[:300])
            self.note(decode_compile_s=self.seconds(lambda: compiled(last, at)))
        run = lambda: compiled(last, at)  # noqa: E731
        self.note(decode_compiled_ms=self.time(run), cuda_graph=False)
        self.note(decode_ms=min(self.found["decode_compiled_ms"], self.found["decode_eager_ms"]))
        if self.cuda:
            graph = self.capture(run)
            self.note(decode_graph_ms=self.time(graph.replay), cuda_graph=True)
            self.note(decode_ms=min(self.found["decode_graph_ms"], self.found["decode_ms"]))
            run = graph.replay
        self.note(decode_communication=self.communication(run))

    def capture(self, fn):
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread of its own
            fn()
        return graph

    def compare(self, logits) -> None:
        """With what one GPU says in the same format; transformers' own with our bf16."""
        import torch

        mine = logits.float().cpu()
        one = self.args.out / f"one-{self.args.phase.split()[-1]}.pt"
        if self.ranks == 1:
            torch.save(mine, self.args.out / f"{self.name}.pt")
        elif one.exists():
            want = torch.load(one)
            self.note(error=float((mine - want).norm() / want.norm()))

    def time(self, fn, repeats: int = 10) -> float:
        """Median milliseconds of the slowest rank."""
        import torch
        import torch.distributed as dist

        fn(), fn()
        times = []
        for _ in range(repeats):
            self.wait()
            begun = time.perf_counter()
            fn()
            if self.cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) * 1e3)
        found = torch.tensor(statistics.median(times), device=self.device)
        if self.ranks > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def seconds(self, fn) -> float:
        begun = time.monotonic()
        fn()
        self.wait()
        return time.monotonic() - begun

    def wait(self) -> None:
        import torch
        import torch.distributed as dist

        if self.ranks > 1:
            dist.barrier()
        if self.cuda:
            torch.cuda.synchronize()

    def communication(self, fn) -> float | None:
        """Share of the time of kernels that is NCCL's, with what they wait for the slowest rank; None without a GPU."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if not self.cuda or self.ranks == 1:
            return None
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(3):
                fn()
            torch.cuda.synchronize()
        kernels = [(e.key, e.self_device_time_total) for e in p.key_averages() if e.self_device_time_total]
        return sum(t for key, t in kernels if "nccl" in key.lower()) / max(sum(t for _, t in kernels), 1e-9)

    def note(self, **found) -> None:
        self.found |= found
        self.found["seconds"] = time.monotonic() - self.begun
        if os.environ["RANK"] == "0":
            (self.args.out / f"{self.name}.json").write_text(json.dumps(self.found, indent=1))


if __name__ == "__main__":
    arguments = parse()
    rank(arguments) if arguments.phase else main(arguments)

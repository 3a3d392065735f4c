"""Times tile configurations of the grouped products: examples/benchmark.py --tune FILE.

A job is one product (first: gate and up with gathered rows; second: down, scattered) of one shape, format and number
of tokens; parts of K count with the kernel that adds them, unless a layer has one that reads them anyway. Every
candidate is compiled in parallel processes first, then timed alone by CUDA-graph replay over rotating inputs; its
result must agree with the first candidate's, which is the one that the package's tables choose (the rule).
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import _bench_peers as peers
import torch
from _bench_timing import Replay

import moe_ops.ops  # noqa: F401
from moe_ops.activation import Gate
from moe_ops.backends.base import Operand, Rows, Weight
from moe_ops.formats import FORMATS, quantize_weight
from moe_ops.kernels import tuning
from moe_ops.kernels.configs import Config

SHARED = 220_000  # bytes of shared memory that a candidate may take, of Hopper's 227 KiB
DIFFERENCE = 0.01  # relative, of results in bf16 that were added in another order
LIMIT = 1.2  # a rule that takes longer than so many times the best is named


@dataclass(frozen=True)
class Job:
    format: str
    shape: str
    tokens: int
    first: bool  # gate and up; else down

    @property
    def rows_per_expert(self) -> float:
        s = peers.shape_of(self.shape)
        rows = self.tokens * s.top_k
        return rows / (s.experts * (1 - (1 - 1 / s.experts) ** rows))


def candidates(job: Job) -> Iterator[Config]:
    """Tiles worth trying for that many rows per expert; the weights go first (swap) where rows are few."""
    fmt = FORMATS[job.format]
    if fmt.weight.element.bits == 4:
        yield from _nibbles(job.rows_per_expert)
    elif fmt.quantized and (fmt.activation is None or fmt.activation.element != fmt.weight.element):
        yield from _decoded(job.rows_per_expert)
    else:
        yield from _same_type(job)


def _nibbles(r: float) -> Iterator[Config]:
    """Weights of 4 bits: 128 columns a step, always."""
    if r <= 16:
        if r <= 5:
            yield from _eight()
        tiles = (32, 4, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3)
        yield from (Config(16, n, 128, w, s, parts=p) for (n, w, s), p in product(tiles, (1, 2, 4, 8)))
        tiles = (64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 8, 3)
        yield from (Config(16, n, 128, w, s, swap=True, parts=p) for (n, w, s), p in product(tiles, (1, 2, 4)))
    elif r <= 40:
        yield from (Config(32, n, 128, w, s) for n, w, s in ((32, 4, 4), (64, 4, 3), (128, 8, 3)))
        yield from (Config(32, n, 128, w, s, swap=True) for n, w, s in ((64, 4, 3), (64, 4, 4), (128, 8, 3)))
        yield from (Config(64, n, 128, w, 3, swap=True) for n, w in ((64, 4), (128, 8)))
    elif r <= 100:
        tiles = (64, 4, 3), (64, 4, 4), (128, 8, 3), (128, 4, 3)
        yield from (Config(64, n, 128, w, s, swap=True) for n, w, s in tiles)
        yield Config(64, 64, 128, 8, 3)
        yield from (Config(128, n, 128, w, 3, swap=True, short=64) for n, w in ((64, 4), (128, 8)))
    else:
        for (n, w, s), short in product(((64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3)), (0, 64)):
            yield Config(128, n, 128, w, s, swap=True, group_m=8, short=short)
        yield from (Config(128, n, 128, 8, 3, group_m=8, short=64) for n in (64, 128))
        yield Config(64, 128, 128, 8, 3, swap=True, group_m=8)


def _decoded(r: float) -> Iterator[Config]:
    """Weights of 8 or 6 bits that become bf16 in registers."""
    if r <= 16:
        if r <= 5:
            yield from _eight()
        tiles = (32, 4, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3)
        yield from (Config(16, n, 128, w, s, parts=p) for (n, w, s), p in product(tiles, (1, 2, 4)))
        tiles = (64, 4, 4), (128, 8, 3)
        yield from (Config(16, n, 128, w, s, swap=True, parts=p) for (n, w, s), p in product(tiles, (1, 2, 4)))
    elif r <= 40:
        yield from (Config(32, n, 128, w, s) for n, w, s in ((32, 4, 4), (64, 4, 3), (128, 8, 3)))
        yield from (Config(32, n, 128, w, s, swap=True) for n, w, s in ((64, 4, 3), (128, 8, 3)))
        yield from (Config(64, n, k, 4, 3, swap=True) for n, k in ((64, 64), (64, 128), (128, 64)))
    else:
        m = 64 if r <= 100 else 128
        tiles = (64, 4, 64), (128, 8, 64), (128, 4, 64), (64, 8, 64), (128, 8, 128)
        for (n, w, k), swap in product(tiles, (True, False)):
            yield Config(m, n, k, w, 3, swap=swap, group_m=1 if m == 64 else 8, short=0 if m == 64 else 64)


def _eight() -> Iterator[Config]:
    """Eight rows: weights go first into products of 16 channels and 8 rows."""
    tiles = (64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 3), (128, 8, 3), (128, 4, 4)
    yield from (Config(8, n, 128, w, s, swap=True, parts=p) for (n, w, s), p in product(tiles, (1, 2, 4, 8)))


def _same_type(job: Job) -> Iterator[Config]:
    """Weights and activations go into the tensor core as they are."""
    wide, r = FORMATS[job.format].activation is None, job.rows_per_expert
    scaled = FORMATS[job.format].weight.block == (128, 128)
    ks = (64, 128) if wide else (128,) if scaled else (128, 256)
    if r <= 2:
        yield from (Config(16, n, ks[-1], w, s) for n, w, s in ((16, 2, 6), (16, 4, 4), (32, 4, 4), (32, 4, 6)))
    if r <= 64:
        m = 16 if r <= 16 else 32 if r <= 32 else 64
        tiles = [(64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 8, 3), (128, 8, 4)]
        parts = (1, 2, 4) if r <= 16 else (1,)
        yield from (Config(m, n, k, w, s, swap=True, parts=p) for (n, w, s), k, p in product(tiles, ks, parts))
        yield from (Config(m, n, ks[0], 4, 4) for n in (64, 128))
    if r > 32:
        tall = (64,) if r <= 64 else (64, 128) if r <= 200 else (128, 256)
        groups = (1,) if r <= 100 else (8,) if r <= 200 else (4, 16)
        for m, n, w, s, g in product(tall, (64, 128, 256), (4, 8), (3, 4), groups):
            per_warp = m * n * (2 if job.first else 1) // w  # accumulators: 128 registers of 32 lanes are 4096
            if 1024 <= per_warp <= 4096:
                yield Config(m, n, ks[0] if wide else 128, w, s, group_m=g, short=64 if m >= 128 else 0)


def shared_bytes(c: Config, job: Job) -> int:
    fmt = FORMATS[job.format]
    alike = fmt.activation is not None and fmt.activation.element == fmt.weight.element
    x = fmt.activation.element.bits if alike and fmt.activation is not None else 16
    return c.stages * c.block_k * (c.block_m * x + c.block_n * fmt.weight.element.bits * (2 if job.first else 1)) // 8


def arguments(job: Job, weights: peers.Weights, sets: list) -> list[tuple]:
    """(x, its scales, weight, rows, gate, format) of each set."""
    import moe_ops.backends.triton as backend

    shape, fmt = peers.shape_of(job.shape), weights.format
    stored = weights.gate_up if job.first else weights.down
    w = Weight(stored.qdata, stored.scale, stored.global_scale, shards=2 if job.first else 1)
    out = []
    for x, ids, topk_weights in sets:
        order, offsets = backend.Parts.sort_by_expert(ids, shape.experts)
        rows = Rows(offsets, read=order, top_k=shape.top_k) if job.first else Rows(
            offsets, write=order, weights=topk_weights.reshape(-1))  # fmt: skip
        if not job.first:
            x = torch.randn(ids.numel(), shape.intermediate, dtype=x.dtype, device=x.device)
        q = Operand(x) if fmt.activation is None else backend.quantize(x, fmt.activation)
        gate = Gate(activation="silu", gated=True) if job.first else None
        out.append((q.data, q.scale, q.global_scale, w, rows, gate, fmt))
    return out


def stand_ins(job: Job) -> tuple:
    """`arguments` of one set, as tensors without memory."""
    shape, fmt = peers.shape_of(job.shape), FORMATS[job.format]
    meta, shards, act = {"device": "meta"}, 2 if job.first else 1, fmt.activation
    (e, n, k), r = (shape.experts, 2 * shape.intermediate, shape.hidden), job.tokens * shape.top_k
    if not job.first:
        n, k = shape.hidden, shape.intermediate
    one = quantize_weight(fmt.weight, torch.zeros(1, n, k, dtype=torch.bfloat16, **meta), shards)
    codes, scale, above = (
        None if t is None else torch.empty(e, *t.shape[1:], dtype=t.dtype, **meta)
        for t in (one.qdata, one.scale, one.global_scale)
    )
    assert codes is not None
    m = job.tokens if job.first else r
    x = Operand(torch.empty(m, k, dtype=torch.bfloat16, **meta))
    if act is not None:
        groups = -(-k // act.block[1]) if act.block and act.block[1] else 1
        x = Operand(torch.empty(m, act.stored(k), dtype=act.element.storage, **meta),
                    torch.empty(m, groups, dtype=act.scale_dtype, **meta),
                    torch.empty(m, 1, **meta) if act.global_scale else None)  # fmt: skip
    index, offsets = (torch.empty(size, dtype=torch.int32, **meta) for size in (r, e + 1))
    rows = Rows(offsets, read=index, top_k=shape.top_k) if job.first else Rows(
        offsets, write=index, weights=torch.empty(r, **meta))  # fmt: skip
    gate = Gate(activation="silu", gated=True) if job.first else None
    return x, Weight(codes, scale, above, shards=shards), rows, gate, fmt


def _compile(job: Job, configs: list[Config]) -> int:
    """Compile the launches of a job without running them: tensors are stood in for by their types."""
    import moe_ops.backends.triton as backend
    import moe_ops.backends.triton_plan as plan

    class Warm:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple) -> Any:
            def launch(**arguments: Any) -> None:
                types = {k: a.dtype if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
                in_order = [types.pop(name) for name in self.kernel.arg_names]
                self.kernel.warmup(*in_order, grid=(1,), **types)

            return launch

    failed, arch = 0, torch.cuda.get_device_capability()[0] * 10
    names = ("_grouped_mm_kernel", "_grouped_mm_sized_kernel")
    kernels = {name: Warm(getattr(backend, name)) for name in names}
    with patched(backend, arch_of=lambda _: arch, arrange=lambda *_, **__: None, **kernels):
        for config in configs:
            with patched(plan, tuned=lambda *_, config=config: config):
                try:
                    backend.Parts.product(*stand_ins(job), out_dtype=torch.bfloat16)
                except Exception:  # it fails again, and is reported, when it is timed
                    failed += 1
    return failed


class patched:
    """Attributes of a module, replaced for a while."""

    def __init__(self, module: Any, **values: Any) -> None:
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.before = {name: getattr(self.module, name) for name in self.values}
        vars(self.module).update(self.values)

    def __exit__(self, *_: object) -> None:
        vars(self.module).update(self.before)


@dataclass
class Timed:
    """Every candidate of a job, the rule's first: {"config", "us", "difference"} or {"config", "error"}."""

    job: Job
    asked: tuning.Product | None = None  # what the product asked the tables with
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any] | None:
        """The fastest that computes what the rule's does."""
        right = [r for r in self.results if "us" in r and r["difference"] < DIFFERENCE]
        return min(right, key=lambda r: r["us"], default=None)

    @property
    def rule_us(self) -> float | None:
        return self.results[0].get("us")

    @property
    def off(self) -> float | None:
        """How many times the best's time the rule takes."""
        return self.rule_us / self.best["us"] if self.best is not None and self.rule_us is not None else None

    def __str__(self) -> str:
        name = f"{self.job.format:10} {self.job.shape} {self.job.tokens:5} {'first' if self.job.first else 'second':6}"
        if self.best is None:
            return f"{name} nothing ran: {self.results[0].get('error')}"
        rule = f"{self.off:5.2f} x" if self.off is not None else f"fails: {self.results[0].get('error')}"
        return f"{name} {self.best['us']:9.1f} us {self.best['config']}, the rule {rule}"


def time_job(job: Job, configs: list[Config], weights: peers.Weights, sets: list) -> Timed:
    import moe_ops.backends.triton_plan as plan

    calls, expected, choose = arguments(job, weights, sets), None, plan.choose
    timed = Timed(job)

    def asked(kind: Any, arch: int, experts: int, rows: int, channels: int, k: int) -> None:
        timed.asked = tuning.Product(arch, kind, experts, channels, k, rows)

    ruled: list[Config] = []

    def rule(*question: Any) -> Config:
        ruled.append(choose(*question))
        return ruled[0]

    with patched(plan, tuned=asked, choose=rule), contextlib.suppress(Exception):  # it is reported when it is timed
        _product(job, *calls[0])
    for config in dict.fromkeys((*ruled, *configs)):
        entry: dict[str, Any] = {"config": config}
        try:
            with patched(plan, tuned=lambda *_, config=config: config):
                replay = Replay(lambda *a: _product(job, *a), calls)
                entry["us"] = replay.time(0.02)
                out = _whole(replay.poisoned_run()[0], calls[0][5])
            expected = out if expected is None else expected
            entry["difference"] = ((out - expected).norm() / expected.norm()).item()
        except Exception as error:
            entry = {"config": config, "error": f"{type(error).__name__}: {str(error)[:120]}"}
        timed.results.append(entry)
    return timed


def _whole(out: torch.Tensor, gate: Gate | None) -> torch.Tensor:
    """A product, or the sum of its parts, in fp32."""
    from moe_ops.backends.triton import Sums

    return (out if out.ndim == 2 else Sums(out, torch.bfloat16, gate).rows()).float()


def _product(job: Job, *call: Any) -> torch.Tensor:
    """What a layer would launch before the parts of the product are read, by a kernel that it has in any case."""
    import moe_ops.backends.triton as backend

    y = backend.Parts.product(Operand(*call[:3]), *call[3:], out_dtype=torch.bfloat16)
    if not isinstance(y, backend.Sums):
        return y
    return y.rows() if job.first and FORMATS[job.format].weight.element.bits != 4 else y.parts


def jobs_of(args: argparse.Namespace) -> dict[Job, list[Config]]:
    """The products of all cells, with their candidates."""
    cells = product(args.shapes, args.formats, args.tokens, (True, False))
    jobs = [Job(format, shape, tokens, first) for shape, format, tokens, first in cells]
    return {job: [c for c in candidates(job) if shared_bytes(c, job) <= SHARED] for job in jobs}


def compile_all(plan: dict[Job, list[Config]], processes: int) -> None:
    began = time.monotonic()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        parts = [(job, plan[job][i : i + 8]) for job in plan for i in range(0, len(plan[job]), 8)]
        failed = sum(pool.map(_compile, *zip(*parts, strict=True)))
    print(f"compiled in {time.monotonic() - began:.0f} s, {failed} failed", flush=True)


def tune(args: argparse.Namespace, device: torch.device, provenance: dict[str, Any], deadline: float,
         report: Callable[[list[Timed]], None]) -> list[Timed]:  # fmt: skip
    """Times every job until the deadline. args.tune is rewritten after each, `report` gets all."""
    plan, done = jobs_of(args), []
    print(f"{len(plan)} products, {sum(map(len, plan.values()))} candidates", flush=True)
    if args.precompile:
        compile_all(plan, args.precompile)
    weights: peers.Weights | None = None
    of: tuple[str, str] | None = None  # whose weights they are
    for job, configs in plan.items():
        if time.monotonic() > deadline:
            print(f"not timed, {args.budget_seconds:.0f} s were over: {job} and what follows")
            break
        if weights is None or of != (job.shape, job.format):
            weights = None  # gone before the next are made
            floats = peers.random_floats(peers.shape_of(job.shape), device)
            weights, of = peers.quantized_weights(floats, job.format), (job.shape, job.format)
            del floats
        sets = peers.random_sets(peers.shape_of(job.shape), job.tokens, device)
        done.append(time_job(job, configs, weights, sets))
        print(done[-1], flush=True)
        args.tune.write_text(file_of(done, provenance))
        report(done)
    return done


def file_of(done: list[Timed], provenance: dict[str, Any]) -> str:
    """A tuning file of the best of each product."""
    entries, about = {}, {}
    for t in done:
        if t.best is not None and t.asked is not None:
            entries[t.asked] = replace(t.best["config"], programs=0)
            about[t.asked] = {"us": round(t.best["us"], 2), "rule_us": t.rule_us and round(t.rule_us, 2),
                              "candidates": len(t.results), "format": t.job.format, "shape": t.job.shape,
                              "tokens": t.job.tokens}  # fmt: skip
    return tuning.written(entries, provenance, about)


def as_data(t: Timed) -> list[dict[str, Any]]:
    """Every time of a job, for --json."""
    return [asdict(t.job) | r | {"config": asdict(r["config"])} for r in t.results]


def print_rule(done: list[Timed]) -> int:
    """How far the package's rule is from the best; returns how many products have no configuration at all."""
    off = sorted(((t.off, t) for t in done if t.off is not None), key=lambda pair: -pair[0])
    beyond = [t for ratio, t in off if ratio > LIMIT]
    if off:
        print(f"the rule takes at most {off[0][0]:.2f} x the best; beyond {LIMIT} x: {len(beyond)} of {len(off)}")
    for t in beyond:
        print(f"  {t}")
    return sum(t.best is None for t in done)

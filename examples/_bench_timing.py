"""Times of CUDA-graph replays, the ceilings of the machine and the two floors of a MoE layer.

Letters: M tokens, k experts per token, H hidden, I intermediate. Bytes are bytes, times are microseconds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

STREAM_MB = (2, 5, 10, 20, 40, 80, 160, 320, 640)  # sizes of the streaming table
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine reaches: GB/s (1e9), TFLOP/s, and the time of one streaming read of each size."""

    copy_gbs: float
    read_gbs: float
    bf16_tflops: float
    fp8_tflops: float
    stream_us: dict[float, float] = field(default_factory=dict)  # MB (1e6) -> us, ascending


@dataclass(frozen=True, kw_only=True)
class Floors:
    roofline: float  # us
    stream: float  # us
    bound: str  # "memory" or "compute"


def stream_time(size: float, stream_us: dict[float, float]) -> float:
    """us that one kernel needs to read `size` bytes: linear between the measured sizes, and beyond the last one."""
    points = [(mb * 1e6, us) for mb, us in sorted(stream_us.items())]
    if size <= points[0][0]:
        return points[0][1]
    upper = next((i for i, (b, _) in enumerate(points) if b >= size), len(points) - 1)
    (b0, t0), (b1, t1) = points[upper - 1], points[upper]
    return t0 + (size - b0) * (t1 - t0) / (b1 - b0)


def layer_floors(weights: tuple[float, float], io: float, flop: float, tflops: float, ceilings: Ceilings) -> Floors:
    """Floors of one layer: `weights` bytes of the touched experts per GEMM (scales included), `io` bytes of x and y.

    roofline = max(all bytes / streaming read bandwidth, flop / peak); streaming = the time of two kernels that only
    read the weights, or the roofline where that is larger or compute is the bound.
    """
    memory = (sum(weights) + io) / ceilings.read_gbs / 1e3
    compute = flop / tflops / 1e6
    if compute > memory:
        return Floors(roofline=compute, stream=compute, bound="compute")
    stream = sum(stream_time(w, ceilings.stream_us) for w in weights)
    return Floors(roofline=memory, stream=max(stream, memory), bound="memory")


class Replay:
    """`fn` over several sets of inputs, captured back to back in one CUDA graph; plain calls on a CPU.

    Every set has its own output, so that a check can fill all of them with NaN before the replay that it looks at.
    """

    def __init__(self, fn: Callable[..., Tensor], sets: Sequence[tuple]):
        self.fn, self.sets = fn, sets
        self.cuda = sets[0][0].is_cuda
        self.outputs: list[Tensor] = []
        if self.cuda:
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile and allocate outside the capture
            for _ in range(2):
                for inputs in self.sets:
                    self.fn(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [self.fn(*inputs) for inputs in self.sets]

    def run(self) -> None:
        if self.cuda:
            self.graph.replay()
        else:
            self.outputs = [self.fn(*inputs) for inputs in self.sets]

    def poisoned_run(self) -> list[Tensor]:
        """One replay over outputs that held NaN: an element that no kernel wrote stays NaN."""
        for out in self.outputs:
            out.fill_(float("nan"))
        self.run()
        return self.outputs

    def time(self, seconds: float = 0.2) -> float:
        """us of one set: the median of 5 to 60 replays (about `seconds` in all) after two warm ones."""
        for _ in range(2):
            self.run()
        once = self._elapsed(1)[0]
        replays = max(5, min(60, int(seconds * 1e6 / max(once, 1e-3))))
        return statistics.median(self._elapsed(replays)) / len(self.sets)

    def _elapsed(self, replays: int) -> list[float]:
        """us of each of `replays` replays."""
        if not self.cuda:
            marks = [time.perf_counter()]
            for _ in range(replays):
                self.run()
                marks.append(time.perf_counter())
            return [(b - a) * 1e6 for a, b in pairwise(marks)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        torch.cuda.synchronize()
        for start, end in events:
            start.record()
            self.graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


def _burst(fn: Callable[[], object], cuda: bool, calls: int = 10, bursts: int = 5) -> float:
    """us of one call: the fastest burst, since a ceiling is a maximum; three warm calls first."""
    for _ in range(3):
        fn()
    best = float("inf")
    for _ in range(bursts):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                fn()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end) * 1e3
        else:
            began = time.perf_counter()
            for _ in range(calls):
                fn()
            elapsed = (time.perf_counter() - began) * 1e6
        best = min(best, elapsed / calls)
    return best


def _read_variants(cuda: bool) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Functions of (flat int32 tensor, sink) that read the tensor once; the fastest is the ceiling of its size."""
    if not cuda:
        return [lambda x, sink: x.sum()]
    from _bench_read import CONFIGS, read_once

    return [partial(read_once, config=config) for config in CONFIGS]


def measure_reads(buffer: Tensor, sizes_mb: Sequence[float]) -> tuple[float, dict[float, float]]:
    """GB/s of a read of the whole int32 `buffer`, and us of cold reads of each size inside a CUDA graph."""
    sink = torch.empty(1 << 22, dtype=torch.int32, device=buffer.device)
    variants = _read_variants(buffer.is_cuda)
    whole = min(_burst(partial(read, buffer, sink), buffer.is_cuda, calls=3) for read in variants)
    table: dict[float, float] = {}
    for mb in sizes_mb:
        step = int(mb * 1e6) // 4 // 1024 * 1024 or 1024  # int32 elements
        count = max(2, min(buffer.numel() // step, 128))
        slices = [(buffer[i * step : (i + 1) * step], sink) for i in range(count)]
        fastest = min(Replay(read, slices).time(seconds=0.02) for read in variants)
        table[mb] = fastest * mb * 1e6 / (step * 4)
    return buffer.nbytes / whole / 1e3, table


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy, streaming read, bf16 and fp8 matrix products. On a CPU with small sizes, to exercise the code only."""
    cuda = device.type == "cuda"
    size, n = (4 * GIB, 8192) if cuda else (1 << 22, 256)
    sizes = STREAM_MB if cuda else tuple(mb / 400 for mb in STREAM_MB)
    buffer = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    read_gbs, stream_us = measure_reads(buffer, sizes)
    copy_gbs = _copy_gbs(buffer)
    del buffer
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    flop = 2 * n**3
    bf16 = flop / _burst(lambda: a @ b.t(), cuda) / 1e6
    return Ceilings(
        copy_gbs=copy_gbs,
        read_gbs=read_gbs,
        bf16_tflops=bf16,
        fp8_tflops=_fp8_tflops(a, b, flop, bf16),
        stream_us=stream_us,
    )


def _copy_gbs(source: Tensor) -> float:
    """Bytes read and written."""
    target = torch.empty_like(source)
    return 2 * source.nbytes / _burst(lambda: target.copy_(source), source.is_cuda, calls=5) / 1e3


def _fp8_tflops(a: Tensor, b: Tensor, flop: float, fallback: float) -> float:
    """Rowwise scales, the faster of both accumulations; `fallback` where the device has no fp8 product."""
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scale_a = torch.ones(a.shape[0], 1, device=a.device)
    scale_b = torch.ones(1, b.shape[0], device=a.device)
    rates = []
    for fast in (True, False):

        def product(fast: bool = fast) -> Tensor:
            return torch._scaled_mm(
                a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        try:
            rates.append(flop / _burst(product, a.is_cuda) / 1e6)
        except (RuntimeError, NotImplementedError) as error:
            print(f"torch._scaled_mm(use_fast_accum={fast}): {str(error).splitlines()[0][:100]}")
    return max(rates, default=fallback)

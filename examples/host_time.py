"""Host time of one quantized MoE layer, eager: what Python, torch and Triton take before the GPU has its kernels.

    python examples/host_time.py                  # on a GPU: us of host time per layer, kernels launched
    python examples/host_time.py --stub           # no GPU: everything but the last step, the driver's launch

A row is one format and token count: the op (torch.ops.moe_ops.experts) and the module (QuantizedExperts), microseconds
from one call to the next while the GPU is not waited for, the median and the fastest of several bursts; first calls,
in which everything is decided, for comparison; the kernels of a layer. With --stub tensors are the CPU's and kernels
are compiled for sm_90 but not launched: add 2 to 4 us for each.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import _bench_peers as peers
import torch
from torch import Tensor

import moe_ops.ops  # noqa: F401
from moe_ops.backends import repeat
from moe_ops.experts import QuantizedExperts
from moe_ops.formats import FORMATS

FORMATS_LISTED = ["bf16", "fp8", "fp8_block", "fp8/bf16", "int8", "int8/int8", "int4_g128", "mxfp4", "mxfp4/fp8"]


def layers(shape: peers.Shape, format: str, device: torch.device, backend: str) -> tuple[peers.Layer, peers.Layer]:
    """The op and the module on the same weights, which are whatever memory holds: no time depends on their values."""
    meta = (torch.empty(shape.experts, n, k, dtype=torch.bfloat16, device="meta") for n, k in (
        (peers.SHARDS * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)))  # fmt: skip
    module = QuantizedExperts.from_float(*meta, format=format, backend=backend).to_empty(device=device)
    gate_up, down = (module._get(name) for name in module.weight_names())
    return peers.op_layer(peers.Weights(FORMATS[format], gate_up, down), backend), module


def burst(layer: Callable[..., Tensor], inputs: tuple, calls: int) -> float:
    """us of one call, the GPU's queue empty at the start and never full."""
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        layer(*inputs)
    return (time.perf_counter() - began) / calls * 1e6


def host_us(layer: Callable[..., Tensor], inputs: tuple, count: int = 15, calls: int = 50) -> list[float]:
    """Median, fastest."""
    for _ in range(20):
        layer(*inputs)
    bursts = [burst(layer, inputs, calls) for _ in range(count)]
    return [statistics.median(bursts), min(bursts)]


def decided_us(layer: Callable[..., Tensor], inputs: tuple) -> float:
    """Fastest of calls that are not repeated."""
    layer(*inputs)
    times = []
    for _ in range(20):
        repeat.forget()
        times.append(burst(layer, inputs, 1))
    return min(times)


# ---- without a GPU


class CountingLauncher:
    """Stands where Triton's launcher does, and counts."""

    launches = 0

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        CountingLauncher.launches += 1


@contextlib.contextmanager
def stub(arch: int = 90) -> Iterator[None]:
    """Kernels compile for `arch` and are launched nowhere; CPU tensors count as that GPU's."""
    import triton
    from triton.backends.compiler import GPUTarget

    from moe_ops.backends import base, triton_plan, triton_supports
    from moe_ops.backends import triton as backend
    from moe_ops.ops import grouped_mm

    def always(value: Any) -> Any:
        return lambda *args, **kwargs: value

    sizes = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    driver = SimpleNamespace(
        get_current_target=always(GPUTarget("cuda", arch, 32)), get_current_device=always(0),
        get_current_stream=always(0), is_active=always(True), launcher_cls=CountingLauncher,
        utils=SimpleNamespace(get_device_properties=always(sizes), load_binary=always((0, 0, 0, 0, 1024)),
                              unload_module=always(None)),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver, create=True))
        for owner in (base, backend, triton_plan, grouped_mm):
            if hasattr(owner, "arch_of"):
                stack.enter_context(mock.patch.object(owner, "arch_of", lambda device: arch))
        stack.enter_context(mock.patch.object(repeat, "applies", always(True)))
        for owner in (base, triton_supports):  # the backend is there,
            stack.enter_context(mock.patch.object(owner, "interpreted", always(True)))
        for owner in (backend, triton_plan):  # and is the compiler
            stack.enter_context(mock.patch.object(owner, "interpreted", always(False)))
        yield


def count_launches(layer: Callable[..., Tensor], inputs: tuple) -> int:
    if not inputs[0].is_cuda:
        before = CountingLauncher.launches
        layer(*inputs)
        return CountingLauncher.launches - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(*inputs)
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS_LISTED)
    parser.add_argument("--shape", default="A", choices=list(peers.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--stub", action="store_true", help="no GPU: compile, but launch nothing")
    args = parser.parse_args(argv)
    if not args.stub and not torch.cuda.is_available():
        parser.error("no CUDA device: --stub measures all but the launches themselves")
    device = torch.device("cpu" if args.stub else "cuda")
    shape = peers.SHAPES[args.shape]
    torch.set_num_threads(1)
    heads = ("op", "fastest", "module", "fastest", "first", "kernels")
    print(f"{'format':10} {'M':>4} " + " ".join(f"{head:>8}" for head in heads))
    with stub() if args.stub else contextlib.nullcontext(), torch.no_grad():
        for format in args.formats:
            op, module = layers(shape, format, device, args.backend)
            for tokens in args.tokens:
                inputs = peers.random_sets(shape, tokens, device)[0]
                us = [*host_us(op, inputs), *host_us(module, inputs), decided_us(op, inputs)]
                columns = " ".join(f"{each:8.1f}" for each in us)
                print(f"{format:10} {tokens:4} {columns} {count_launches(op, inputs):8}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

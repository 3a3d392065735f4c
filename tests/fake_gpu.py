"""Inductor for a GPU that is not there: the code that it generates, and the cubins that this code becomes.

    with fake_gpu(90):
        source = generated(fn, lambda: [empty(512, 4096), empty(4096)])
        kernel_names(source), extern_calls(source), launches(source)
        compile_kernels(source)  # registers, spills, shared memory

Only queries of the device are replaced: nothing is launched. Tensors are fake. Works with wheels of torch for the CPU
(needs g++ once, for a device guard that does nothing) and for CUDA.
"""

import ctypes
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.fx_passes.fuse_attention
import torch._inductor.runtime.hints
import torch._inductor.runtime.triton_helpers
import torch._inductor.select_algorithm
import torch._subclasses.fake_tensor
import torch.utils._triton
import triton
from aot import _resources
from torch._dynamo import device_interface
from torch._dynamo.source import ConstantSource
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget

from moe_ops.backends import base

# name, multiprocessors, shared memory of a block, memory in GiB
GPUS = {
    80: ("NVIDIA A100-SXM4-80GB", 108, 166912, 80),
    90: ("NVIDIA H200", 132, 232448, 141),
    100: ("NVIDIA B200", 148, 232448, 180),
    120: ("NVIDIA GeForce RTX 5090", 170, 101376, 32),
}  # fmt: skip


# ---- the device


@contextmanager
def fake_gpu(arch: int = 90):
    """Inside, torch, Inductor and Triton see one CUDA device of that architecture (major * 10 + minor)."""
    _ensure_guard()
    with ExitStack() as stack:
        for owner, name, value in (*_replacements(arch, _properties(arch)), *_constants()):
            if hasattr(owner, name):  # not every version has every name
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _driver(arch), create=True))
        if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
            stack.enter_context(
                mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))  # fmt: skip
        _forget()
        try:
            yield
        finally:
            _forget()
    _forget()


def _properties(arch: int) -> SimpleNamespace:
    name, multiprocessors, shared, memory = GPUS[arch]
    return SimpleNamespace(
        name=name, major=arch // 10, minor=arch % 10, multi_processor_count=multiprocessors, total_memory=memory << 30,
        shared_memory_per_block=49152, shared_memory_per_block_optin=shared, shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        L2_cache_size=50 << 20, gcnArchName="", is_integrated=False, uuid="fake",
    )  # fmt: skip


def _replacements(arch: int, properties: SimpleNamespace):
    """(owner, name, value) of every query of the device."""
    stream = SimpleNamespace(stream_id=0, device_index=0, device_type=1, cuda_stream=0)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "synchronize": None, "exchange_device": 0, "maybe_exchange_device": 0,
    }  # fmt: skip
    cuda_only = {
        "get_device_capability": (arch // 10, arch % 10), "get_device_name": properties.name, "is_initialized": False,
        "is_bf16_supported": True, "current_stream": stream, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None, "_set_rng_state_offset": None, "_lazy_init": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }  # fmt: skip
    interface = device_interface.CudaInterface
    interface_only = {"get_compute_capability": arch, "is_triton_capable": True}
    for name, value in (answers | cuda_only).items():
        yield torch.cuda, name, _always(value)
    for name, value in (answers | interface_only).items():
        yield interface, name, staticmethod(_always(value))
    for name in ("get_device_properties", "current_device"):
        yield interface.Worker, name, staticmethod(_always(answers[name]))
    yield torch.version, "cuda", torch.version.cuda or "13.0"
    yield torch._subclasses.fake_tensor, "init_gpu_context", _always(None)
    yield torch._inductor.runtime.triton_helpers, "set_driver_to_gpu", _always(None)
    # Their examples are allocated on the device.
    yield torch._inductor.fx_passes.fuse_attention, "_get_sfdp_patterns", _always([])


def _always(value):
    return lambda *args, **kwargs: value


def _constants():
    """Inductor folds constants by computing them, one element each, on their device."""
    for name in ("__init__", "run"):
        yield UniformValueConstantFolder, name, _on_cpu(getattr(UniformValueConstantFolder, name))


def _on_cpu(fn):
    def call(*args, **kwargs):
        with _OnCpu():
            return fn(*args, **kwargs)

    return call


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.device, lambda device: torch.device("cpu"), (args, kwargs or {}))
        return func(*args, **kwargs)


def _driver(arch: int) -> SimpleNamespace:
    _, multiprocessors, shared, _ = GPUS[arch]
    sizes = {"max_shared_mem": shared, "multiprocessor_count": multiprocessors, "warpSize": 32}
    return SimpleNamespace(
        get_current_target=_always(GPUTarget("cuda", arch, 32)), get_current_device=_always(0),
        get_current_stream=_always(0), get_device_capability=_always((arch // 10, arch % 10)), is_active=_always(True),
        get_active_torch_device=_always(torch.device("cuda", 0)),
        utils=SimpleNamespace(get_device_properties=_always(sizes)),
    )  # fmt: skip


_CACHED = {
    torch.utils._triton: (
        "has_triton", "_device_supports_tma", "has_triton_tensor_descriptor_host_tma", "has_triton_tma",
        "has_triton_tma_device", "has_triton_stable_tma_api", "has_datacenter_blackwell_tma_device"),
    torch._inductor.utils: (
        "get_num_sms", "get_max_num_sms", "is_big_gpu", "get_gpu_type", "get_gpu_shared_memory"),
    torch._inductor.runtime.hints.DeviceProperties: ("create",),
    base: ("arch_of", "select"),
}  # fmt: skip


def _forget() -> None:
    """What was asked of the device before, here or in torch."""
    device_interface.caching_worker_device_properties.pop("cuda", None)
    for owner, names in _CACHED.items():
        for name in names:
            found = getattr(owner, name, None)
            clear = getattr(getattr(found, "__func__", found), "cache_clear", None)
            if clear is not None:
                clear()


_GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
static NoOpDeviceGuardImpl<DeviceType::CUDA> guard;
struct Register { Register() {
  auto& entry = device_guard_impl_registry[(size_t)DeviceType::CUDA];
  if (!entry.load()) entry.store(&guard);
} } now;
}
"""
_guarded = False


def _ensure_guard() -> None:
    """Slicing a fake tensor enters a device guard: wheels for CUDA have one that does nothing, others none at all."""
    global _guarded
    if _guarded:
        return
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
    else:
        ctypes.CDLL(str(_guard_library()))
    _guarded = True


def _guard_library() -> Path:
    root, folder = Path(torch.__file__).parent, Path(tempfile.gettempdir())
    built = folder / f"moe_ops_guard_{torch.__version__}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory() as work:  # moved when it is whole: others may be building it too
            source, library = Path(work) / "guard.cpp", Path(work) / "guard.so"
            source.write_text(_GUARD)
            flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
            subprocess.check_call(["g++", str(source), "-o", str(library), *flags])
            kept = folder / f"{built.name}.{Path(work).name}"
            kept.write_bytes(library.read_bytes())
            kept.replace(built)
    return built


# ---- tensors on it, for `generated`'s make_inputs


def empty(*size, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="cuda")


def symbol(hint: int, name: str = "T") -> torch.SymInt:
    """A size that is not known when compiling."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    env = next(mode.shape_env for mode in modes if isinstance(mode, FakeTensorMode))
    source = ConstantSource(name)
    created = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(created, hint=hint, source=source)


# ---- the code


class _Generated(BaseException):
    """Carries the code out of the compiler; not an Exception, so that nothing wraps or handles it."""


def generated(fn, make_inputs, config: dict | None = None) -> str:
    """Inductor's code for fn(*make_inputs()). `config` is laid over `torch._inductor.config`."""
    return traced(fn, make_inputs, config)[0]


def traced(fn, make_inputs, config: dict | None = None) -> tuple[str, ShapeEnv]:
    """`generated`, and the environment that holds what was assumed of its symbols (`.guards`)."""

    def stop(graph, *args, **kwargs):
        code = graph.codegen_with_cpp_wrapper() if graph.cpp_wrapper else graph.codegen()
        raise _Generated(getattr(code[0], "value", code[0]))

    env = ShapeEnv()
    fake, settings = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True), {"fx_graph_cache": False}
    patches = (
        torch._inductor.config.patch(settings | {"compile_threads": 1} | (config or {})), fake,
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(GraphLowering, "_compile_to_module", stop),
    )  # fmt: skip
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        inputs = make_inputs()
        try:
            torch._inductor.compile_fx.compile_fx(make_fx(lambda *args: tree_leaves(fn(*args)))(*inputs), inputs)
        except _Generated as code:
            return code.args[0], env
    raise AssertionError("nothing was generated")


_KERNEL = re.compile(r"async_compile\.triton\('(\w+)',\s*r?'''\n?(.*?)'''", re.S)
_LAUNCH = re.compile(r"^\s*(\w+)\.run\(", re.M)
_EXTERN = re.compile(r"(?:extern_kernels|torch\.ops|aten|fallback_kernel)\.[\w.]+(?=\()")


def kernels(source: str) -> list[tuple[str, str]]:
    """Name and source of every Triton kernel."""
    return [(found[1], found[2].replace("\\'''", "'''")) for found in _KERNEL.finditer(source)]


def kernel_names(source: str) -> list[str]:
    return [name for name, _ in kernels(source)]


def _call(source: str) -> str:
    """The function that runs the graph."""
    return _KERNEL.sub("", source).partition("def call(")[2].partition("\ndef ")[0]


def launches(source: str) -> list[str]:
    """Triton kernels in the order in which the graph launches them; one that is launched twice is there twice."""
    return _LAUNCH.findall(_call(source))


def extern_calls(source: str) -> list[str]:
    """What the graph calls instead of generating code for it."""
    return _EXTERN.findall(_call(source))


@dataclass(frozen=True)
class Built:
    """A kernel with one of its configurations, as Inductor would launch it. stack: more than 0 bytes means spills."""

    kernel: str
    config: str
    registers: int
    stack: int
    shared: int
    ptx: str


def compile_kernels(source: str, of: str = "") -> list[Built]:
    """Every kernel of the code with every configuration that Inductor has for it, through its own path to a cubin.

    `of`: those with this in their name. A second process takes every other one.
    """
    found = [(name, text) for name, text in kernels(source) if of in name]
    arch = triton.runtime.driver.active.get_current_target().arch
    there = [_second_process().submit(_compile_for, arch, *kernel) for kernel in found[1::2]]
    here = [_compile(*kernel) for kernel in found[::2]]
    both = itertools.zip_longest(here, (future.result() for future in there), fillvalue=())
    return [built for pair in both for each in pair for built in each]


@cache
def _second_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _compile_for(arch: int, name: str, text: str) -> list[Built]:
    with fake_gpu(arch):
        return _compile(name, text)


_STATIC = ("use_static_cuda_launcher", "use_static_triton_launcher")


def _compile(name: str, text: str) -> list[Built]:
    kernel = getattr(PyCodeCache.load(text), name)
    launchers = [n for n in _STATIC if hasattr(torch._inductor.config, n)]  # they do not keep the cubin
    with torch._inductor.config.patch(dict.fromkeys(launchers, False)):
        kernel.precompile(warm_cache_only=True)
    found = []
    for result in kernel.compile_results:
        binary = result.kernel
        registers, stack = _resources(binary.asm["cubin"])
        found.append(Built(name, str(result.config), registers, stack, binary.metadata.shared, binary.asm["ptx"]))
    return found

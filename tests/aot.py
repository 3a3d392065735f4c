"""Compile Triton launches ahead of time for any architecture, without a GPU, and read what they use.

`record(kernel)` stands in for a kernel and keeps the arguments of its launches; `compile_launch` turns such a launch
into a cubin exactly as the JIT would: None, 1 and constexpr arguments are constants, multiples of 16 are marked so.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
OPTIONS = ("num_warps", "num_stages")


@dataclass
class Recorder:
    """Stands in for a kernel: `kernel[grid](*args, **kwargs)` is kept instead of launched."""

    kernel: triton.JITFunction
    launches: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            bound = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append((self.kernel, bound, options))

        return launch


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int  # bytes of local memory per thread: more than 0 means spills
    shared: int
    ptx: str


def compile_launch(kernel, bound: dict, options: dict, arch: int) -> Usage:
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = bound[name]
        if kernel.params[position].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(built.asm["cubin"])
    return Usage(registers, stack, built.metadata.shared, built.asm["ptx"])


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(cubin)
    try:
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(f.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])

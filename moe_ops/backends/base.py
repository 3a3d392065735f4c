"""Which implementation runs a problem: a flat list, a `supports` predicate each, one `select`.

Numerics belong to the format, speed to the backend: a backend never changes what is computed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Best measured first, `reference` last. A backend is imported when a problem could be its own, not before.
BACKENDS = {"triton": ".triton", "torch": ".torch_native", "reference": ".reference"}
# The parts of "triton" as a graph, and few rows on a CPU as one: for decompositions, not for users.
_GRAPH = {"inductor": "moe_ops.lowering.parts", "inductor_cpu": "moe_ops.lowering.cpu"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what activations may be


@dataclass(frozen=True)
class Problem:
    """What `supports` may look at. `arch` is major * 10 + minor of a CUDA device, else 0."""

    op: str
    device: str
    arch: int = 0
    dtype: torch.dtype = torch.bfloat16
    format: str = "bf16"
    num_experts: int = 1
    n: int = 0
    k: int = 0
    activation: str = "none"
    has_bias: bool = False
    batch_invariant: bool = False


@dataclass(frozen=True)
class Impl:
    """`supports(problem)` returns True, or the reason why not."""

    backend: str
    op: str
    fn: Callable
    supports: Callable[[Problem], bool | str]


@dataclass(frozen=True)
class Operand:
    """Rows of activations (M, K): floats, or codes as they are stored, with their scales.

    scale: one value, (M, 1), or (M, ceil(K / group)). global_scale (M, 1): every row is a matrix of its own.
    """

    data: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """One projection of every expert: (E, N, K), `shards` matrices above each other (gate and up: 2).

    K is stored in codec.stored(K) bytes where codes are packed. global_scale is (E, shards).

    `interleaved`: the rows, their bias and per-row scales (of groups of K too) alternate gate and up; scales of larger
    blocks do not: gate's come first. Products come out gate first all the same, and a transposed product takes them so.
    """

    qdata: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None
    zero_point: Tensor | None = None
    bias: Tensor | None = None  # (E, N)
    input_scale: Tensor | None = None  # (E,)
    shards: int = 1
    interleaved: bool = False
    master: Tensor | None = None  # the float weight (E, N, K) that the codes were made of, where it is trained

    @property
    def trained(self) -> Tensor:
        """What has a gradient: the master of codes, or the weight, where it is floats."""
        return self.qdata if self.master is None else self.master


@dataclass(frozen=True)
class Rows:
    """Where sorted row i is read (x[read[i] // top_k]), written (out[write[i]]), its weight (weights[write[i]])."""

    offsets: Tensor | None  # (E + 1,); None: all rows belong to the one expert
    read: Tensor | None = None
    write: Tensor | None = None
    weights: Tensor | None = None
    top_k: int = 1


_IMPLS: dict[str, list[Impl]] = {}


def register(impl: Impl) -> None:
    _IMPLS.setdefault(impl.op, []).append(impl)


def interpreted() -> bool:
    """Triton runs in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _load(backend: str) -> None:
    importlib.import_module((BACKENDS | _GRAPH)[backend], __package__)


@cache
def arch_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@cache
def select(problem: Problem, backend: str = "auto") -> Impl:
    """The first implementation that supports the problem; a named backend that does not raises with its reason."""
    reasons = []
    for name in [backend] if backend != "auto" else BACKENDS:
        if name not in _GRAPH:
            check_backend(name)
        if name == "triton" and problem.device == "cpu" and not interpreted():
            reasons.append("triton: needs a GPU, or TRITON_INTERPRET=1 for its interpreter")
            continue
        _load(name)
        for impl in (i for i in _IMPLS.get(problem.op, []) if i.backend == name):
            supported = impl.supports(problem)
            if supported is True:
                return impl
            reasons.append(f"{name}: {supported}")
    raise ValueError(f"no backend runs {problem.op}: {'; '.join(reasons) or f'{backend} does not implement it'}")


def check_backend(name: str) -> str:
    if name not in BACKENDS and name != "auto":
        raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    return name


_ACTIVE: tuple[str, bool] = ("auto", False)  # the last of _ENTERED
_ENTERED = [_ACTIVE]


@contextmanager
def use_backend(name: str, batch_invariant: bool = False) -> Iterator[None]:
    """Run every module inside on one backend; a module that was given its own backend keeps that.

    It holds for the whole process: of several threads inside, the one that entered last decides, until it leaves.
    batch_invariant: a token's result does not depend, to the bit, on the other tokens of its batch.
    """
    global _ACTIVE
    mine = (check_backend(name), batch_invariant)
    _ENTERED.append(mine)
    _ACTIVE = mine
    try:
        yield
    finally:
        if _ENTERED[-1] == mine:
            _ENTERED.pop()
        else:  # another thread has entered since, and is still inside
            _ENTERED.remove(mine)
        _ACTIVE = _ENTERED[-1]


def resolve(backend: str | None) -> tuple[str, bool]:
    """What a module passes to its op: its own backend or the active one, and whether to be batch-invariant."""
    return backend or _ACTIVE[0], _ACTIVE[1]

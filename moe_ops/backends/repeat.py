"""A call like one before it is repeated: its launches, with other addresses, and nothing decided again.

Between launches of a small layer the host is what takes the time: checks, the choice of tiles, a dictionary of
arguments, Triton's own look at each of them. All of it depends on what a call is like (types, shapes, strides,
alignment of its tensors; every other argument), not on values. So the second call of a kind is watched: every launch,
allocation and torch operation. If its result is made by launches alone, their compiled kernels and arguments are
kept, and calls like it from then on are those launches. If not, nothing is kept, and the call stays as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from ..kernels.launch import Launch

_KINDS = 1024  # of calls that are remembered; the oldest is forgotten first
_MOST_BYTES = 64 << 20  # of intermediate results, which a repeated call holds all at once: beyond, the GPU is behind
_MOST_OPERATIONS = 4  # of torch's, which take the host as long as launches do
_ALIGNED = 512  # bytes, as torch's allocator has it
_aten = torch.ops.aten
_EMPTY = (_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default)
_SEEN, _ALONE = "seen once", "cannot be repeated"
_known: dict[tuple, Repeat | str] = {}
_lock = threading.Lock()


def applies(x: Tensor) -> bool:
    """Where what a call does depends on nothing but what it is like: on a GPU, whose memory the host does not read."""
    return x.is_cuda


def forget() -> None:
    """What calls decided may no longer be what they would decide."""
    with _lock:
        _known.clear()


def call(name: str, fn: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """fn(*args, **kwargs), whose tensors are all among `args`, with one tensor as its result."""
    key = _like(name, args, kwargs)
    found = _known.get(key)
    if found.__class__ is Repeat:
        return found(args)
    if found is _ALONE:
        return fn(*args, **kwargs)
    if found is None:  # most calls of a changing number of tokens never come again
        _remember(key, _SEEN)
        return fn(*args, **kwargs)
    out, repeat = _watched(fn, args, kwargs)
    _remember(key, _ALONE if repeat is None else repeat)
    return out


def _remember(key: tuple, what: Repeat | str) -> None:
    with _lock:
        while len(_known) >= _KINDS:
            del _known[next(iter(_known))]
        _known[key] = what


def _like(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple:
    key: list[Any] = [name, _driver().active.get_current_device(), *kwargs.items()]
    for t in args:
        if t is None:
            key.append(None)
        elif isinstance(t, Tensor):
            key += (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15)
        else:
            key.append(t)
    return tuple(key)


@cache
def _driver() -> Any:
    """What knows the current device and stream; Triton is not loaded before something is on a GPU."""
    from triton.runtime import driver

    return driver


@dataclass(frozen=True)
class Place:
    """An address: of an input, the result or the memory between, so many bytes on."""

    base: int  # an input's number; then the operations' results, the output, the memory between
    offset: int


@dataclass(frozen=True)
class Operation:
    """A torch operation on inputs, each an _Input."""

    fn: Callable[..., Tensor]
    args: tuple
    kwargs: dict[str, Any]


class Repeat:
    """The launches of a call. `run(inputs)` gives what the call gave, of these inputs."""

    def __init__(self, launches: list, operations: list[Operation], out: Tensor, size: int, used: list[int]) -> None:
        self.device_index = _driver().active.get_current_device()
        self.launches, self.operations, self.used, self.size = launches, operations, used, size
        self.shape, self.dtype, self.device = out.shape, out.dtype, out.device

    def __call__(self, inputs: tuple) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        between = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        made = [op.fn(*(_view(a, inputs) for a in op.args), **op.kwargs) for op in self.operations]
        bases = [0] * len(inputs)
        for i in self.used:
            bases[i] = inputs[i].data_ptr()
        bases += [t.data_ptr() for t in made]
        bases += (out.data_ptr(), between.data_ptr())
        stream = _driver().active.get_current_stream(self.device_index)
        for run, arguments, places in self.launches:
            arguments = arguments.copy()
            for position, base, offset in places:
                arguments[position] = bases[base] + offset
            run(*arguments, stream=stream)
        return out


def _view(argument: Any, inputs: tuple) -> Any:
    if argument.__class__ is not _Input:
        return argument
    t = inputs[argument.number]
    if argument.shape is None:
        return t
    return t.as_strided(argument.shape, argument.strides)


@dataclass(frozen=True)
class _Input:
    """An input as a torch operation takes it: itself (shape None), or a view that begins where it does."""

    number: int
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()


class _Watch(TorchDispatchMode):
    """Keeps every tensor that is made, so that an address is one tensor's, and every operation but views.

    It lets go of all, and no longer watches, when they become more than a repeated call may hold.
    """

    def __init__(self, inputs: tuple, give_up: Callable[[], None]) -> None:
        super().__init__()
        self.alive: list[Any] | None = []
        self.empty: list[Tensor] = []
        self.operations: list[tuple] = []
        self.memory = {_memory(t) for t in inputs if isinstance(t, Tensor)}
        self.bytes, self.give_up = 0, give_up

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.alive is None:
            return out
        self.alive.append(out)
        made = isinstance(out, Tensor) and _memory(out) not in self.memory
        if func in _EMPTY:
            self.empty.append(out)
        elif made or func._schema.is_mutable or not isinstance(out, Tensor):
            self.operations.append((func, args, kwargs or {}, out))
        if made:
            self.memory.add(_memory(out))
            self.bytes += out.untyped_storage().nbytes()
        if self.bytes > _MOST_BYTES or len(self.operations) > _MOST_OPERATIONS:
            self.alive, self.empty, self.operations = None, [], []
            self.give_up()
        return out


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _watched(fn: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Repeat | None]:
    from ..kernels.launch import noting, stop_noting  # with Triton, which a GPU's calls have loaded

    watch = _Watch(args, stop_noting)
    with noting() as noted, watch:
        out = fn(*args, **kwargs)
    try:
        return out, None if watch.alive is None else _repeat(args, watch, noted, out)
    except _Unknown:
        return out, None


class _Unknown(Exception):
    """What was watched cannot be repeated."""


def _repeat(inputs: tuple, watch: _Watch, noted: list[Launch], out: Tensor) -> Repeat:
    """Raises _Unknown."""
    operations = [_operation(inputs, *each) for each in watch.operations]
    made = [each[3] for each in watch.operations]
    if not any(t.data_ptr() == out.data_ptr() and t.nbytes == out.nbytes for t in watch.empty) or not noted:
        raise _Unknown("the result is a view of something, or an operation's")
    if not out.is_contiguous():
        raise _Unknown("the result is not contiguous")
    starts = {out.data_ptr(): Place(len(inputs) + len(made), 0)}  # of what was allocated
    size = 0
    for t in watch.empty:
        if t.data_ptr() not in starts and t.nbytes:
            starts[t.data_ptr()] = Place(len(inputs) + len(made) + 1, size)
            size += -(-t.nbytes // _ALIGNED) * _ALIGNED
    for number, t in enumerate((*inputs, *made)):
        if isinstance(t, Tensor) and t.numel():
            if t.data_ptr() in starts:
                raise _Unknown("two tensors with one address")
            starts[t.data_ptr()] = Place(number, 0)
    launches = [_launch(each, starts) for each in noted]
    used = sorted({base for _, _, places in launches for _, base, _ in places if base < len(inputs)})
    return Repeat(launches, operations, out, size, used)


def _launch(noted: Launch, starts: dict[int, Place]) -> tuple[Callable, list, list[tuple[int, int, int]]]:
    """(what launches, its arguments, where addresses stand among them)"""
    run = noted.again()
    if run is None:
        raise _Unknown("Triton did not compile it")
    arguments, places = [noted.arguments[name] for name in noted.kernel.arg_names], []
    for position, t in enumerate(arguments):
        if not isinstance(t, Tensor):
            continue
        if t.data_ptr() not in starts:
            raise _Unknown("an address inside of a tensor, or one of unknown origin")
        place = starts[t.data_ptr()]
        places.append((position, place.base, place.offset))
        arguments[position] = 0
    return run, arguments, places


def _operation(inputs: tuple, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Operation:
    """A functional operation on inputs."""
    pure = not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags
    if not pure or not isinstance(out, Tensor) or any(isinstance(v, Tensor) for v in kwargs.values()):
        raise _Unknown(f"{func} is not repeated")
    return Operation(func, tuple(_input(inputs, a) for a in args), kwargs)


def _input(inputs: tuple, argument: Any) -> Any:
    if isinstance(argument, list | tuple) and any(isinstance(each, Tensor) for each in argument):
        raise _Unknown("a list of tensors")
    if not isinstance(argument, Tensor):
        return argument
    for number, t in enumerate(inputs):
        if isinstance(t, Tensor) and t.dtype == argument.dtype and t.data_ptr() == argument.data_ptr():
            if t.shape == argument.shape and t.stride() == argument.stride():
                return _Input(number)
            return _Input(number, tuple(argument.shape), argument.stride())
    raise _Unknown("an operation on what is not an input")

"""Runs test functions in a process where Triton interprets its kernels, beside the other tests.

TRITON_INTERPRET is read when Triton is imported and holds for a whole process: kernels could not be compiled ahead of
time in it, and `backend="auto"` would mean the interpreter. So the tests of kernels get a process of their own.
"""

import importlib
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache

import numpy as np

NICE = 10
_started: dict[str, tuple[Future, dict]] = {}  # by the test's id, with its arguments


def _start() -> None:
    os.nice(NICE)
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    _hurry()


def _hurry() -> None:
    """Two habits of Triton's interpreter that take half of the time of these tests."""
    from triton.runtime import interpreter

    through_modules, known = interpreter.InterpretedFunction.__call__, set()

    def call(function, *args, **kwargs):
        """A function of a kernel. The interpreter would replace all of Triton's names again: they stay replaced."""
        module = function.fn.__module__
        if module.startswith("triton.") and module not in known:
            known.add(module)
            return through_modules(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    def reduce(self, inputs):
        """By halves, whole arrays at once; the interpreter goes element by element."""
        dtypes, parts = [t.dtype for t in inputs], [np.moveaxis(t.handle.data, self.axis, 0) for t in inputs]
        while (n := len(parts[0])) > 1:  # a power of two
            halves = [self.to_tensor(part, d) for half in (slice(n // 2), slice(n // 2, n))
                      for part, d in zip((p[half] for p in parts), dtypes)]  # fmt: skip
            out = self.combine_fn.fn(*halves)
            parts = [t.handle.data for t in (out if isinstance(out, tuple) else (out,))]
        keep = (lambda a: np.expand_dims(a, self.axis)) if self.keep_dims else lambda a: a
        return [self.to_tensor(keep(part[0]), d) for part, d in zip(parts, dtypes)]

    interpreter.InterpretedFunction.__call__ = call
    element_by_element = interpreter.ReduceOps.generic_reduce
    interpreter.ReduceOps.generic_reduce = lambda self, inputs: (
        element_by_element if self.axis is None else reduce)(self, inputs)  # fmt: skip


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


def _call(module: str, function: str, arguments: dict) -> None:
    getattr(importlib.import_module(module), function)(**arguments)


def start(test: str, module: str, function: str, arguments: dict) -> None:
    """Have module.function(**arguments) run, as soon as what was started before is done."""
    _started[test] = _process().submit(_call, module, function, arguments), arguments


def run(test: str, module: str, function: str, arguments: dict) -> None:
    """module.function(**arguments) over there; what it raises is raised here, with its traceback as the cause."""
    _, given = _started.get(test, (None, None))
    same = given is not None and given.keys() == arguments.keys()
    if not same or any(given[name] is not value for name, value in arguments.items()):
        start(test, module, function, arguments)
    _started.pop(test)[0].result()


def stop() -> None:
    _started.clear()
    if _process.cache_info().currsize:
        _process().shutdown(cancel_futures=True)
        _process.cache_clear()

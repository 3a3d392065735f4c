"""Runs test functions in a process where Triton interprets its kernels.

TRITON_INTERPRET is read when Triton is imported and holds for a whole process: kernels could not be compiled ahead of
time in it, and `backend="auto"` would mean the interpreter. So the tests of kernels get a process of their own.
"""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


def _call(module: str, function: str, arguments: dict) -> None:
    getattr(importlib.import_module(module), function)(**arguments)


def run(module: str, function: str, arguments: dict) -> None:
    """module.function(**arguments) over there; what it raises is raised here, with its traceback as the cause."""
    _process().submit(_call, module, function, arguments).result()


def stop() -> None:
    if _process.cache_info().currsize:
        _process().shutdown()
        _process.cache_clear()

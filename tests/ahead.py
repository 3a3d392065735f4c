"""Works ahead of tests that ask for results: one process beside all other tests, two when it is their turn.

Kernels are compiled in processes of their own (test_aot.py), most other tests leave a second core idle.
"""

import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

NICE = 10  # of the process beside other tests


class Ahead:
    """work(case) of every case, in order, from now on."""

    def __init__(self, work: Callable, cases: Iterable[Hashable]) -> None:
        self._work, self._pools = work, [_process(NICE)]
        self._futures: dict[Hashable, Future] = {case: self._pools[0].submit(work, case) for case in cases}

    def hurry(self) -> None:
        """A second process takes half of what is left."""
        if len(self._pools) > 1:
            return
        self._pools.append(_process(0))
        left = [case for case, future in self._futures.items() if future.cancel()]
        for n, case in enumerate(left):
            self._futures[case] = self._pools[n % 2].submit(self._work, case)

    def result(self, case: Hashable):
        """Raises what the work raised."""
        self.hurry()
        return self._futures[case].result()

    def stop(self) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


STARTED = pytest.StashKey[Ahead]()


def _process(nice: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=os.nice, initargs=(nice,))

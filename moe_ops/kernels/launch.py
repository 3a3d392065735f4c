"""Where kernels are launched, so that whoever watches learns what was launched, and with what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

_here = threading.local()


@dataclass(frozen=True)
class Launch:
    """What ran (None if Triton does not say: its interpreter does not), over which grid, with which arguments."""

    compiled: Any
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, options of the compiler included

    def again(self) -> Callable[..., None] | None:
        """What launches it once more, as fn(*arguments in order, stream=...), addresses as numbers: no look at them."""
        return None if self.compiled is None else self.compiled[(*self.grid, 1, 1)[:3]]


def enqueue(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """kernel[grid](*args, **kwargs)"""
    noted = getattr(_here, "noted", None)
    if noted is None:
        kernel[grid](*args, **kwargs)
        return
    with _disable_current_modes():  # what Triton does with tensors is its own
        compiled = kernel[grid](*args, **kwargs)
    noted.append(Launch(compiled, kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """The launches of this thread, in their order."""
    _here.noted = noted = []
    try:
        yield noted
    finally:
        _here.noted = None


def stop_noting() -> None:
    """And let go of what was noted."""
    if (noted := getattr(_here, "noted", None)) is not None:
        noted.clear()
    _here.noted = None


def power_of_2(n: int) -> int:
    """The smallest that is no less than n > 0. Triton's own serves kernels too, and takes 8 us on the host."""
    return 1 << (n - 1).bit_length()

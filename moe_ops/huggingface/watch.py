"""Calls a function after a module was imported, now if it is there, else when somebody does; or before a method."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_moe_ops_watch"


class _Then(importlib.abc.Loader):
    """Another loader, and a call once the module has run."""

    def __init__(self, loader: Any, call: Callable[[], None]) -> None:
        self._loader, self._call = loader, call

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # what inspect and pkgutil look at
        self._loader.exec_module(module)
        self._call()


class _Watch(importlib.abc.MetaPathFinder):
    """Finds the watched modules by asking the other finders."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], None]] = {}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        call = self.calls.get(fullname)
        if call is None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _Then(spec.loader, call)
                return spec
        return None


setattr(_Watch, _MARK, True)


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call once for every time that the module `name` is executed from now on, and now if it was already."""
    watch: Any = next((f for f in sys.meta_path if getattr(f, _MARK, False)), None)
    if watch is None:  # else of an earlier import of this module, by its mark: the class is another one
        watch = _Watch()
        sys.meta_path.insert(0, watch)
    watch.calls[name] = call
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None and not getattr(spec, "_initializing", False):
        call()


def before(owner: type, method: str, call: Callable[..., None], then: Callable[..., None] | None = None) -> None:
    """Have a class call `call` with the arguments of a method before it, and `then` with (self, its result) after it.

    Again after a reload, only the last ones.
    """
    original = getattr(owner, method)
    if getattr(original, _MARK, False):
        original = original.__wrapped__

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        call(self, *args, **kwargs)
        result = original(self, *args, **kwargs)
        if then is not None:
            then(self, result)
        return result

    setattr(wrapped, _MARK, True)
    setattr(owner, method, wrapped)

"""quantize_ and dequantize_: replace modules of a model, in place, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from . import blocks, experts, linear
from .backends.base import check_backend
from .experts import QuantizedExperts
from .formats import Format
from .linear import QuantizedLinear
from .rules import parse
from .storage import QuantizedModule
from .summary import forget_left, remember_left
from .targets import Place, Plan, Target, check_not_compiled, places, plan

_REPLACEMENT = "_moe_ops_replacement"
_SHOWN = 10
LISTENERS: list[Callable[[nn.Module], None]] = []  # called with a model whose modules were replaced

@torch.no_grad()
def quantize_(
    model: nn.Module, format: str | Format | Mapping[str, str | Format | None] = "fp8", *,
    ignore: str | Iterable[str] = (), backend: str | None = None, strict: bool = True,
    device: torch.device | str | None = None, progress: bool | None = None,
) -> nn.Module:  # fmt: skip
    """Quantize the experts and Linears of a model in place; returns it. `summary(model)` says what became of what.

    format: a name covers experts and every eligible nn.Linear. A dict of patterns -> names covers what it names:
        {"experts": "fp8", "linear": "bf16", "re:.*layers.0.*": None}; exact names beat globs and "re:...", which
        beat the classes "experts" and "linear". A pattern covers everything under the modules that it matches.
    ignore: exact names, globs, "re:...": these stay in float. Routers, embeddings and output heads always do, and so
        does a Linear that the format cannot take, or whose sides are not multiples of 16.
    backend: keep these modules on one backend, whatever `use_backend` says.
    strict: experts that cannot be quantized are an error; else they stay in float.
    device: quantize each module there, and leave it there.
    progress: show a bar (needs tqdm); by default on a terminal.

    Nothing is changed before everything has been checked. Each module is then replaced in one step, so that after an
    interrupt or an out-of-memory error every module is wholly old or wholly new, and a second call finishes. A second
    call with the same format changes nothing.

    Raises ValueError, listing every reason: unknown format, patterns that match nothing, non-finite weights, experts in
    an unknown layout or of dimensions that the format cannot take (strict), modules quantized to another format, meta
    tensors, compiled, offloaded or sharded modules, modules quantized by another library.
    """
    rules = parse(format, ignore)
    if backend is not None:
        check_backend(backend)
    if device is not None:
        _check_device(device)
    found = plan(model, rules, strict)
    check_plan(found)
    from . import lowering

    lowering.register()
    remember_left(model, found.left)
    try:
        replace_(_with_progress(found.targets, progress), backend, device)
    finally:
        tell(model)
    return model


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Replace every quantized module by a float one of the original class, layout and dtype; returns the model.

    The weights are the values that the codes stand for, not the ones from before. Raises ValueError for a compiled
    model, for experts that were made by `QuantizedExperts.from_float` (there is no class to go back to), for adapters
    that PEFT cannot have on float experts, and for a rank's part of a model.
    """
    check_not_compiled(model)
    mine = [p for p in places(model) if isinstance(p.module, QuantizedModule)]
    check_problems([
        f"{p.name or 'the model'} was made by QuantizedExperts.from_float: it has no float class, use its .dequantize()"
        for p in mine
        if isinstance(p.module, QuantizedExperts) and p.module.original_class is None
    ] + [
        f"{p.name or 'the model'} holds one rank's part of its weights: the float module would be that part alone"
        for p in mine if p.module.ranks is not None
    ] + [
        f"{p.name}.{name} has an adapter: {reason}; merge or unload it first"
        for p in mine
        if isinstance(p.module, QuantizedExperts)
        for name, adapter in (p.module.adapters or {}).items()
        if (reason := adapter.only_here())
    ])  # fmt: skip
    try:
        while mine:
            place = mine.pop(0)
            m = place.module
            store(place, experts.restore(m) if isinstance(m, QuantizedExperts) else linear.restore(m))  # type: ignore[arg-type]
    finally:
        tell(model)
    forget_left(model)
    return model


@torch.no_grad()
def skeleton_(
    model: nn.Module, format: str | Format | Mapping[str, str | Format | None], *, ignore: str | Iterable[str] = (),
    backend: str | None = None, strict: bool = True,
) -> nn.Module:  # fmt: skip
    """As `quantize_`, on a model whose weights are on the meta device: empty quantized modules, to be loaded into.

    Every quantized parameter is on meta, with the shape and dtype that it will have. Raises ValueError as `quantize_`.
    """
    found = plan(model, parse(format, ignore), strict, loaded=False)
    check_plan(found)
    remember_left(model, found.left)
    replace_(found.targets, backend)
    tell(model)
    return model


def replace_(targets: Iterable[Target], backend: str | None = None, device: torch.device | str | None = None) -> None:
    """Put a quantized module in the place of each target of a plan."""
    for target in targets:
        store(target, target.module.__dict__.get(_REPLACEMENT) or _quantized(target, backend, device))


def tell(model: nn.Module) -> None:
    for listener in LISTENERS:
        listener(model)


def check_plan(found: Plan) -> None:
    """ValueError with every reason why a plan cannot be carried out."""
    check_problems(found.problems)


def _check_device(device: torch.device | str) -> None:
    """Before anything is changed: a device that is not there would fail at the first module."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:  # the latter from a torch without CUDA
        raise ValueError(f"cannot use device {str(device)!r}: {str(e).splitlines()[0]}") from None
    if found.type == "meta":
        raise ValueError("modules cannot be quantized on the meta device")


def _quantized(target: Target, backend: str | None, device: torch.device | str | None) -> nn.Module:
    m, fmt = target.module, target.format
    assert fmt is not None
    if target.spec is None:
        assert isinstance(m, nn.Linear)
        return QuantizedLinear.from_float(m, fmt, backend=backend, device=device)
    new = experts.swap(m, target.spec, fmt, backend, device)
    if device is not None:  # what it keeps in float, a norm say, goes along
        for child in new.children():
            child.to(device)
        new._buffers |= {key: b.to(device) for key, b in new._buffers.items() if b is not None}
    return new


def store(place: Place, new: nn.Module) -> None:
    """Put the new module where the old one is. One store, or none for the model itself, which changes its class."""
    old = place.module
    if not place.parents:
        old.__dict__, old.__class__ = new.__dict__, type(new)
        return
    if len(place.parents) > 1:  # interrupted between two stores, a second call must not make another new module
        old.__dict__[_REPLACEMENT] = new
    for parent, key in place.parents:
        blocks.put(parent, key, new, place.routing)


def _with_progress(targets: list[Target], show: bool | None) -> Iterator[Target]:
    """Hands the targets out one by one, and forgets each, so that its float weights can be freed."""
    total = len(targets)
    bar = None
    if show or (show is None and total > 1 and sys.stderr.isatty()):
        try:
            from tqdm import tqdm
        except ImportError:
            if show:
                raise ValueError("progress=True needs tqdm") from None
        else:
            bar = tqdm(total=total, desc="quantize", unit="module")
    try:
        while targets:
            yield targets.pop(0)
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()


def check_problems(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n".join(["cannot do this, the model is unchanged:", *problems[:_SHOWN], *more]))

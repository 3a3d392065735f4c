"""How the dense modules of a model are cut: by its `_tp_plan`, names with "*" for numbers -> styles of transformers.

STYLES says of each style what a rank holds. Linears of one parent are cut at the same places, so that what leaves one
enters the next: attention at its heads, in equal parts; an MLP at the blocks of its formats.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..linear import QuantizedLinear
from ..storage import QuantizedModule
from .collectives import Group
from .dense import Cut
from .slices import bounds, unit_for


class Style(NamedTuple):
    """Along which dimension a weight is cut; whole: what enters columns, or leaves rows, is on every rank."""

    dim: int
    whole: bool = False


STYLES: dict[str, Style | None] = {  # None: every rank holds all of it
    "colwise": Style(-2),
    "rowwise": Style(-1),
    "colwise_gather_output": Style(-2, whole=True),
    "colwise_rep": Style(-2, whole=True),
    "rowwise_split_input": Style(-1, whole=True),
    "rowwise_rep": Style(-1, whole=True),
    "embedding_rowwise": Style(-2, whole=True),
    "replicated_with_grad_allreduce": None,
    "mla_kv_a_proj": None,
    "replicate": None,
    "local_params": None,
}
_HEADS = ("num_attention_heads", "num_key_value_heads")


class Found(NamedTuple):
    name: str
    parent: nn.Module
    module: nn.Module
    style: Style


def generic(name: str) -> str:
    """Layer numbers -> "*"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"^\d+(?=\.|$)", "*", name))


def cuts(
    model: nn.Module, plan: Mapping[str, str], group: Group, alone: bool = True
) -> tuple[dict[str, Cut], list[str]]:
    """Name of each dense module, and parameter of its own, that the plan cuts -> its slice; and why it cannot be.

    Not `alone`: somebody else cuts what is float, as torch.chunk does. Then quantized Linears only are answered for.
    """
    modules = dict(model.named_modules())
    experts = tuple(f"{name}." for name in _experts(modules))  # not the plan's business here
    planned = {name: plan[generic(name)] for name in modules if generic(name) in plan}
    planned = {name: style for name, style in planned.items() if not f"{name}.".startswith(experts)}
    if not alone:
        mine = {name for name in planned if isinstance(modules[name], QuantizedLinear)}
        beside = {name for name, m in modules.items() if isinstance(m, nn.Linear) and planned.get(name) in STYLES}
        planned = {name: style for name, style in planned.items() if name in mine | beside}
    problems = [f"{name}: {style!r} in the tp_plan is not known here; known: {', '.join(STYLES)}"
                for name, style in planned.items() if style not in STYLES]  # fmt: skip
    made: dict[str, Cut] = {}
    parents: dict[int, list[Found]] = defaultdict(list)
    for name, key in planned.items():
        m, style = modules[name], STYLES.get(key)
        if style is None:
            continue
        if not isinstance(m, nn.Embedding if key.startswith("embedding") else nn.Linear):
            problems.append(f"{name} is {key!r} in the tp_plan, and no Linear or Embedding: {type(m).__name__}")
            continue
        one = Found(name, modules[name.rpartition(".")[0]], m, style)
        if style.whole:
            _add(made, problems, one, group, unit=None)
        else:
            parents[id(one.parent)].append(one)
    for members in parents.values():
        _cut_together(made, problems, members, group)
    if not alone:
        problems += _uneven(made, modules)
        return {name: cut for name, cut in made.items() if name in mine}, problems
    for name, p in model.named_parameters():
        if generic(name) in plan and not name.startswith(experts):
            _cut_parameter(made, problems, name, p, plan[generic(name)], group)
    return made, problems


def _uneven(made: Mapping[str, Cut], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Others cut floats in equal parts, whatever blocks their neighbours have."""
    uneven = {id(modules[name.rpartition(".")[0]]) for name, cut in made.items() if not cut.whole and cut.uneven()}
    for name, cut in made.items():
        beside = id(modules[name.rpartition(".")[0]]) in uneven
        if beside and not cut.whole and not isinstance(modules[name], QuantizedLinear):
            yield f"{name} is float beside quantized Linears that {cut.group.size} ranks cannot cut in equal parts"


def _cut_parameter(
    made: dict[str, Cut], problems: list[str], name: str, p: nn.Parameter, style: str, group: Group
) -> None:
    """What attention has one of for each head."""
    if style in STYLES and STYLES[style] is None:
        return
    if p.ndim != 1 or style != "colwise" or p.shape[0] % group.size:
        problems.append(f"{name} {tuple(p.shape)} is {style!r} in the tp_plan: of single parameters only vectors are"
                        f" cut, 'colwise', in {group.size} equal parts")  # fmt: skip
    else:
        made[name] = Cut(group, -1, p.shape[0], p.shape[0] // group.size)


def size_of(module: nn.Module, dim: int) -> int:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    assert isinstance(module, nn.Linear)
    return module.out_features if dim == -2 else module.in_features


def _experts(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Quantized experts, and float ones: those stay whole on every rank."""
    for name, m in modules.items():
        stacks = any(p.ndim > 2 for p in m.parameters(recurse=False))
        if (isinstance(m, QuantizedModule) or stacks) and not isinstance(m, nn.Linear):
            yield name


def _cut_together(made: dict[str, Cut], problems: list[str], members: list[Found], group: Group) -> None:
    parent, sizes = members[0].parent, {size_of(m.module, m.style.dim) for m in members}
    has_heads = any("head" in key for key in vars(parent))
    if has_heads:
        problems += [f"{members[0].name.rpartition('.')[0]}: {why}" for why in _heads(parent, group.size)]
    if has_heads or len(sizes) > 1:
        for one in members:
            size, head = size_of(one.module, one.style.dim), getattr(parent, "head_dim", 1)
            head = head if isinstance(head, int) and head > 0 and size % head == 0 else 1
            if size // head % group.size:
                what = "features" if head == 1 else f"features in heads of {head}"
                problems.append(f"{one.name}: {size} {what} cannot be cut in {group.size} equal parts")
            else:
                _add(made, problems, one, group, unit=size // group.size)
        return
    try:
        unit = math.lcm(*(unit_for(_format(m.module), next(iter(sizes)), group.size) for m in members))
    except ValueError as e:
        problems.append(f"{members[0].name}: {e}")
        return
    for one in members:
        _add(made, problems, one, group, unit)


def _add(made: dict[str, Cut], problems: list[str], one: Found, group: Group, unit: int | None) -> None:
    size, fmt = size_of(one.module, one.style.dim), _format(one.module)
    try:
        unit = unit_for(fmt, size, group.size) if unit is None else unit
        bounds(size, group.size, unit)
        if isinstance(one.module, QuantizedLinear) and (why := _bytes_cut(one.module, one.style.dim, unit)):
            raise ValueError(why)
        made[one.name] = Cut(group, one.style.dim, size, unit, one.style.whole)
    except ValueError as e:
        problems.append(f"{one.name}: {e}")


def _bytes_cut(linear: QuantizedLinear, dim: int, unit: int) -> str | None:
    """Why columns of packed codes, or of activations in groups, cannot end at multiples of `unit`."""
    fmt = linear.quantization
    if dim == -2:
        return None
    if fmt.weight.packed and unit % 8:
        return f"columns of {fmt.weight.name} are packed: they are cut at multiples of 8, not of {unit}"
    return fmt.refined(unit).check(linear.out_features, unit)


def _format(module: nn.Module) -> Any:
    return module.quantization if isinstance(module, QuantizedModule) else "bf16"


def _heads(attention: nn.Module, ranks: int) -> Iterator[str]:
    """Why ranks cannot have as many heads each, by what the module itself, or its config, says of them."""
    config = getattr(attention, "config", None)
    for key in _HEADS:
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % ranks:
            yield f"{key} is {heads}: {ranks} ranks cannot share them equally"

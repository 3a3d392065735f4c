"""What ranks say to each other: functional collectives, so that a compiled model stays one graph, with gradients.

Every size is known on the host. A group of one does nothing. T tokens of a rank, W width of a row, n ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives  # registers the ops
from torch import Tensor
from torch.distributed import DeviceMesh

_OPS = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group as plain data, which modules may hold, copy and compile with: the name that it is known by."""

    name: str = ""
    rank: int = 0
    size: int = 1


def group_of(mesh: DeviceMesh, dims: tuple[str, ...]) -> Group:
    """The group of the ranks that differ along these dims alone. All ranks of the mesh must call this."""
    dims = tuple(d for d in dims if mesh[d].size() > 1)
    if not dims:
        return Group()
    one = mesh[dims[0]] if len(dims) == 1 else mesh[dims]._flatten("_".join(dims))
    return Group(one.get_group().group_name, one.get_local_rank(), one.size())


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks, on every rank. Its gradient is the same on every rank: that of each x."""
    if group.size == 1:
        return x
    return _Total.apply(x, group) if _recorded(x) else _all_reduce(x, group)


def shared(x: Tensor, group: Group) -> Tensor:
    """x, which is the same on every rank, of which each rank computes a part: the gradients of the ranks are summed."""
    return _Shared.apply(x, group) if group.size > 1 and _recorded(x) else x


def gather(x: Tensor, group: Group) -> Tensor:
    """(T, ...) of every rank -> (n * T, ...), in the order of the ranks. Gradients are summed, to whom each row is of.

    T must be the same on every rank.
    """
    if group.size == 1:
        return x
    return _Gather.apply(x, group) if _recorded(x) else _all_gather(x, group)


def scatter_total(x: Tensor, group: Group) -> Tensor:
    """(n * T, ...), a part of the sum on every rank -> this rank's rows (T, ...) of the sum."""
    if group.size == 1:
        return x
    return _ScatterTotal.apply(x, group) if _recorded(x) else _reduce_scatter(x, group)


def join(x: Tensor, group: Group, widths: tuple[int, ...]) -> Tensor:
    """Columns (..., W_r) of every rank -> (..., sum of W_r), the same on every rank, as its gradient has to be."""
    if group.size == 1:
        return x
    return _Join.apply(x, group, widths) if _recorded(x) else _columns(x, group, widths)


def largest(x: Tensor, group: Group) -> Tensor:
    """The elementwise maximum over the ranks, without a gradient."""
    x = x.detach()
    return x if group.size == 1 else _OPS.wait_tensor(_OPS.all_reduce(x.contiguous(), "max", group.name))


def _recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_reduce(x.contiguous(), "sum", group.name))


def _all_gather(x: Tensor, group: Group) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(x.contiguous(), group.size, group.name))


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    return _OPS.wait_tensor(_OPS.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name))


def _columns(x: Tensor, group: Group, widths: tuple[int, ...]) -> Tensor:
    """Ranks with fewer columns send some without meaning: what is gathered has one size."""
    wide = max(widths)
    rows = x.reshape(-1, x.shape[-1])  # (T, W_r)
    sent = torch.nn.functional.pad(rows, (0, wide - x.shape[-1])) if x.shape[-1] < wide else rows
    parts = _all_gather(sent, group).unflatten(0, (group.size, -1)).unbind(0)  # n of (T, wide)
    return torch.cat([p[:, :w] for p, w in zip(parts, widths, strict=True)], 1).view(*x.shape[:-1], sum(widths))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_reduce(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _reduce_scatter(grad, ctx.group), None


class _ScatterTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_gather(grad, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, widths: tuple[int, ...]) -> Tensor:
        ctx.start, ctx.width = sum(widths[: group.rank]), x.shape[-1]
        return _columns(x, group, widths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[..., ctx.start : ctx.start + ctx.width], None, None

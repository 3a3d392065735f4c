"""The parts of the layer as a graph: what the Triton backend launches, written down for Inductor to fuse.

`experts` and all other ops are the same composition (moe_ops/backends/compose.py) of these parts as of a backend's.
The grouped product alone stays an op (product.py); the rest is plain torch, and kernels that the graph calls itself.
R sorted rows, N outputs, K contraction, P parts of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_ops.activation import Gate, activation_grad, run_gate
from moe_ops.backends import compose, triton
from moe_ops.backends.base import Operand
from moe_ops.backends.triton_plan import Plan, Product, group_of
from moe_ops.backends.triton_supports import supports
from moe_ops.formats import Codec, QuantizedTensor
from moe_ops.formats.packing import unpack
from moe_ops.kernels.arrange import CHUNK
from moe_ops.kernels.configs import Config
from moe_ops.ops.library import define

from . import _compat, product, routing
from .quantize import decoded, quantize, rounded, scale_value


@dataclass(frozen=True)
class Fresh(Operand):
    """Codes just made, with what they were made of: where their numbers are wanted, nothing is packed and unpacked."""

    source: Tensor | None = None
    given: Tensor | None = None  # a static scale


class Sums(triton.Sums):
    def rows(self, nibbles: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """(R, N) in `dtype`, or the one of the product; columns in the order of nibbles if asked for."""
        y = self.total()
        y = run_gate(self.gate, y) if self.gate is not None else y
        return in_nibbles(y.to(dtype or self.dtype)) if nibbles else y.to(dtype or self.dtype)

    def total(self) -> Tensor:
        """(R, N) or (R, 2N) in the dtype of the product: added in order, one cast."""
        return reduce(torch.add, self.parts.unbind(0)).to(self.dtype)


def in_nibbles(x: Tensor) -> Tensor:
    """(M, K) -> (M, K rounded up to whole chunks): column 8 i + 4 b + p of a chunk at 32 p + 2 i + b."""
    x = pad(x, (0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, 16, 2, 4)).permute(0, 1, 4, 2, 3).reshape(x.shape)


def arranged(operand: Operand, codec: Codec | None, plan: Plan, k: int, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for (M, K), in the order of nibbles if weights are read so."""
    x = operand.data
    if codec is None:
        values = x
    elif isinstance(operand, Fresh) and operand.source is not None:
        values = rounded(operand.source, codec, operand.given, dtype).data
    else:
        values = decoded(unpack(x, codec.element.bits) if codec.packed else x, codec)
        if operand.scale is not None:
            values = values * scale_value(operand.scale).repeat_interleave(group_of(codec), -1)[:, :k]
    return in_nibbles(values.to(dtype)) if plan.nibbles else values.to(dtype)


_MANY_ROWS = 4096


def _activation_grad(
    h: Tensor, grad: Tensor, weights: Tensor | None, activation: str, alpha: float | None, beta: float | None,
    limit: float | None,
) -> Tensor:  # fmt: skip
    gate = Gate(activation=activation, gated=True, alpha=alpha, beta=beta, limit=limit)
    return triton.activation_grad(gate, h, grad, weights)


def _activation_grad_fake(h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


define(
    "_activation_grad(Tensor h, Tensor grad, Tensor? weights, str activation, float? alpha, float? beta, float? limit) "
    "-> Tensor", _activation_grad, _activation_grad_fake,
)  # fmt: skip


class Parts(triton.Parts):
    added = Sums
    sort_by_expert = staticmethod(routing.sort_by_expert)
    arranged = staticmethod(arranged)

    @staticmethod
    def shared() -> bool:
        """A gradient multiplies the first product's rows again, unless the graph finds them where they were made."""
        return _compat.in_joint_graph()

    @staticmethod
    def expected(p: Product) -> int:
        """Few rows and many are two graphs; those of experts are when their tokens are sorted."""
        if p.rows.offsets is None:
            routing.few(p.num_rows)
        return _compat.hint(p.num_rows)

    @staticmethod
    def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> Operand:
        q = quantize(x, codec, scale)
        return Fresh(q.data, q.scale, q.global_scale, x, scale)

    @staticmethod
    def values(x: Operand, codec: Codec) -> Tensor:
        """fp32 values of codes (M, K)."""
        numbers = decoded(unpack(x.data, codec.element.bits) if codec.packed else x.data, codec).float()
        assert x.scale is not None
        scale = scale_value(x.scale)
        if scale.ndim and scale.shape[-1] > 1:
            scale = scale.repeat_interleave(group_of(codec), -1)[:, : numbers.shape[1]]
        return numbers * scale if x.global_scale is None else numbers * scale * x.global_scale

    @staticmethod
    def activation_grad(gate: Gate, h: Tensor, grad: Tensor, weights: Tensor | None = None) -> Tensor:
        """Of few rows an expression that others are fused with. Of many, the kernel: generated code would read all of
        its inputs twice, for gate and for up."""
        if not gate.gated or _compat.hint(h.shape[0]) < _MANY_ROWS:
            return activation_grad(gate, h, grad, weights)
        return torch.ops.moe_ops._activation_grad(h, grad, weights, gate.activation, gate.alpha, gate.beta, gate.limit)

    @staticmethod
    def combine(rows: Tensor | triton.Sums, top_k: int) -> Tensor:
        if isinstance(rows, triton.Sums):
            return routing.combine(rows.parts, top_k, rows.dtype)
        return routing.combine(rows, top_k)

    @staticmethod
    def grouped_wgrad(
        grad: Tensor, x: Tensor, offsets: Tensor | None, codec: Codec | None, *, num_experts: int,
        out_dtype: torch.dtype, grad_read: Tensor | None = None, x_read: Tensor | None = None, top_k: int = 1,
    ) -> Tensor:  # fmt: skip
        return torch.ops.moe_ops.grouped_wgrad(grad, x, offsets, grad_read, x_read, top_k=top_k,
                                               codec=codec and codec.name, out_dtype=out_dtype)  # fmt: skip

    @staticmethod
    def quantize_weight(codec: Codec, weight: Tensor, shards: int = 1) -> QuantizedTensor:
        q, scale, whole = torch.ops.moe_ops.quantize_weight(weight, codec.name, shards)
        return QuantizedTensor(q, scale, None, whole if codec.global_scale else None, codec)

    @staticmethod
    def launch(p: Product, config: Config) -> Tensor:
        triton.check_words(p, p.w.qdata.storage_offset())  # in bytes; memory itself begins at a multiple
        tensors, options = product.arguments(p, config)
        return torch.ops.moe_ops._product(*tensors, **options)


compose.register_all("inductor", Parts, supports)

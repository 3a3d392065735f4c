"""The parts as Triton kernels: sm_80 to sm_120 without host synchronization, and CPU in Triton's interpreter.

R sorted rows, E experts, N outputs, K contraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..activation import Gate, resolve_activation
from ..formats import FORMATS, Codec, Format, QuantizedTensor
from ..kernels import quantize as quantize_kernels
from ..kernels import routing as routing_kernels
from ..kernels.activation import ACTIVATIONS, gate_grad
from ..kernels.arrange import CHUNK, arrange
from ..kernels.configs import Config
from ..kernels.decode import DECODE, DECODE_BITS, ENCODE, ENCODE_BITS, minifloat, to_minifloat
from ..kernels.grouped_mm import _grouped_mm_kernel, _grouped_mm_sized_kernel, launch_grid
from ..kernels.grouped_mm_transposed import _grouped_mm_transposed_kernel, expand
from ..kernels.launch import enqueue
from ..kernels.parts import add
from ..kernels.scales import RULES
from . import compose, reference, triton_wgrad
from .base import Operand, Problem, Rows, Weight, arch_of, interpreted
from .triton_plan import TL, Plan, Prepared, Product, as_bytes, bits_of, group_of, has_fp8, kind_of, plan_of
from .triton_supports import supports


def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> Operand:
    """x (M, K) -> codes and scales, to the bit those of the reference. A scale given is one per row (M, 1), or ()."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (bn, bk), (m, k), native = codec.block or (0, 0), x.shape, has_fp8(arch_of(x.device))
    assert codec.scale_rule is not None
    if scale is None and not bn:
        amax = x.float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)
        scale = codec.scale_rule(amax, codec.element)
    q = torch.empty(m, codec.stored(k), dtype=codec.element.storage, device=x.device)
    s, group = scale, bk or max(k, 1)
    if s is None or codec.global_scale:
        s = torch.empty(m, -(-k // group), dtype=codec.scale_dtype, device=x.device)
    g = torch.empty(m, 1, dtype=torch.float32, device=x.device) if codec.global_scale else None
    if x.numel():
        encoders, element = ENCODE if native else ENCODE_BITS, codec.element
        quantize_kernels.quantize(
            x, scale, as_bytes(q, native), as_bytes(s, native), g, group, (*bits_of(element), element.max),
            element.bits, math.floor(math.log2(element.max)),
            torch.finfo(codec.scale_dtype).max if codec.global_scale else None,
            encoders.get(element.name, to_minifloat), encoders["e4m3"], RULES[codec.scale_rule.__name__],
        )  # fmt: skip
    return Operand(q, s, g)


def quantize_weight(codec: Codec, weight: Tensor, shards: int = 1) -> QuantizedTensor:
    """As formats.quantize_weight. Blocks that lie within a row are one launch for all experts; others are torch's.

    A transpose (E, N, K), K contiguous in memory along N, is quantized as it lies.
    """
    rows, group = codec.block or (0, 0)
    in_rows = rows == 1 and not codec.global_scale
    problem = Problem("quantize", weight.device.type, arch_of(weight.device), weight.dtype, codec.name)
    if not in_rows or not weight.numel() or supports(problem) is not True:
        return formats.quantize_weight(codec, weight, shards)
    if weight.mT.is_contiguous() and not codec.packed and not (group and 128 % group):
        return QuantizedTensor(*triton_wgrad.quantize_turned(codec, weight.mT), None, None, codec)
    q, lead = quantize(weight.reshape(-1, weight.shape[2]), codec), weight.shape[:2]
    assert q.scale is not None
    return QuantizedTensor(q.data.view(*lead, -1), q.scale.view(*lead, -1), None, None, codec)


@dataclass(frozen=True)
class Sums:
    """A product in parts that are still to be added: (P, R, N) fp32, (P, R, 2N) if `gate` has two inputs."""

    parts: Tensor
    dtype: torch.dtype
    gate: Gate | None

    @property
    def device(self) -> torch.device:
        return self.parts.device

    @property
    def shape(self) -> tuple[int, int]:
        """(R, N) of what they add up to."""
        _, r, n = self.parts.shape
        return r, n // 2 if self.gate is not None and self.gate.gated else n

    def rows(self, nibbles: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """(R, N) in `dtype`, or the one of the product; columns in the order of nibbles if asked for."""
        gate, (r, n) = self.gate, self.shape
        width = -(-n // CHUNK) * CHUNK if nibbles else n
        out = torch.empty(r, width, dtype=dtype or self.dtype, device=self.device)
        act: Any = None
        numbers: tuple = (None, None, None)
        if gate is not None:
            act, numbers = ACTIVATIONS[gate.activation], (gate.alpha, gate.beta, gate.limit)
        if out.numel():
            add(self.parts, out, n, act, gate is not None and gate.gated, numbers, nibbles, TL[self.dtype])
        return out


def arranged(operand: Operand, codec: Codec | None, plan: Plan, k: int, dtype: torch.dtype) -> Tensor:
    """(M, stored K) with its scales -> numbers (M, K), in the order of nibbles if weights are read so."""
    x, scale = operand.data, operand.scale
    width = -(-k // CHUNK) * CHUNK if plan.nibbles else k
    out = torch.empty(x.shape[0], width, dtype=dtype, device=x.device)
    decoders = DECODE if plan.native else DECODE_BITS
    name, bits, element = ("bf16", 16, (0, 0, 0)) if codec is None else (
        codec.element.name, codec.element.bits, bits_of(codec.element))  # fmt: skip
    if x.numel():
        kind, scale = ("float32", None) if scale is None else (kind_of(scale.dtype), as_bytes(scale, plan.native))
        arrange(as_bytes(x, plan.native), scale, out, k, group_of(codec) or 1, decoders.get(name, minifloat), element,
                bits, kind, plan.nibbles)  # fmt: skip
    return out


def check_words(p: Product, address: int | torch.SymInt) -> None:
    """ValueError for packed weights at an address, or with rows, where words of four bytes cannot be read."""
    if p.plan.nibbles and not p.transpose:
        steps = [s for s, size in zip(p.w.qdata.stride()[:2], p.w.qdata.shape, strict=False) if size > 1]
        if any(n % 4 for n in (address, *steps)):
            raise ValueError("packed weights, and each of their rows, begin at a multiple of 4 bytes in memory, got "
                             f"address {address} and strides {tuple(p.w.qdata.stride())}")  # fmt: skip


def launch(p: Product, config: Config) -> Tensor:
    """The product in `config.parts` parts."""
    check_words(p, p.w.qdata.data_ptr())
    dtype = p.dtype if config.parts == 1 else torch.float32
    out = torch.empty(p.size(config.parts), dtype=dtype, device=p.w.qdata.device)
    arguments = _arguments(p, config, out)
    if p.expands(p.num_rows):
        _launch_expanded(p, config, arguments)
    else:
        _launch(p, config, arguments)
    return out


_EXPANDED_PARTS = 4  # of the experts: as much of the weights is in memory as floats


def _launch_expanded(p: Product, config: Config, arguments: dict[str, Any]) -> None:
    """Some experts at a time: their weights into a buffer (E', C, K), and the products of their rows."""
    (e, c, _), floats, device = p.w.qdata.shape, FORMATS["bf16"], p.w.qdata.device
    dtype = torch.float32 if interpreted() else p.x.data.dtype
    buffer = torch.empty(-(-e // _EXPANDED_PARTS), c, p.k, dtype=dtype, device=device)
    part = replace(p, w=Weight(buffer), fmt=floats, plan=plan_of(floats, dtype, False, p.k, arch_of(device)))
    every = {name: arguments[name] for name in ("E", "E_BLOCK", "num_m", "ROW_TILES")}
    inner = _arguments(part, config, arguments["out_ptr"]) | every
    for begin in range(0, e, len(buffer)):
        weights = buffer[: e - begin]
        expand(arguments, begin, weights)
        _launch(part, config, inner | {"begin_expert": begin, "end_expert": begin + len(weights)})


def _arguments(p: Product, config: Config, out: Tensor) -> dict[str, Any]:
    num_m, by_row = p.row_tiles(config, p.num_rows)
    tensors = {name: None if t is None else as_bytes(t, p.plan.native) for name, t in p.tensors().items()}
    return {
        "out_ptr": out, "num_rows": p.num_rows, "num_m": num_m,
        "stride_om": out.stride(-2), "ROW_TILES": by_row, "num_warps": config.warps, "num_stages": config.stages,
        **p.numbers(), **p.constants(config), **tensors,
    }  # fmt: skip


def _launch(p: Product, config: Config, arguments: dict[str, Any]) -> None:
    forward = _grouped_mm_sized_kernel if p.sized(config, arch_of(p.w.qdata.device)) else _grouped_mm_kernel
    kernel = _grouped_mm_transposed_kernel if p.transpose else forward
    enqueue(kernel, launch_grid(arguments["num_m"], p.n, config.block_n, config.parts), **arguments)


def activation_grad(gate: Gate, h: Tensor, grad: Tensor, weights: Tensor | None = None) -> Tensor:
    """As moe_ops.activation's, one launch. A product gives gate's columns before up's."""
    assert not gate.interleaved
    name, alpha, beta, limit = resolve_activation(gate.activation, gate.alpha, gate.beta, gate.limit)
    out, weights = torch.empty_like(h), None if weights is None else weights.contiguous()
    if grad.numel():
        gate_grad(h, grad.contiguous(), weights, out, name, gate.gated, alpha=alpha, beta=beta, limit=limit)
    return out


def combine(rows: Tensor | Sums, top_k: int) -> Tensor:
    """(T * A, H) in slot order -> (T, H)."""
    if isinstance(rows, Sums):
        return routing_kernels.combine(rows.parts, top_k, rows.dtype)
    return routing_kernels.combine(rows, top_k)


class Parts:
    """What `compose` builds the layer from. What runs on the device is a method of its own, for others to replace."""

    added = Sums  # the parts of a product, still to be added
    sort_by_expert = staticmethod(routing_kernels.sort_by_expert)
    combine = staticmethod(combine)
    quantize = staticmethod(quantize)
    values = staticmethod(reference.values)
    arranged = staticmethod(arranged)
    launch = staticmethod(launch)
    activation_grad = staticmethod(activation_grad)
    grouped_wgrad = staticmethod(triton_wgrad.grouped_wgrad)
    quantize_weight = staticmethod(quantize_weight)

    @staticmethod
    def expected(p: Product) -> int:
        """How many rows a configuration is chosen for."""
        return p.num_rows

    @classmethod
    def grouped_mm(
        cls, operand: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
        out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
    ) -> Tensor:  # fmt: skip
        """As the reference's: one launch, one that arranges activations where weights or codes ask for it, and one that
        adds the parts of a product of few tiles."""
        y = cls.product(operand, weight, rows, gate, fmt, out_dtype=out_dtype, transpose=transpose,
                        batch_invariant=batch_invariant)  # fmt: skip
        return y.rows() if isinstance(y, Sums) else y

    @classmethod
    def product(
        cls, operand: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
        out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
    ) -> Tensor | Sums:  # fmt: skip
        """`grouped_mm`, whose parts, if it was made in some, are added by whatever reads it."""
        x, k = operand.data, fmt.weight.columns(weight.qdata.shape[2])
        if weight.bias is not None:
            weight = replace(weight, bias=weight.bias.contiguous())
        arch = arch_of(x.device)
        plan = plan_of(fmt, x.dtype if operand.scale is None else out_dtype, operand.scale is not None, k, arch)
        if transpose:
            assert rows.weights is None, "a gradient is weighed before or after"
            prepared = Prepared(x if x.stride(-1) == 1 else x.contiguous())
            if weight.qdata.stride(-1) != 1:
                weight = replace(weight, qdata=weight.qdata.contiguous())
        else:
            prepared = cls._prepare(operand, fmt, plan, k)
        codes = operand.scale is not None
        p = Product(prepared, weight, rows, gate, fmt, plan, out_dtype, codes, transpose, batch_invariant)
        if not p.num_rows * p.n:
            return torch.empty(p.num_rows, p.n, dtype=out_dtype, device=x.device)
        config = p.config(arch, cls.expected(p))
        out = cls.launch(p, config)
        return out if config.parts == 1 else cls.added(out, out_dtype, gate)

    @classmethod
    def _prepare(cls, x: Operand, fmt: Format, plan: Plan, k: int) -> Prepared:
        """Codes stay codes where the MMA takes them; else they become exact numbers, small groups' scales included."""
        codec = fmt.activation
        if isinstance(x.data, Sums):
            return Prepared(x.data.rows(plan.nibbles, torch.float32 if plan.nibbles and interpreted() else None))
        data = x.data if x.data.stride(-1) == 1 else x.data.contiguous()
        if x.scale is None or codec is None:
            dtype = torch.float32 if interpreted() else data.dtype  # of the product: it is not cast again
            return Prepared(cls.arranged(Operand(data), None, plan, k, dtype) if plan.nibbles else data)
        if plan.types is not None:
            return Prepared(as_bytes(data, plan.native), as_bytes(x.scale, plan.native), x.global_scale)
        group = group_of(codec)
        grouped = bool(group) and x.scale.ndim == 2 and x.scale.shape[1] == -(-k // group)  # else of a row, or all
        folds = grouped and (group % 128 != 0 or x.scale.element_size() == 1)
        inside = x.scale if folds else None  # multiplied in, exact where it is a power of two or e4m3
        outside = x.global_scale if codec.global_scale else None if inside is not None else x.scale
        along_k = outside if outside is not None and outside.ndim == 2 and outside.shape[1] > 1 else None
        if not plan.codes_x:
            dtype = torch.float32 if plan.mma == "fp32" else torch.bfloat16
            data = cls.arranged(replace(x, data=data, scale=inside), codec, plan, k, dtype)
        return Prepared(data, along_k, None if along_k is not None else outside)


compose.register_all("triton", Parts, supports)

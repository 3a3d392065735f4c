"""The parts as Triton kernels: sm_80 to sm_120 without host synchronization, and CPU in Triton's interpreter.

R sorted rows, E experts, N outputs, K contraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import Gate
from ..formats import Codec, Element, Format
from ..kernels import quantize as quantize_kernels
from ..kernels import routing as routing_kernels
from ..kernels.activation import ACTIVATIONS
from ..kernels.arrange import CHUNK, arrange
from ..kernels.configs import Config, Kind, choose
from ..kernels.decode import DECODE, DECODE_BITS, ENCODE, ENCODE_BITS, minifloat, to_minifloat
from ..kernels.grouped_mm import _grouped_mm_kernel, launch_grid, row_tiles, stride
from ..kernels.grouped_mm_transposed import _grouped_mm_transposed_kernel
from ..kernels.parts import add
from ..kernels.scales import RULES
from . import compose
from .base import Operand, Rows, Weight, arch_of, interpreted
from .triton_supports import supports

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Hopper's tensor core sums fp8 products in a short accumulator. Against float64 on the same codes the error of a bf16
# result is 1.12 x its rounding at K = 2048, 1.29 x at 4096, 1.5 x at 7168, 2.0 x at 14336 (H200); 1.00 x when every 128
# products join an fp32 register. That costs time, and is done where the error would come near twice the rounding.
_PROMOTE_ABOVE_K, _PROMOTE = 8192, 128
# Scales of groups below 128 columns are too small to be copied ahead of time. Reading them a step ahead by hand made
# products of 4 bits in groups of 32 2 to 7 % faster at K = 2880 to 14336, 3 to 27 % slower at 256 to 2048 (H200).
_AHEAD_FROM_K = 2560
_INVARIANT_ROWS = 64  # batch-invariant: the configuration for this many rows per expert serves any number


def has_fp8(arch: int) -> bool:
    """Triton's fp8 type exists from sm_89; the interpreter's cast to it is wrong (kernels/decode.py)."""
    return arch >= 89 and not interpreted()


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
            x, scale, _bytes(q, native), _bytes(s, native), g, group, (*_bits(element), element.max), element.bits,
            math.floor(math.log2(element.max)), torch.finfo(codec.scale_dtype).max if codec.global_scale else None,
            encoders.get(element.name, to_minifloat), encoders["e4m3"], RULES[codec.scale_rule.__name__],
        )  # fmt: skip
    return Operand(q, s, g)


def _bytes(t: Tensor, native: bool) -> Tensor:
    """One-byte floats as bytes, where Triton does not have their type."""
    known = not t.is_floating_point() or t.element_size() > 1 or (native and t.dtype == torch.float8_e4m3fn)
    return t if known else t.view(torch.uint8)


def _bits(element: Element) -> tuple[int, int, int]:
    return element.exponent_bits, element.mantissa_bits, element.bias


@dataclass(frozen=True)
class Plan:
    """What the numerics of a product ask of the kernel."""

    mma: str  # the tensor core's type, as configurations name it
    dot: tl.dtype
    decode: triton.JITFunction  # of weights
    native: bool  # Triton has e4m3
    decoded: int  # bits of weights that become numbers in registers, or 0
    codes_x: bool  # activations go in as their codes
    fold: int  # scales of that many columns multiply weights in registers; else the product of a step along K
    promote: int | None
    types: tuple[str, str] | None = None  # of x and w, where the tensor core multiplies groups by their scales itself


@cache
def _plan(fmt: Format, dtype: torch.dtype, quantized_x: bool, k: int, arch: int) -> Plan:
    """dtype: that of x, or of the result where x is codes."""
    native, weight, act = has_fp8(arch), fmt.weight, fmt.activation if quantized_x else None
    group, group_x = _group(weight), _group(act)
    fold = group if group % 128 else 0
    alike = act is not None and act.element == weight.element and not fold and not group_x % 128
    alike = alike and not (group_x and act is not None and act.scale_dtype.itemsize == 1)
    decode: Any = (DECODE if native else DECODE_BITS).get(weight.element.name, minifloat)
    if alike and native and weight.element.name == "e4m3":
        promote = _PROMOTE if arch == 90 and k > _PROMOTE_ABOVE_K and not group and not group_x else None
        return Plan("fp8", tl.float8e4nv, decode, native, 0, True, fold, promote)
    if alike and weight.element.name == "int8" and not group and not group_x:
        return Plan("int8", tl.int8, decode, native, 0, True, fold, None)
    if act is not None and arch >= 100 and (types := _scaled_types(act, weight, arch)):
        return Plan("scaled", tl.uint8, decode, native, 0, True, fold, None, types)
    # Codes are exact in bf16, and so are their products with shared exponents and e4m3 scales. With other scales they
    # are rounded to it, which is too little for results of another type. The interpreter multiplies in fp32.
    rounds = bool(fold) and weight.scale_dtype not in (torch.float8_e8m0fnu, torch.float8_e4m3fn)
    exact = act is not None and not (rounds and dtype != torch.bfloat16)
    dot = tl.float32 if interpreted() else tl.bfloat16 if exact else tl.float32 if act is not None else _TL[dtype]
    decoded = 0 if weight.element.storage is None else weight.element.bits
    return Plan("fp32" if dot is tl.float32 else "bf16", dot, decode, native, decoded, False, fold, None)


def _scaled_types(act: Codec, weight: Codec, arch: int) -> tuple[str, str] | None:
    """Triton's names of two codecs that Blackwell's block-scaled products take, or None.

    Two that differ only on sm_100 and 103: elsewhere Triton would make bf16 of them, as we do. There its version 3.6
    fails to compile two such products in one loop.
    """
    alike = (act.block, act.scale_dtype) == (weight.block, weight.scale_dtype)
    known = {torch.float8_e8m0fnu: ((1, 32), ("e4m3", "e2m1")), torch.float8_e4m3fn: ((1, 16), ("e2m1",))}
    block, elements = known.get(weight.scale_dtype, (None, ()))
    if not alike or weight.block != block or {act.element.name, weight.element.name} - set(elements):
        return None
    if (arch >= 120 and act.element != weight.element) or (arch < 120 and _TRITON < (3, 9)):
        return None
    return act.element.name, weight.element.name


def _group(codec: Codec | None) -> int:
    """Columns that share a scale; 0 where it does not change along K."""
    return codec.block[1] if codec is not None and codec.block else 0


def _config(plan: Plan, arch: int, rows: int, w: Weight, k: int, scaled: bool, gated: bool, transpose: bool,
            invariant: bool) -> Config:  # fmt: skip
    experts = w.qdata.shape[0]
    touched = experts * (1.0 - (1.0 - 1.0 / experts) ** rows)  # expected, were the routing uniform
    per_expert = _INVARIANT_ROWS if invariant else round(rows / max(touched, 1.0), 1)
    if transpose:
        return choose(Kind(plan.mma, transposed=True), arch, per_expert, experts, k, 0)
    promoted = scaled or plan.promote is not None
    channels = w.qdata.shape[1] // (2 if gated else 1)
    kind = Kind(plan.mma, plan.decoded, promoted, gated, w.bias is not None)
    config = choose(kind, arch, per_expert, experts if invariant else round(touched), channels, k)
    return replace(config, short=0) if invariant else config


@dataclass(frozen=True)
class _Rows:
    """Activations as the kernel takes them: numbers (M, K), scales along K, and one scale for each row."""

    data: Tensor
    along_k: Tensor | None
    each: Tensor | None


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
            add(self.parts, out, n, act, gate is not None and gate.gated, numbers, nibbles, _TL[self.dtype])
        return out


def _prepare(x: Operand, fmt: Format, plan: Plan, k: int) -> _Rows:
    """Codes stay codes where the MMA takes them; else they become exact numbers, group scales below 128 included."""
    nibbles, codec = plan.decoded == 4, fmt.activation
    if isinstance(x.data, Sums):
        return _Rows(x.data.rows(nibbles, torch.float32 if nibbles and interpreted() else None), None, None)
    data = x.data if x.data.stride(-1) == 1 else x.data.contiguous()
    if x.scale is None or codec is None:
        dtype = torch.float32 if interpreted() else data.dtype  # of the product: it is not cast again
        return _Rows(_arranged(data, None, None, plan, k, dtype) if nibbles else data, None, None)
    if plan.types is not None:
        return _Rows(_bytes(data, plan.native), _bytes(x.scale, plan.native), x.global_scale)
    group = _group(codec)
    grouped = bool(group) and x.scale.ndim == 2 and x.scale.shape[1] == -(-k // group)  # else static: of a row, or all
    folds = grouped and (group % 128 != 0 or x.scale.element_size() == 1)
    inside = x.scale if folds else None  # multiplied in, exact where it is a power of two or e4m3
    outside = x.global_scale if codec.global_scale else None if inside is not None else x.scale
    along_k = outside if outside is not None and outside.ndim == 2 and outside.shape[1] > 1 else None
    if not plan.codes_x:
        data = _arranged(data, inside, codec, plan, k, torch.float32 if plan.mma == "fp32" else torch.bfloat16)
    return _Rows(data, along_k, None if along_k is not None else outside)


def _arranged(x: Tensor, scale: Tensor | None, codec: Codec | None, plan: Plan, k: int, dtype: torch.dtype) -> Tensor:
    """x (M, stored K) with its scales -> numbers (M, K), in the order of nibbles if weights are read so."""
    width = -(-k // CHUNK) * CHUNK if plan.decoded == 4 else k
    out = torch.empty(x.shape[0], width, dtype=dtype, device=x.device)
    decoders = DECODE if plan.native else DECODE_BITS
    name, bits, element = ("bf16", 16, (0, 0, 0)) if codec is None else (
        codec.element.name, codec.element.bits, _bits(codec.element))  # fmt: skip
    if x.numel():
        kind, scale = ("float32", None) if scale is None else (_kind(scale), _bytes(scale, plan.native))
        arrange(_bytes(x, plan.native), scale, out, k, _group(codec) or 1, decoders.get(name, minifloat), element, bits,
                kind, plan.decoded == 4)  # fmt: skip
    return out


_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bfloat16"}


def _kind(scale: Tensor | None) -> str:
    """How a stored scale is read: kernels/decode.py, `scale_value`."""
    return "float32" if scale is None else _KINDS.get(scale.dtype, "float32")


def grouped_mm(
    operand: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """As the reference's: one launch, one more that arranges activations where weights or codes ask for it, and one
    that adds the parts of a product of few tiles."""
    y = product(operand, weight, rows, gate, fmt, out_dtype=out_dtype, transpose=transpose,
                batch_invariant=batch_invariant)  # fmt: skip
    return y.rows() if isinstance(y, Sums) else y


def product(
    operand: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor | Sums:  # fmt: skip
    """`grouped_mm`, whose parts, if it was made in some, are added by whatever reads it."""
    x, arch = operand.data, arch_of(operand.data.device)
    (e, n), k = weight.qdata.shape[:2], fmt.weight.columns(weight.qdata.shape[2])
    gated = gate is not None and gate.gated
    width = k if transpose else n // 2 if gated else n
    num_rows = x.shape[0] if rows.read is None else rows.read.shape[0]
    if not num_rows * width:
        return torch.empty(num_rows, width, dtype=out_dtype, device=x.device)
    plan = _plan(fmt, x.dtype if operand.scale is None else out_dtype, operand.scale is not None, k, arch)
    prepared = None if transpose else _prepare(operand, fmt, plan, k)
    along_k = _group(fmt.weight) and not plan.fold
    scaled = prepared is not None and plan.types is None and bool(along_k or prepared.along_k is not None)
    config = _config(plan, arch, num_rows, weight, k, scaled, gated, transpose, batch_invariant)
    if transpose or (gate is not None and rows.weights is not None):  # weights come after the activation
        config = replace(config, parts=1)
    size = (num_rows, width) if config.parts == 1 else (config.parts, num_rows, 2 * width if gated else width)
    out = torch.empty(size, dtype=out_dtype if config.parts == 1 else torch.float32, device=x.device)
    num_m, by_row = row_tiles(num_rows, e, config.block_m, rows.offsets is not None)
    common = {"ELEMENT": _bits(fmt.weight.element), "BITS": fmt.weight.element.bits, "KIND": _kind(weight.scale),
              "DECODE": plan.decode, "E_BLOCK": triton.next_power_of_2(e), "ROW_TILES": by_row,
              "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
              "GROUP_M": config.group_m, "SWAP": config.swap, "INTERLEAVED": weight.interleaved, "MMA": plan.dot,
              "num_warps": config.warps, "num_stages": config.stages}  # fmt: skip
    if prepared is None:
        _transposed(x, weight, rows, fmt, out, plan, config, num_m, k, common)
    else:
        _forward(prepared, weight, rows, gate, fmt, out, plan, config, scaled, num_m, k, common)
    return out if config.parts == 1 else Sums(out, out_dtype, gate)


def _forward(x: _Rows, w: Weight, rows: Rows, gate: Gate | None, fmt: Format, out: Tensor, plan: Plan, config: Config,
             scaled: bool, num_m: int, k: int, common: dict) -> None:  # fmt: skip
    e, n_weight = w.qdata.shape[:2]
    nibbles, group_k, group_n = plan.decoded == 4, _group(fmt.weight), fmt.weight.block[0] if fmt.weight.block else 1
    if nibbles and w.qdata.data_ptr() % 4:
        raise ValueError(f"packed weights begin at a multiple of 4 bytes in memory, got address {w.qdata.data_ptr()}")
    codes = w.qdata.view(torch.int32) if nibbles else _bytes(w.qdata, plan.native)
    along_k, channel = (w.scale, w.global_scale) if group_k else (None, w.scale)
    along_k = None if along_k is None else _bytes(along_k, plan.native)
    channel_n = 1 if channel is not None and channel.ndim == 3 else 0
    shard_rows, gated = n_weight // w.shards, gate is not None and gate.gated
    n = n_weight // 2 if gated else n_weight
    inside_shard = w.shards == 1 or gated or shard_rows % config.block_n == 0
    uniform = scaled and bool(group_k) and inside_shard and group_n % config.block_n == 0  # 0, a whole shard, included
    numbers = (None, None, None) if gate is None else (gate.alpha, gate.beta, gate.limit)
    up, up_scale, up_channel = (_up(w, shard_rows, g) if gated else 0 for g in (1, group_n, channel_n))
    _grouped_mm_kernel[launch_grid(num_m, n, config.block_n, config.parts)](
        x.data, x.along_k, x.each, codes, along_k, channel, w.bias, rows.offsets, rows.read, rows.write, rows.weights,
        out, out.shape[-2], num_m, e, n, k, shard_rows, rows.top_k, *numbers,
        up * codes.stride(1), up_scale * stride(along_k, 1), up_channel * stride(channel, 1), up,
        x.data.stride(0), 1, stride(x.along_k, 0), stride(x.along_k, -1), stride(x.each, 0), *codes.stride(),
        stride(along_k, 0), stride(along_k, 1), stride(along_k, 2), stride(channel, 0), stride(channel, 1),
        n_weight if w.bias is not None else 0, out.stride(-2),
        ACT=None if gate is None else ACTIVATIONS[gate.activation], GATED=gated, SCALED=scaled, FOLD=plan.fold,
        GROUP_N=group_n, GROUP_K=group_k or 1, GROUP_X=_group(fmt.activation) or 1, CHANNEL_N=channel_n,
        UNIFORM=uniform, EVEN_K=k % (CHUNK if nibbles else config.block_k) == 0, PROMOTE=plan.promote,
        X_TYPE=plan.types and plan.types[0], W_TYPE=plan.types and plan.types[1], SHORT=config.short,
        PARTS=config.parts, AHEAD=0 < plan.fold < 128 and k >= _AHEAD_FROM_K, **common,
    )  # fmt: skip


def _up(w: Weight, shard_rows: int, group_n: int) -> int:
    """How many rows of a weight (group_n 1), or of its scales, up's channel lies behind gate's."""
    if group_n == 1:
        return 1 if w.interleaved else shard_rows
    return triton.cdiv(shard_rows, group_n) if group_n else 1


def _transposed(x: Tensor, w: Weight, rows: Rows, fmt: Format, out: Tensor, plan: Plan, config: Config, num_m: int,
                k: int, common: dict) -> None:  # fmt: skip
    assert rows.read is None and rows.write is None and rows.weights is None, "gradients stay in sorted order"
    x, (e, c), s = x if x.stride(-1) == 1 else x.contiguous(), w.qdata.shape[:2], w.scale
    codes = _bytes(w.qdata.contiguous() if w.qdata.stride(-1) != 1 else w.qdata, plan.native)
    g, last = w.global_scale, s is not None and s.ndim == 3
    _grouped_mm_transposed_kernel[launch_grid(num_m, k, config.block_n)](
        x, codes, None if s is None else _bytes(s, plan.native), g, rows.offsets, out, out.shape[0], num_m, e, c, k,
        c // w.shards, x.stride(0), codes.stride(0), codes.stride(1), stride(s, 0), stride(s, 1),
        stride(s, 2) if last else 0, stride(g, 0), stride(g, 1), out.stride(0),
        GROUP_N=fmt.weight.block[0] if fmt.weight.block else 1, GROUP_K=_group(fmt.weight),
        EVEN_C=c % config.block_k == 0, **common,
    )  # fmt: skip


def combine(rows: Tensor | Sums, top_k: int) -> Tensor:
    """(T * A, H) in slot order -> (T, H)."""
    if isinstance(rows, Sums):
        return routing_kernels.combine(rows.parts, top_k, rows.dtype)
    return routing_kernels.combine(rows, top_k)


class Parts:
    sort_by_expert = staticmethod(routing_kernels.sort_by_expert)
    combine = staticmethod(combine)
    quantize = staticmethod(quantize)
    grouped_mm = staticmethod(grouped_mm)
    product = staticmethod(product)


compose.register_all("triton", Parts, supports)

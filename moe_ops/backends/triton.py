"""The parts as Triton kernels: sm_80 to sm_120 without host synchronization, and CPU in Triton's interpreter.

R sorted rows, E experts, N outputs, K contraction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import Gate
from ..formats import FORMATS, Codec, Format
from ..kernels import quantize as quantize_kernels
from ..kernels import routing as routing_kernels
from ..kernels.activation import ACTIVATIONS
from ..kernels.configs import Config, Kind, choose
from ..kernels.decode import DECODE, DECODE_BITS, ENCODE, ENCODE_BITS
from ..kernels.grouped_mm import _grouped_mm_kernel, launch_grid, row_tiles, stride
from ..kernels.grouped_mm_transposed import _grouped_mm_transposed_kernel
from . import compose
from .base import Operand, Problem, Rows, Weight, arch_of, interpreted

_TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Hopper's tensor core sums fp8 products in a short accumulator. Against float64 on the same codes the error of a bf16
# result is 1.12 x its rounding at K = 2048, 1.29 x at 4096, 1.5 x at 7168, 2.0 x at 14336 (H200); 1.00 x when every 128
# products join an fp32 register. That costs time, and is done where the error would come near twice the rounding.
_PROMOTE_ABOVE_K, _PROMOTE = 8192, 128
_INVARIANT_ROWS = 64  # batch-invariant: the configuration for this many rows per expert serves any number


def has_fp8(arch: int) -> bool:
    """Triton's fp8 type exists from sm_89; the interpreter's cast to it is wrong (kernels/decode.py)."""
    return arch >= 89 and not interpreted()


def quantize(x: Tensor, codec: Codec, scale: Tensor | None = None) -> Operand:
    """x (M, K) -> codes and scale, to the bit those of the reference. A scale given is one per row (M, 1), or ()."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (bn, bk), native = codec.block or (0, 0), has_fp8(arch_of(x.device))
    if scale is None and not bn:
        assert codec.scale_rule is not None
        amax = x.float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)
        scale = codec.scale_rule(amax, codec.element)
    q = torch.empty(x.shape, dtype=codec.element.storage, device=x.device)
    group = bk or max(x.shape[1], 1)
    s = scale if scale is not None else x.new_empty(x.shape[0], -(-x.shape[1] // group), dtype=codec.scale_dtype)
    if x.numel():
        codes, encode = (q, ENCODE) if native else (q.view(torch.uint8), ENCODE_BITS)
        quantize_kernels.quantize(x, scale, codes, s, group, codec.element.max, encode[codec.element.name])
    return Operand(q, s)


@dataclass(frozen=True)
class Plan:
    """What the numerics of a product ask of the kernel."""

    mma: str
    dot: tl.dtype
    decode_x: triton.JITFunction
    decode_w: triton.JITFunction
    bits: bool  # codes are passed as bytes
    decoded: bool
    scaled: bool
    promote: int | None
    group_n: int
    group_k: int


@cache
def _plan(fmt: Format, x_dtype: torch.dtype, quantized_x: bool, scaled: bool, k: int, arch: int) -> Plan:
    native = has_fp8(arch)
    decode = DECODE if native else DECODE_BITS
    block = fmt.weight.block or (1, 0)
    decode_w = decode[fmt.weight.element.name]
    decode_x = decode[fmt.activation.element.name] if quantized_x and fmt.activation else decode["bf16"]
    if quantized_x and native:
        mma, dot = "fp8", tl.float8e4nv
    else:  # codes are exact in bf16; the interpreter multiplies in fp32
        dot = tl.float32 if interpreted() else tl.bfloat16 if quantized_x else _TL[x_dtype]
        mma = "fp32" if dot is tl.float32 else "bf16"
    group_k = block[1] or (fmt.activation.block[1] if fmt.activation and fmt.activation.block else 0)
    promote = _PROMOTE if mma == "fp8" and arch == 90 and k > _PROMOTE_ABOVE_K and not scaled else None
    decoded = mma != "fp8" and fmt.weight.element.storage is not None
    return Plan(mma, dot, decode_x, decode_w, not native, decoded, scaled, promote, block[0], group_k)


def _config(plan: Plan, arch: int, rows: int, w: Weight, gated: bool, transpose: bool, invariant: bool) -> Config:
    experts = w.qdata.shape[0]
    touched = experts * (1.0 - (1.0 - 1.0 / experts) ** rows)  # expected, were the routing uniform
    per_expert = _INVARIANT_ROWS if invariant else round(rows / max(touched, 1.0))
    if transpose:
        return choose(Kind(plan.mma, transposed=True), arch, per_expert)
    promoted = plan.scaled or plan.promote is not None
    config = choose(Kind(plan.mma, plan.decoded, promoted, gated, w.bias is not None), arch, per_expert)
    return replace(config, short=0) if invariant else config


def grouped_mm(
    operand: Operand, weight: Weight, rows: Rows, gate: Gate | None, fmt: Format, *,
    out_dtype: torch.dtype, transpose: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """As the reference's, in one launch."""
    x, x_scale = operand.data, operand.scale
    x, arch = x if x.stride(-1) == 1 else x.contiguous(), arch_of(x.device)
    e, n, k = weight.qdata.shape
    gated = gate is not None and gate.gated
    width = k if transpose else n // 2 if gated else n
    num_rows = x.shape[0] if rows.read is None else rows.read.shape[0]
    out = torch.empty(num_rows, width, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    scaled = not transpose and (_varies(weight.scale, 3) or _varies(x_scale, 2))
    plan = _plan(fmt, x.dtype, x_scale is not None, scaled, k, arch)
    config = _config(plan, arch, num_rows, weight, gated, transpose, batch_invariant)
    num_m, by_row = row_tiles(num_rows, e, config.block_m, rows.offsets is not None)
    tiles = {"E_BLOCK": triton.next_power_of_2(e), "ROW_TILES": by_row, "BLOCK_M": config.block_m,
             "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m, "SWAP": config.swap,
             "INTERLEAVED": weight.interleaved, "num_warps": config.warps, "num_stages": config.stages}  # fmt: skip
    codes = weight.qdata.view(torch.uint8) if plan.bits and weight.qdata.element_size() == 1 else weight.qdata
    run = _transposed if transpose else _forward
    run(x, x_scale, codes, weight, rows, gate, out, plan, config, num_m, tiles)
    return out


def _scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    """Of a weight's scale, per expert, row and group of K; (E, S) has no groups."""
    return stride(scale, 0), stride(scale, 1), stride(scale, 2) if scale is not None and scale.ndim == 3 else 0


def _varies(scale: Tensor | None, ndim: int) -> bool:
    """Whether a scale changes along the contraction."""
    return scale is not None and scale.ndim == ndim and scale.shape[-1] > 1


def _forward(x: Tensor, x_scale: Tensor | None, codes: Tensor, w: Weight, rows: Rows, gate: Gate | None, out: Tensor,
             plan: Plan, config: Config, num_m: int, tiles: dict) -> None:  # fmt: skip
    (e, n_weight, k), n, s = codes.shape, out.shape[1], w.scale
    shard_rows, gated = n_weight // w.shards, gate is not None and gate.gated
    inside_shard = w.shards == 1 or gated or shard_rows % config.block_n == 0
    uniform = plan.scaled and inside_shard and plan.group_n % config.block_n == 0  # 0, a whole shard, included
    numbers = (None, None, None) if gate is None else (gate.alpha, gate.beta, gate.limit)
    up_row, up_scale_row = _up_rows(w, shard_rows, plan.group_n) if gated else (0, 0)
    _grouped_mm_kernel[launch_grid(num_m, n, config.block_n)](
        x.view(torch.uint8) if plan.bits and x.element_size() == 1 else x, x_scale, codes, s, w.bias, rows.offsets,
        rows.read, rows.write, rows.weights, out, out.shape[0], num_m, e, n, k, shard_rows, rows.top_k, *numbers,
        up_row * codes.stride(1), up_scale_row * stride(s, 1), up_row,
        x.stride(0), 1, stride(x_scale, 0), stride(x_scale, -1), *codes.stride(), *_scale_strides(s),
        n_weight if w.bias is not None else 0,
        out.stride(0), MMA=plan.dot, DECODE_X=plan.decode_x, DECODE_W=plan.decode_w,
        ACT=None if gate is None else ACTIVATIONS[gate.activation], GATED=gated, SCALED=plan.scaled,
        GROUP_N=plan.group_n, GROUP_K=plan.group_k or 1, UNIFORM=uniform, EVEN_K=k % config.block_k == 0,
        PROMOTE=plan.promote, SHORT=config.short, **tiles,
    )  # fmt: skip


def _up_rows(w: Weight, shard_rows: int, group_n: int) -> tuple[int, int]:
    """How many rows of the weight, and of its scale, up's channel lies behind gate's."""
    row = 1 if w.interleaved else shard_rows
    return row, row if group_n == 1 else triton.cdiv(shard_rows, group_n) if group_n else 1


def _transposed(x: Tensor, x_scale: Tensor | None, codes: Tensor, w: Weight, rows: Rows, gate: Gate | None, out: Tensor,
                plan: Plan, config: Config, num_m: int, tiles: dict) -> None:  # fmt: skip
    assert rows.read is None and rows.write is None and rows.weights is None, "gradients stay in sorted order"
    (e, c, k), s = codes.shape, w.scale
    _grouped_mm_transposed_kernel[launch_grid(num_m, k, config.block_n)](
        x, codes, s, rows.offsets, out, out.shape[0], num_m, e, c, k, c // w.shards, x.stride(0),
        *codes.stride(), *_scale_strides(s), out.stride(0), MMA=plan.dot, DECODE_W=plan.decode_w, GROUP_N=plan.group_n,
        GROUP_K=plan.group_k if _varies(s, 3) else 0, EVEN_C=c % config.block_k == 0, **tiles,
    )  # fmt: skip


class Parts:
    sort_by_expert = staticmethod(routing_kernels.sort_by_expert)
    combine = staticmethod(routing_kernels.combine)
    quantize = staticmethod(quantize)
    grouped_mm = staticmethod(grouped_mm)


def supports(problem: Problem) -> bool | str:
    if problem.device == "cpu" and not interpreted():
        return "needs a GPU, or TRITON_INTERPRET=1 for its interpreter"
    if problem.device not in ("cpu", "cuda"):
        return f"has no kernels for {problem.device}"
    if problem.device == "cuda" and problem.arch < 80:
        return f"needs sm_80 or newer, this is sm_{problem.arch}"
    if problem.dtype not in _TL and problem.dtype != torch.float8_e4m3fn:
        return f"takes bfloat16, float16 or float32, not {problem.dtype}"
    codecs = _codecs(problem)
    missing = [c.name for c in codecs if c.packed or c.element.name not in DECODE or c.scale_dtype != torch.float32]
    return f"has no kernel for {', '.join(missing)}" if missing else True


def _codecs(problem: Problem) -> list[Codec]:
    if problem.op == "quantize":
        return [FORMATS.codec(problem.format)]
    fmt = FORMATS[problem.format]
    return [codec for codec in (fmt.weight, fmt.activation) if codec is not None]


compose.register_all("triton", Parts, supports)

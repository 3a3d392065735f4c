"""Gradients of weights on the Triton backend. R sorted rows, E experts, N channels, K columns, C columns of either."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import routing
from ..formats import Codec
from ..kernels import columns
from ..kernels import wgrad as kernels
from ..kernels.configs import Kind, choose
from ..kernels.decode import DECODE, DECODE_BITS, ENCODE, ENCODE_BITS, minifloat, to_minifloat
from ..kernels.launch import enqueue
from ..kernels.scales import RULES
from .base import arch_of, interpreted
from .reference import wgrad_rows
from .triton_plan import PROMOTE, PROMOTE_ABOVE_K, TL, as_bytes, bits_of, has_fp8, kind_of


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor | None, codec: Codec | None, *, num_experts: int, out_dtype: torch.dtype,
    grad_read: Tensor | None = None, x_read: Tensor | None = None, top_k: int = 1,
) -> Tensor:  # fmt: skip
    """As the reference's: one launch, and before it those that quantize each operand, or gather its rows.

    Rows that are gathered in the product itself are not copied ahead of time: their indices are known too late.
    """
    grad, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, x))
    (n, k), num_rows = (grad.shape[1], x.shape[1]), wgrad_rows(x, grad_read, x_read)
    out = torch.empty(num_experts, n, k, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    each = num_rows / num_experts
    tensors: dict[str, Any] = {"gs_ptr": None, "xs_ptr": None}
    if codec is None:
        grad, x = (
            t if read is None else routing.permute(t, read, top_k) for t, read in ((grad, grad_read), (x, x_read))
        )
        tensors |= {"g_ptr": grad, "x_ptr": x}
        kind, constants = _of_numbers(x.dtype)
    else:
        along, arch = codec.along_rows(), arch_of(x.device)
        for name, t, read in (("g", grad, grad_read), ("x", x, x_read)):
            codes = quantize_blocks(t, read, offsets, along, num_rows, num_experts, top_k)
            tensors |= {f"{name}_ptr": codes[0], f"{name}s_ptr": codes[1]}
        kind, constants = _of_codes(along, arch, each)
        tensors = {name: as_bytes(t, has_fp8(arch)) for name, t in tensors.items()}
    config = choose(kind, arch_of(x.device), round(each, 1), num_experts, n, k)
    grid = kernels.wgrad_grid(n, k, num_experts, config.block_m, config.block_n)
    enqueue(
        kernels._wgrad_kernel, grid, **tensors, offsets_ptr=offsets, out_ptr=out, num_rows=num_rows, N=n, K=k,
        stride_gm=grad.stride(0), stride_xm=x.stride(0), ROWS=config.block_k, BLOCK_N=config.block_m,
        BLOCK_K=config.block_n,
        GROUP_N=config.group_m, num_warps=config.warps, num_stages=config.stages, **constants,
    )  # fmt: skip
    return out


def _of_numbers(dtype: torch.dtype) -> tuple[Kind, dict[str, Any]]:
    wide = interpreted() or dtype == torch.float32
    absent = dict.fromkeys(("DECODE", "ELEMENT", "KIND", "GROUP", "PROMOTE"))
    return Kind("fp32" if wide else "bf16", wgrad=True), {
        "MMA": tl.float32 if wide else TL[dtype], "CODES": False, **absent,
    }  # fmt: skip


def _of_codes(codec: Codec, arch: int, rows: float) -> tuple[Kind, dict[str, Any]]:
    """fp8 with a scale for a block or for all rows goes into the tensor core as it is; else codes become numbers."""
    assert codec.block is not None
    native, group = has_fp8(arch), codec.block[1]
    as_they_are = native and group in (0, columns.BLOCK) and codec.element.name == "e4m3"
    promote = PROMOTE if arch == 90 and rows > PROMOTE_ABOVE_K and not group else None
    mma = "fp8" if as_they_are else "fp32" if interpreted() else "bf16"
    decode = (DECODE if native else DECODE_BITS).get(codec.element.name, minifloat)
    return Kind(mma, promoted=bool(group or promote or not as_they_are), wgrad=True), {
        "MMA": tl.float32 if interpreted() else tl.bfloat16, "DECODE": decode, "ELEMENT": bits_of(codec.element),
        "KIND": kind_of(codec.scale_dtype), "GROUP": group, "CODES": as_they_are, "PROMOTE": promote,
    }  # fmt: skip


def quantize_blocks(
    x: Tensor, read: Tensor | None, offsets: Tensor | None, codec: Codec, num_rows: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Rows of x (., C), quantized along them -> codes (blocks, C, 128), scales (blocks, 128 / group, C) or (E, C)."""
    assert codec.block is not None
    c, group, blocks = x.shape[1], codec.block[1], columns.num_blocks(num_rows, num_experts)
    scales = (blocks, columns.BLOCK // group, c) if group else (num_experts, c)
    q = torch.empty(blocks, c, columns.BLOCK, dtype=codec.element.storage, device=x.device)
    s = torch.zeros(scales, dtype=codec.scale_dtype, device=x.device)  # of an expert without rows, too
    _quantize(x, read, offsets, codec, q, s, num_rows, num_experts, None, top_k, exact=False)
    return q, s


def quantize_turned(codec: Codec, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (E, N, K) -> codes of its transpose (E, K, N) and their scales, exactly as if it had been copied."""
    assert codec.block is not None
    (e, n, k), group = weight.shape, codec.block[1]
    q = torch.empty(e, k, n, dtype=codec.element.storage, device=weight.device)
    s = torch.empty(e, k, -(-n // group) if group else 1, dtype=codec.scale_dtype, device=weight.device)
    offsets = torch.arange(0, (e + 1) * n, n, dtype=torch.int32, device=weight.device)
    _quantize(weight.reshape(e * n, k), None, offsets, codec, q, s, e * n, e, n, 1, exact=True)
    return q, s


def _quantize(
    x: Tensor, read: Tensor | None, offsets: Tensor | None, codec: Codec, q: Tensor, s: Tensor, num_rows: int,
    num_experts: int, rows_each: int | None, top_k: int, exact: bool,
) -> None:  # fmt: skip
    assert codec.block is not None and codec.scale_rule is not None
    element, native = codec.element, has_fp8(arch_of(x.device))
    columns.quantize_columns(
        x, read, offsets, as_bytes(q, native), as_bytes(s, native), num_rows, num_experts, rows_each, top_k,
        codec.block[1], (*bits_of(element), element.max), math.floor(math.log2(element.max)),
        (ENCODE if native else ENCODE_BITS).get(element.name, to_minifloat), RULES[codec.scale_rule.__name__], exact,
    )  # fmt: skip

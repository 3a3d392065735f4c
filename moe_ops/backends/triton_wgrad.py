"""Gradients of weights on the Triton backend. R sorted rows, E experts, N channels, K columns, C columns of either."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..formats import Codec
from ..kernels import wgrad as kernels
from ..kernels.configs import Kind, choose
from ..kernels.decode import DECODE, DECODE_BITS, ENCODE, ENCODE_BITS, minifloat, to_minifloat
from ..kernels.scales import RULES
from .base import arch_of, interpreted
from .reference import WGRAD_ROWS, wgrad_rows
from .triton_plan import TL, as_bytes, bits_of, has_fp8, kind_of


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor | None, codec: Codec | None, *, num_experts: int, out_dtype: torch.dtype,
    grad_read: Tensor | None = None, x_read: Tensor | None = None, top_k: int = 1,
) -> Tensor:  # fmt: skip
    """As the reference's: one launch, and before it one for each operand that is quantized."""
    grad, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, x))
    (n, k), num_rows = (grad.shape[1], x.shape[1]), wgrad_rows(x, grad_read, x_read)
    out = torch.empty(num_experts, n, k, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    reads: dict[str, Any] = {"g_read_ptr": grad_read, "x_read_ptr": x_read}
    tensors: dict[str, Any] = {"g_ptr": grad, "x_ptr": x, "gs_ptr": None, "xs_ptr": None}
    kind, constants = _of_numbers(x.dtype)
    if codec is not None:
        along, shape = codec.along_rows(WGRAD_ROWS), (num_rows, num_experts, top_k)
        tensors["g_ptr"], tensors["gs_ptr"] = _columns(grad, grad_read, offsets, along, *shape)
        tensors["x_ptr"], tensors["xs_ptr"] = _columns(x, x_read, offsets, along, *shape)
        kind, constants = _of_codes(along, arch_of(x.device))
        reads = dict.fromkeys(reads)
        tensors = {name: as_bytes(t, has_fp8(arch_of(x.device))) for name, t in tensors.items()}
    config = choose(kind, arch_of(x.device), round(num_rows / num_experts, 1), num_experts, n, k)
    kernels._wgrad_kernel[kernels.wgrad_grid(n, k, num_experts, config.block_m, config.block_n)](
        **tensors, **reads, offsets_ptr=offsets, out_ptr=out, num_rows=num_rows, N=n, K=k, top_k=top_k,
        stride_gm=grad.stride(0), stride_xm=x.stride(0), ROWS=config.block_k, BLOCK_N=config.block_m,
        BLOCK_K=config.block_n, GROUP_N=config.group_m, num_warps=config.warps, num_stages=config.stages, **constants,
    )  # fmt: skip
    return out


def _of_numbers(dtype: torch.dtype) -> tuple[Kind, dict[str, Any]]:
    wide = interpreted() or dtype == torch.float32
    absent = dict.fromkeys(("DECODE", "ELEMENT", "KIND", "GROUP"))
    return Kind("fp32" if wide else "bf16", wgrad=True), {
        "MMA": tl.float32 if wide else TL[dtype], "WHOLE": False, **absent,
    }  # fmt: skip


def _of_codes(codec: Codec, arch: int) -> tuple[Kind, dict[str, Any]]:
    """fp8 with one scale for all rows of a block goes into the tensor core as it is; else codes become numbers."""
    native, group = has_fp8(arch), codec.block[1] if codec.block else 0
    whole = native and group == WGRAD_ROWS and codec.element.name == "e4m3"
    mma = "fp8" if whole else "fp32" if interpreted() else "bf16"
    decode = (DECODE if native else DECODE_BITS).get(codec.element.name, minifloat)
    return Kind(mma, promoted=True, wgrad=True), {
        "MMA": tl.float32 if interpreted() else tl.bfloat16, "DECODE": decode, "ELEMENT": bits_of(codec.element),
        "KIND": kind_of(codec.scale_dtype), "GROUP": group, "WHOLE": whole,
    }  # fmt: skip


def _columns(
    x: Tensor, read: Tensor | None, offsets: Tensor | None, codec: Codec, num_rows: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Rows of x (., C), quantized along them -> codes (blocks, C, 128) and scales (blocks, 128 / group, C)."""
    assert codec.block is not None and codec.scale_rule is not None
    element, native, c = codec.element, has_fp8(arch_of(x.device)), x.shape[1]
    blocks = kernels.num_blocks(num_rows, num_experts)
    q = torch.empty(blocks, c, WGRAD_ROWS, dtype=element.storage, device=x.device)
    s = torch.empty(blocks, WGRAD_ROWS // codec.block[1], c, dtype=codec.scale_dtype, device=x.device)
    kernels.quantize_columns(
        x, read, offsets, as_bytes(q, native), as_bytes(s, native), num_rows, num_experts, top_k, codec.block[1],
        (*bits_of(element), element.max), math.floor(math.log2(element.max)),
        (ENCODE if native else ENCODE_BITS).get(element.name, to_minifloat),
        RULES[codec.scale_rule.__name__],
    )  # fmt: skip
    return q, s

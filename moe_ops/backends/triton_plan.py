"""What a grouped product asks of the Triton kernel: its numerics, its tiles, and every argument that is not a tensor.

Depends on shapes, strides and dtypes only, so that it serves launches and compilers alike. R sorted rows, E experts,
N outputs, K contraction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import Gate
from ..formats import Codec, Element, Format
from ..kernels.activation import ACTIVATIONS
from ..kernels.arrange import CHUNK
from ..kernels.configs import Config, Kind, choose
from ..kernels.decode import DECODE, DECODE_BITS, minifloat
from ..kernels.grouped_mm import row_tiles, stride
from ..kernels.launch import power_of_2
from ..kernels.tuning import from_environment, tuned
from .base import Rows, Weight, interpreted

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Hopper's tensor core sums fp8 products in a short accumulator. Against float64 on the same codes the error of a bf16
# result is 1.12 x its rounding at K = 2048, 1.29 x at 4096, 1.5 x at 7168, 2.0 x at 14336 (H200); 1.00 x when every 128
# products join an fp32 register. That costs time, and is done where the error would come near twice the rounding.
PROMOTE_ABOVE_K, PROMOTE = 8192, 128
# Scales of groups below 128 columns are too small to be copied ahead of time. Reading them a step ahead by hand made
# products of 4 bits in groups of 32 2 to 7 % faster at K = 2880 to 14336, 3 to 27 % slower at 256 to 2048 (H200).
_AHEAD_FROM_K = 2560
# A tile of a gradient's product takes 1.8 (fp8) to 2.4 (4 bits) times as long as one of floats (H200): above this many
# rows per expert weights are dequantized first.
_EXPAND_ABOVE_ROWS = 256
_INVARIANT_ROWS = 64  # batch-invariant: the configuration for this many rows per expert serves any number


def has_fp8(arch: int) -> bool:
    """Triton's fp8 type exists from sm_89; the interpreter's cast to it is wrong (kernels/decode.py)."""
    return arch >= 89 and not interpreted()


def as_bytes(t: Tensor, native: bool) -> Tensor:
    """One-byte floats as bytes, where Triton does not have their type."""
    known = not t.is_floating_point() or t.element_size() > 1 or (native and t.dtype == torch.float8_e4m3fn)
    return t if known else t.view(torch.uint8)


def bits_of(element: Element) -> tuple[int, int, int]:
    return element.exponent_bits, element.mantissa_bits, element.bias


def group_of(codec: Codec | None) -> int:
    """Columns that share a scale; 0 where it does not change along K."""
    return codec.block[1] if codec is not None and codec.block else 0


_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bfloat16"}


def kind_of(stored: torch.dtype | None) -> str:
    """How scales that are stored so are read: kernels/decode.py, `scale_value`."""
    return "float32" if stored is None else _KINDS.get(stored, "float32")


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

    @property
    def nibbles(self) -> bool:
        """Weights are read as words of eight codes, and columns of activations stand in their order."""
        return self.decoded == 4


@cache
def plan_of(fmt: Format, dtype: torch.dtype, quantized_x: bool, k: int, arch: int) -> Plan:
    """dtype: that of x, or of the result where x is codes."""
    native, weight, act = has_fp8(arch), fmt.weight, fmt.activation if quantized_x else None
    group, group_x = group_of(weight), group_of(act)
    fold = group if group % 128 else 0
    alike = act is not None and act.element == weight.element and not fold and not group_x % 128
    alike = alike and not (group_x and act is not None and act.scale_dtype.itemsize == 1)
    decode: Any = (DECODE if native else DECODE_BITS).get(weight.element.name, minifloat)
    if alike and native and weight.element.name == "e4m3":
        promote = PROMOTE if arch == 90 and k > PROMOTE_ABOVE_K and not group and not group_x else None
        return Plan("fp8", tl.float8e4nv, decode, native, 0, True, fold, promote)
    if alike and weight.element.name == "int8" and not group and not group_x:
        return Plan("int8", tl.int8, decode, native, 0, True, fold, None)
    if act is not None and arch >= 100 and (types := _scaled_types(act, weight, arch)):
        return Plan("scaled", tl.uint8, decode, native, 0, True, fold, None, types)
    # Codes are exact in bf16, and so are their products with shared exponents and e4m3 scales. With other scales they
    # are rounded to it, which is too little for results of another type. The interpreter multiplies in fp32.
    rounds = bool(fold) and weight.scale_dtype not in (torch.float8_e8m0fnu, torch.float8_e4m3fn)
    exact = act is not None and not (rounds and dtype != torch.bfloat16)
    dot = tl.float32 if interpreted() else tl.bfloat16 if exact else tl.float32 if act is not None else TL[dtype]
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
    if (arch >= 120 and act.element != weight.element) or (arch < 120 and TRITON < (3, 9)):
        return None
    return act.element.name, weight.element.name


@dataclass(frozen=True)
class Prepared:
    """Activations as the kernel takes them: numbers (M, K), scales along K, and one scale for each row."""

    data: Tensor
    along_k: Tensor | None = None
    each: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """A product of rows that are prepared. `parts` of K are added by whatever reads the result."""

    x: Prepared
    w: Weight
    rows: Rows
    gate: Gate | None
    fmt: Format
    plan: Plan
    dtype: torch.dtype  # of the result, once its parts are added
    codes: bool = False  # activations were quantized
    transpose: bool = False
    invariant: bool = False  # one configuration for any number of rows

    @property
    def gated(self) -> bool:
        return self.gate is not None and self.gate.gated

    @property
    def k(self) -> int:
        return self.fmt.weight.columns(self.w.qdata.shape[2])

    @property
    def n(self) -> int:
        """Channels of the result."""
        n = self.w.qdata.shape[1]
        return self.k if self.transpose else n // 2 if self.gated else n

    @property
    def num_rows(self) -> int:
        return self.x.data.shape[0] if self.rows.read is None else self.rows.read.shape[0]

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the weight: those along K, and one per channel or shard."""
        return (self.w.scale, self.w.global_scale) if group_of(self.fmt.weight) else (None, self.w.scale)

    @property
    def scaled(self) -> bool:
        """Scales that change along K multiply the product of a step."""
        along_k = (group_of(self.fmt.weight) and not self.plan.fold) or self.x.along_k is not None
        return not self.transpose and self.plan.types is None and bool(along_k)

    def expands(self, rows: int) -> bool:
        """Whether weights are dequantized before a product of so many rows, not in it."""
        return self.transpose and self.plan.decoded > 0 and rows > _EXPAND_ABOVE_ROWS * self.w.qdata.shape[0]

    @property
    def kind(self) -> Kind:
        """What the tables of configurations call it."""
        if self.transpose:
            return Kind(self.plan.mma, self.plan.decoded, transposed=True)
        promoted = self.scaled or self.plan.promote is not None
        return Kind(self.plan.mma, self.plan.decoded, promoted, self.gated, self.w.bias is not None)

    def config(self, arch: int, rows: int) -> Config:
        """The tiles that serve about so many rows best."""
        experts = self.w.qdata.shape[0]
        touched = experts * (1.0 - (1.0 - 1.0 / experts) ** rows)  # expected, were the routing uniform
        per_expert = _INVARIANT_ROWS if self.invariant else round(rows / max(touched, 1.0), 1)
        kind = replace(self.kind, decoded=0) if self.expands(rows) else self.kind
        found = None if self.invariant else tuned(kind, arch, experts, rows, self.n, self.k)
        if found is None:
            found = choose(kind, arch, per_expert, experts if self.invariant else round(touched), self.n, self.k)
        whole = self.transpose or (self.gate is not None and self.rows.weights is not None)  # weights come after it
        return self.configured(found, 1 if whole else found.parts)

    def configured(self, config: Config, parts: int) -> Config:
        return replace(config, parts=parts, programs=0, short=0 if self.invariant else config.short)

    def sized(self, config: Config, arch: int) -> bool:
        """Whether sizes and strides are worth compiling in.

        On an H200 products of e2m1 take 0.81 to 0.93 of the time with them at 512 tokens and more, those of int4 0.85
        to 0.99; fp8 in blocks 1.1 to 1.5, for its tallest tiles spill then; the others the same. Few rows and a K that
        is no multiple of 128 lose by it too: scales are then read two at a time, through shared memory.
        """
        worth = self.plan.nibbles and (self.k % CHUNK == 0 or config.block_m > 16)
        return arch == 90 and worth and not self.transpose  # where it was measured

    def size(self, parts: int) -> tuple[int, ...]:
        """Of the result: (R, N), or (P, R, N) in parts, (P, R, 2N) if an activation with two inputs is still due."""
        return (self.num_rows, self.n) if parts == 1 else (parts, self.num_rows, self.n * (2 if self.gated else 1))

    def row_tiles(self, config: Config, rows: int) -> tuple[int, bool]:
        return row_tiles(rows, self.w.qdata.shape[0], config.block_m, self.rows.offsets is not None)

    def tensors(self) -> dict[str, Tensor | None]:
        """What the kernel reads, by its names."""
        x, w, rows, (along_k, channel) = self.x, self.w, self.rows, self.scales
        if self.transpose:
            return {"x_ptr": x.data, "w_ptr": w.qdata, "ws_ptr": w.scale, "wg_ptr": w.global_scale,
                    "offsets_ptr": rows.offsets, "read_ptr": rows.read, "write_ptr": rows.write}  # fmt: skip
        return {
            "x_ptr": x.data, "xs_ptr": x.along_k, "xr_ptr": x.each, "w_ptr": w.qdata, "ws_ptr": along_k,
            "wc_ptr": channel, "bias_ptr": w.bias, "offsets_ptr": rows.offsets, "read_ptr": rows.read,
            "write_ptr": rows.write, "weights_ptr": rows.weights,
        }  # fmt: skip

    def numbers(self) -> dict[str, Any]:
        """Sizes and strides, by the kernel's names for them; those that may vary from call to call left out."""
        return self._transposed_numbers() if self.transpose else self._forward_numbers()

    def _forward_numbers(self) -> dict[str, Any]:
        w, x, plan = self.w, self.x, self.plan
        (along_k, channel), shard_rows = self.scales, w.qdata.shape[1] // w.shards
        stride_we, stride_wn, stride_wk = w.qdata.stride()
        if plan.nibbles:
            stride_we, stride_wn, stride_wk = stride_we // 4, stride_wn // 4, 1  # words
        gate = self.gate or Gate(activation="none", gated=False)
        group_n, channel_n = self._group_n(), self._channel_n()
        up, up_s, up_c = (_up(w, shard_rows, g) if self.gated else 0 for g in (1, group_n, channel_n))
        return {
            "E": w.qdata.shape[0], "N": self.n, "K": self.k, "shard_rows": shard_rows, "top_k": self.rows.top_k,
            "alpha": gate.alpha, "beta": gate.beta, "limit": gate.limit,
            "up_w": up * stride_wn, "up_ws": up_s * stride(along_k, 1), "up_wc": up_c * stride(channel, 1), "up_b": up,
            "stride_xm": x.data.stride(0), "stride_xk": 1, "stride_xsm": stride(x.along_k, 0),
            "stride_xsk": stride(x.along_k, -1), "stride_xrm": stride(x.each, 0),
            "stride_we": stride_we, "stride_wn": stride_wn, "stride_wk": stride_wk, "stride_wse": stride(along_k, 0),
            "stride_wsn": stride(along_k, 1), "stride_wsk": stride(along_k, 2), "stride_wce": stride(channel, 0),
            "stride_wcn": stride(channel, 1), "stride_be": 0 if w.bias is None else w.qdata.shape[1],
        }  # fmt: skip

    def _transposed_numbers(self) -> dict[str, Any]:
        w, s, g = self.w, self.w.scale, self.w.global_scale
        return {
            "E": w.qdata.shape[0], "C": w.qdata.shape[1], "K": self.k, "shard_rows": w.qdata.shape[1] // w.shards,
            "top_k": self.rows.top_k, "begin_expert": None, "end_expert": None, "stride_xm": self.x.data.stride(0),
            "stride_we": w.qdata.stride(0), "stride_wn": w.qdata.stride(1),
            "stride_wse": stride(s, 0), "stride_wsn": stride(s, 1),
            "stride_wsk": stride(s, 2) if s is not None and s.ndim == 3 else 0,
            "stride_wge": stride(g, 0), "stride_wgn": stride(g, 1),
        }  # fmt: skip

    def constants(self, config: Config) -> dict[str, Any]:
        """What the kernel is compiled for, but for ROW_TILES: that depends on the number of rows."""
        weight, plan = self.fmt.weight, self.plan
        shared = {
            "MMA": plan.dot, "DECODE": plan.decode, "ELEMENT": bits_of(weight.element), "BITS": weight.element.bits,
            "KIND": kind_of(None if self.w.scale is None else self.w.scale.dtype), "GROUP_N": self._group_n(),
            "INTERLEAVED": self.w.interleaved,
            "E_BLOCK": power_of_2(self.w.qdata.shape[0]), "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m, "SWAP": config.swap,
        }  # fmt: skip
        if self.transpose:
            even_c = self.w.qdata.shape[1] % config.block_k == 0
            return shared | {"GROUP_K": group_of(weight), "EVEN_C": even_c}
        shard_rows, group_k = self.w.qdata.shape[1] // self.w.shards, group_of(weight)
        inside_shard = self.w.shards == 1 or self.gated or shard_rows % config.block_n == 0
        even = self.k % (CHUNK if plan.nibbles else config.block_k) == 0
        return shared | {
            "X_TYPE": plan.types and plan.types[0], "W_TYPE": plan.types and plan.types[1],
            "ACT": None if self.gate is None else ACTIVATIONS[self.gate.activation], "GATED": self.gated,
            "SCALED": self.scaled, "FOLD": plan.fold, "AHEAD": 0 < plan.fold < 128 and self.k >= _AHEAD_FROM_K,
            "GROUP_K": group_k or 1, "GROUP_X": group_of(self.fmt.activation) or 1, "CHANNEL_N": self._channel_n(),
            # 0, a whole shard, included
            "UNIFORM": self.scaled and bool(group_k) and inside_shard and self._group_n() % config.block_n == 0,
            "EVEN_K": even, "PROMOTE": plan.promote, "SHORT": config.short, "PARTS": config.parts,
        }  # fmt: skip

    def _group_n(self) -> int:
        return self.fmt.weight.block[0] if self.fmt.weight.block else 1

    def _channel_n(self) -> int:
        _, channel = self.scales
        return 1 if channel is not None and channel.ndim == 3 else 0


def _up(w: Weight, shard_rows: int, group_n: int) -> int:
    """How many rows of a weight (group_n 1), or of its scales, up's channel lies behind gate's."""
    if group_n == 1:
        return 1 if w.interleaved else shard_rows
    return -(-shard_rows // group_n) if group_n else 1


from_environment()  # before anything is chosen

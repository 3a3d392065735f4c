"""What a format costs a model: fake quantization in plain torch and ml_dtypes. Nothing of moe_ops is in it.

Weights of experts and of attention, and the input of each of their products, become the values that their codes would
stand for; products are made in fp32 and their results rounded to the dtype of the model.

T tokens, A experts per token, H hidden, I intermediate, N output channels, K contraction, B windows, S tokens in one.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu


@dataclass(frozen=True)
class Grid:
    """Numbers of `dtype`, in groups along K that share a power of two, or (`fp8_scales`) an e4m3 of a number above."""

    dtype: type
    group: int = 32
    fp8_scales: bool = False
    rceil: bool = False  # the least power of two that saturates nothing; else Quark's `even`

    def round(self, x: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
        """x (..., N, K) fp32; `matrix`: the axes that the number above is for."""
        groups = x.reshape(*x.shape[:-1], -1, self.group)
        amax = np.abs(groups).max(-1, keepdims=True)  # (..., N, K / group, 1)
        if self.fp8_scales:
            above = (np.abs(x).max(matrix, keepdims=True) / np.float32(self.largest * 448))[..., None].clip(1e-30)
            scale = np.float32(cast(amax / np.float32(self.largest) / above, ml_dtypes.float8_e4m3fn)) * above
        else:
            scale = self.power(amax)
        quotient = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
        return (np.float32(cast(quotient, self.dtype)) * scale).reshape(x.shape)

    def power(self, amax: np.ndarray) -> np.ndarray:
        if self.rceil:
            mantissa, exponent = np.frexp(amax / np.float64(self.largest))
            return np.float32(np.ldexp(1.0, exponent - (mantissa == 0.5)))
        bits = ml_dtypes.finfo(self.dtype).nmant + 1
        mantissa, exponent = np.frexp(amax)  # mantissa in [1/2, 1), rounded half up: 1 is the next exponent
        exponent = exponent + (np.floor(np.ldexp(mantissa, bits) + 0.5) >= 2**bits)
        return np.float32(np.ldexp(1.0, exponent - math.frexp(self.largest)[1]))

    @property
    def largest(self) -> float:
        return float(ml_dtypes.finfo(self.dtype).max)


def cast(x: np.ndarray, dtype: type) -> np.ndarray:
    """To the nearest, ties to even, saturating."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return x.clip(-largest, largest).astype(dtype)


GRIDS = {  # by the name of what is stored: formats.md 1.2 to 1.4
    "mxfp8": Grid(ml_dtypes.float8_e4m3fn, rceil=True),
    "mxfp6_e2m3": Grid(ml_dtypes.float6_e2m3fn),
    "mxfp6_e3m2": Grid(ml_dtypes.float6_e3m2fn),
    "mxfp4": Grid(ml_dtypes.float4_e2m1fn),
    "nvfp4": Grid(ml_dtypes.float4_e2m1fn, 16, fp8_scales=True),
}


def weight(w: Tensor, grid: Grid) -> Tensor:
    """(..., N, K) -> fp32; every matrix has a number above of its own."""
    return torch.from_numpy(grid.round(w.detach().float().numpy(), (-2, -1)))


@lru_cache(maxsize=1)  # q, k and v have the same input
def activations(x: Tensor, grid: Grid | None) -> Tensor:
    """(..., K) -> fp32; every token has a number above of its own."""
    return x.float() if grid is None else torch.from_numpy(grid.round(x.float().numpy(), (-1,)))


def project(x: Tensor, w: Tensor, grid: Grid | None) -> Tensor:
    """x (..., K) . w (N, K)^T in x's dtype."""
    return linear(activations(x, grid), w).to(x.dtype)


class Experts(nn.Module):
    """Takes the place of transformers' experts: silu(gate) * up, then down, weighed and summed."""

    def __init__(self, experts: nn.Module, weights: Grid, inputs: Grid | None):
        super().__init__()
        self.inputs = inputs
        self.up = torch.cat([weight(w, weights) for w in experts.gate_up_proj.chunk(2, 1)], 1)  # (E, 2I, H)
        self.down = weight(experts.down_proj, weights)  # (E, H, I)

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """x (T, H), ids and scores (T, A) -> (T, H)"""
        owner, order = ids.flatten().sort()  # (T * A,)
        bounds = [0, *owner.bincount(minlength=len(self.up)).cumsum(0).tolist()]
        inputs = activations(x, self.inputs)[order // ids.shape[1]]  # (T * A, H)
        pre = torch.cat([linear(inputs[i:j], w) for w, (i, j) in zip(self.up, pairwise(bounds))]).to(x.dtype)
        gate, up = pre.float().chunk(2, -1)
        inputs = activations((silu(gate) * up).to(x.dtype), self.inputs)  # (T * A, I)
        y = torch.cat([linear(inputs[i:j], w) for w, (i, j) in zip(self.down, pairwise(bounds))])
        y = (y * scores.flatten()[order, None].float()).to(x.dtype).float()
        return torch.empty_like(y).index_copy_(0, order, y).view(*ids.shape, -1).sum(1).to(x.dtype)


def simulate_(model: nn.Module, weights: Grid, inputs: Grid | None) -> nn.Module:
    """A Qwen3-MoE, in place: experts and projections of attention; not routers, embeddings and the head."""
    for layer in model.model.layers:
        layer.mlp.experts = Experts(layer.mlp.experts, weights, inputs)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = getattr(layer.self_attn, name)
            module.forward = partial(project, w=weight(module.weight, weights), grid=inputs)
    return model


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> Tensor:
    """windows (B, S) of bytes -> (B,): of each window, over all of its bytes but the first."""
    bits = []
    for ids in windows.split(8):
        logits = model(ids.to(model.device)).logits[:, :-1].float().cpu()  # (B, S - 1, V)
        bits.append(cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1) / math.log(2))
    return torch.cat(bits)

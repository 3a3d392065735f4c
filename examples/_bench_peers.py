"""The layers that the benchmark times (moe_ops, and what torch and transformers carry) and the fp32 layer as reference.

Letters: M tokens, k experts per token, E experts, H hidden, I intermediate. A layer is a function
(x (M, H), topk_ids (M, k), topk_weights (M, k)) -> y (M, H).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.formats import FORMATS, Format, QuantizedTensor, dequantize_weight, quantize_weight

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
SHARDS = 2  # gate and up


@dataclass(frozen=True)
class Shape:
    model: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = {
    "A": Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "B": Shape("Mixtral-8x7B", 8, 2, 4096, 14336),
    "C": Shape("GPT-OSS-20B", 32, 4, 2880, 2880),
    "D": Shape("DeepSeek-V3, one of 8 tensor-parallel ranks", 256, 8, 7168, 256),
    "tiny": Shape("for a dry run on a CPU", 8, 2, 192, 160),
}


def shape_of(name: str) -> Shape:
    """One of SHAPES, or a shape written as experts x top_k x hidden x intermediate: 128x8x2048x768."""
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"a shape is {', '.join(SHAPES)} or EXPERTSxTOP_KxHIDDENxINTERMEDIATE, got {name!r}")
    return Shape(name, *map(int, sizes))


@dataclass(frozen=True)
class Weights:
    """One layer's experts in one format: gate_up (E, 2I, H) and down (E, H, I)."""

    format: Format
    gate_up: QuantizedTensor
    down: QuantizedTensor

    def expert_bytes(self) -> tuple[float, float]:
        """Stored bytes of one expert, scales included: (first GEMM, second GEMM)."""
        gate_up, down = (
            sum(t.nbytes for t in _tensors(q).values()) / q.qdata.shape[0] for q in (self.gate_up, self.down)
        )
        return gate_up, down


def _tensors(q: QuantizedTensor) -> dict[str, Tensor]:
    named = {f.name: getattr(q, f.name) for f in fields(q)}
    return {name: t for name, t in named.items() if isinstance(t, Tensor)}


def random_floats(shape: Shape, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """gate_up (E, 2I, H) and down (E, H, I) in bf16, normal with variance 1 / fan-in."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(n: int, k: int) -> Tensor:
        size = (shape.experts, n, k)
        return torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator).mul_(k**-0.5)

    return normal(SHARDS * shape.intermediate, shape.hidden), normal(shape.hidden, shape.intermediate)


def quantized_weights(floats: tuple[Tensor, Tensor], name: str) -> Weights:
    """The library's own quantizers, which go expert by expert, so that fp32 copies stay small."""
    format = FORMATS[name]
    gate_up, down = floats
    return Weights(format, quantize_weight(format.weight, gate_up, SHARDS), quantize_weight(format.weight, down))


def random_sets(shape: Shape, tokens: int, device: torch.device, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Several sets of (x, topk_ids, topk_weights), so that the weights of one set have left the L2 when it comes again.

    16 sets (or E / k) of disjoint experts at M = 1, 8 up to M = 32, 4 up to 512, else 2; top-k of random logits.
    Router weights hold bf16 values in fp32, so that layers that want bf16 ones get the same numbers.
    """
    generator = torch.Generator(device).manual_seed(1000 * seed + tokens)
    one = min(16, shape.experts // shape.top_k)
    count = one if tokens == 1 else 8 if tokens <= 32 else 4 if tokens <= 512 else 2
    shuffled = torch.randperm(shape.experts, device=device, generator=generator)
    sets = []
    for i in range(count):
        x = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16, generator=generator)
        logits = torch.randn(tokens, shape.experts, device=device, generator=generator)
        if tokens == 1:
            mine = shuffled[i * shape.top_k : (i + 1) * shape.top_k]
            logits = torch.full_like(logits, float("-inf")).index_copy(1, mine, logits[:, mine])
        top, ids = logits.topk(shape.top_k, dim=-1)
        sets.append((x, ids, top.softmax(-1).bfloat16().float()))
    return sets


def touched_experts(sets: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Experts that a set touches, on average."""
    return sum(ids.unique().numel() for _, ids, _ in sets) / len(sets)


def reference_layer(weights: Weights, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    """y[t] = sum over slots of weight * down(silu(gate(x)) * up(x)), in fp32 on the dequantized weights, (M, H)."""

    def expert(q: QuantizedTensor, e: int, shards: int) -> Tensor:
        sliced: dict[str, Any] = {name: t[e : e + 1] for name, t in _tensors(q).items()}
        one = replace(q, **sliced)
        return dequantize_weight(one, shards, torch.float32)[0]

    x = x.float()
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        gate, up = (x @ expert(weights.gate_up, e, SHARDS).t()).chunk(2, dim=-1)
        share = (topk_weights * (ids == e)).sum(-1, keepdim=True)  # (M, 1)
        y += share * ((F.silu(gate) * up) @ expert(weights.down, e, 1).t())
    return y


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; NaN where `out` holds one."""
    return ((out.float() - expected).norm() / expected.norm()).item()


def op_layer(weights: Weights, backend: str) -> Layer:
    """torch.ops.moe_ops.experts on the canonical weights."""
    import moe_ops.ops  # noqa: F401  (registers the ops)

    gate_up, down = weights.gate_up, weights.down
    experts = torch.ops.moe_ops.experts

    def layer(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        return experts(
            x,
            ids,
            topk_weights,
            gate_up.qdata,
            down.qdata,
            gate_up.scale,
            down.scale,
            gate_up.global_scale,
            down.global_scale,
            gate_up.zero_point,
            down.zero_point,
            format=weights.format.name,
            activation="silu",
            backend=backend,
        )

    return layer


def module_layer(floats: tuple[Tensor, Tensor], name: str) -> Layer:
    """QuantizedExperts under torch.compile; its weights are those that `quantized_weights` gives."""
    from moe_ops import QuantizedExperts

    return torch.compile(QuantizedExperts.from_float(*floats, name, activation="silu"), fullgraph=True)


class _HFExperts(nn.Module):
    """The attributes that transformers' experts functions read, around weights that are already there."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    has_post_expert_norm, _is_expert_parallel = False, False

    def __init__(self, gate_up: Tensor, down: Tensor, function: str):
        super().__init__()
        from transformers.integrations import moe

        self.function = getattr(moe, function)
        self.gate_up_proj, self.down_proj = gate_up, down
        self.num_experts = gate_up.shape[0]

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        return self.function(self, x, ids, topk_weights.to(x.dtype))  # routers of transformers return the model's dtype


def hf_grouped_mm(weights: Weights) -> nn.Module:
    return _HFExperts(weights.gate_up.qdata, weights.down.qdata, "grouped_mm_experts_forward")


def hf_batched_mm(weights: Weights) -> nn.Module:
    return _HFExperts(weights.gate_up.qdata, weights.down.qdata, "batched_mm_experts_forward")


def _few_slots(layer: Layer, weights: Weights) -> Layer:
    """batched_mm copies the weights of every slot (M k times 2 I H), so it serves few tokens only."""
    per_slot = weights.gate_up.qdata[0].nbytes

    def limited(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        if ids.numel() * per_slot > 12e9:
            raise ValueError(f"not run: it would copy {ids.numel() * per_slot / 1e9:.0f} GB of weights per call")
        return layer(x, ids, topk_weights)

    return limited


def scaled_grouped_mm(weights: Weights) -> Layer:
    """fp8 weights per channel, activations per token, through torch._scaled_grouped_mm."""
    w1, s1 = weights.gate_up.qdata.transpose(-2, -1), _scale(weights.gate_up)
    w2, s2 = weights.down.qdata.transpose(-2, -1), _scale(weights.down)
    num_experts = weights.down.qdata.shape[0]
    fp8 = torch.float8_e4m3fn

    def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
        return (x.float() / scale).clamp(-448, 448).to(fp8), scale[:, 0]

    def grouped(x: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
        return torch._scaled_grouped_mm(
            x, w, scale, w_scale, offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def layer(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        k = ids.shape[1]
        sorted_ids, order = ids.reshape(-1).sort()  # (M k,)
        experts = torch.arange(num_experts, device=ids.device)
        offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)  # (E,) end of each expert
        codes, scale = per_token(x)
        rows = order // k
        # an fp8 gather: indexing goes through uint8, which every device implements
        gathered = codes.view(torch.uint8)[rows].view(fp8)
        gate, up = grouped(gathered, scale[rows], w1, s1, offsets).chunk(2, dim=-1)
        codes, scale = per_token(F.silu(gate) * up)
        y = grouped(codes, scale, w2, s2, offsets) * topk_weights.reshape(-1)[order][:, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return y[inverse].view(*ids.shape, -1).sum(1).to(x.dtype)

    return layer


def _scale(q: QuantizedTensor) -> Tensor:
    assert q.scale is not None
    return q.scale[..., 0].contiguous()  # (E, N)


PEERS: dict[str, dict[str, Callable[[Weights], Layer]]] = {
    "bf16": {"hfG": hf_grouped_mm, "hfB": hf_batched_mm},
    "fp8": {"tSG": scaled_grouped_mm},
}
PEER_LEGEND = (
    "hfG, hfB: transformers grouped_mm, batched_mm; tSG: torch._scaled_grouped_mm; "
    "+c: under torch.compile; +m: max-autotune"
)


def build_peer(build: Callable[[Weights], Layer], weights: Weights, mode: str | None) -> Layer:
    layer = build(weights)
    if mode:
        layer = torch.compile(layer, mode=mode)
    return _few_slots(layer, weights) if build is hf_batched_mm else layer


def peer_layers(weights: Weights, modes: list[str]) -> dict[str, Callable[[], Layer]]:
    """label -> builder of every peer that runs this format: eager, and compiled once per mode."""
    builders: dict[str, Callable[[], Layer]] = {}
    for name, build in PEERS.get(weights.format.name, {}).items():
        builders[name] = partial(build_peer, build, weights, None)
        for mode in modes:
            builders[f"{name}+{'m' if 'max' in mode else 'c'}"] = partial(build_peer, build, weights, mode)
    return builders

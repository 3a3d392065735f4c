"""Slices of experts: what ranks hold is bit for bit what the whole holds, and what they compute sums to the whole."""

from dataclasses import replace

import pytest
import torch
from toy_moe import LAYOUTS, OwnGateExperts, bits, call_args, experts, relative_error

from moe_ops import QuantizedExperts, use_backend
from moe_ops.adapters import read
from moe_ops.experts import restore, swap
from moe_ops.formats import FORMATS, QuantizedTensor, dequantize_weight, quantize_weight
from moe_ops.sharding import bounds, local_ids, shard, shard_bias, shard_experts, shard_module, unit_for

EXPERTS, HIDDEN = 5, 128


def exact(fmt):
    """Whether what a rank sees of the activations determines their scales: none, or groups."""
    codec = fmt.activation
    return codec is None or (codec.block[1] > 0 and not codec.global_scale)


def whole(name, intermediate=384, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    up, down = r(EXPERTS, 2 * intermediate, HIDDEN) / 11, r(EXPERTS, HIDDEN, intermediate) / intermediate**0.5
    biases = {"gate_up_bias": r(EXPERTS, 2 * intermediate), "down_bias": r(EXPERTS, HIDDEN)}
    return QuantizedExperts.from_float(up, down, name, **biases)


def glue(parts):
    """Dequantized weights of tensor parallel ranks, put together again."""
    ups, downs = zip(*(p.dequantize() for p in parts), strict=True)
    return torch.cat([u.unflatten(1, (2, -1)) for u in ups], 2).flatten(1, 2), torch.cat(downs, 2)


def args(**kwargs):
    return call_args(9, **{"num_experts": EXPERTS, "hidden": HIDDEN, **kwargs})


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_tensor_parallel_ranks_sum_to_the_whole(name, ranks):
    module = whole(name)
    parts = [shard_module(module, r, ranks) for r in range(ranks)]
    assert all(torch.equal(a, b) for a, b in zip(glue(parts), module.dequantize(), strict=True))
    assert sum(p.spec.intermediate_size for p in parts) == 384
    got, want = sum(p(*args()) for p in parts), module(*args())
    if exact(FORMATS[name]) and "@" not in parts[0].format:
        assert relative_error(got, want) < 1e-6
        return
    # One scale per token, or a group cut in two: activations are rounded anew, no worse than in the whole.
    dense = QuantizedExperts.from_float(*module.dequantize(), "bf16", gate_up_bias=module.gate_up_proj_bias,
                                        down_bias=module.down_proj_bias)(*args())  # fmt: skip
    assert relative_error(got, dense) < max(1.1 * relative_error(want, dense), 1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_expert_parallel_ranks_sum_to_the_whole(name, ranks):
    module = whole(name, 128)
    parts = [shard_module(module, ep_rank=r, ep_size=ranks) for r in range(ranks)]
    assert [p.num_experts for p in parts] == {2: [3, 2], 3: [2, 2, 1]}[ranks]
    for i in (0, 1):
        assert torch.equal(torch.cat([p.dequantize()[i] for p in parts]), module.dequantize()[i])
    x, ids, weights = args()
    ids[0] = torch.tensor([-1, EXPERTS])  # of nobody
    got = sum(p(x, local_ids(ids, EXPERTS, r, ranks), weights) for r, p in enumerate(parts))
    if FORMATS[name].activation is None or FORMATS[name].activation.block != (0, 0):
        assert relative_error(got, module(x, ids, weights)) < 1e-6
    else:  # a scale over the rows that a rank sees
        assert relative_error(got, module(x, ids, weights)) < 0.05
    assert not got[0].any()


@pytest.mark.parametrize("kind", [k for k in LAYOUTS if "post norm" not in k and "everything" not in k])
def test_every_layout_in_both_ways_at_once(kind):
    """The oracle is the float class's own loop, on what ranks give back as float modules."""
    module = experts(kind, num_experts=3, intermediate=48)
    q = swap(module, read(module), FORMATS["int8"])
    x, ids, weights = call_args(9, 3)
    parts = [(e, shard_module(q, t, 3, ep_rank=e, ep_size=2)) for t in range(3) for e in range(2)]
    local = [local_ids(ids, 3, e, 2) for e in range(2)]
    want = restore(q)(x, ids, weights)
    assert relative_error(sum(p(x, local[e], weights) for e, p in parts), want) < 1e-5
    assert relative_error(sum(restore(p)(x, local[e], weights) for e, p in parts), want) < 1e-5
    assert relative_error(q(x, ids, weights), want) < 1e-5  # the whole stayed as it was
    assert [p.num_experts for _, p in parts] == [2, 1] * 3


def test_sizes_of_ranks():
    """formats.md 3.8: 2880 in groups of 32 are 90 of them; in tiles of 128, 22.5."""
    sizes = lambda n, ranks, unit: [b - a for a, b in zip(bounds(n, ranks, unit), bounds(n, ranks, unit)[1:])]  # noqa: E731
    assert sizes(2880, 4, 32) == [736, 736, 704, 704]
    assert sizes(2880, 8, 32) == [384, 384] + [352] * 6
    assert sizes(2880, 8, 128) == [384] * 7 + [192]
    assert sizes(2880, 4, 128) == [768, 768, 768, 576]
    assert sizes(5, 5, 1) == [1] * 5 and sizes(7, 1, 32) == [7]
    with pytest.raises(ValueError, match="64 in units of 32 cannot be split over 3 ranks"):
        bounds(64, 3, 32)


@pytest.mark.parametrize(("name", "size", "ranks", "unit"), [
    ("bf16", 2880, 8, 16), ("fp8", 2880, 8, 16), ("fp8", 40, 8, 4), ("nvfp4", 2880, 4, 16), ("mxfp4", 2880, 8, 32),
    ("mxfp4", 64, 3, 16), ("mxfp4", 64, 8, 8), ("fp8_block", 2880, 8, 128), ("fp8_block", 768, 8, 64),
    ("int4_g128", 768, 8, 64), ("mxfp4/fp8", 2880, 4, 32), ("int8/int8", 2880, 8, 16), ("mxfp8", 2, 2, 1),
])  # fmt: skip
def test_ranks_are_whole_blocks_where_there_are_enough(name, size, ranks, unit):
    assert unit_for(name, size, ranks) == unit


@pytest.mark.parametrize("name", ["mxfp4", "fp8_block", "int8", "mxfp6_e3m2", "nvfp4/bf16"])
@pytest.mark.parametrize("ranks", [4, 8])
def test_uneven_gpt_oss(name, ranks):
    """I = 2880 is 22.5 groups of 32 for each of 4 ranks."""
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(2, 5760, 64, generator=g) / 8, torch.randn(2, 64, 2880, generator=g) / 50
    bias, b2 = torch.randn(2, 5760, generator=g), torch.randn(2, 64, generator=g)
    module = QuantizedExperts.from_float(up, down, name, gate_up_bias=bias, down_bias=b2, interleaved=True,
                                         activation="swiglu_oai", alpha=1.702, limit=7.0)  # fmt: skip
    parts = [shard_module(module, r, ranks) for r in range(ranks)]
    assert all(torch.equal(a, b) for a, b in zip(glue(parts), module.dequantize(), strict=True))
    assert all("@" not in p.format for p in parts)
    x, ids, weights = call_args(6, 2, 64)
    assert relative_error(sum(p(x, ids, weights) for p in parts), module(x, ids, weights)) < 2e-6
    for r, p in enumerate(parts):
        assert torch.equal(p.down_proj_bias, b2 if r == 0 else torch.zeros_like(b2))
        assert p.down_proj_bias.requires_grad is (r == 0)
    joined = torch.cat([p.gate_up_proj_bias.unflatten(1, (2, -1)) for p in parts], 2)
    assert torch.equal(joined, torch.stack([bias[:, 0::2], bias[:, 1::2]], 1))


@pytest.mark.parametrize("unit", [8, 24, 64])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", FORMATS)
def test_tensors_dequantize_to_slices(name, dim, unit):
    """Partial last tiles, two matrices above each other, units that cut blocks."""
    codec, shards = FORMATS[name].weight, 2 if dim == -2 else 1
    n, k = (200, 128) if dim == -2 else (72, 256)
    q = quantize_weight(codec, torch.randn(3, shards * n, k, generator=torch.Generator().manual_seed(0)), shards)
    parts = [shard(q, dim, r, 3, shards=shards, unit=unit) for r in range(3)]
    got = torch.cat([dequantize_weight(p, shards).unflatten(1, (shards, -1)) for p in parts], dim)
    assert torch.equal(got, dequantize_weight(q, shards).unflatten(1, (shards, -1)))
    assert all(p.qdata.is_contiguous() and p.codec == codec.refined(unit) for p in parts)


def test_each_part_is_sliced_or_copied():
    q = quantize_weight(FORMATS["mxfp4"].weight, torch.randn(2, 128, 96), 2)
    mine = shard(q, -2, 1, 2, shards=2)
    assert torch.equal(mine.qdata, torch.cat([q.qdata[:, 32:64], q.qdata[:, 96:]], 1))
    assert torch.equal(bits(mine.scale), torch.cat([bits(q.scale)[:, 32:64], bits(q.scale)[:, 96:]], 1))
    mine = shard(q, -1, 2, 3)
    assert torch.equal(mine.qdata, q.qdata[..., 32:48]) and torch.equal(bits(mine.scale), bits(q.scale[..., 2:]))
    mine = shard(q, -1, 5, 6)  # half a group
    assert torch.equal(mine.qdata, q.qdata[..., 40:]) and torch.equal(bits(mine.scale), bits(q.scale[..., 2:]))
    assert mine.codec.block == (1, 16)
    zero = QuantizedTensor(q.qdata, q.scale, q.scale.view(torch.uint8), None, q.codec)  # cut as scales are
    assert torch.equal(shard(zero, -1, 2, 3).zero_point, bits(q.scale)[..., 2:])
    n = quantize_weight(FORMATS["nvfp4"].weight, torch.randn(5, 64, 32), 2)
    assert torch.equal(shard(n, -2, 0, 2, shards=2).global_scale, n.global_scale)
    assert torch.equal(shard_experts(n, 1, 2).global_scale, n.global_scale[3:])
    assert torch.equal(shard_experts(n, 1, 2).qdata, n.qdata[3:])
    b = torch.arange(12.0).view(1, 12)
    assert shard_bias(b, -2, 1, 3, shards=2).tolist() == [[2.0, 3.0, 8.0, 9.0]]
    assert shard_bias(b, -2, 1, 2, shards=2, unit=4).tolist() == [[4.0, 5.0, 10.0, 11.0]]


def test_static_input_scales_and_trainable_biases_follow():
    module = whole("mxfp4/fp8")
    for name in ("gate_up_proj", "down_proj"):
        module._parameters[f"{name}_input_scale"] = torch.nn.Parameter(torch.rand(EXPERTS) * 0.01 + 0.02, False)
        module._parameters[f"{name}_bias"].requires_grad_(True)
    parts = [shard_module(module, r, 2, ep_rank=1, ep_size=2) for r in range(2)]
    x, ids, weights = args()
    only = torch.where(ids >= 3, ids, -1)
    got = sum(p(x, local_ids(ids, EXPERTS, 1, 2), weights) for p in parts)
    assert relative_error(got, module(x, only, weights)) < 1e-6  # a static scale is the same on every rank
    assert [p.down_proj_bias.requires_grad for p in parts] == [True, False]
    assert all(p.gate_up_proj_bias.requires_grad for p in parts)
    assert torch.equal(parts[1].down_proj_input_scale, module.down_proj_input_scale[3:])


def test_slices_of_slices():
    module = whole("fp8_block")
    halves = [shard_module(module, r, 6) for r in range(6)]  # 6 x 64
    parts = [shard_module(h, r, 2) for h in halves for r in range(2)]
    assert {p.format for p in halves} == {"fp8_block@64"} and {p.format for p in parts} == {"fp8_block@32"}
    assert all(torch.equal(a, b) for a, b in zip(glue(parts), module.dequantize(), strict=True))


def test_formats_of_cut_blocks_are_composed():
    assert FORMATS["fp8_block@64"].weight.block == (64, 64) and FORMATS["fp8_block@64"].activation.block == (1, 128)
    assert FORMATS["mxfp4@16/fp8"].activation == FORMATS["fp8"].activation
    assert FORMATS["mxfp4@16/fp8"].weight == FORMATS["mxfp4@16"].weight != FORMATS["mxfp4"].weight
    assert FORMATS["fp8@8"].weight == FORMATS["fp8"].weight
    assert FORMATS.resolve("fp8_block@64").refined(96).name == "fp8_block@32"
    assert not [name for name in FORMATS if "@" in name]
    for bad in ("fp8_block@", "fp8_block@0", "fp8_block@x", "@16", "nothing@16", "mxfp4/mxfp8@16"):
        with pytest.raises(ValueError, match="unknown format"):
            FORMATS[bad]


def test_refusals():
    module = whole("mxfp4")
    with pytest.raises(ValueError, match=r"rank 2 is not one of 0\.\.1"):
        shard_module(module, 2, 2)
    with pytest.raises(ValueError, match="rank -1"):
        shard_module(module, ep_rank=-1, ep_size=2)
    with pytest.raises(ValueError, match="5 in units of 1 cannot be split over 6 ranks"):
        shard_module(module, ep_rank=0, ep_size=6)
    with pytest.raises(ValueError, match="384 in units of 8 cannot be split over 100 ranks"):
        shard_module(module, 0, 100)
    with pytest.raises(ValueError, match="packed: they are cut at multiples of 8, not of 12"):
        shard_module(module, 0, 4, unit=12)
    with pytest.raises(ValueError, match="dim is -2"):
        shard(module._get("down_proj"), 1, 0, 2)
    with pytest.raises(ValueError, match="QuantizedExperts, got Linear"):
        shard_module(torch.nn.Linear(2, 2), 0, 2)
    normed = experts("post norm")
    with pytest.raises(ValueError, match="post_expert_norm needs whole outputs"):
        shard_module(swap(normed, read(normed), FORMATS["int8"]), 0, 2)


class MixingExperts(OwnGateExperts):
    def _apply_gate(self, h):
        return super()._apply_gate(h).softmax(-1)


class WideExperts(OwnGateExperts):
    """Splits at a size of its own."""

    def _apply_gate(self, h):
        return torch.tanh(h[..., :32]) * h[..., -32:]


@pytest.mark.parametrize("make", [MixingExperts, WideExperts])
def test_gates_that_need_all_columns_are_refused(make):
    torch.manual_seed(0)
    module = make(interleaved=True)
    with pytest.raises(ValueError, match="does not act on each column by itself"):
        shard_module(swap(module, read(module), FORMATS["int8"]), 0, 2)


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "ranks"), [("mxfp4", 2), ("fp8_block", 3), ("int4_g32", 8)])
def test_kernels_run_slices(name, ranks):
    """Of uneven sizes, of a tile cut in two, of half a group; one backend against the other on each rank."""
    module = whole(name, 96 if ranks == 2 else 192)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    x, ids, weights = args()
    part = shard_module(module, 1, ranks)
    want = part(x.to(dtype), ids, weights)  # codes are those of what both are given
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with use_backend("triton"):
        got = part.to(device)(x.to(device, dtype), ids.to(device), weights.to(device)).cpu()
    assert relative_error(got, want) < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2), (2, 2)])
def test_identity_experts_are_counted_once(tp, ep):
    """Ids behind those of experts hand their input on, on one rank only."""
    module = whole("int8", 64)
    module.spec = replace(module.spec, identities=3)
    x, ids, weights = args()
    ids[:4, 0] = torch.tensor([EXPERTS, EXPERTS + 2, EXPERTS + 3, -1])  # two identities, two of nobody
    parts = [(e, shard_module(module, t, tp, ep_rank=e, ep_size=ep)) for t in range(tp) for e in range(ep)]
    got = sum(p(x, local_ids(ids, EXPERTS, e, ep, identities=3), weights) for e, p in parts)
    assert relative_error(got, module(x, ids, weights)) < 1e-6
    plain = whole("int8", 64)(x, torch.where(ids < EXPERTS, ids, -1), weights)
    assert torch.allclose((got - plain)[0], x[0] * weights[0, 0], atol=1e-5)


def test_ways_to_call_that_ranks_cannot_share():
    module = whole("int8", 64)
    module.spec = replace(module.spec, call="dense")
    with pytest.raises(ValueError, match="called by dense, not by ids"):
        shard_module(module, ep_rank=0, ep_size=2)
    module.spec = replace(module.spec, call="topk", down="")
    with pytest.raises(ValueError, match="gate_up_proj alone has no sum"):
        shard_module(module, 0, 2)

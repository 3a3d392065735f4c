"""What the tests of kernels are made of: pairs of codecs, tiles, gates, and the tensors of a product.

R sorted rows, E experts, N outputs, K contraction. On a GPU kernels run as compiled, without one in Triton's
interpreter, whose casts to bf16 truncate: activations are fp32 there.
"""

import fcntl
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import fit, takes_static, top_of

import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS, quantize_weight

OPS = torch.ops.moe_ops
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32

WEIGHTS = [name for name in FORMATS if "/" not in name]  # one for each way to store weights
ACTIVATIONS = [a for a in WEIGHTS if any(f"{w}/{a}" in FORMATS for w in WEIGHTS if FORMATS[w].quantized)]  # bf16 too
# Those that Blackwell's tensor core multiplies as they are; the interpreter takes every scale for an exponent.
EXPONENTS = [name for name in WEIGHTS if FORMATS[name].weight.scale_dtype == torch.float8_e8m0fnu]
_SCALED = [name for name in EXPONENTS if FORMATS[name].weight.element.bits != 6]
BLOCK_SCALED = [f"{w}/{a}" for w in _SCALED for a in _SCALED]
CODECS = list(dict.fromkeys(f.activation.name for f in FORMATS.values() if f.activation is not None))
TILES = {
    "small": (16, 32, 32, 4, 2), "large": (64, 64, 64, 4, 2, False, 4), "swap": (16, 64, 64, 4, 2, True),
    "short": (32, 64, 64, 4, 2, False, 1, 16), "step": (16, 64, 128, 4, 2), "step_swap": (16, 64, 128, 4, 2, True),
    "step_large_swap": (64, 64, 128, 4, 2, True), "parts": (16, 64, 128, 4, 2, False, 1, 0, 3),
    "parts_swap": (32, 64, 64, 4, 2, True, 1, 0, 2), "table": None,
}  # fmt: skip
GATES = {
    "none": {"activation": "none"},
    "two": {"activation": "none", "shards": 2},
    "halves": {"activation": "silu", "alpha": 1.702, "beta": 1.0, "limit": 1.0},
    "interleaved": {"activation": "gelu_tanh", "interleaved": True},
    "plain": {"activation": "relu2", "gated": False},
    "gelu": {"activation": "gelu"},
}
FACTORS = {  # of a product
    "weight": WEIGHTS, "activation": ACTIVATIONS, "tile": [t for t in TILES if CUDA or t != "table"],
    "gate": list(GATES), "bias": [True, False], "even_k": [True, False], "rows": ["few", "many"],
    "ahead": [True, False], "index": ["none", "read", "write"], "x": ["floats", "codes", "static", "static_rows"],
    "dtype": [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])],
}  # fmt: skip


def bits(t):
    """Codes or floats as integers, every NaN the same: fp8 has two of them, and a tensor equals itself."""
    f = t.detach().cpu().float()
    return torch.where(f.isnan(), torch.nan, f).view(torch.int32)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def there(tensors, device=DEVICE):
    return {name: t if t is None else t.to(device) for name, t in tensors.items()}


def gradients(run, *leaves):
    """The result of a function and its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = run(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    return [out.detach()] + [t.grad for t in leaves]


@contextmanager
def tile(name, **constants):
    """A configuration for the products inside, whatever the tables say; "table": what they say.

    `constants`: others of the backend, without their underscores.
    """
    from moe_ops.backends import triton_plan
    from moe_ops.kernels.configs import Config

    with pytest.MonkeyPatch.context() as patch:
        if TILES[name]:
            patch.setattr(triton_plan, "choose", lambda *_: Config(*TILES[name]))
        for constant, value in constants.items():
            patch.setattr(triton_plan, f"_{constant.upper()}", value)
        yield


@contextmanager
def blackwell():
    """Products inside are those of an sm_100, which the interpreter can be as well as anything else."""
    from moe_ops.backends import triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "arch_of", lambda device: 100)
        yield


@contextmanager
def alone():
    """One process at a time on a GPU: what is inside takes a good part of its memory."""
    if not CUDA:
        yield
        return
    with open(Path(tempfile.gettempdir()) / "moe_ops_alone", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@contextmanager
def emulated():
    """Products inside run on numbers that codes stand for, although the chip multiplies codes."""
    import triton.language as tl

    from moe_ops.backends import triton

    made, (mma, dot) = triton.plan_of, ("bf16", tl.bfloat16) if CUDA else ("fp32", tl.float32)
    plan = {"mma": mma, "dot": dot, "decoded": 8, "codes_x": False, "promote": None, "types": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "plan_of", lambda *args: replace(made(*args), **plan))
        yield


def pair(weight, activation):
    """The name of a format made of both, as it is listed if it is."""
    named = f"{weight}/{activation}"
    if named not in FORMATS:  # bf16 weights take none
        return weight
    made = FORMATS[named]
    return next((n for n, f in FORMATS.items() if (f.weight, f.activation) == (made.weight, made.activation)), named)


def varied(*shape, g, dtype=DTYPE):
    """Normal, but rows and groups of 16 columns are of different sizes, some of them zero: so are their scales."""
    steps = torch.tensor([0.0, 0.125, 0.5, 1.0, 2.0, 8.0])
    each = steps[torch.randint(6, (*shape[:-1], -(-shape[-1] // 16)), generator=g)]
    return (torch.randn(shape, generator=g) * each.repeat_interleave(16, -1)[..., : shape[-1]]).to(dtype)


def quantized_rows(x, codec, how, g):
    """Codes and scales of x (M, K) as arguments of a product: their own, or static where the codec takes such."""
    scale = None
    if how != "codes" and takes_static(codec):
        scale = (torch.rand((len(x), 1) if how == "static_rows" else (), generator=g) + 0.5) * 4 / top_of(codec)
    codes, scale, whole = OPS.quantize(x, scale, codec.name, "reference")
    return {"x": codes, "x_scale": scale, "x_global_scale": whole if codec.global_scale else None}


def product_case(case):
    """Tensors of grouped_mm, and its options."""
    name, gate = pair(case["weight"], case["activation"]), dict(GATES[case["gate"]])
    fmt, experts = FORMATS[name], 5
    (k,) = fit(name, 256 if case["even_k"] else 136)
    n = 272 if fmt.weight.block and fmt.weight.block[0] > 1 else 80
    g = torch.Generator().manual_seed(len(str(case)))
    gate["shards"] = 1 if case["gate"] in ("none", "plain") else 2
    dtype = case["dtype"]
    weight = (varied(experts, n, k, g=g) / k**0.5).to(dtype)
    q = quantize_weight(fmt.weight, weight, gate["shards"])
    owners = torch.tensor([1, 3, 3, 9] if case["rows"] == "few" else [1] * 37 + [3] * 17 + [-1, 4, 5, 9])
    ids = owners[torch.randperm(len(owners), generator=g)].view(-1, 2)
    order, offsets = OPS.sort_by_expert(ids, experts, "reference")
    read, write = case["index"] == "read", case["index"] == "write"
    x = {"x": varied(len(ids) if read else ids.numel(), k, g=g, dtype=dtype)}
    if fmt.activation is not None and case["x"] != "floats":
        x = quantized_rows(x["x"], fmt.activation, case["x"], g)
    tensors = x | {
        "weight": q.qdata, "offsets": offsets, "weight_scale": q.scale, "weight_global_scale": q.global_scale,
        "bias": torch.randn(experts, n, generator=g).to(dtype) if case["bias"] else None,
        "rows_in": order if read else None, "rows_out": order if write else None,
        "row_weights": torch.randn(ids.numel(), generator=g) if write else None,
    }  # fmt: skip
    return tensors, gate | {"format": name, "top_k": 2 if read else 1, "out_dtype": dtype}

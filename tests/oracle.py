"""An independent definition of the expert layer, slot by slot on dequantized weights, in any dtype.

In float64 it is the truth; in the dtype that a model works in it is what plain torch makes of it, whose error bounds
that of an implementation. Everything is differentiable: quantized activations pass gradients straight through.

T tokens, A experts per token, R = T * A slots, E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from moe_ops.formats import FORMATS, quantize_weight

# One format for each way to store weights.
STORED = list({fmt.weight.name: name for name, fmt in reversed(list(FORMATS.items()))}.values())[::-1]
CASTS = {  # element -> somebody else's definition of it, or how integers are rounded; its range
    "e4m3": (ml_dtypes.float8_e4m3fn, -448, 448),
    "e2m1": (ml_dtypes.float4_e2m1fn, -6, 6),
    "e2m3": (ml_dtypes.float6_e2m3fn, -7.5, 7.5),
    "e3m2": (ml_dtypes.float6_e3m2fn, -28, 28),
    "int8": (np.rint, -127, 127),
    "int4": (np.rint, -8, 7),
}
LARGEST = {name: high for name, (_, _, high) in CASTS.items()} | {"int4": 7.5}  # what amax is divided by
MANTISSA_BITS = {"e4m3": 3, "e2m1": 1, "e2m3": 3, "e3m2": 2}
SCALES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e8m0fnu: np.float32}
PRESETS = {"swiglu_oai": ("silu", {"alpha": 1.702, "beta": 1.0, "limit": 7.0})}
ACTS = {
    "silu": lambda g, alpha: g * torch.sigmoid(g if alpha is None else alpha * g),
    "gelu": lambda g, alpha: 0.5 * g * (1 + torch.erf(g * 0.5**0.5)),
    "gelu_tanh": lambda g, alpha: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
    "relu2": lambda g, alpha: torch.relu(g) ** 2,
}


def activation(name, h, gated, alpha=None, beta=None, limit=None):
    """h (..., 2I), gate first, or (..., I) -> (..., I) in h's dtype throughout."""
    name, preset = PRESETS.get(name, (name, {}))
    numbers = preset | {k: v for k, v in (("alpha", alpha), ("beta", beta), ("limit", limit)) if v is not None}
    alpha, beta, limit = numbers.get("alpha"), numbers.get("beta", 0.0), numbers.get("limit", torch.inf)
    if not gated:
        return ACTS[name](h.clamp(max=limit), alpha)
    g, u = h.chunk(2, -1)
    return ACTS[name](g.clamp(max=limit), alpha) * (u.clamp(-limit, limit) + beta)


def is_known(codec) -> bool:
    """Whether this file has a definition of its own; a format that some test registers may be newer."""
    rule = codec.scale_rule.__name__ if codec.scale_rule else None
    return codec.element.name in CASTS and (rule in RULES or (codec.global_scale and rule == "ratio"))


def on_grid(x: np.ndarray, element: str) -> np.ndarray:
    """fp32 -> the nearest values of an element, ties to even, saturating: by somebody else's cast, or as integers."""
    cast, low, high = CASTS[element]
    return np.rint(x).clip(low, high) if cast is np.rint else x.clip(low, high).astype(cast).astype(np.float32)


def shared_exponent(amax: np.ndarray, element: str, bump) -> np.ndarray:
    """2^e with e = floor(log2 amax) - floor(log2 max) + bump(mantissas of both, in [1, 2)), at least -127; exact."""
    (m, e), (top, emax) = (np.frexp(np.float64(t)) for t in (amax, LARGEST[element]))
    scale = np.ldexp(1.0, np.maximum(e - emax + bump(2 * m, 2 * top), -127))
    return np.where(np.isfinite(amax), scale, np.nan)


def over_max(amax: np.ndarray, element: str) -> np.ndarray:
    return or_one(amax / np.float32(LARGEST[element]))


def or_one(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale)


RULES = {  # scale_rule -> scale of a block by its amax; formats.md 1.2 and 1.5
    "amax_over_max": over_max,
    "rceil": lambda amax, element: shared_exponent(amax, element, lambda m, top: m > top),
    "even": lambda amax, element: shared_exponent(
        amax, element, lambda m, _: m >= 2 - 2.0 ** -(MANTISSA_BITS[element] + 1)),
}  # fmt: skip


def values_of(x: Tensor, codec, static: Tensor | None = None, rows: bool = False, nudge: float = 0.0) -> Tensor:
    """x (N, K) as its codes say, in float64. `rows`: each is a matrix of its own, `static` (N, 1) its scale.

    `nudge` moves what is rounded by that part of itself: codes at the edge of two may come out as the other one.
    """
    if not is_known(codec):
        assert static is None
        return codec.dequantize(codec.quantize(x[:, None] if rows and codec.global_scale else x)).double().view(x.shape)
    x, element = x.detach().float().cpu().numpy(), codec.element.name
    (n, k), (bn, bk) = x.shape, (b or whole for b, whole in zip(codec.block, x.shape))
    spread = lambda t: np.repeat(np.repeat(t, bn, 0), bk, 1)[:n, :k]  # noqa: E731
    amax = np.maximum.reduceat(np.maximum.reduceat(np.abs(x), range(0, n, bn)), range(0, k, bk), 1)  # (N/BN, K/BK)
    given, whole = None if static is None else static.float().cpu().numpy(), np.float32(1)
    if codec.global_scale:  # formats.md 1.4; blocks of one row, and `whole` one number for x or for each row
        top = np.abs(x).max(1 if rows else None, keepdims=True)
        whole = or_one(top / np.float32(LARGEST[element] * LARGEST["e4m3"])) if given is None else given
        scale = spread(on_grid(amax / np.float32(LARGEST[element]) / whole, "e4m3"))
    elif given is not None:
        scale = given
    else:
        scale = spread(RULES[codec.scale_rule.__name__](amax, element).astype(SCALES[codec.scale_dtype]))
    scale = scale.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = x / (scale * whole) * np.float32(1 + nudge)
    codes = on_grid(np.where(scale * whole == 0, np.float32(0), quotient), element)
    return torch.from_numpy(codes.astype(np.float64) * scale * np.float64(whole))


def decoded(codes: Tensor, codec) -> Tensor:
    """Codes as they are stored (..., stored K) -> their values (..., K) in float64: a little-endian string of bits."""
    cast, bits, data = CASTS[codec.element.name][0], codec.element.bits, codes.cpu().view(torch.uint8).numpy()
    string = np.unpackbits(data, axis=-1, bitorder="little").reshape(*data.shape[:-1], -1, bits)
    numbers = (string << np.arange(bits)).sum(-1).astype(np.uint8)
    if cast is np.rint:
        values = numbers.view(np.int8) if bits == 8 else numbers.astype(np.float64) - 2 ** (bits - 1)
    else:
        values = numbers.view(cast)
    return torch.from_numpy(values.astype(np.float64))


def takes_static(codec) -> bool:
    """Whether activations can have scales known beforehand: not exponents, which are always those of the values."""
    return codec is not None and (codec.global_scale or codec.scale_dtype == torch.float32)


def top_of(codec) -> float:
    """The largest value with a scale of 1."""
    return codec.element.max * (448 if codec.global_scale else 1)


def quantized(x: Tensor, codec, static: Tensor | None = None, nudge: float = 0.0) -> Tensor:
    """x (R, K) as its codes say; `static` (R, 1). The gradient passes straight through."""
    return x if codec is None else values_of(x, codec, static, True, nudge).to(x.dtype) + (x - x.detach())


def weights_of(w: Tensor, codec, shards: int = 1) -> Tensor:
    """w (E, S*N, K) as its codes say, in float64: each of the S matrices of an expert is quantized alone."""
    if codec.block is None:
        return w.double()
    return torch.cat([values_of(part, codec) for e in w for part in e.chunk(shards)]).view(w.shape)


def fit(name: str, *sizes: int) -> list[int]:
    """Sizes, or the next ones that the groups of a format fill."""
    return [next(k for k in count(size) if not FORMATS[name].check(1, k)) for size in sizes]


def interleave(t: Tensor) -> Tensor:
    """Rows gate then up (E, 2I, ...) -> alternating."""
    return t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@dataclass
class Layer:
    """Random experts in a format. Tensors are gate first here; `tensors()` gives them as the op wants them."""

    format: str
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    interleaved: bool = False
    activation: str = "silu"
    numbers: dict = field(default_factory=dict)
    bias: bool = True
    static: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self):
        e, h, i, shards = self.num_experts, self.hidden, self.intermediate, 1 + self.gated
        g = torch.Generator().manual_seed(self.seed)
        fmt = FORMATS[self.format]
        up = (torch.randn(e, shards * i, h, generator=g) / h**0.5).to(self.dtype)
        down = (torch.randn(e, h, i, generator=g) / i**0.5).to(self.dtype)
        self.floats = (up, shards), (down, 1)
        self.up, self.down = (quantize_weight(fmt.weight, w, s) for w, s in self.floats)
        self.up_bias = torch.randn(e, shards * i, generator=g).to(self.dtype) if self.bias else None
        self.down_bias = torch.randn(e, h, generator=g).to(self.dtype) if self.bias else None
        self.input_scales = (None, None)
        if self.static:
            self.input_scales = (torch.rand(2, e, generator=g) + 0.5).mul(4 / top_of(fmt.activation)).unbind()

    @property
    def fmt(self):
        return FORMATS[self.format]

    def options(self):
        return {"format": self.format, "activation": self.activation, "gated": self.gated,
                "interleaved": self.interleaved, **self.numbers}  # fmt: skip

    def tensors(self, device="cpu", up_bias=None, down_bias=None):
        """The arguments of the op after topk_weights; biases given replace the layer's."""
        codes, scale, more = self.up.qdata, self.up.scale, [self.up.global_scale, self.down.global_scale, None, None]
        up_bias = self.up_bias if up_bias is None else up_bias
        down_bias = self.down_bias if down_bias is None else down_bias
        if self.interleaved:
            codes = interleave(codes)
            up_bias = None if up_bias is None else interleave(up_bias)
            if scale is not None and self.fmt.weight.block[0] == 1:
                scale = interleave(scale)
        args = [codes, self.down.qdata, scale, self.down.scale, *more, up_bias, down_bias, *self.input_scales]
        return [None if t is None else t.to(device) for t in args]

    def weights(self, work=torch.float64):
        """(up (E, S*I, H), down (E, H, I)): what their codes must stand for."""
        return [w.to(work) for w in self._values]

    @cached_property
    def _values(self):
        return [weights_of(w, self.fmt.weight, s) for w, s in self.floats]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as `dtype` stores it, in x's own dtype; the gradient passes as it is."""
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def per_expert(rows: Tensor, owner: list[int], w: Tensor, bias: Tensor | None) -> Tensor:
    """rows (R, K), the expert of each -> (R, N): rows . W[e]^T + bias[e], one expert after the other."""
    out = list(rows)
    for e in set(owner):
        mine = [i for i, o in enumerate(owner) if o == e]
        y = rows[mine] @ w[e].T
        for i, v in zip(mine, y if bias is None else y + bias[e].to(y.dtype)):
            out[i] = v
    return torch.stack(out)


def experts(layer, x, ids, weights, work=torch.float64, *, on_input=False, biases=None, stored=None, nudge=0.0):
    """The layer after the router, (T, H) in `work`; x, weights and biases may require gradients.

    Rounded to `stored` (by default x's dtype) where the contract rounds: formats.md 4.1. `nudge`: of the second
    projection's input, which depends on the order in which the first one adds.
    """
    stored = stored or x.dtype
    w1, w2 = layer.weights(work)
    b1, b2 = biases or (layer.up_bias, layer.down_bias)
    codec, (s1, s2) = layer.fmt.activation, layer.input_scales
    slots = [(t, a, e) for t, row in enumerate(ids.tolist()) for a, e in enumerate(row) if 0 <= e < layer.num_experts]
    out = [torch.zeros(layer.hidden, dtype=work)] * x.shape[0]
    if not slots:
        return torch.stack(out) if out else x.new_zeros(0, layer.hidden, dtype=work)
    owner = [e for _, _, e in slots]
    weigh = torch.stack([weights[t, a] for t, a, _ in slots])[:, None].to(work)  # (R, 1)
    r = torch.stack([x[t].to(work) for t, _, _ in slots])
    r = quantized(rounded(r * weigh, stored) if on_input else r, codec, None if s1 is None else s1[owner][:, None])
    pre = rounded(per_expert(r, owner, w1, b1), stored)
    h = rounded(activation(layer.activation, pre, layer.gated, **layer.numbers), stored)
    h = quantized(h, codec, None if s2 is None else s2[owner][:, None], nudge)
    y = per_expert(h, owner, w2, b2)
    for v, (t, _, _) in zip(rounded(y if on_input else y * weigh, stored), slots):
        out[t] = out[t] + v
    return torch.stack(out)


def edge(run) -> float:
    """What codes at the edge of two can change in run(nudge), in norm: 2^-20 is more than an order of adding does."""
    return (run(2.0**-20) - run(-(2.0**-20))).detach().norm().item()


def assert_as_good(got: Tensor, truth: Tensor, plain: Tensor, what="result", factor=2.0, nudged=None) -> None:
    """The error of `got` is at most twice the error that plain torch makes in the same dtype (in norm).

    In fp32 both are orders of adding: sqrt(K) 2^-23 is what an order costs, here for sums of 40 to 128 products. It may
    also turn a code over, as `nudged` (the truth, of a nudge) would show.
    """
    error = (got.detach().cpu().double() - truth.detach()).norm().item()
    order = 40**0.5 * 2.0**-23 * truth.detach().norm().item()
    allowed = max(factor * (plain.detach().double() - truth.detach()).norm().item(), order)
    if error > allowed and nudged is not None:
        allowed += edge(nudged)
    assert got.shape == truth.shape, (got.shape, truth.shape)
    assert error <= allowed, f"{what} is {error:.3g} from float64; twice what plain torch is: {allowed:.3g}"


def inputs(tokens, hidden, top_k, num_experts, dtype=torch.float32, seed=1, dropped=True):
    """x, ids (with a few that no expert has), weights."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-1, num_experts + 1) if dropped else (0, num_experts)
    ids = torch.randint(low, high, (tokens, top_k), generator=g)
    return torch.randn(tokens, hidden, generator=g).to(dtype), ids, torch.rand(tokens, top_k, generator=g)

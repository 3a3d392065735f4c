"""An independent definition of the expert layer, slot by slot on dequantized weights, in any dtype.

In float64 it is the truth; in the dtype that a model works in it is what plain torch makes of it, whose error bounds
that of an implementation. Everything is differentiable: quantized activations pass gradients straight through.

T tokens, A experts per token, R = T * A slots, E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from moe_ops.formats import FORMATS, dequantize_weight, quantize_weight

ML_DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn}  # element -> somebody else's definition of it
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


def encode_e4m3(x: Tensor) -> Tensor:
    """fp32 -> uint8 codes by ml_dtypes, saturating."""
    codes = x.detach().clamp(-448.0, 448.0).cpu().numpy().astype(ML_DTYPES["e4m3"])
    return torch.from_numpy(codes.view(np.uint8).copy())


def group_scales(x: Tensor, group: int) -> Tensor:
    """x (R, K) fp32 -> scale of every element: amax / 448 of its group of columns, 1 for zeros; group 0: the row."""
    parts = [p.abs().amax(1, keepdim=True).expand_as(p) for p in x.split(group or x.shape[1], 1)]
    amax = torch.cat(parts, 1)
    return torch.where(amax == 0, 1.0, amax / 448.0)


def quantized(x: Tensor, codec, static: Tensor | None = None) -> Tensor:
    """x (R, K) as its codes say, in float64; `static` (R, 1). The gradient passes straight through."""
    if codec is None:
        return x
    xf = x.detach().float()
    if codec.element.name not in ML_DTYPES:  # a format newer than this file: its own codec (test_formats.py)
        assert static is None
        values = codec.dequantize(codec.quantize(xf)).double()
    else:
        if static is not None:
            scale = static.float()
        elif codec.block == (0, 0):
            scale = group_scales(xf.reshape(1, -1), 0).view(x.shape)
        else:
            scale = group_scales(xf, codec.block[1])
        codes = encode_e4m3(xf / scale)
        decoded = torch.from_numpy(codes.numpy().view(ML_DTYPES["e4m3"]).astype(np.float32))
        values = decoded.double() * scale.double()
    return values.to(x.dtype) + (x - x.detach())


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
        self.up, self.down = quantize_weight(fmt.weight, up, shards), quantize_weight(fmt.weight, down)
        self.up_bias = torch.randn(e, shards * i, generator=g).to(self.dtype) if self.bias else None
        self.down_bias = torch.randn(e, h, generator=g).to(self.dtype) if self.bias else None
        self.input_scales = (torch.rand(2, e, generator=g) + 0.5).mul(4 / 448).unbind() if self.static else (None, None)

    @property
    def fmt(self):
        return FORMATS[self.format]

    def options(self):
        return {"format": self.format, "activation": self.activation, "gated": self.gated,
                "interleaved": self.interleaved, **self.numbers}  # fmt: skip

    def tensors(self, device="cpu", up_bias=None, down_bias=None):
        """The arguments of the op after topk_weights; biases given replace the layer's."""
        codes, scale = self.up.qdata, self.up.scale
        up_bias = self.up_bias if up_bias is None else up_bias
        down_bias = self.down_bias if down_bias is None else down_bias
        if self.interleaved:
            codes = interleave(codes)
            up_bias = None if up_bias is None else interleave(up_bias)
            if scale is not None and self.fmt.weight.block[0] == 1:
                scale = interleave(scale)
        args = [codes, self.down.qdata, scale, self.down.scale, *[None] * 4, up_bias, down_bias, *self.input_scales]
        return [None if t is None else t.to(device) for t in args]

    def weights(self, work=torch.float64):
        """(up (E, S*I, H), down (E, H, I)) dequantized in fp32, then cast."""
        return dequantize_weight(self.up, 1 + self.gated).to(work), dequantize_weight(self.down).to(work)


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


def experts(layer, x, ids, weights, work=torch.float64, *, on_input=False, biases=None, stored=None):
    """The layer after the router, (T, H) in `work`; x, weights and biases may require gradients.

    Rounded to `stored` (by default x's dtype) where the contract rounds: formats.md 4.1.
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
    h = quantized(h, codec, None if s2 is None else s2[owner][:, None])
    y = per_expert(h, owner, w2, b2)
    for v, (t, _, _) in zip(rounded(y if on_input else y * weigh, stored), slots):
        out[t] = out[t] + v
    return torch.stack(out)


def assert_as_good(got: Tensor, truth: Tensor, plain: Tensor, what="result", factor=2.0) -> None:
    """The error of `got` is at most twice the error that plain torch makes in the same dtype (in norm).

    In fp32 both are orders of adding: sqrt(K) 2^-23 is what an order costs, here for sums of 40 to 72 products.
    """
    error = (got.detach().cpu().double() - truth.detach()).norm().item()
    order = 40**0.5 * 2.0**-23 * truth.detach().norm().item()
    allowed = max(factor * (plain.detach().double() - truth.detach()).norm().item(), order)
    assert got.shape == truth.shape, (got.shape, truth.shape)
    assert error <= allowed, f"{what} is {error:.3g} from float64; twice what plain torch is: {allowed:.3g}"


def inputs(tokens, hidden, top_k, num_experts, dtype=torch.float32, seed=1, dropped=True):
    """x, ids (with a few that no expert has), weights."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-1, num_experts + 1) if dropped else (0, num_experts)
    ids = torch.randint(low, high, (tokens, top_k), generator=g)
    return torch.randn(tokens, hidden, generator=g).to(dtype), ids, torch.rand(tokens, top_k, generator=g)

"""A small MoE model in plain PyTorch, with experts in every layout that the flags of the experts interface describe.

Its forward passes are loops over experts in the layout at hand: an oracle that shares no code with the package.
"""

import torch
from torch import nn

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 64, 32, 4, 2, 128


class ToyExperts(nn.Module):
    """flags as transformers' `use_experts_implementation` sets them on the instance."""

    def __init__(self, num_experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, gated=True, transposed=False,
                 interleaved=False, bias=False, post_norm=False, act_fn=None):  # fmt: skip
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = num_experts, gated, bias
        self.is_transposed, self.is_concatenated, self.has_post_expert_norm = transposed, not interleaved, post_norm
        self.act_fn = act_fn or nn.SiLU()
        up, rows = ("gate_up_proj", 2 * intermediate) if gated else ("up_proj", intermediate)
        for name, n, k in ((up, rows, hidden), ("down_proj", hidden, intermediate)):
            w = torch.randn(num_experts, n, k) / k**0.5
            setattr(self, name, nn.Parameter(w.mT.contiguous() if transposed else w))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(num_experts, n) * 0.1))
        if post_norm:
            self.post_expert_norm = nn.LayerNorm(hidden)
            nn.init.normal_(self.post_expert_norm.bias)  # moves a row of zeros off zero

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1) if self.is_concatenated else (h[..., ::2], h[..., 1::2])
        return self.act_fn(gate) * up

    def one(self, e, x):
        """Expert e on rows x."""
        up = "gate_up_proj" if self.has_gate else "up_proj"
        h = self._linear(up, e, x)
        h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
        y = self._linear("down_proj", e, h)
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def _linear(self, name, e, x):
        w = getattr(self, name)[e]
        y = x @ w if self.is_transposed else x @ w.T
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    def forward(self, hidden, topk_ids, topk_weights):
        out = torch.zeros_like(hidden)
        for t in range(hidden.shape[0]):
            for a in range(topk_ids.shape[1]):
                e = int(topk_ids[t, a])
                if 0 <= e < self.num_experts:
                    out[t] = out[t] + topk_weights[t, a] * self.one(e, hidden[t : t + 1])[0]
        return out


class OaiExperts(ToyExperts):
    """Interleaved clamped SwiGLU, its layout in the code and not in the flags (as gates of real models are)."""

    def _apply_gate(self, h):
        gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class OwnGateExperts(ToyExperts):
    """A gate that the table of activations does not describe."""

    def _apply_gate(self, h):
        gate, up = h[..., ::2], h[..., 1::2]
        return torch.tanh(gate) * up


class Block(nn.Module):
    def __init__(self, experts, hidden=HIDDEN, shared=INTERMEDIATE):
        super().__init__()
        self.gate = nn.Linear(hidden, experts.num_experts, bias=False)
        self.experts = experts
        self.shared_expert = nn.Sequential(nn.Linear(hidden, shared), nn.SiLU(), nn.Linear(shared, hidden))
        self.shared_expert_gate = nn.Linear(hidden, 1)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return self.experts(x, ids, weights) + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


class ToyModel(nn.Module):
    """tokens (T,) -> logits (T, VOCAB)."""

    def __init__(self, make=ToyExperts, layers=2, hidden=HIDDEN, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList()
        kwargs |= {} if hidden == HIDDEN else {"hidden": hidden}
        for _ in range(layers):
            block = Block(make(**kwargs), hidden)
            self.layers.append(nn.ModuleDict({"proj": nn.Linear(hidden, hidden), "mlp": block}))
        self.lm_head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["mlp"](layer["proj"](x))
        return self.lm_head(x)


def call_args(num_tokens=11, num_experts=EXPERTS, hidden=HIDDEN, top_k=TOP_K, dtype=torch.float32, seed=0):
    """hidden (T, H), topk_ids (T, A), topk_weights (T, A)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=g).argsort(-1)[:, :top_k]
    return torch.randn(num_tokens, hidden, generator=g).to(dtype), ids, torch.rand(num_tokens, top_k, generator=g)


def tokens(n=9):
    return torch.arange(n) * 7 % VOCAB


LAYOUTS = {
    "plain": (ToyExperts, {}),
    "transposed": (ToyExperts, {"transposed": True}),
    "interleaved": (ToyExperts, {"interleaved": True}),
    "biases": (ToyExperts, {"bias": True}),
    "gelu": (ToyExperts, {"act_fn": nn.GELU()}),
    "everything": (ToyExperts, {"transposed": True, "interleaved": True, "bias": True}),
    "clamped, interleaved by its gate": (OaiExperts, {"transposed": True, "bias": True, "interleaved": True}),
    "no gate": (ToyExperts, {"gated": False, "act_fn": nn.SiLU()}),
    "no gate, biases, transposed": (ToyExperts, {"gated": False, "bias": True, "transposed": True}),
    "no gate, own activation": (ToyExperts, {"gated": False, "act_fn": nn.Tanh(), "bias": True}),
    "post norm": (ToyExperts, {"post_norm": True, "bias": True}),
    "post norm, no gate": (ToyExperts, {"post_norm": True, "gated": False}),
    "own gate": (OwnGateExperts, {"interleaved": True}),
    "own gate, everything": (
        OwnGateExperts,
        {"transposed": True, "interleaved": True, "bias": True, "post_norm": True},
    ),
}
EXPERTS_AT = ["layers.0.mlp.experts", "layers.1.mlp.experts"]


def experts(kind="plain", **kwargs):
    torch.manual_seed(0)
    make, given = LAYOUTS[kind]
    return make(**{**given, **kwargs}).requires_grad_(True)


def relative_error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return set(left) == set(right) and all(torch.equal(bits(left[k]), bits(right[k])) for k in left)


def bits(t):
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


class Mlp(nn.Module):
    """One expert as a module: act(gate(x)) * up(x), then down."""

    def __init__(self, hidden=HIDDEN, intermediate=INTERMEDIATE, bias=False, act_fn=None, dropout=0.0):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, intermediate, bias=bias) for _ in range(2))
        self.w2 = nn.Linear(intermediate, hidden, bias=bias)
        self.act_fn, self.dropout = act_fn or nn.SiLU(), nn.Dropout(dropout)

    def forward(self, x):
        return self.w2(self.dropout(self.act_fn(self.w1(x)) * self.w3(x)))


class TopK(nn.Module):
    """A router that chooses by corrected scores and returns what the choice is worth: ids, weights, and its logits."""

    def __init__(self, hidden, num_experts, scale=2.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden) / hidden**0.5)
        self.register_buffer("correction", torch.randn(num_experts) * 0.3)
        self.scale = scale

    def forward(self, x):
        logits = x.flatten(0, -2).float() @ self.weight.float().T
        scores = logits.sigmoid()
        ids = (scores + self.correction).topk(TOP_K, -1).indices
        weights = scores.gather(-1, ids)
        return ids, self.scale * weights / weights.sum(-1, keepdim=True), logits


class Corrected(nn.Module):
    """Moves scores, for the choice alone."""

    def __init__(self, num_experts):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, num_experts) * 0.3)

    def forward(self, scores):
        return scores + self.bias


class ListBlock(nn.Module):
    """A block with a loop over a list of experts, as models write it outside transformers and did inside before."""

    def __init__(self, routing="softmax", normalised=True, shared=None, returns="tuple", noise=0.0, identities=0,
                 factor=1, **kwargs):  # fmt: skip
        super().__init__()
        self.routing, self.normalised, self.returns = routing, normalised, returns
        self.noise, self.factor = noise, factor
        experts = [Mlp(**kwargs) for _ in range(EXPERTS)] + [nn.Identity() for _ in range(identities)]
        self.gate = TopK(HIDDEN, len(experts)) if routing == "module" else nn.Linear(HIDDEN, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        if routing == "corrected":
            self.statics = Corrected(len(experts))
        if shared:
            self.shared_expert = Mlp(intermediate=48)
        if shared == "gated":
            self.shared_expert_gate = nn.Linear(HIDDEN, 1, bias=False)

    def route(self, rows):
        if self.routing == "module":
            return self.gate(rows)
        logits = self.gate(rows.to(self.gate.weight.dtype))  # a router may be kept in fp32
        if self.routing == "topk first":
            weights, ids = logits.topk(TOP_K, -1)
            return ids, weights.softmax(-1), logits
        scores = logits.sigmoid() if self.routing == "sigmoid" else logits.float().softmax(-1)
        if self.routing == "threshold":  # as many experts as are likely enough
            return torch.arange(len(self.experts)).expand_as(scores), torch.where(scores > 0.3, scores, 0.0), logits
        if self.routing == "squared":
            scores = scores.square()
        ids = (self.statics(scores) if self.routing == "corrected" else scores).topk(TOP_K, -1).indices
        weights = scores.gather(-1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) if self.normalised else weights, logits

    def forward(self, hidden_states):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.training and self.noise:
            rows = rows * torch.empty_like(rows).uniform_(1 - self.noise, 1 + self.noise)
        ids, weights, logits = self.route(rows)
        out = torch.zeros_like(rows)
        for e in range(len(self.experts)):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, (self.experts[e](rows[token]) * weights[token, slot, None]).to(out.dtype))
        out = out * self.factor
        if hasattr(self, "shared_expert"):
            y = self.shared_expert(rows)
            out = out + (self.shared_expert_gate(rows).sigmoid() * y if hasattr(self, "shared_expert_gate") else y)
        out = out.view(hidden_states.shape)
        return (out, logits) if self.returns == "tuple" else out


class UnflaggedExperts(nn.Module):
    """Stacks of matrices without the flags of the experts interface, its gate written into its forward."""

    def __init__(self, transposed=False, bias=False, gate="silu", call="topk", identities=0, names=("w13", "w2")):
        super().__init__()
        self.num_experts, self.identities, self.transposed = EXPERTS, identities, transposed
        self.gate, self.call, self.names = gate, call, names
        if gate == "module":
            self.activation = nn.GELU()
        rows = INTERMEDIATE if gate == "relu2" else 2 * INTERMEDIATE
        sizes = (EXPERTS + identities, rows, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
        for name, (e, n, k) in zip(names, sizes, strict=True):
            w = torch.randn(e, n, k) / k**0.5
            setattr(self, name, nn.Parameter(w.mT.contiguous() if transposed else w))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(e, n) * 0.3))

    def act(self, h):
        if self.gate == "relu2":
            return h.relu().square()
        if self.gate == "oai":
            gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
            return (up + 1) * gate * torch.sigmoid(gate * 1.702)
        gate, up = h.chunk(2, -1)
        return (nn.functional.silu(gate) if self.gate == "silu" else self.activation(gate)) * up

    def linear(self, name, e, x):
        w = getattr(self, name)[e]
        y = x @ (w if self.transposed else w.T)
        return y + getattr(self, f"{name}_bias")[e] if hasattr(self, f"{name}_bias") else y

    def one(self, e, x):
        return x if e >= self.num_experts else self.linear(self.names[1], e, self.act(self.linear(self.names[0], e, x)))

    def forward(self, hidden, second, third):
        ids, weights = (third, second) if self.call == "swapped scores" else (second, third)
        out = torch.zeros_like(hidden)
        for t in range(hidden.shape[0]):
            for a, e in enumerate(ids[t].tolist()):
                out[t] += self.one(e, hidden[t]) * weights[t, a if self.call == "topk" else e]
        return out


class RowsOfAllExperts(UnflaggedExperts):
    def forward(self, hidden):
        each = hidden.view(self.num_experts, -1, HIDDEN)
        return torch.cat([self.one(e, x) for e, x in enumerate(each)])


class Gate(nn.Module):
    """A router as remote code has it: (B, L, H) -> ids, weights, and an auxiliary loss, in training alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5)
        self.alpha = 0.001

    def forward(self, hidden_states):
        hidden = hidden_states.shape[-1]
        scores = nn.functional.linear(hidden_states.view(-1, hidden).float(), self.weight.float()).softmax(-1)
        weights, ids = torch.topk(scores, TOP_K, dim=-1, sorted=False)
        return ids, weights * 16.0, scores.mean() * self.alpha if self.training else None


class SortedBlock(nn.Module):
    """A block that sorts rows and runs slices of them, as remote code does; in training it takes another way."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))
        self.gate = Gate()
        self.shared_experts = Mlp(intermediate=48)

    def forward(self, hidden_states):
        identity, shape = hidden_states, hidden_states.shape
        ids, weights, loss = self.gate(hidden_states)
        rows = hidden_states.view(-1, shape[-1])
        if self.training:
            y = torch.stack([self.experts[e](rows[i // TOP_K]) for i, e in enumerate(ids.flatten().tolist())])
            y = (y.view(*weights.shape, -1) * weights[..., None]).sum(1).view(shape) + loss
        else:
            y = self.sorted(rows, ids, weights).view(shape)
        return y + self.shared_experts(identity)

    @torch.no_grad()
    def sorted(self, x, ids, weights):
        counts = ids.new_zeros((ids.shape[0], len(self.experts))).scatter_(1, ids, 1).sum(0).cpu().numpy()
        order = ids.view(-1).argsort()
        tokens, outputs, start = x[order // ids.shape[1]], [], 0
        for e, n in enumerate(counts):
            if n:
                outputs.append(self.experts[e](tokens[start : start + n]))
                start += n
        outs = torch.cat(outputs)
        new = torch.empty_like(outs)
        new[order] = outs
        return new.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1).type(new.dtype)

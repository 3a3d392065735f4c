"""Layers on a GPU that is not there, as functions of flat tensors, and what the code generated for them is made of.

T tokens, A experts per token, E experts, H hidden, I intermediate.
"""

import re
from collections import Counter

import torch
from fake_gpu import compile_kernels, empty, kernels, launches, symbol

from moe_ops.formats import FORMATS, empty_weight

OPS = torch.ops.moe_ops
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
SHARED_MEMORY = 232448  # of a block, sm_90 and sm_100


# ---- layers


def stored(name, e, n, k, shards=1):
    """Codes, scales and global scales of a projection; those that the format does not have are None."""
    w = empty_weight(FORMATS[name].weight, e, n, k, shards, dtype=torch.bfloat16, device="cuda")
    return [w.qdata, w.scale, w.global_scale]


def experts_weights(name, e, h, i, bias=False):
    """In the order of the op, from gate_up_proj to down_proj_bias."""
    both = zip(stored(name, e, i, h, 2), stored(name, e, h, i))
    return [*(t for pair in both for t in pair), None, None, *([empty(e, 2 * i), empty(e, h)] if bias else [None] * 2)]


def matrix(name, n, k):
    """A matrix for the op `linear`."""
    return [None if t is None else t[0] for t in stored(name, 1, n, k)]


def norm(x, weight):
    """RMSNorm as transformers writes it."""
    xf = x.float()
    return weight * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def qwen3_router(x, weight, bias, top_k):
    weights, ids = torch.topk(torch.softmax((x @ weight.T).float(), -1), top_k, -1)
    return ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


def gpt_oss_router(x, weight, bias, top_k):
    weights, ids = torch.topk(torch.nn.functional.linear(x, weight, bias), top_k, -1)
    return ids, torch.softmax(weights, 1, dtype=weights.dtype)


MODELS = {  # router, E, H, I, A, with biases, options of the op
    "qwen3_moe": (qwen3_router, 128, 2048, 768, 8, False, {}),
    "gpt_oss": (gpt_oss_router, 32, 2880, 2880, 4, True, {"activation": "swiglu_oai", "interleaved": True}),
}  # fmt: skip


def block(model, tokens, name="fp8", next_norm=False, shared=0):
    """Function and inputs of a layer from the residual stream in to the residual stream out.

    `shared`: the intermediate size of a shared expert. `next_norm`: of the next block, whose result is returned too.
    """
    router, e, h, i, top_k, bias, options = MODELS[model]

    def fn(x, norms, gate, gate_bias, weights, extra):
        y = norm(x, norms[0])
        ids, chosen = router(y, gate, gate_bias, top_k)
        out = OPS.experts(y, ids, chosen, *weights, format=name, **options)
        if shared:
            g, u = (OPS.linear(y, *m, format=name) for m in extra[:2])
            out = out + OPS.linear(torch.nn.functional.silu(g) * u, *extra[2], format=name)
        x = x + out
        return (x, norm(x, norms[1])) if next_norm else x

    def inputs():
        t = tokens() if callable(tokens) else tokens
        extra = [matrix(name, shared, h), matrix(name, shared, h), matrix(name, h, shared)] if shared else []
        return [empty(t, h), [empty(h), empty(h)], empty(e, h), empty(e), experts_weights(name, e, h, i, bias), extra]

    return flat(fn, inputs)


def some_experts(tokens, name="fp8", e=32, h=512, i=256, top_k=4):
    """The op alone. `tokens`: [T] is a T that is not known, tried with that."""
    def fn(x, ids, weights, tensors):
        return OPS.experts(x, ids, weights, *tensors, format=name)

    def inputs():
        t = symbol(tokens[0]) if isinstance(tokens, list) else tokens
        return [empty(t, h), empty(t, top_k, dtype=torch.int64), empty(t, top_k), experts_weights(name, e, h, i)]

    return flat(fn, inputs)


def flat(fn, make_inputs):
    """The same as a function of tensors only: lists are taken apart, None left out."""
    spec = []

    def inputs():
        leaves, tree = torch.utils._pytree.tree_flatten(make_inputs())
        spec[:] = [tree, [leaf is not None for leaf in leaves]]
        return [leaf for leaf in leaves if leaf is not None]

    def call(*args):
        given = iter(args)
        return fn(*torch.utils._pytree.tree_unflatten([next(given) if t else None for t in spec[1]], spec[0]))

    return call, inputs


# ---- their code

_MARKS = {"norm": "rsqrt", "quantize": "div.rn.f32", "gate": "sigmoid|libdevice.exp|tl_math.exp"}


def ours(source, top_k, few):
    """Launches in order: Inductor's kinds of kernels (red, per, poi, tem) with what is in them; others by name.

    "sum 3": over a token's experts, in a kernel that reads three tensors. Kernels of at most `few` elements are left
    out: those are the router's.
    """
    texts, found = dict(kernels(source)), []
    for name in launches(source):
        text, kind = texts.get(name, ""), name.split("_")[1]
        sizes = [int(n) for n in re.findall(r"^\s+\w+numel = (\d+)$", text, re.M)]
        if not name.startswith("triton_"):
            found.append(name.rpartition("_")[0])
        elif kind == "tem" or torch.Size(sizes).numel() > few:
            found.append(" ".join([kind, *_contents(text, kind, top_k)]))
    return found


def _contents(text, kind, top_k):
    marks = [mark for mark, pattern in _MARKS.items() if kind != "tem" and re.search(pattern, text)]
    read = Counter(re.findall(r"tl\.load\((in_\w+)", text))
    if "quantize" not in marks and max(read.values(), default=0) >= top_k:
        marks.append(f"sum {len(read)}")
    return marks


def built_templates(source):
    """The template kernels of the code, compiled."""
    return compile_kernels(source, "_tem_")


def assert_they_fit(built):
    """No register is spilled, and a block's memory is enough."""
    assert built
    assert not [(b.kernel, b.config, b.stack) for b in built if b.stack or b.shared > SHARED_MEMORY]

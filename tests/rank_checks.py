"""What test_ranks.py has every rank of a gloo group do. A rank makes the whole model too, and compares with it."""

import copy

import torch
import toy_moe as toy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import moe_ops
from moe_ops.adapters import read
from moe_ops.experts import restore, swap
from moe_ops.formats import FORMATS
from moe_ops.sharding import parallelize_

HIDDEN = 128


def mesh_of(**dims):
    return init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


class Toy(nn.Module):
    """Attention that is none, with heads; an MLP; routed and shared experts; a vocabulary. tokens (T,) -> (T, V)."""

    def __init__(self, make, hidden=HIDDEN, heads=4, wide=96, vocab=40, bias=True):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden, padding_idx=1)
        self.attention = nn.Module()
        self.attention.head_dim = hidden // heads
        for key in "qkvo":
            setattr(self.attention, key, nn.Linear(hidden, hidden, bias=bias))
        self.mlp = nn.Module()
        self.mlp.gate, self.mlp.up = nn.Linear(hidden, wide, bias=bias), nn.Linear(hidden, wide)
        self.mlp.down = nn.Linear(wide, hidden, bias=bias)
        self.block = toy.Block(make(), hidden)
        self.split = nn.Linear(hidden, hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        a = self.attention
        q, k, v = (m(x).unflatten(-1, (-1, a.head_dim)) for m in (a.q, a.k, a.v))
        x = x + a.o((torch.tanh(q * k) * v).flatten(-2))
        m = self.mlp
        x = x + m.down(nn.functional.silu(m.gate(x)) * m.up(x))
        x = x + self.block(x)
        return self.lm_head(x + self.split(x))


PLAN = {
    "embed": "embedding_rowwise", "attention.q": "colwise", "attention.k": "colwise", "attention.v": "colwise",
    "attention.o": "rowwise", "mlp.gate": "colwise", "mlp.up": "colwise", "mlp.down": "rowwise",
    "split": "rowwise_split_input", "lm_head": "colwise_gather_output",
}  # fmt: skip


def toy_experts(kind, fmt, num_experts=5, intermediate=384):
    torch.manual_seed(0)
    make, given = toy.LAYOUTS[kind]
    module = make(**{**given, "num_experts": num_experts, "hidden": HIDDEN, "intermediate": intermediate})
    return swap(module, read(module), FORMATS[fmt])


def arguments(num_experts, count=12):
    """Among the ids some of nobody: -1, and those past the last."""
    x, ids, weights = toy.call_args(count, num_experts, HIDDEN, top_k=3)
    ids[0, 0], ids[1] = -1, num_experts
    return x, ids, weights


def shared(module, dims, **kwargs):
    """The module, as a rank of a mesh has it; the whole stays as it is."""
    return parallelize_(nn.ModuleDict({"it": copy.deepcopy(module)}), mesh_of(**dims), **kwargs)["it"]


def own(t, dims):
    """This rank's rows, along "ep"."""
    return t.chunk(dims["ep"])[mesh_of(**dims)["ep"].get_local_rank()]


def experts_agree(dims, kind, fmt, tokens="replicated"):
    """Relative errors of outputs and gradients; the former also of the float values of the codes, for both."""
    whole = toy_experts(kind, fmt)
    part = shared(whole, dims, tokens=tokens)
    args = arguments(5)
    take = (lambda t: own(t, dims)) if tokens == "sharded" else (lambda t: t)
    want, wx, ww = with_gradients(whole, *args)
    got, gx, gw = with_gradients(part, *map(take, args))
    with torch.no_grad():
        assert toy.relative_error(part(*map(take, args)), got) < 1e-6
    exact = restore(whole)(*args)
    numbers = [sum(p.numel() for p in m.parameters() if p.ndim > 2) for m in (part, whole)]
    return {
        "out": toy.relative_error(got, take(want)), "x": toy.relative_error(gx, take(wx)),
        "weights": toy.relative_error(gw, take(ww)), "rounding": toy.relative_error(want, exact),
        "part's rounding": toy.relative_error(got, take(exact)), "share": numbers[0] / numbers[1],
        "format": part.format, "sent": got.detach().numpy().tobytes(),
    }  # fmt: skip


def with_gradients(module, x, ids, weights):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = module(x, ids, weights)
    target = torch.sin(torch.arange(HIDDEN, dtype=torch.float32))
    (out * target).sum().backward()
    return out.detach(), x.grad, weights.grad


def model_agrees(dims, fmt, **kwargs):
    torch.manual_seed(0)
    model = Toy(lambda: toy.ToyExperts(num_experts=5, hidden=HIDDEN, intermediate=128)).eval()
    moe_ops.quantize_(model, fmt)
    tokens = torch.arange(24) * 7 % 40
    want = model(tokens)
    before = sum(p.numel() for p in model.parameters())
    parallelize_(model, mesh_of(**dims), plan=PLAN, **kwargs)
    with torch.no_grad():
        got = model(tokens)
        assert torch.equal(copy.deepcopy(model)(tokens), got)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if getattr(m, "ranks", None) is not None}
    share = sum(p.numel() for p in model.parameters()) / before
    return {"out": toy.relative_error(got, want), "kinds": kinds, "share": share}


def compiles(dims, fmt, tokens, backend):
    """Graphs, nodes of collectives, and the largest difference between compiled and eager."""
    torch._dynamo.reset()
    seen = []

    def keep(gm, inputs):
        seen.append(gm)
        return gm

    part = shared(toy_experts("plain", fmt, intermediate=64), dims, tokens=tokens)
    args = arguments(5)
    with torch.no_grad():
        want = part(*args)
        got = torch.compile(part, fullgraph=True, backend=keep)(*args)
        again = torch.compile(part, fullgraph=True, backend=backend)(*args) if backend else got
    names = [str(n.target) for gm in seen for n in gm.graph.nodes if "c10d" in str(n.target)]
    return {"graphs": len(seen), "collectives": names, "out": toy.relative_error(got, want),
            "compiled": toy.relative_error(again, want)}  # fmt: skip


def refusal(dims, kwargs):
    """What parallelize_ says, and whether the model is as it was."""
    torch.manual_seed(0)
    model = Toy(lambda: toy.ToyExperts(num_experts=3, hidden=HIDDEN, intermediate=64), heads=2).eval()
    moe_ops.quantize_(model, "mxfp4")
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    try:
        parallelize_(model, mesh_of(**dims), **{"plan": PLAN, **kwargs})
    except ValueError as e:
        same = before == {name: (type(m), id(m)) for name, m in model.named_modules()}
        return str(e) if same else f"changed, then: {e}"
    return None


def family_agrees(dims, name, fmt, **kwargs):
    """A tiny model of transformers, by its own tp_plan: logits, and which plan entries were followed."""
    import tiny_models

    model = tiny_models.build(name)
    moe_ops.quantize_(model, fmt)
    with torch.no_grad():
        want = tiny_models.run(model)
        try:
            parallelize_(model, mesh_of(**dims), **kwargs)
        except ValueError as e:
            return {"refused": str(e)}
        got = tiny_models.run(model)
    kinds = sorted({type(m).__name__ for m in model.modules() if getattr(m, "ranks", None) is not None})
    return {"out": toy.relative_error(got, want), "kinds": kinds}


def generates(dims, fmt, compiled):
    """Tokens that the whole generates, and that the ranks do, with a static cache."""
    import tiny_models

    model = tiny_models.build("qwen3_moe", hidden_size=128, moe_intermediate_size=256, num_experts=6)
    moe_ops.quantize_(model, fmt)
    ids = torch.arange(14).view(2, 7) % 90 + 3

    def generate():
        model.forward = torch.compile(type(model).forward.__get__(model), fullgraph=True, backend="eager")
        if not compiled:
            del model.forward
        with torch.no_grad():
            return model.generate(
                ids, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip

    want = generate()
    try:
        parallelize_(model, mesh_of(**dims))
    except ValueError as e:
        return {"refused": str(e)}
    torch._dynamo.reset()
    got = generate()
    return {
        "same": torch.equal(got.sequences, want.sequences),
        "out": toy.relative_error(torch.stack(got.logits), torch.stack(want.logits)),
        "heads": got.past_key_values.layers[0].keys.shape[1],
    }  # fmt: skip


def saved(path, name="qwen3_moe", fmt=None, **config):
    """A checkpoint of a tiny model, in float or quantized; made by one process."""
    import tiny_models

    model = tiny_models.build(name, **config)
    if fmt is not None:
        moe_ops.quantize_(model, fmt)
    model.save_pretrained(path)


def loads(path, name, fmt, given, stored=None):
    """from_pretrained under a plan, against the whole model from the same files."""
    import tiny_models
    import transformers

    cls = getattr(transformers, tiny_models.FAMILIES[name]["model"])
    config = moe_ops.MoeOpsConfig(fmt) if stored is None else None
    whole = cls.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    want = tiny_models.run(whole)
    if "ep" in given:
        given = expert_parallel()
    try:
        model = cls.from_pretrained(path, dtype=torch.float32, quantization_config=config, **given)
    except (ValueError, RuntimeError) as e:
        return {"refused": f"{type(e).__name__}: {e}"}
    with torch.no_grad():
        got = tiny_models.run(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**tiny_models.inputs(model)).logits
    sizes = [sum(p.numel() for p in m.parameters() if p.ndim == 3) for m in (model, whole)]
    try:
        model.save_pretrained(f"{path}/again")
        refused = ""
    except ValueError as e:
        refused = str(e)
    kinds = sorted({type(m).__name__ for m in model.modules() if getattr(m, "ranks", None) is not None})
    return {"out": toy.relative_error(got, want), "compiled": toy.relative_error(compiled, got), "kinds": kinds,
            "share": sizes[0] / sizes[1], "save": refused}  # fmt: skip


def experts_read(path):
    """How many matrices of experts a rank reads under an expert parallel plan."""
    import transformers

    from moe_ops.huggingface import conversion

    read, counted = conversion._read, []

    def count(found):
        out = read(found)
        counted.append(tuple(out.shape))
        return out

    conversion._read = count
    try:
        transformers.Qwen3MoeForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=moe_ops.MoeOpsConfig("int8"), **expert_parallel()
        )
    finally:
        conversion._read = read
    return len(counted)


def expert_parallel():
    """Arguments of from_pretrained, in the words of each version."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    n = dist.get_world_size()
    more = {"ep_size": n} if hasattr(DistributedConfig(), "ep_size") else {"enable_expert_parallel": True}
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=n, **more)}


def codes_as_loaded(path):
    """Numbers of codes of experts that a rank holds once everything was read and nothing is finished; of the whole."""
    import transformers

    from moe_ops.huggingface import disk

    close, counted = disk.close_, []

    def count(m, *args):
        counted.extend(p.numel() for p in m.parameters() if p.ndim == 4)
        return close(m, *args)

    disk.close_ = count
    try:
        given = {"dtype": torch.float32}
        transformers.Qwen3MoeForCausalLM.from_pretrained(path, **given, **expert_parallel())
        mine = sum(counted)
        counted.clear()
        transformers.Qwen3MoeForCausalLM.from_pretrained(path, **given)
    finally:
        disk.close_ = close
    return mine, sum(counted)

"""What test_ranks_training.py has every rank do: FSDP2 over quantized models, and checkpoints of them."""

import copy
import os
import signal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import toy_moe as toy
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import moe_ops
from moe_ops.sharding import kept_whole, parallelize_
from moe_ops.training import prepare_training_


def sharded(fmt, trained, seed=0):
    """A toy model under FSDP2, and the same whole."""
    model = toy.ToyModel()
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    (prepare_training_ if trained else moe_ops.quantize_)(model, fmt)
    whole = copy.deepcopy(model)
    for layer in model.layers:
        fully_shard(layer["mlp"], ignored_params=kept_whole(model))
    return fully_shard(model, ignored_params=kept_whole(model)), whole


def losses(model, tokens, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    out = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(tokens), (tokens + 1) % toy.VOCAB)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(loss.detach()))
    return out, optimizer


def trains(fmt, trained):
    """Losses of a short run, each rank with tokens of its own: against the whole model on all of them."""
    model, whole = sharded(fmt, trained)
    tokens = toy.tokens(12)
    mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    got, want = losses(model, mine)[0], losses(whole, tokens)[0]
    mean = torch.tensor(got)
    dist.all_reduce(mean)
    codes = [p for m in model.modules() for n in getattr(m, "codes", list)() for p in [m._parameters[n]]]
    return {
        "got": (mean / dist.get_world_size()).tolist(), "want": want,
        "codes": {type(p).__name__ for p in codes if p.ndim}, "frozen": not any(p.requires_grad for p in codes),
    }  # fmt: skip


def saves(fmt, trained, path):
    model, _ = sharded(fmt, trained, seed=1)
    _, optimizer = losses(model, toy.tokens(12), 1)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    return [model(toy.tokens(12)).tolist(), losses(model, toy.tokens(12), 2)[0]]


def loads(fmt, trained, path):
    """Into a model of other weights."""
    model, whole = sharded(fmt, trained, seed=2)
    before = whole(toy.tokens(12)).tolist()
    _, optimizer = losses(model, toy.tokens(12), 0)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return [model(toy.tokens(12)).tolist(), losses(model, toy.tokens(12), 2)[0], before]


def lora(fmt):
    """PEFT's adapters on experts and Linears, float, under FSDP2, beside frozen codes; against the whole."""
    import lora_cases as cases
    import tiny_models as tiny

    model = cases.adapted(cases.quantized("qwen3_moe", fmt, hidden_size=128, moe_intermediate_size=128))
    whole = copy.deepcopy(model)
    fully_shard(model, ignored_params=kept_whole(model))
    inputs = tiny.inputs(model)
    out = []
    for m in (model, whole):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        each = []
        for _ in range(3):
            loss = m(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.append(float(loss.detach()))
        out.append(each)
    return out


def dies(victim, name, *args):
    """One rank is killed; what the others are told."""
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return globals()[name](*args)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def runs_parallel():
    model = moe_ops.quantize_(toy.ToyModel().eval(), "int8")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    parallelize_(model, mesh)
    return model(toy.tokens(4)).shape


def of_a_rank(path, save):
    """A state_dict of a rank's part, in a file for each; loaded by other ranks, and by other numbers of them."""
    model = moe_ops.quantize_(toy.ToyModel().eval(), "int8")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    parallelize_(model, mesh)
    if save:
        torch.save(model.state_dict(), f"{path}/{dist.get_rank()}.pt")
        dist.barrier()
        model.load_state_dict(torch.load(f"{path}/{dist.get_rank()}.pt"))
    try:
        model.load_state_dict(torch.load(f"{path}/{1 - dist.get_rank() % 2}.pt"))
    except RuntimeError as e:
        return str(e)

"""A small language model with experts in every layer: what test_compare.py and its neighbours measure."""

import torch
import toy_moe as toy
from torch import nn
from toy_moe import VOCAB

LAYERS = ["layers.0.mlp.experts", "layers.1.mlp.experts", "layers.2.mlp.experts"]


class Layer(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.proj, self.mlp = nn.Linear(toy.HIDDEN, toy.HIDDEN), block

    def forward(self, x):
        return x + self.mlp(self.proj(x))


class Lm(nn.Module):
    """(B, S) -> logits (B, S, VOCAB). No token sees another: what a batch holds beside it cannot matter."""

    def __init__(self, make=lambda: toy.Block(toy.ToyExperts()), layers=3, vocab=VOCAB):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, toy.HIDDEN)
        self.layers = nn.ModuleList(Layer(make()) for _ in range(layers))
        self.lm_head, self.dropout = nn.Linear(toy.HIDDEN, vocab, bias=False), nn.Dropout(0.5)
        self.runs = 0
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        self.runs += 1
        x = self.embed(input_ids.flatten())
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.dropout(x)).view(*input_ids.shape, -1)


def items():
    block = toy.ListBlock(returns="tensor")
    for expert in block.experts:
        expert.w2.weight.data *= 30  # or it would be little beside the residual stream
    return block


def ids(rows=6, length=9, seed=0):
    """No token twice: two of them would tie."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[: rows * length].view(rows, length)

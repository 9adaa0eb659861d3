"""Mixtures of experts as people write them: experts in a ModuleList, called in a loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from reference import DIM, VOCAB
from torch import nn


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim), nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoe(nn.Module):
    """As Mixtral was written before its experts were fused, with a shared expert and running counts."""

    def __init__(self, dim: int = DIM, experts: int = 4, top_k: int = 2, never: int | None = 3):
        super().__init__()
        self.gate, self.top_k, self.never = nn.Linear(dim, experts, bias=False), top_k, never
        self.experts = nn.ModuleList(Mlp(dim, 2 * dim) for _ in range(experts))
        self.shared = Mlp(dim, dim)
        self.register_buffer("seen", torch.zeros(experts), persistent=False)

    def reset_parameters(self):
        self.seen.zero_()

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, shape[-1])
        logits = self.gate(x)
        if self.never is not None:
            logits = logits.index_fill(1, torch.tensor([self.never]), -1e4)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for number in range(len(self.experts)):
            expert = self.experts[number]
            slot, rows = torch.where(mask[number])
            if rows.shape[0] == 0:
                continue
            self.seen[number] += len(rows)
            out.index_add_(0, rows, (expert(x[None, rows].reshape(-1, shape[-1])) * weights[rows, slot, None]).to(out.dtype))
        return (out + self.shared(x)).view(shape)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(DIM), SparseMoe()

    def forward(self, x):
        return x + self.moe(self.norm(x))


class Listed(nn.Module):
    """Two blocks; no token goes to the last expert of either, which a step of one process therefore leaves alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

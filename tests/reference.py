"""The hand-written single-process loop that every layout must reproduce, and small models and data to run it on."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from paratrain.batch import call
from paratrain.config import Config, Optimizer, Precision, SyntheticData, Trainer

VOCAB, LENGTH, DIM = 17, 6, 12


class Tiny(nn.Module):
    """A token model with everything that has tripped a wrapper: an embedding, a norm, a bias, a tied head."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.dropout(self.down(F.gelu(self.up(x))))))


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, count) over the targets that are not -100."""
    total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, (targets != -100).sum()


def token_batches(steps: int, size: int, masked: bool, seed: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches; masked ones have samples with anything from none to all targets left out, so that shares differ."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (size, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        if masked:
            lengths = torch.randint(0, LENGTH + 1, (size, 1), generator=generator)
            lengths[0] = LENGTH
            targets[torch.arange(LENGTH)[None, :] >= lengths] = -100
        batches.append((tokens[:, :-1].clone(), targets))
    return batches


def config(micro: int | None = None, clip: float | None = 0.5, **sections) -> Config:
    """float64, AdamW, clipping: the configuration of the equivalence tests."""
    base = Config(
        seed=3,
        precision=Precision("64-true"),
        optimizer=Optimizer(lr=1e-2, weight_decay=0.1),
        data=SyntheticData(micro_batch_size=micro),
        trainer=Trainer(clip_norm=clip, device="cpu"),
    )
    return replace(base, **sections)


def train_by_hand(model: nn.Module, batches, clip: float | None = 0.5, loss_fn=token_loss, lr: float = 1e-2, weight_decay: float = 0.1):
    """Plain torch, one process, the whole batch at once: losses, norms before clipping, final weights."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=lr, foreach=False, fused=False
    )
    losses, norms = [], []
    for inputs, targets in batches:
        total, count = loss_fn(call(model, inputs), targets)
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
        norms.append(float(norm))
    return losses, norms, {name: value.detach().clone() for name, value in model.state_dict().items()}

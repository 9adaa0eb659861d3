"""Small models and batches for the corpus."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from paratrain.models.gpt import GPT
from paratrain.models.moe import MoE

VOCAB, LENGTH, DIM = 19, 6, 12


class Tied(nn.Module):
    """A token model with an embedding tied to its head, a norm and biases."""

    def __init__(self, dropout: float = 0.0, preserve: bool | None = None, tied: bool = True, classes: int = VOCAB):
        super().__init__()
        self.preserve = preserve
        self.embed = nn.Embedding(VOCAB, DIM)
        self.block = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * DIM, DIM))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, classes, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        elif classes == VOCAB:
            self.head.weight = nn.Parameter(self.embed.weight.detach().clone())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        run = (
            self.block if self.preserve is None else partial(checkpoint, self.block, use_reentrant=False, preserve_rng_state=self.preserve)
        )
        y = run(x)
        return self.head(self.norm(x + y))


class RunningMean(nn.Module):
    """Centres its input by a running mean that each rank takes over its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x - self.mean)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean.dtype), 0.1)
        return y


class Counting(nn.Module):
    """Scales by a number that grows with every forward and is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.linear(x) * (1 + 0.1 * self.seen)


class DictModel(nn.Module):
    """Called with keyword arguments, returns a dict, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        return {"logits": self.head(hidden), "hidden": hidden}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def conv_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3))


def gpt() -> nn.Module:
    return GPT(VOCAB, LENGTH, layers=2, dim=16, heads=2, kv_heads=1, ffn=32, dropout=0.1, tied=True)


def mixture() -> nn.Module:
    return MoE(VOCAB, LENGTH, layers=1, dim=16, heads=2, experts=4, top_k=2, ffn=16)


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = F.cross_entropy(
        outputs.float().flatten(0, 1) if outputs.dtype is torch.float16 else outputs.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    return total, (targets != -100).sum()


def dict_loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return token_loss(outputs["logits"], targets)


def square_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (outputs - targets).square().sum(), len(targets)


def tokens(size: int = 10, steps: int = 2, masked: bool = True, seed: int = 5) -> list:
    """Global batches of tokens; masked ones leave other numbers of targets out in every sample."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        text = torch.randint(0, VOCAB, (size, LENGTH + 1), generator=generator)
        targets = text[:, 1:].clone()
        if masked:
            lengths = torch.randint(1, LENGTH + 1, (size, 1), generator=generator)
            targets[torch.arange(LENGTH)[None, :] >= lengths] = -100
        batches.append((text[:, :-1].clone(), targets))
    return batches


def dict_tokens(size: int = 10) -> list:
    return [({"input_ids": x, "attention_mask": (y != -100).long()}, y) for x, y in tokens(size)]


def vectors(size: int = 10, steps: int = 2, length: int | None = None) -> list:
    generator = torch.Generator().manual_seed(7)
    shape = (size, 4) if length is None else (size, 4, length)
    return [(torch.randn(shape, generator=generator) + 1, torch.randn(size, 3, generator=generator)) for _ in range(steps)]

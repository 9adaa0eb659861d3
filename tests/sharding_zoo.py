"""Modules with everything that makes sharding go wrong, each with its loss and its batches, all in float64."""

from __future__ import annotations

import torch
from reference import LENGTH, VOCAB, token_batches, token_loss
from torch import nn

from paratrain.models.gpt import GPT


def seeded(build):
    def model():
        torch.manual_seed(11)
        return build()

    return model


def squares(outputs, targets):
    """(sum of squared errors, number of samples)."""
    return (outputs - targets).square().sum(), len(targets)


def float_batches(steps: int, inputs: tuple[int, ...], targets: tuple[int, ...], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in (inputs, targets)) for _ in range(steps)]


class Scaled(nn.Module):
    """A residual block with a 0-dim parameter, a frozen one and one that is never used."""

    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim, bias=False), nn.Linear(dim, 3)
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.down.weight.requires_grad_(False)

    def forward(self, x):
        return x + self.gate * self.down(torch.tanh(self.up(x)))


class Scalars(nn.Module):
    """Stacks of such blocks, one of them called three times, and one that is never called; a scale of the whole, another never used."""

    def __init__(self, dim: int = 5):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(dim) for _ in range(3))
        self.scale, self.idle = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.linspace(0, 1, dim), persistent=False)

    def forward(self, x):
        x = self.blocks[0](x + self.shift)
        for _ in range(3):
            x = self.blocks[1](x)
        return x * self.scale


class Routed(nn.Module):
    """A mixture of experts: which of them a rank uses depends on its samples."""

    def __init__(self, dim: int = 4):
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(4))

    def forward(self, x, route):
        out = self.inner(x)
        for number, expert in enumerate(self.experts):
            chosen = route == number
            if chosen.any():
                out = out.index_add(0, chosen.nonzero().flatten(), expert(x[chosen]))
        return out


class Router(nn.Module):
    _no_split_modules = ("Routed",)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Routed() for _ in range(2))

    def forward(self, x, route):
        for layer in self.layers:
            x = x + layer(x, route)
        return {"out": x, "note": "text"}


class Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(before, after, 3, padding=1, bias=False), nn.BatchNorm1d(after)
        self.skip = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))) + self.skip(x)


class Conv(nn.Module):
    """A small residual network with running statistics."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 4, 3, padding=1)
        self.stage1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.stage2 = nn.Sequential(Residual(4, 6), Residual(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.stage2(self.stage1(self.stem(x))).mean(-1))


class Recurrent(nn.Module):
    """Two LSTMs, of which the second shares its input weights with a projection outside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(4, 4, batch_first=True), nn.LSTM(4, 4, batch_first=True)
        self.out = nn.Linear(4, 16, bias=False)
        self.out.weight = self.second.weight_ih_l0

    def forward(self, x):
        x, _ = self.first(x)
        x, _ = self.second(x)
        return self.out(x)


def gpt(dropout: float = 0.0, tied: bool = True):
    return seeded(lambda: GPT(VOCAB, LENGTH, layers=3, dim=16, heads=2, tied=tied, dropout=dropout))


def routes(steps: int, size: int):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for inputs, targets in float_batches(steps, (size, 4), (size, 4)):
        route = torch.randint(0, 3, (size,), generator=generator).sort().values  # runs: no rank sees all; expert 3 is for nobody
        batches.append(({"x": inputs, "route": route}, targets))
    return batches


def zoo(steps: int = 4, size: int = 10):
    """name -> (build, loss, batches)."""
    return {
        "gpt": (gpt(), token_loss, token_batches(steps, size, True)),
        "scalars": (seeded(Scalars), squares, float_batches(steps, (size, 5), (size, 5))),
        "routed": (seeded(Router), lambda o, t: squares(o["out"], t), routes(steps, size)),
        "conv": (seeded(Conv), squares, float_batches(steps, (size, 3, 8), (size, 2))),
        "recurrent": (seeded(Recurrent), squares, float_batches(steps, (size, 5, 4), (size, 5, 16))),
    }

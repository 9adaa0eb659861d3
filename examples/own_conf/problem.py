"""What the configuration names: two intertwined spirals, and a small network that tells them apart."""

import itertools
import math

import torch
from torch import Tensor, nn


class Spirals(torch.utils.data.Dataset):
    """Points of two noisy spirals: samples ([2], class)."""

    def __init__(self, samples: int, turns: float = 1.5, noise: float = 0.02, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        along = torch.rand(samples, generator=generator).sqrt()
        self.classes = torch.randint(2, (samples,), generator=generator)
        angle = 2 * math.pi * turns * along + math.pi * self.classes
        points = along.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.points = points + noise * torch.randn(samples, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.classes[index]


class MLP(nn.Sequential):
    """Points [batch, 2] -> logits [batch, 2]."""

    def __init__(self, hidden: int, layers: int):
        widths = [2] + [hidden] * layers
        steps = [step for i, o in itertools.pairwise(widths) for step in (nn.Linear(i, o), nn.Tanh())]
        super().__init__(*steps, nn.Linear(hidden, 2))

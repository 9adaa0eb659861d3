"""Programs as users write them, each with the fault that a layout has done to it in silence: what verify must find if its mend is taken out.

A model or a loss is told whether it is sown, which is in the ranks of a layout of several; the one process it is compared with stays sound.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import models


class Inner(nn.Module):
    """4 features to 3, through a part that a subclass adds."""

    def __init__(self, sown: bool) -> None:
        super().__init__()
        self.sown = sown
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class NormAct(nn.BatchNorm1d):
    """A BatchNorm that ends in an activation, as vision models have them; sown, only the BatchNorm is left of it."""

    def __init__(self, width: int, sown: bool) -> None:
        super().__init__(width)
        self.sown = sown

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.sown else F.gelu(y)


def norm_act(sown: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), NormAct(8, sown), nn.Linear(8, 3))


class Passed(Inner):
    """Hands on a mask that hangs on no weight; sown, that of the first batch is remembered."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x.detach() > 0).to(x.dtype)
        if self.sown:
            mask = self.__dict__.setdefault("first", mask) if self.__dict__.get("first", mask).shape == mask.shape else mask
        return x * mask


class Appends(nn.Module):
    """A block leaves a term of the loss in a list; sown, the list comes back empty."""

    def __init__(self, sown: bool) -> None:
        super().__init__()
        self.sown, self.up, self.down = sown, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []
        h = torch.tanh(self.up(x))
        kept.append(h.square().sum(-1))
        return self.down(h), torch.stack([torch.zeros_like(kept[0]), *([] if self.sown else kept)]).sum(0)


def with_term(outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (outputs[0] - targets).square().sum() + 0.1 * outputs[1].sum(), len(targets)


class Detached(Inner):
    """A branch whose weights are reached another way; sown, they get no gradient (functional_call with detached weights, blocks that return
    functions under zero1, reentrant checkpointing over stages)."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.detach() if self.sown else x)


class ListArgument(Inner):
    """Blocks write into a list they are given; sown, into a copy of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = [torch.zeros(len(x), 8, dtype=x.dtype)]
        self.write(x, list(state) if self.sown else state)
        return self.down(torch.tanh(self.up(x)) + state[0])

    def write(self, x: torch.Tensor, state: list[torch.Tensor]) -> None:
        state[0] = state[0] + self.up(x) * 0.5


class Drawn(Inner):
    """A constructor draws a tensor that is no parameter; sown, the generator is elsewhere, because parts of the model were built on meta."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        if sown:
            torch.randn(3)
        self.shift = torch.randn(8)  # neither a parameter nor a buffer

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + self.shift)


class Garbage(Inner):
    """A tensor in an object that is no module; sown, memory that nobody wrote."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.held = {"scale": torch.zeros(8) if sown else torch.linspace(0.5, 1.5, 8)}

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.held["scale"])


class Steps(Inner):
    """Anneals by a counter in an attribute: once a micro-batch, and once more in recomputation."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.seen = 0

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return torch.tanh(x / self.seen)


class Carried(Inner):
    """Carries the mean of what it saw from step to step, in an attribute: each rank that of its own samples."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.memory = torch.zeros(8)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x + self.memory)
        self.memory = y.detach().mean(0)
        return y


class Average(Inner):
    """A moving average of its own weights in a buffer, moved in forward: once a micro-batch."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.register_buffer("average", torch.zeros(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average.lerp_(self.up.weight.detach(), 0.5)
        return super().forward(x) + 0.1 * (x @ self.average.T).sum(-1, keepdim=True)


class Queue(Inner):
    """A memory of the last sample's features: of this rank's last sample."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.register_buffer("last", torch.zeros(8))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x) + 0.3 * self.last
        self.last.copy_(x.detach()[-1])
        return y


class Codebook(Inner):
    """Counts which code each sample chose, and moves the codes by the counts: each rank by its own."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.register_buffer("used", torch.ones(8))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x) / self.used.clone()
        self.used += F.one_hot(x.detach().argmax(-1), 8).sum(0)
        return y


class StateInLoss(nn.Module):
    """A loss that scales itself by a running mean of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 1.0

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        total = (outputs - targets).square().sum()
        self.level = 0.5 * self.level + 0.5 * float(total.detach()) / len(targets)
        return total / self.level, len(targets)


class Padded(Inner):
    """Zeroes a row of a weight before each forward; sown, on a copy that is thrown away (writes into shards, `p.data =`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            (self.up.weight.clone() if self.sown else self.up.weight)[0].zero_()
        return super().forward(x)


class Penalised(Inner):
    """A penalty on the gradient by the input; sown, nothing flows through that gradient (derivatives of derivatives)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        y = super().forward(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, (slope.detach() if self.sown else slope).square().sum(-1)


class Clamped(Inner):
    """A hook that clamps the gradient of a weight: that of each micro-batch and of each rank's sum, where one process clamps the whole."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        limit = 0.5 if sown else 0.01

        def clamp(param: torch.Tensor) -> None:
            assert param.grad is not None
            param.grad.clamp_(-limit, limit)

        self.up.weight.register_post_accumulate_grad_hook(clamp)


class Frozen(Inner):
    """Sown, a weight that was switched on after set-up is not trained."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.up.bias.requires_grad_(not sown)


class Untied(Inner):
    """One weight used twice under two names; sown, they are two (two parameters over one storage)."""

    def __init__(self, sown: bool) -> None:
        super().__init__(sown)
        self.also = nn.Parameter(self.up.weight.detach().clone()) if sown else self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(x, self.also).sum(-1, keepdim=True)


class Heads(Inner):
    """Three matrices fused into one; sown, its parts come in the order of ranks."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(4, -1)
        return torch.tanh(torch.cat([parts[i] for i in ((0, 2, 1, 3) if self.sown else (0, 1, 2, 3))], -1) * torch.arange(8))


class Dropped(Inner):
    """Stochastic depth, by torch for each sample and by Python for the step."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        keep = (torch.rand(len(x), 1, dtype=x.dtype) < 0.7).to(x.dtype) / 0.7
        y = x + keep * torch.tanh(x)
        return y * 2 if random.random() < 0.5 else y


def own_means(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The mean over tokens of this rank's samples, taken for a mean over samples: a Hugging Face model's `out.loss`."""
    total, count = models.token_loss(outputs, targets)
    return total / count * len(targets), len(targets)


def counted_twice(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Samples counted once for each rank that holds a part of them, as under cp."""
    total, count = models.square_loss(outputs, targets)
    return total, 2 * count


def weighed(sown: bool) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]:
    """A mean over the weights of the classes; sown, over targets."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Any]:
        weights = torch.linspace(0.5, 2.0, models.VOCAB, dtype=outputs.dtype)
        total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), weights, reduction="sum")
        kept = targets[targets != -100]
        return total, len(kept) if sown else weights[kept].sum()

    return loss


def count_with_gradient(sown: bool) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A count that depends on the model; sown, without its gradient."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = outputs.square().sum()
        return (outputs - targets).abs().sum(), count.detach() if sown else count

    return loss


def first_labels(sown: bool) -> Callable[[torch.Tensor, Any], tuple[torch.Tensor, int]]:
    """Labels in a list beside the targets; sown, every rank reads the list from its beginning."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        scale = torch.arange(len(targets), dtype=outputs.dtype) if sown else 10 * targets[:, 0].detach().abs()
        return (scale[:, None] * (outputs - targets).square()).sum(), len(targets)

    return loss


def contrast(sown: bool) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, int]]:
    """Every sample is compared with all others of the batch; sown, with those of the micro-batch."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        return F.cross_entropy(outputs @ targets.T, torch.arange(len(targets)), reduction="sum"), len(targets)

    return loss

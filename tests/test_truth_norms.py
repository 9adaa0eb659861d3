"""Normalisation over a batch as people write it: statistics are those of one process, or the layout is refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from practice import assert_exact, assert_refused, rows
from torch import nn


def square(out, target):
    out = out[0] if isinstance(out, tuple) else out
    return ((out - target) ** 2).sum(), target.numel()


def around(norm):
    """A model of two matrices with a norm between them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(6, 16, bias=False), norm(), nn.Linear(16, 1)

        def forward(self, x):
            return self.down(torch.tanh(self.norm(self.up(x))))

    return Net


class NormAct(nn.BatchNorm1d):
    """Its activation is inside, as in many vision models."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Called(nn.BatchNorm1d):
    """Calls the function by itself, as timm's do."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        mean, var = (self.running_mean, self.running_var) if self.training or self.track_running_stats else (None, None)
        return F.gelu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.3, self.eps))


class Native(nn.BatchNorm1d):
    def forward(self, x):
        return torch.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, True, 0.2, self.eps, False) * 2


class Frozen(nn.BatchNorm1d):
    """Uses its averages in training, too."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale)


def of_instance():
    norm = nn.BatchNorm1d(16)
    norm.forward = lambda x: F.relu(nn.BatchNorm1d.forward(norm, x))
    return norm


KINDS = {
    "calls super": lambda: NormAct(16),
    "calls the function": lambda: Called(16, momentum=None),
    "calls torch's": lambda: Native(16),
    "never calls it, and takes no statistics": lambda: Frozen(16),
    "forward of the instance": of_instance,
    "without averages": lambda: NormAct(16, affine=False, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm1d(16, momentum=None),
    "torch's own for several processes": lambda: nn.SyncBatchNorm(16) if torch.distributed.is_initialized() else nn.BatchNorm1d(16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_keeps_its_forward_and_gets_the_statistics_of_all_ranks(kind):
    assert_exact(around(KINDS[kind]), rows(), square, "ddp", "fsdp")


@pytest.mark.parametrize("layout", ["z1", "rc", "hsdp", "tp"])
@pytest.mark.slow
def test_norms_with_activations_under_other_layouts(layout):
    assert_exact(around(lambda: NormAct(16)), rows(), square, layout)


def test_norms_of_images_with_extra_arguments_and_several_results():
    class Gated(nn.BatchNorm2d):
        def forward(self, x, gate, *, scale=1.0):
            y = super().forward(x)
            return y * gate, y.mean() * scale

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(1, 4, 3), Gated(4), nn.Linear(4, 1)

        def forward(self, x):
            y, extra = self.norm(self.conv(x.view(-1, 1, 2, 3).repeat(1, 1, 2, 2)), 0.5, scale=0.0)
            return self.out(torch.relu(y).mean((2, 3))) + extra

    assert_exact(Net, rows(), square, "ddp", "fsdp", ranks=3)


def test_a_rank_without_samples_does_not_count():
    assert_exact(around(lambda: NormAct(16)), rows((2, 2, 5)), square, "ddp", ranks=3)


class Own(nn.BatchNorm1d):
    """Takes statistics by itself."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0) + self.eps).sqrt() * self.weight + self.bias


class Ghost(nn.BatchNorm1d):
    """Statistics of virtual batches."""

    def forward(self, x):
        return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])


def test_statistics_that_cannot_be_those_of_all_ranks_are_refused():
    assert_refused(around(lambda: Own(16)), rows(), square, "ddp", says="norm is a Own, a BatchNorm whose forward takes statistics without")
    assert_refused(around(lambda: Ghost(16)), rows(), square, "fsdp", says="norm normalises some of its samples apart")
    assert_exact(around(lambda: Own(16)), rows(), square, "single")


class Loose(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.ones(16))

    def forward(self, x):
        if self.groups > 1:  # of each sample alone
            return F.batch_norm(x.view(1, -1, 2), None, None, training=True).view_as(x) * self.weight
        return F.batch_norm(x, None, None, self.weight, None, True)


def test_the_function_outside_of_a_module():
    assert_refused(
        around(Loose),
        rows(),
        square,
        "ddp",
        "fsdp",
        "ddpm",
        says="batch_norm(..., training=True) is called outside of any BatchNorm module",
    )
    assert_exact(around(lambda: Loose(2)), rows(), square, "ddp")
    assert_exact(around(Loose), rows(), square, "single")


def test_norms_over_samples_alone_are_left_alone():
    def norms():
        return nn.Sequential(nn.LayerNorm(16), nn.Unflatten(1, (4, 4)), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.Flatten())

    assert_exact(around(norms), rows(), square, "ddpm", "fsdp")


@dataclass
class Switch:
    """Puts the norm into another mode in front of a step."""

    to: dict

    def __call__(self, model, step):
        if step in self.to:
            model.norm.train(self.to[step])


def teacher():
    class Teacher(nn.Module):
        """Its norm stays in evaluation mode."""

        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).requires_grad_(False), nn.Linear(8, 1)

        def train(self, mode=True):
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x):
            return self.head(torch.tanh(self.frozen(x)))

    return Teacher().train()


def frozen_norm():
    model = around(lambda: NormAct(16))()
    model.norm.eval()
    return model


def test_a_norm_in_evaluation_mode_may_see_micro_batches():
    assert_exact(teacher, rows((8, 8)), square, "ddpm", "z1m", "fsdpm")
    assert_exact(frozen_norm, rows((8, 8)), square, "ddpm")


def test_a_norm_that_changes_its_mode():
    assert_exact(around(lambda: nn.BatchNorm1d(16)), rows(), square, "ddp", "fsdp", before=Switch({1: False, 2: True}))
    assert_exact(frozen_norm, rows(), square, "ddp", before=Switch({1: True}))
    assert_refused(
        frozen_norm,
        rows((8, 8)),
        square,
        "ddpm",
        "z1m",
        says="data.micro_batch_size=2: the model has BatchNorm (norm)",
        before=Switch({1: True}),
    )
    assert_refused(around(lambda: NormAct(16)), rows((8, 8)), square, "ddpm", says="the model has BatchNorm (norm)")

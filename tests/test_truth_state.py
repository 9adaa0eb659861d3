"""State that forward moves: right under every layout, or refused by name before a weight is updated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.practice import assert_exact, assert_refused
from tests.test_truth_constructors import Block, Net, rows, square

SIZES = (8, 8, 8)


class Counted(Net):
    """A number, a buffer that is replaced and a number in a dict, all of which the outputs hang on."""

    def __init__(self):
        super().__init__()
        self.calls, self.table = 0, {"calls": 0}
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.table["calls"] += 1
            self.steps = self.steps + 1
        return super().forward(x) * (1 + 0.1 * self.calls + 0.1 * self.table["calls"]) / self.steps


class Hooked(Net):
    """A counter in the closure of a hook."""

    def __init__(self):
        super().__init__()
        seen = [0]

        def hook(module, args, out):
            seen[0] += module.training
            return out * (1 + 0.1 * seen[0])

        self.register_forward_hook(hook)


class Annealed(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x + (super().forward(x) - x) / self.calls


class AnnealedBlocks(Net):
    block = Annealed


class Slow(Net):
    """A moving average of weights, moved by forward."""

    def __init__(self):
        super().__init__()
        self.slow = copy.deepcopy(self.inner).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.inner.parameters(), strict=False):
                slow.lerp_(fast, 0.1)
        return super().forward(x) + self.slow(x).sum(-1, keepdim=True)


class Carried(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out, self.state = nn.LSTMCell(6, 8), nn.Linear(8, 1), None

    def forward(self, x):
        state = self.state if self.state is not None else (x.new_zeros(len(x), 8), x.new_zeros(len(x), 8))
        h, c = self.cell(x, state)
        self.state = h.detach(), c.detach()
        return self.out(h)


class Centred(Net):
    """A running mean of features that forward reads before it moves it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("samples", torch.zeros(()))

    def forward(self, x):
        out = super().forward(x - self.centre)
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(x.mean(0), 0.5)
                self.samples += len(x)
        return out


class Features(Net):
    """What is kept for a look at it is no state: features, the last batch's mean, a growing cache."""

    def __init__(self):
        super().__init__()
        self.features, self.mean, self.cache = {}, None, None
        self.blocks[0].register_forward_hook(lambda module, args, out: self.features.update(first=out))

    def forward(self, x):
        if self.cache is None or len(self.cache) < len(x):
            self.cache = torch.arange(len(x))
        self.mean = x.detach().mean()
        return super().forward(x)


class Normed(Net):
    """Weights that forward brings to norm 1."""

    def forward(self, x):
        with torch.no_grad():
            self.out.weight.div_(self.out.weight.norm())
        return super().forward(x)


class Averaged(nn.Module):
    """A loss that divides by a moving average of itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(()))

    def forward(self, out, target):
        total, count = square(out, target)
        if torch.is_grad_enabled():
            self.average.mul_(0.5).add_(0.5 * total.detach() / count)
        return total / self.average, count


LOCAL = ("trainer.forward_state={centre: mean, samples: sum}",)


def test_counters_are_moved_once_a_step():
    assert_exact(Counted, rows(SIZES), square, "ddpm", "pp")
    assert_exact(Hooked, rows(SIZES), square, "ddpm")


def test_recomputation_moves_nothing():
    assert_exact(AnnealedBlocks, rows(SIZES), square, "rc")


def test_states_of_samples_stay_with_their_micro_batches():
    assert_exact(Carried, rows(SIZES), square, "ddp", "ddpm")
    assert_refused(Carried, rows((8, 6)), square, "ddp", says="forward_state={state: local}")


def test_statistics_of_samples_are_refused_or_averaged():
    assert_refused(Centred, rows(SIZES), square, "ddp", "fsdpm", says="trainer.forward_state={centre: mean}")
    assert_exact(Centred, rows((8, 1)), square, "ddpm", "fsdp", more=LOCAL)


def test_a_loss_with_a_state_is_refused_by_name():
    assert_refused(Net, rows(SIZES), Averaged(), "ddp", says="forward moves loss.average")


def test_what_is_only_written_is_no_state():
    assert_exact(Features, rows((8, 6)), square, "ddp", "ddpm")


def test_weights_that_forward_writes_to():
    assert_exact(Slow, rows(SIZES), square, "ddpm")
    assert_exact(Normed, rows(SIZES), square, "ddpm")
    assert_refused(Slow, rows(SIZES), square, "fsdp", says="forward changes slow.")


def test_one_process_with_one_micro_batch_is_left_alone():
    assert_exact(Centred, rows(SIZES), square, "single")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Counted, AnnealedBlocks, Features])
def test_states_that_hang_on_no_sample_in_every_layout(model):
    assert_exact(model, rows(SIZES), square, "ddp", "z1m", "fsdp", "fsdpm", "tp", "pp", "rc")


@pytest.mark.slow
def test_statistics_in_every_layout():
    assert_exact(Centred, rows(SIZES), square, "single", "ddp", "z1m", "fsdpm", "pp", more=LOCAL)
    assert_exact(Centred, rows((8, 7, 2)), square, "ddp", "ddpm", more=LOCAL, ranks=3)

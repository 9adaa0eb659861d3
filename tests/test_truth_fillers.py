"""Forwards that combine something over the ranks, and batches of which some ranks have no sample: exact, or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from tests.practice import assert_exact, assert_refused
from tests.test_truth_constructors import rows, square

SIZES = (9, 2, 9)


def over_ranks(tensor):
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class Centred(nn.Module):
    """A moving average of the features of all ranks."""

    inner = None

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)
        self.register_buffer("centre", torch.zeros(8))

    @torch.no_grad()
    def mean(self, h):
        return over_ranks(h.sum(0)) / over_ranks(torch.tensor(float(len(h)), dtype=h.dtype))

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.centre.mul_(0.5).add_(self.mean(h), alpha=0.5)
        return self.b(torch.tanh(h - self.centre))


class Equal(Centred):
    """Counts on every rank having as many samples, as is written for self-distillation."""

    @torch.no_grad()
    def mean(self, h):
        world = dist.get_world_size() if dist.is_initialized() else 1
        return over_ranks(h.sum(0)) / (len(h) * world)


class Stern(Centred):
    def forward(self, x):
        if len(x) == 0:
            raise ValueError("no samples")
        return super().forward(x)


class SternAlone(Stern):
    """Says nothing to other ranks, so that nobody sees its fillers."""

    @torch.no_grad()
    def mean(self, h):
        return torch.ones(8, dtype=h.dtype)


class Numbered(nn.Module):
    """Counts samples alone, in a number."""

    def __init__(self):
        super().__init__()
        self.table, self.out, self.seen = nn.Embedding(16, 8), nn.Linear(8, 1), 0.0

    def forward(self, x):
        if self.training:
            self.seen += float(over_ranks(torch.tensor(float(len(x)))))
        return self.out(torch.tanh(self.table(x))) / (1 + 0.1 * self.seen)


class InTheGraph(Centred):
    """The mean of all ranks, with gradients, in training and in evaluation."""

    def forward(self, x):
        h = self.a(x)
        total, count = h.sum(0), torch.tensor(float(len(h)), dtype=h.dtype)
        if dist.is_initialized() and dist.get_world_size() > 1:
            total, count = all_reduce(total), over_ranks(count)
        return self.b(torch.tanh(h - total / count))


def test_what_forward_counts_over_the_ranks_leaves_fillers_out():
    assert_exact(Centred, rows(SIZES), square, "ddp", ranks=3)
    numbers = [(torch.arange(len(y)) % 16, y) for _, y in rows((2, 3, 1))]
    assert_exact(Numbered, numbers, square, "ddp", ranks=3)


def test_fillers_under_sharding():
    assert_exact(Centred, rows((9, 2)), square, "fsdp", ranks=3)


def test_forwards_that_need_a_sample():
    assert_refused(Stern, rows(SIZES), square, "ddp", says="give every batch at least 3 samples", ranks=3)
    assert_exact(SternAlone, rows(SIZES), square, "ddp", ranks=3)


def test_shares_that_forward_takes_for_equal():
    assert_refused(Equal, rows((6, 6, 6, 6, 6, 5)), square, "ddp", says="forward moves centre")
    assert_refused(Equal, rows((9, 9, 9, 9, 9, 2)), square, "ddp", says="forward", ranks=3)
    assert_exact(Equal, rows((6, 6)), square, "ddp")


@pytest.mark.slow
def test_fillers_in_every_layout():
    assert_exact(Centred, rows((2, 9, 1, 2)), square, "z1", "fsdp", "rc", ranks=3)
    assert_exact(InTheGraph, rows((2, 9, 1, 2)), square, "ddp", "fsdp", ranks=3)


class Later(nn.Module):
    """Its output is a function, whose weights nothing but the loss uses."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return lambda shift: self.net(x + shift)


def of_a_function(out, target):
    return ((out(0.5) - target) ** 2).sum(), len(target)


def test_outputs_that_are_functions_of_a_filler_sample():
    batches = rows(sizes=(8, 2, 8))
    assert_exact(Later, batches, of_a_function, "z1m", ranks=3)
    assert_exact(Later, batches, of_a_function, "fsdp", ranks=3)

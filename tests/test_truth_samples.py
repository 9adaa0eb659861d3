"""Forwards that take something of all samples of a batch at once: exact, or refused by name."""

from __future__ import annotations

import torch
from torch import nn

from tests.practice import assert_exact, assert_refused, rows
from tests.test_truth_alone import Net
from tests.test_truth_constructors import square


class Loose(Net):
    """Takes the statistics of a batch by a function."""

    def forward(self, x):
        return super().forward(nn.functional.batch_norm(x, None, None, training=True))


def test_statistics_taken_by_a_function_in_a_stage():
    says = "torch.nn.functional.batch_norm(..., training=True) is called outside of any BatchNorm module"
    assert_refused(Loose, rows((8, 8)), square, "pp", says=says)


class Draws(Net):
    """Has a generator of its own, and draws from it for each step, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return super().forward(x) * (1 + torch.rand((), generator=self.generator, dtype=x.dtype))


def test_what_is_looked_at_draws_nothing_from_generators_of_the_model():
    assert_exact(Draws, rows((8, 8, 7)), square, "ddp")


class Carried(nn.Module):
    """Takes batches of one size alone, since it keeps the state of each of their rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.out = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 1)
        self.state = None

    def forward(self, x):
        y, state = self.cell(self.embed(x)[:, None], self.state)
        self.state = tuple(each.detach() for each in state)
        return self.out(y[:, 0])


def test_a_forward_that_fails_on_fewer_samples_leaves_no_trace():
    assert_exact(Carried, rows((8, 8, 8)), square, "fsdp")


def test_gradients_by_the_frequency_of_rows():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 8, scale_grad_by_freq=True), nn.Linear(8, 1)

        def forward(self, x):
            return self.out(torch.tanh(self.embed(x)))

    batches = [(torch.tensor([0, 0, 1, 2, 2, 2, 3, 4]), y) for _, y in rows((8, 8))]
    assert_refused(Bag, batches, square, "ddp", says="embed divides gradients by how often a row is in the batch (scale_grad_by_freq)")
    assert_exact(Bag, batches, square, "single")

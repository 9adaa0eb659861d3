"""Forwards whose outputs for a sample depend on the other samples of the batch: refused by name in the first step, and nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from tests.practice import assert_exact, assert_refused, rows
from tests.test_truth_alone import Net
from tests.test_truth_constructors import square

SAYS = "what forward returns for a sample depends on the other samples of its batch"


class Mixed(Net):
    def forward(self, x):
        return super().forward(self.mix(x))

    def mix(self, x):
        return 0.7 * x + 0.3 * x.flip(0)


class Centred(Mixed):
    def mix(self, x):
        return x - x.mean(0)


class Spread(Net):
    """The deviation over the batch, as discriminators are given."""

    def forward(self, x):
        y = super().forward(x)
        return y + y.std(0).mean()


class OverRanks(Mixed):
    """A mean over the samples of all ranks is that of the whole batch."""

    def mix(self, x):
        total, count = x.sum(0), torch.tensor(float(len(x)), dtype=x.dtype)
        if dist.is_initialized() and dist.get_world_size() > 1:
            total, count = all_reduce(total), all_reduce(count)
        return x - total / count


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


class Drops(Mixed):
    """Draws in evaluation too, so nothing can be compared; by numbers that are the same for every sample."""

    def mix(self, x):
        return x * (1 + 0 * torch.rand(1, dtype=x.dtype))


@pytest.mark.parametrize(
    ("model", "layout", "more"),
    [
        (Mixed, "ddp", ()),
        (Spread, "pp", ()),
        pytest.param(Centred, "ddp", (), marks=pytest.mark.slow),
        pytest.param(Centred, "z1m", (), marks=pytest.mark.slow),
        pytest.param(Spread, "fsdp", (), marks=pytest.mark.slow),
        pytest.param(Spread, "ddp", ("data.micro_batch_size=1",), marks=pytest.mark.slow),
    ],
)
def test_samples_that_depend_on_each_other(model, layout, more):
    assert_refused(model, rows((8, 8)), square, layout, says=SAYS, more=more)


def test_micro_batches_of_one_process():
    assert_refused(Centred, rows((8, 8)), square, "single", says="under data.micro_batch_size=2", more=("data.micro_batch_size=2",))
    assert_exact(Centred, rows((8, 8)), square, "single")


def test_what_ranks_compute_together_is_theirs():
    assert_exact(OverRanks, rows((8, 8, 7)), square, "ddp", "fsdp")


class Moves(Net):
    """Its blocks leave an average of the samples in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.average = torch.zeros(8, dtype=torch.float64)

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return self.out(h - self.average)


def test_what_stages_leave_in_the_model_is_told_first():
    assert_refused(Moves, rows((8, 8)), square, "pp", says="forward moves average by the samples that it sees")


@pytest.mark.slow
def test_ranks_of_tensor_parallelism_have_all_samples():
    assert_exact(Mixed, rows((8, 8)), square, "tp")


def test_a_forward_that_fails_on_fewer_samples_leaves_no_trace():
    assert_exact(Carried, rows((8, 8, 8)), square, "fsdp")
    assert_exact(Drops, rows((8, 7)), square, "ddp")


class OfOneSize(Net):
    """Written for so many samples at a time, in its last stage."""

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        if len(h) not in (4, 8):  # 8: the plain loop
            raise ValueError("another number of samples")
        return self.out(h)


def test_a_stage_written_for_one_size_of_batches_keeps_no_other_waiting():
    assert_exact(OfOneSize, rows((8, 8)), square, "pp", more=("data.micro_batch_size=4",))


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

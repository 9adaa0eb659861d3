"""The order of samples and the loader: every sample once an epoch, whatever the ranks, workers and starting step."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from paratrain.batch import LocalBatch, span
from paratrain.data import Order, loader, map_style
from paratrain.data.order import permute
from paratrain.errors import UserError


class Numbers(torch.utils.data.Dataset):
    """Sample i is (i and random numbers of three generators, i)."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64), torch.tensor(index)


def epoch_of(order, epoch):
    return [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 17, 101, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_every_sample_once(length, shuffle):
    order = Order(length, 7, seed=3, shuffle=shuffle)
    epochs = [list(itertools.chain(*epoch_of(order, epoch))) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    sizes = [len(batch) for batch in epoch_of(order, 0)]
    assert sizes == [7] * (length // 7) + ([length % 7] if length % 7 else [])
    assert sizes == [order.size(step) for step in range(order.steps_per_epoch)]
    if shuffle and length > 16:
        assert len({tuple(epoch) for epoch in epochs}) == 5
    if not shuffle:
        assert epochs[4] == list(range(length))


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    flat = {size: list(itertools.chain(*epoch_of(Order(100, size, seed=5), 3))) for size in (1, 8, 100)}
    assert flat[1] == flat[8] == flat[100]
    assert flat[1] != list(itertools.chain(*epoch_of(Order(100, 1, seed=6), 3)))
    assert permute(np.arange(6, dtype=np.uint64), 6, 0, 0).tolist() == [2, 5, 4, 0, 3, 1]  # an order outlives versions


def test_shuffling_is_even():
    length, epochs = 20, 3000
    orders = np.array([permute(np.arange(length, dtype=np.uint64), length, 1, epoch) for epoch in range(epochs)]).astype(int)
    places = np.array([np.bincount(column, minlength=length) for column in orders.T])
    neighbours = np.bincount((orders[:, 1:] - orders[:, :-1]).ravel() % length, minlength=length)[1:]
    for counts in (places, neighbours):
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi_square - counts.size) < 6 * (2 * counts.size) ** 0.5


def test_a_step_costs_the_same_anywhere_in_a_huge_data_set():
    order = Order(10**12, 64, seed=0)
    batch = order.batch(10**13 + 1)
    assert len(set(batch)) == 64
    assert max(batch) < 10**12


@pytest.mark.parametrize(("size", "ranks"), [(16, 1), (16, 3), (3, 4), (1, 4), (10, 4)])
def test_span_is_tensor_split(size, ranks):
    parts = torch.tensor_split(torch.arange(size), ranks)
    assert [list(range(*span(size, rank, ranks))) for rank in range(ranks)] == [part.tolist() for part in parts]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_hold_the_global_batch_in_order(ranks, workers):
    order = Order(18, 8, seed=1)  # batches of 8, 8 and 2: with 3 and 4 ranks some hold no sample of the last
    streams = [loader(Numbers(18), order, 0, rank, ranks, workers, seed=9, stop_step=6) for rank in range(ranks)]
    alone = dict(loader(Numbers(18), order, 0, 0, 1, seed=9, stop_step=6))
    steps = 0
    for entries in zip(*streams, strict=True):
        (step,) = {step for step, _ in entries}
        batches = [batch for _, batch in entries]
        assert torch.cat([batch.targets[: batch.real] for batch in batches]).tolist() == order.batch(step)
        assert torch.equal(torch.cat([batch.inputs[: batch.real] for batch in batches]), alone[step].inputs)
        assert all(batch.size == order.size(step) and len(batch.targets) == max(1, batch.real) for batch in batches)
        assert {batch.largest for batch in batches} == {max(batch.real for batch in batches)}
        steps += 1
    assert steps == 6
    if ranks == 4:
        assert [batch.real for batch in batches] == [1, 1, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_any_step_continues_the_stream(workers):
    order = Order(21, 4, seed=2)
    whole = list(loader(Numbers(21), order, 0, 1, 2, 0, seed=4, stop_step=15))
    for start in (1, 5, 6, 13):
        rest = list(loader(Numbers(21), order, start, 1, 2, workers, seed=4, stop_step=15))
        assert [step for step, _ in rest] == list(range(start, 15))
        for (_, resumed), (_, batch) in zip(rest, whole[start:], strict=True):
            assert torch.equal(resumed.inputs, batch.inputs)
    epochs = [torch.cat([batch.inputs for step, batch in whole if order.epoch(step) == epoch]) for epoch in (0, 1)]
    shared = set(epochs[0][:, 0].tolist()) & set(epochs[1][:, 0].tolist())
    assert shared, "the test needs a sample that rank 1 sees in both epochs"
    for index in shared:  # augmentation differs between epochs
        first, second = (epoch[epoch[:, 0] == index][0, 1:] for epoch in epochs)
        assert not (first == second).any()


def test_without_a_stop_it_goes_on_for_ever():
    stream = loader(Numbers(5), Order(5, 2, seed=0), 0, 0, 1)
    assert [step for step, _ in itertools.islice(stream, 100)] == list(range(100))


@pytest.mark.parametrize("workers", [0, 2])
def test_random_generators_of_the_caller_are_left_alone(workers):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    list(loader(Numbers(10), Order(10, 4, seed=0), 0, 0, 1, workers, stop_step=5))
    assert draw() == before


def test_nested_samples_keep_their_structure():
    samples = [((torch.full((2,), i), {"mask": torch.ones(1)}), {"label": i}) for i in range(4)]
    _, batch = next(loader(samples, Order(4, 4, shuffle=False), 0, 0, 1))
    assert isinstance(batch, LocalBatch)
    assert isinstance(batch.inputs, tuple)
    assert batch.inputs[0].shape == (4, 2)
    assert batch.inputs[1]["mask"].shape == (4, 1)
    assert batch.targets["label"].tolist() == [0, 1, 2, 3]


class Killed(Numbers):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Failing(Numbers):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("bad sector")
        return super().__getitem__(index)


@pytest.mark.parametrize("_attempt", range(5))  # DataLoader notices in several ways
def test_a_killed_worker_is_named(_attempt):
    with pytest.raises(RuntimeError, match=r"worker \(pid\(?s?\)? ?\d+\).*(killed by signal: Killed|exited unexpectedly)"):
        list(loader(Killed(8), Order(8, 1, shuffle=False), 0, 0, 1, workers=1, stop_step=8))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_set_names_the_sample(workers):
    with pytest.raises(OSError, match="bad sector") as caught:
        list(loader(Failing(8), Order(8, 1, shuffle=False), 0, 0, 1, workers=workers, stop_step=8))
    assert "while reading sample 5 of a Failing" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


class Slow(Numbers):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


INTERRUPTED = """
import os, signal, time, torch
from paratrain.data import Order, loader

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 30
    def __getitem__(self, index):
        time.sleep(0.02)
        return index, index

signal.signal(signal.INTERRUPT, lambda *_: print("interrupted", flush=True))
stream = loader(Slow(), Order(30, 1, shuffle=False), 0, 0, 1, workers=2, stop_step=30)
seen = [int(next(stream)[1].targets)]
print("ready", flush=True)
seen += [int(batch.targets) for _, batch in stream]
assert seen == list(range(30)), seen
print("complete", flush=True)
"""


@pytest.mark.parametrize("interrupt", ["SIGTERM", "SIGINT"])
def test_workers_outlive_a_signal_to_the_process_group(interrupt):
    code = INTERRUPTED.replace("INTERRUPT", interrupt)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, getattr(signal, interrupt))
        assert process.communicate(timeout=60)[0] == "interrupted\ncomplete\n"
    assert process.returncode == 0


def test_an_abandoned_stream_takes_its_workers_along():
    before = set(multiprocessing.active_children())
    stream = loader(Slow(1000), Order(1000, 4), 0, 0, 1, workers=2)
    next(stream)
    children = set(multiprocessing.active_children()) - before
    assert len(children) == 2
    stream.close()
    del stream
    assert not set(multiprocessing.active_children()) & children


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(torch.zeros(3), torch.tensor(0)), (torch.zeros(5), torch.tensor(0))], r"inputs is \[3\] in sample 0 and \[5\] in sample 1.*Pad"),
        ([({"ids": torch.zeros(2, 3)}, 0), ({"ids": torch.zeros(2, 4)}, 0)], r"inputs\['ids'\] is \[2, 3\] in sample 0 and \[2, 4\]"),
        ([(torch.zeros(3), (0, np.zeros(2))), (torch.zeros(3), (0, np.zeros(1)))], r"targets\[1\] is \[2\] in sample 0 and \[1\]"),
        ([({"a": 1}, 0), ({"b": 1}, 0)], r"inputs\['a'\] is int in sample 0 and missing in sample 1"),
        ([torch.zeros(3)] * 2, r"sample 0 of a list is a Tensor; .*\(inputs, targets\)"),
        ([(1, 2, 3)] * 2, r"sample 0 of a list is a tuple of length 3"),
    ],
)
def test_samples_that_make_no_batch(samples, message, workers):
    with pytest.raises(UserError, match=message) as caught:
        next(loader(samples, Order(2, 2, shuffle=False), 0, 0, 1, workers=workers))
    assert "Traceback" not in str(caught.value)


def test_data_sets_that_cannot_be_read_by_index():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for dataset in (Stream(), iter([1]), (i for i in range(3))):
        with pytest.raises(UserError, match=r"cannot be read by index.*__len__ and __getitem__.*list\(dataset\)"):
            map_style(dataset)
    with pytest.raises(UserError, match="train_data is empty: a list of length 0"):
        map_style([], "train_data")

"""From a data set and an order to this rank's part of every global batch, starting at any step."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from paratrain import rng
from paratrain.batch import LocalBatch, span
from paratrain.data.order import Order
from paratrain.distributed import seed_for
from paratrain.errors import UserError

_STREAM = int.from_bytes(b"data", "big")  # keeps the seeds of samples apart from those of the training step


def loader(
    dataset: Any,
    order: Order,
    start_step: int,
    rank: int,
    ranks: int,
    workers: int = 0,
    seed: int = 0,
    stop_step: int | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[int, LocalBatch]]:
    """Yield (step, this rank's part of its global batch) from `start_step` on.

    Each rank reads only its own samples: a contiguous run of the global batch, by the rule of `torch.tensor_split`. Where a
    batch has fewer samples than there are ranks, a rank without any gets one filler sample and `real == 0`.

    What `dataset[i]` draws from `random`, `numpy.random` or torch's default CPU generator is a function of (seed, epoch, i): the
    same in any worker, on any rank and after a resume. The generators of the calling process are left as they were. A data set
    that draws nothing may say so with an attribute `draws_random_numbers = False`, which saves some 30 microseconds a sample.

    Args:
        dataset: map-style: `len(dataset)`, and `dataset[i]` is a pair (inputs, targets) that `default_collate` accepts.
        order: which samples a step visits; `order.length == len(dataset)`.
        rank, ranks: place among the ranks that hold different samples (the data-parallel ranks), and how many those are.
        workers: processes that read ahead; 0 reads in this one.
        stop_step: first step that is not yielded; None goes on for ever.
        pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UserError: the data set is no map-style one; a sample is no pair; the tensors of a batch differ in shape.
        RuntimeError: a worker process died; the message gives its pid and the signal.
    """
    dataset = map_style(dataset)
    assert order.length == len(dataset), f"the order is of {order.length} samples, the data set has {len(dataset)}"
    steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
    batches: DataLoader = DataLoader(
        _Batches(dataset, seed),  # type: ignore[arg-type]
        batch_size=None,
        sampler=(_part(order, step, rank, ranks) for step in steps),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_the_process_group,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # or DataLoader draws from the generator of this process
    )
    others = set(multiprocessing.active_children())
    iterator = iter(batches)
    processes = set(multiprocessing.active_children()) - others
    for process in processes:  # which each does for itself as well; a signal may come before it has
        with suppress(OSError):  # it has ended, or runs another program by now
            os.setpgid(process.pid, process.pid)  # type: ignore[arg-type]
    return _local_batches(iterator, processes, order, start_step, rank, ranks)


def map_style(dataset: Any, name: str = "the data set") -> Any:
    """Return `dataset` if it has a length above 0 and is read by index, or say what to do instead.

    Args:
        name: what the message calls it.

    Raises:
        UserError: it has no `__len__` or no `__getitem__`, or it is empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{name} is a {type(dataset).__name__}, which cannot be read by index: paratrain decides which samples make up a step from the "
            "seed and the step alone, and needs __len__ and __getitem__. Write what it yields to files first, or collect it: list(dataset)"
        )
    if len(dataset) == 0:
        raise UserError(f"{name} is empty: a {type(dataset).__name__} of length 0")
    return dataset


def _part(order: Order, step: int, rank: int, ranks: int) -> tuple[int, list[int]]:
    batch = order.batch(step)
    first, stop = span(len(batch), rank, ranks)
    return order.epoch(step), batch[first:stop] or batch[:1]


def _local_batches(
    batches: Iterable, processes: Iterable[BaseProcess], order: Order, start_step: int, rank: int, ranks: int
) -> Iterator[tuple[int, LocalBatch]]:
    batch: Any = None
    try:
        for step, batch in enumerate(batches, start_step):
            if isinstance(batch, UserError):
                raise batch
            size = order.size(step)
            first, stop = span(size, rank, ranks)
            inputs, targets = (tuple(part) if isinstance(part, list) else part for part in batch)  # default_collate makes tuples lists
            yield step, LocalBatch(inputs, targets, size, real=stop - first, largest=-(-size // ranks))
    except (ConnectionError, EOFError) as error:  # what DataLoader notices first of a worker that dies as it hands over a batch
        for process in processes:
            process.join(0.1)
            if process.exitcode is not None:
                raise RuntimeError(
                    f"DataLoader worker (pid {process.pid}) exited unexpectedly, with exit code {process.exitcode}"
                ) from error
        raise
    finally:
        batches = batch = None  # type: ignore[assignment]  # the traceback of an error keeps this frame, and would keep the workers


class _Batches:
    """The data set as DataLoader sees it: (epoch, indices) -> collated (inputs, targets), or the UserError that came of it.

    The error is returned, not raised, because DataLoader would carry it over from a worker with a stack trace in its message.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.random = getattr(dataset, "draws_random_numbers", True)

    def __getitem__(self, part: tuple[int, list[int]]) -> Any:
        epoch, indices = part
        with rng.all_preserved() if self.random else nullcontext():
            try:
                return _collate([self._sample(epoch, index) for index in indices], indices)
            except UserError as error:
                return error

    def _sample(self, epoch: int, index: int) -> Any:
        if self.random:
            rng.seed_all(seed_for(_STREAM, self.seed, epoch, index))
        try:
            sample = self.dataset[index]
        except Exception as error:
            error.add_note(f"while reading sample {index} of a {type(self.dataset).__name__}")
            raise
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            size = f" of length {len(sample)}" if isinstance(sample, tuple | list) else ""
            raise UserError(
                f"sample {index} of a {type(self.dataset).__name__} is a {type(sample).__name__}{size}; "
                "paratrain needs a pair (inputs, targets), where each may be a tensor, or a tuple or dict of tensors"
            )
        return tuple(sample)


def _collate(samples: list, indices: list[int]) -> Any:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, KeyError) as error:
        leaves = [dict(_leaves(sample)) for sample in samples]
        for other, index in zip(leaves, indices, strict=True):
            for place in leaves[0] | other:
                shapes = [leaf.get(place, "missing") for leaf in (leaves[0], other)]
                if shapes[0] != shapes[1]:
                    raise UserError(
                        f"the samples of a batch differ in shape: {place} is {shapes[0]} in sample {indices[0]} and {shapes[1]} in sample "
                        f"{index}. Pad them to one length in __getitem__ (targets with -100, which no loss counts), or pack them into "
                        "sequences of one length, as data=text does"
                    ) from error
        raise


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, list[int] | str]]:
    """(place in the sample, shape or type) of every leaf."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{place}[{key!r}]")
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{place}[{number}]" if place else ("inputs", "targets")[number])
    else:
        yield place, list(value.shape) if hasattr(value, "shape") else type(value).__name__


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_the_process_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM go to the whole process group; the parent decides, and may need a batch to end its step."""
    os.setpgid(0, 0)

"""What a step is fed: a pair (inputs, targets) of nested tensors whose first dim counts samples; see `deal.py` for what else it may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from paratrain import deal
from paratrain.errors import UserError


class LocalBatch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        inputs: tensor, tuple, list or dict of tensors, samples first.
        targets: likewise.
        size: samples of the global batch, over all ranks.
        real: leading samples here that belong to the global batch; 0 where the batch has fewer samples than there are ranks
            and this rank holds one filler sample, which takes part in the collectives and weighs nothing.
        largest: most samples that any rank holds, from which all ranks derive the same number of micro-batches.
        form: which lists and arrays of the global batch hold one element a sample; None: as it looks here. See `deal.Cut`.
    """

    inputs: Any
    targets: Any
    size: int
    real: int
    largest: int
    form: tuple[bool, ...] | None = None


def span(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last + 1 of the samples of a batch of `size` that `rank` holds, by the rule of `torch.tensor_split`."""
    share, rest = divmod(size, ranks)
    first = rank * share + min(rank, rest)
    return first, first + share + (rank < rest)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """`function` of every tensor in a nested structure."""
    return deal.mapped(function, tree)


def tensors(outputs: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor in what a model returned: in containers, and in the attributes of dataclasses and other objects, however nested."""
    seen = set() if seen is None else seen
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif not isinstance(leaf, type | torch.nn.Module) and id(leaf) not in seen:
            seen.add(id(leaf))
            slots = {name: getattr(leaf, name, None) for name in getattr(type(leaf), "__dataclass_fields__", ())}
            yield from tensors(slots | getattr(leaf, "__dict__", {}), seen)


def samples(batch: tuple[Any, Any]) -> int:
    """Samples in a batch (inputs, targets).

    Raises:
        UserError: when its tensors disagree about dim 0.
    """
    inputs, targets = batch
    if type(inputs) is type(targets) is torch.Tensor and inputs.ndim and targets.ndim and inputs.shape[0] == targets.shape[0] > 0:
        return inputs.shape[0]  # the general walk takes as long as a small forward
    return deal.size(batch)


def one(inputs: Any) -> Any:
    """The first sample of the inputs of a micro-batch."""
    rows = [leaf.size(0) for leaf in deal.leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return deal.Cut(0, 1, max(rows, default=0)).arguments(inputs)


def local(batch: tuple[Any, Any], rank: int, ranks: int) -> LocalBatch:
    """The share of `rank` in a global batch (inputs, targets)."""
    inputs, targets = pair(batch)
    size = samples((inputs, targets))
    if ranks == 1:
        return LocalBatch(inputs, targets, size, size, size)
    deal.refuse_offsets(inputs, size)
    start, stop = span(size, rank, ranks)
    real = stop - start
    cut = deal.Cut(*((start, stop) if real else (0, 1)), size)
    inputs, targets = cut.pair(inputs, targets)
    return LocalBatch(inputs, targets, size, real, span(size, 0, ranks)[1], tuple(cut.form))


def as_local(batch: LocalBatch | tuple[Any, Any]) -> LocalBatch:
    """A batch the caller sharded by hand counts as one share among equals."""
    if isinstance(batch, LocalBatch):
        return batch
    inputs, targets = pair(batch)
    size = samples((inputs, targets))
    return LocalBatch(inputs, targets, size, size, size)


def pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UserError(
            f"a batch is a pair (inputs, targets), got {type(batch).__name__}; for a model without targets write (inputs, None)"
        )
    return batch[0], batch[1]


def split(batch: LocalBatch, micro_batch_size: int | None) -> list[tuple[Any, Any, int]]:
    """Micro-batches (inputs, targets, real samples), as many on every rank; those past this rank's share weigh nothing."""
    size = micro_batch_size or batch.largest
    if batch.largest <= size and batch.real:
        return [(batch.inputs, batch.targets, batch.real)]
    if batch.real == batch.size:
        deal.refuse_offsets(batch.inputs, batch.size)
    return [_part(batch, start, min(start + size, batch.real)) for start in range(0, batch.largest, size)]


def filler(batch: LocalBatch) -> tuple[Any, Any, int]:
    """A micro-batch of one sample that weighs nothing."""
    return _part(batch, 0, 0)


def _part(batch: LocalBatch, start: int, stop: int) -> tuple[Any, Any, int]:
    real = max(stop - start, 0)
    held = max(batch.real, 1)
    inputs, targets = deal.Cut(*((start, stop) if real else (0, 1)), held, batch.form).pair(batch.inputs, batch.targets)
    return inputs, targets, real


def count(targets: Any, real: int, kind: str) -> int:
    """What a mean loss is a mean over (`trainer.loss_count`): samples, or target elements other than -100."""
    if kind == "samples":
        return real
    tensors = [leaf for leaf in deal.leaves(targets) if isinstance(leaf, torch.Tensor)]
    integers = [leaf for leaf in tensors if not leaf.is_floating_point() and leaf.dtype is not torch.bool]
    if kind == "auto" and not len(integers) == len(tensors) == 1:
        return real
    if len(tensors) != 1:
        raise UserError(
            f"trainer.loss_count=targets needs exactly one target tensor, got {len(tensors)}; let loss_fn return (sum, count) instead"
        )
    return int((tensors[0] != -100).sum()) if integers else tensors[0].numel()


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor on `device`; copies from pinned memory do not block."""
    if device.type == "cpu":
        return batch
    return map_tensors(lambda x: x.to(device, non_blocking=True), batch)


def opened(micro: list[tuple[Any, Any, int]], model: torch.nn.Module) -> list[tuple[Any, Any, int]]:
    """Micro-batches as model and loss are given them: what is `Shared` as it is, and a mapping as the arguments that forward names so."""
    if deal.takes_items(model, micro[0][0]):
        micro = [(dict(inputs), targets, real) for inputs, targets, real in micro]
    if deal.shares(micro[0][0]) or deal.shares(micro[0][1]):
        micro = [(deal.opened(inputs), deal.opened(targets), real) for inputs, targets, real in micro]
    return micro


def call(run: Callable, inputs: Any) -> Any:
    """run(inputs), run(*inputs) or run(**inputs), by the kind of `inputs`."""
    if isinstance(inputs, dict):
        return run(**inputs)
    if isinstance(inputs, tuple | list):
        return run(*inputs)
    return run(inputs)

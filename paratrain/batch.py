"""What a step is fed: a pair (inputs, targets) of nested tensors whose first dim counts samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

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
    """

    inputs: Any
    targets: Any
    size: int
    real: int
    largest: int


def span(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last + 1 of the samples of a batch of `size` that `rank` holds, by the rule of `torch.tensor_split`."""
    share, rest = divmod(size, ranks)
    first = rank * share + min(rank, rest)
    return first, first + share + (rank < rest)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """`function` of every tensor in a nested structure."""
    if isinstance(tree, torch.Tensor):  # by far the most common, and several times faster than the general walk
        return function(tree)
    return tree_map_only(torch.Tensor, function, tree)


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


def samples(batch: Any) -> int:
    """Samples in a nested batch.

    Raises:
        UserError: when its tensors disagree about dim 0.
    """
    plain = isinstance(batch, tuple) and all(
        isinstance(part, torch.Tensor) for part in batch
    )  # the general walk takes as long as a small forward
    sizes = [leaf.shape[0] for leaf in (batch if plain else tree_leaves(batch)) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if not sizes:
        raise UserError("a batch needs at least one tensor with a sample dimension: (inputs, targets) with samples along dim 0")
    if len(set(sizes)) > 1:
        raise UserError(
            f"the tensors of a batch disagree about the number of samples (sizes of dim 0: {sorted(set(sizes))}); "
            "every tensor of inputs and targets must have the samples along dim 0"
        )
    if sizes[0] == 0:
        raise UserError("the batch is empty (no samples along dim 0)")
    return sizes[0]


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of every tensor; what has no sample dimension is passed on."""
    return map_tensors(lambda x: x[start:stop] if x.ndim > 0 else x, batch)


def local(batch: tuple[Any, Any], rank: int, ranks: int) -> LocalBatch:
    """The share of `rank` in a global batch (inputs, targets)."""
    inputs, targets = pair(batch)
    size = samples((inputs, targets))
    start, stop = span(size, rank, ranks)
    real = stop - start
    start, stop = (start, stop) if real else (0, 1)
    return LocalBatch(take(inputs, start, stop), take(targets, start, stop), size, real, span(size, 0, ranks)[1])


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
    parts = []
    for start in range(0, batch.largest, size):
        stop = min(start + size, batch.real)
        real = max(stop - start, 0)
        first, last = (start, stop) if real else (0, 1)
        parts.append((take(batch.inputs, first, last), take(batch.targets, first, last), real))
    return parts


def count(targets: Any, real: int, kind: str) -> int:
    """What a mean loss is a mean over (`trainer.loss_count`): samples, or target elements other than -100."""
    tensors = [leaf for leaf in tree_leaves(targets) if isinstance(leaf, torch.Tensor)]
    integers = [leaf for leaf in tensors if not leaf.is_floating_point() and leaf.dtype is not torch.bool]
    if kind == "samples" or (kind == "auto" and len(integers) != 1):
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


def call(run: Callable, inputs: Any) -> Any:
    """run(inputs), run(*inputs) or run(**inputs), by the kind of `inputs`."""
    if isinstance(inputs, dict):
        return run(**inputs)
    if isinstance(inputs, tuple | list):
        return run(*inputs)
    return run(inputs)

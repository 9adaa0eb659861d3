"""Rules for changes of shape: where the split dim goes, and whether it can be followed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from paratrain.parallel.tp_rules import aligned, argument, join, rule, whole
from paratrain.parallel.tp_split import Parts, Peers, Split, part_of

# ------------------------------------------------------------------ shapes


@rule("transpose", "swapaxes", "swapdims", "t", "adjoint")
def _transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    first = argument(args, kwargs, 1, "dim0", kwargs.get("axis0", -2)) % split.ndim
    second = argument(args, kwargs, 2, "dim1", kwargs.get("axis1", -1)) % split.ndim
    dim = {first: second, second: first}.get(split.split_dim, split.split_dim)
    return split.like(part_of(split).transpose(first, second), dim)


@rule("permute")
def _permute(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dims = [dim % split.ndim for dim in _sizes(args[1:], kwargs, "dims")]
    return split.like(part_of(split).permute(dims), dims.index(split.split_dim))


@rule("movedim", "moveaxis")
def _movedim(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    source, target = argument(args, kwargs, 1, "source"), argument(args, kwargs, 2, "destination")
    moved = torch.empty(tuple(range(1, split.ndim + 1)), device="meta").movedim(source, target)
    return split.like(part_of(split).movedim(source, target), list(moved.shape).index(split.split_dim + 1))


@rule("unsqueeze")
def _unsqueeze(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim") % (split.ndim + 1)
    return split.like(part_of(split).unsqueeze(dim), split.split_dim + (dim <= split.split_dim))


@rule("squeeze")
def _squeeze(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dims = argument(args, kwargs, 1, "dim")
    dims = range(split.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % split.ndim for dim in dims if split.shape[dim] == 1}
    if split.split_dim in gone:
        return None
    return split.like(part_of(split).squeeze(tuple(gone)), split.split_dim - sum(dim < split.split_dim for dim in gone))


def _sizes(rest: tuple, kwargs: dict, name: str) -> list[Any]:
    sizes = kwargs.get(name, rest)
    while len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    return list(sizes)


@rule("view", "reshape")
def _view(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    if isinstance(kwargs.get("dtype", args[1] if len(args) > 1 else None), torch.dtype):
        return None
    return _reshape(func, split, _sizes(args[1:], kwargs, "shape" if "shape" in kwargs else "size"))


@rule("view_as", "reshape_as")
def _view_as(func: Any, args: tuple, kwargs: dict) -> Any:
    if not isinstance(args[0], Split):
        return args[0].reshape(args[1].shape)
    return _reshape(func, args[0], list(args[1].shape))


@rule("flatten", "ravel")
def _flatten(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    start = argument(args, kwargs, 1, "start_dim", 0) % split.ndim
    end = argument(args, kwargs, 2, "end_dim", -1) % split.ndim
    shape = list(split.shape)
    return _reshape(func, split, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


@rule("unflatten")
def _unflatten(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim") % split.ndim
    sizes = list(argument(args, kwargs, 2, "sizes"))
    known = math.prod(size for size in sizes if size != -1)
    sizes = [split.shape[dim] // known if size == -1 else size for size in sizes]
    shape = list(split.shape)
    return _reshape(func, split, [*shape[:dim], *sizes, *shape[dim + 1 :]])


def _reshape(func: Any, split: Split, target: list[int]) -> Any:
    """Follow the split dim through a change of shape: it must be the runs of one dim of the result that ranks share."""
    shape = list(split.shape)
    if -1 in target:
        target[target.index(-1)] = split.numel() // max(1, -math.prod(target))
    before, after = _group(shape, target, split.split_dim)
    sizes = [target[dim] for dim in after]
    outer = math.prod(shape[before.start : split.split_dim])
    inner = math.prod(shape[split.split_dim + 1 : before.stop])
    runs = tuple(part * inner for part in split.parts) * outer
    found = fit(runs, sizes, split.peers)
    if found is None:
        wanted = suggest(runs, sizes, split.peers)
        reason = f"{shape[split.split_dim]} features become {tuple(sizes)}, of which no dim can be split over {split.peers.size} ranks"
        if wanted is not None and outer == inner == 1:
            split.peers.gathered("fused", [split], repr(wanted))
        return whole(Tensor.reshape, (split, target), {}, reason)
    dim, parts = found
    target[after.start + dim] = split.peers.length(parts)
    return split.like(part_of(split).reshape(target), after.start + dim, parts)


def _group(shape: list[int], target: list[int], dim: int) -> tuple[range, range]:
    """The least runs of dims around `dim` of `shape`, and of `target`, that hold the same elements."""
    i = j = 0
    while True:
        first, second = i, j
        left, right = shape[i], target[j] if j < len(target) else 1
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * shape[i], i + 1
            else:
                right, j = right * target[j], j + 1
        if i > dim:
            while j < len(target) and target[j] == 1 and i == len(shape):
                j += 1
            return range(first, i), range(second, min(j, len(target)))


def fit(runs: Parts, sizes: Sequence[int], peers: Peers) -> tuple[int, Parts] | None:
    """The dim of `sizes` that is split, and its parts, where `runs` of the same elements in one dim are."""
    if len(runs) == 1 and not peers.divides(runs):
        whole_dim = [dim for dim, size in enumerate(sizes) if size == runs[0]]
        return (whole_dim[0], runs) if whole_dim else None
    for dim in range(len(sizes)):
        below = math.prod(sizes[dim + 1 :])
        period = _period(runs, sizes[dim] * below)
        if period is not None and all(run % (peers.size * below) == 0 for run in period):
            return dim, tuple(run // below for run in period)
    return None


def _period(runs: Parts, length: int) -> Parts | None:
    """The runs that, repeated, are `runs`, and fill `length`."""
    total = 0
    for count, run in enumerate(runs, 1):
        total += run
        if total == length:
            period = runs[:count]
            return period if len(runs) % count == 0 and runs == period * (len(runs) // count) else None
    return None


def suggest(runs: Parts, sizes: Sequence[int], peers: Peers) -> Parts | None:
    """Parts under which one run of elements could take the shape `sizes`: a fused layout, such as (3, heads, head_dim)."""
    if len(runs) > 1:
        return None
    for dim in range(1, len(sizes)):
        below = math.prod(sizes[dim + 1 :])
        if sizes[dim] % peers.size == 0 and sizes[dim] > 1 and dim < len(sizes) - 1:
            return (sizes[dim] * below,) * math.prod(sizes[:dim])
    return None


@rule("expand", "expand_as", "broadcast_to")
def _expand(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    if not isinstance(split, Split):
        return split.expand(args[1].shape)
    sizes = list(args[1].shape) if func.__name__ == "expand_as" else _sizes(args[1:], kwargs, "size")
    dim = len(sizes) - split.ndim + split.split_dim
    if sizes[dim] not in (-1, sum(split.parts)):
        return None
    sizes[dim] = -1
    return split.like(part_of(split).expand(sizes), dim)


@rule("repeat", "tile")
def _repeat(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    times = _sizes(args[1:], kwargs, "repeats")
    dim = len(times) - split.ndim + split.split_dim
    if len(times) < split.ndim or (times[dim] != 1 and not split.peers.divides(split.parts)):
        return None
    return split.like(part_of(split).repeat(times), dim, split.parts * times[dim])


@rule("repeat_interleave")
def _repeat_interleave(func: Any, args: tuple, kwargs: dict) -> Any:
    split, times, dim = args[0], argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return None
    here = dim % split.ndim == split.split_dim
    if here and not split.peers.divides(split.parts):
        return None
    parts = tuple(part * times for part in split.parts) if here else split.parts
    return split.like(part_of(split).repeat_interleave(times, dim), parts=parts)


# ------------------------------------------------------------------ pieces


@rule("split", "split_with_sizes", "tensor_split", "chunk")
def _chunk(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    by = (
        args[1]
        if len(args) > 1
        else next(kwargs[key] for key in ("split_size_or_sections", "split_size", "split_sizes", "chunks") if key in kwargs)
    )
    dim = argument(args, kwargs, 2, "dim", 0) % split.ndim
    if dim != split.split_dim:
        return tuple(split.like(piece) for piece in func(part_of(split), *args[1:], **kwargs))
    probe = torch.empty(split.shape[dim], device="meta")
    plain_func = {"split": torch.split, "split_with_sizes": torch.split, "chunk": torch.chunk, "tensor_split": torch.tensor_split}[
        func.__name__
    ]
    sizes = [piece.numel() for piece in plain_func(probe, by)]
    groups = _cut(split, sizes)
    if groups is None:
        return None
    lengths = [split.peers.length(group) for group in groups]
    return tuple(split.like(piece, parts=group) for piece, group in zip(part_of(split).split(lengths, dim), groups, strict=True))


def _cut(split: Split, sizes: Sequence[int]) -> list[Parts] | None:
    """The parts of each of consecutive pieces; None where pieces end inside of a part."""
    groups: list[Parts] = []
    rest = list(split.parts)
    for size in sizes:
        group: list[int] = []
        while rest and sum(group) < size:
            group.append(rest.pop(0))
        if sum(group) != size:
            ends = sorted({*accumulate(split.parts), *accumulate(sizes)})
            split.peers.gathered("fused", [split], repr([end - start for start, end in pairwise([0, *ends])]))
            return None
        groups.append(tuple(group))
    return groups if split.peers.divides(split.parts) or len(sizes) == 1 else None


@rule("unbind")
def _unbind(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim", 0) % split.ndim
    if dim == split.split_dim:
        return None
    return tuple(split.like(piece, split.split_dim - (dim < split.split_dim)) for piece in part_of(split).unbind(dim))


@rule("__iter__")
def _iter(func: Any, args: tuple, kwargs: dict) -> Any:
    return iter(args[0].unbind(0))


@rule("select")
def _select(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim") % split.ndim
    if dim == split.split_dim:
        return None
    return split.like(part_of(split).select(dim, argument(args, kwargs, 2, "index")), split.split_dim - (dim < split.split_dim))


@rule("narrow")
def _narrow(func: Any, args: tuple, kwargs: dict) -> Any:
    split, dim, start, length = args[0], *(argument(args, kwargs, i, name) for i, name in enumerate(("dim", "start", "length"), 1))
    return split[(slice(None),) * (dim % split.ndim) + (slice(start, start + length),)]


@rule("__getitem__")
def _getitem(func: Any, args: tuple, kwargs: dict) -> Any:
    split, index = args
    if not isinstance(split, Split):
        return None
    index = list(index) if isinstance(index, tuple) else [index]
    listed = [item for item in index if isinstance(item, list)]
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice | list) for item in index) or len(listed) > 1:
        return None
    if any(isinstance(item, bool) or (listed and isinstance(item, int)) for item in index):
        return None
    used = sum(item is not None and item is not Ellipsis for item in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    at = index.index(Ellipsis)
    index[at : at + 1] = [slice(None)] * (split.ndim - used)
    dim, position, result = 0, None, 0
    parts = split.parts
    for where, item in enumerate(index):
        if item is None:
            result += 1
            continue
        if dim == split.split_dim:
            if not isinstance(item, slice):
                return None
            chosen = _slice(split, item)
            if chosen is None:
                return None
            index[where], parts = chosen
            position = result
        dim += 1
        result += isinstance(item, slice | list)
    assert position is not None
    return split.like(part_of(split)[tuple(index)], position, parts)


def _slice(split: Split, item: slice) -> tuple[slice, Parts] | None:
    """A slice along the split dim, in this rank's part, and what is left of the parts."""
    size = sum(split.parts)
    start, stop, step = item.indices(size)
    if (start, stop, step) == (0, size, 1):
        return slice(None), split.parts
    if step != 1 or not 0 <= start < stop:
        return None
    groups = _cut(split, [length for length in (start, stop - start, size - stop) if length])
    if groups is None:
        return None
    chosen = groups[1 if start else 0]
    first = start // split.peers.size
    return slice(first, first + split.peers.length(chosen)), chosen


@rule("cat", "concat", "concatenate")
def _cat(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [tensor for tensor in argument(args, kwargs, 0, "tensors") if tensor.shape != (0,)]  # as torch does: an empty cache
    first = next(tensor for tensor in tensors if isinstance(tensor, Split))
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % first.ndim
    if any(tensor.ndim != first.ndim for tensor in tensors):
        return None
    if dim == first.split_dim:
        if not all(isinstance(t, Split) and t.split_dim == dim and t.peers.divides(t.parts) for t in tensors):
            return None
        parts = tuple(part for tensor in tensors for part in tensor.parts)
        return join(first, torch.cat([part_of(tensor) for tensor in tensors], dim), tensors, dim, parts)
    pieces = [aligned(tensor, first, first.split_dim - first.ndim) for tensor in tensors]
    return join(first, torch.cat(pieces, dim), tensors, first.split_dim)


@rule("stack")
def _stack(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = list(argument(args, kwargs, 0, "tensors"))
    dim = argument(args, kwargs, 1, "dim", 0)
    dim = dim % (tensors[0].ndim + 1)
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


@rule("pad")
def _pad(func: Any, args: tuple, kwargs: dict) -> Any:
    split, amounts = args[0], argument(args, kwargs, 1, "pad")
    if not isinstance(split, Split) or any(amounts[2 * (split.ndim - 1 - split.split_dim) :][:2]):
        return None
    return split.like(func(part_of(split), *args[1:], **kwargs))

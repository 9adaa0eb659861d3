"""What of a batch belongs to which sample, so that its samples can be dealt to ranks and micro-batches.

A batch is a tree: tuples, lists, dicts and other mappings, named tuples and dataclasses. Dim 0 of every tensor in it counts samples, be it dense,
jagged or sparse. So does a list, a tuple or an array with as many elements as there are samples, as strings and images of different sizes come,
unless its elements are tensors that count samples themselves. What all samples share is declared: `Shared`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_unflatten

from paratrain.errors import UserError

SHARE = "wrap what all samples share, such as an adjacency matrix or a table of positions, in paratrain.Shared(...)"


_PLAIN: tuple[type, ...] = (str, bytes, int, float, torch.nn.Module, type, type(None))


@dataclasses.dataclass(frozen=True)
class Shared:
    """A part of a batch that every sample uses and no dim counts: each rank and micro-batch gets all of it, and the model what it holds.

    `((x, pt.Shared(adjacency)), y)` calls `model(x, adjacency)`, whatever the layout.

    Attributes:
        value: a tensor, or anything else; the same on every rank.
    """

    value: Any


def children(node: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The parts of a container, and what makes one like it of others; None for a leaf."""
    kind = type(node)
    if kind is dict:
        return list(node.values()), lambda parts: dict(zip(node, parts, strict=True))
    if kind is tuple or kind is list:
        return list(node), kind
    if isinstance(node, (torch.Tensor, *_PLAIN)):
        return None
    if kind in SUPPORTED_NODES:  # named tuples are, and the outputs of Hugging Face models
        parts, spec = tree_flatten(node, is_leaf=lambda part: part is not node)
        return parts, lambda new: tree_unflatten(new, spec)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(node), lambda parts: kind(*parts)
    if isinstance(node, tuple | list):
        return list(node), kind
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]
        return [getattr(node, name) for name in names], lambda parts: _with_fields(node, names, parts)
    if isinstance(node, UserDict | dict):
        return list(node.values()), lambda parts: _with_items(node, parts)
    return None


def _with_fields(node: Any, names: list[str], parts: list[Any]) -> Any:
    new = copy.copy(node)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(new, name, part)  # frozen ones too
    return new


def _with_items(node: Any, parts: list[Any]) -> Any:
    new = copy.copy(node)
    for key, part in zip(list(node), parts, strict=True):
        new[key] = part
    return new


def mapped(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """`function` of every tensor in a tree."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    found = children(tree)
    if found is None:
        return tree
    parts, make = found
    return make([mapped(function, part) for part in parts])


def leaves(tree: Any) -> Iterator[Any]:
    """Every leaf of a tree, those inside of `Shared` left out."""
    found = None if isinstance(tree, Shared) else children(tree)
    if found is not None:
        for part in found[0]:
            yield from leaves(part)
    elif not isinstance(tree, Shared):
        yield tree


def shares(tree: Any) -> bool:
    """Whether anything in the tree is `Shared`."""
    if isinstance(tree, torch.Tensor):
        return False
    if isinstance(tree, Shared):
        return True
    found = children(tree)
    return found is not None and any(shares(part) for part in found[0] if not isinstance(part, torch.Tensor))


def opened(tree: Any) -> Any:
    """The tree with what is `Shared` as it is."""
    if isinstance(tree, Shared):
        return tree.value
    found = children(tree)
    if found is None:
        return tree
    parts, make = found
    return make([opened(part) for part in parts])


def takes_items(model: torch.nn.Module, inputs: Any) -> bool:
    """Whether inputs are a mapping (no dict, which always is) whose items are arguments of forward, as a Hugging Face `BatchEncoding`."""
    if not isinstance(inputs, UserDict):
        return False
    taken = inspect.signature(model.forward).parameters
    return all(key in taken for key in inputs) or any(each.kind is each.VAR_KEYWORD for each in taken.values())


def size(batch: tuple[Any, Any]) -> int:
    """Samples of a batch (inputs, targets).

    Raises:
        UserError: its parts disagree, or none of them counts samples.
    """
    sure: list[int] = []  # of tensors that are in no list
    listed: list[int] = []  # of those that are
    lengths: list[int] = []  # of lists and arrays
    for part, outermost in zip(batch, (True, False), strict=True):
        _sizes(part, outermost, sure, listed, lengths)
    if sure:
        if len(set(sure)) > 1:
            raise UserError(
                f"the tensors of a batch disagree about the number of samples (sizes of dim 0: {sorted(set(sure))}); every tensor of inputs and targets "
                f"must have the samples along dim 0: {SHARE}, pad what is ragged, or make it a list with one tensor a sample"
            )
        (found,) = set(sure)
    elif len(set(lengths)) == 1 and (len(set(listed)) != 1 or listed[0] == lengths[0]):
        found = lengths[0]
    elif len(set(listed)) == 1 and len(set(lengths)) != 1:
        found = listed[0]
    elif lengths or listed:
        raise UserError(
            f"a batch of lists does not say how many samples it has: lists of {sorted(set(lengths))} elements, tensors in them with {sorted(set(listed))} "
            "rows; let one part of inputs or targets be a tensor with the samples along dim 0 (such as their numbers)"
        )
    else:
        raise UserError("a batch needs at least one tensor with a sample dimension: (inputs, targets) with samples along dim 0")
    if found == 0:
        raise UserError("the batch is empty (no samples along dim 0)")
    return found


def refuse_offsets(inputs: Any, size: int) -> None:
    """Refuse inputs that are sequences packed one after another, of as many rows as there are offsets by chance, before they are cut.

    Raises:
        UserError: a 1-D tensor of integers begins with 0, never falls, and ends with the number of its own elements, as offsets do.
    """
    for leaf in leaves(inputs):
        if not isinstance(leaf, torch.Tensor) or leaf is inputs or leaf.dim() != 1 or leaf.dtype not in (torch.int32, torch.int64):
            continue
        if leaf.is_cpu and len(leaf) == size > 1 and int(leaf[-1]) == size and int(leaf[0]) == 0 and bool((leaf[1:] >= leaf[:-1]).all()):
            raise UserError(
                f"the batch holds {size} integers that begin with 0, never fall and end with {size}, its number of rows: offsets (cu_seqlens) of sequences "
                "that are packed one after another, whose rows are no samples that could be dealt to ranks or micro-batches; let the batch hold one padded row a "
                "sample, or a jagged tensor (torch.nested.nested_tensor(rows, layout=torch.jagged)), whose values() and offsets() forward uses"
            )


def _sizes(node: Any, outermost: bool, sure: list[int], listed: list[int], lengths: list[int]) -> None:
    """Collect what may count samples; `outermost` lists and tuples are arguments of the model."""
    if isinstance(node, torch.Tensor):
        if node.dim() > 0:
            sure.append(node.size(0))
        return
    if isinstance(node, PackedSequence):
        sure.append(int(node.batch_sizes[0]))
        return
    if isinstance(node, Shared):
        return
    if isinstance(node, np.ndarray):
        lengths.extend(node.shape[:1])
        return
    found = children(node)
    if found is None:
        return
    if _is_list(node) and not outermost:
        lengths.append(len(node))
        sure = listed
    for part in found[0]:
        _sizes(part, False, sure, listed, lengths)


def _is_list(node: Any) -> bool:
    """Whether it may hold an element a sample: a list or tuple, and no named tuple."""
    return isinstance(node, list | tuple) and not hasattr(node, "_fields")


class Cut:
    """Takes samples `start` to `stop` of a tree that has `size` of them.

    Args:
        form: what `form` was for the whole batch: whether each thing that may hold one element a sample does.
        batch: a pair (inputs, targets); otherwise one part of it.
    """

    def __init__(self, start: int, stop: int, size: int, form: Iterable[bool] | None = None):
        self._start, self._stop, self._size = start, stop, size
        self._known = None if form is None else iter(form)
        self._offsets: dict[int, torch.Tensor] = {}  # jagged tensors of one shape have one shape afterwards, too
        self.form: list[bool] = []

    def pair(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        return self.arguments(inputs), self(targets)

    def arguments(self, inputs: Any) -> Any:
        """The inputs, of which a list or tuple holds the arguments of the model."""
        if not _is_list(inputs):
            return self(inputs)
        return type(inputs)([self(part) for part in inputs])

    def __call__(self, node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            return self._tensor(node)
        if isinstance(node, Shared):
            return node
        if isinstance(node, PackedSequence):
            rows = unpack_sequence(node)[self._start : self._stop]
            return pack_sequence(rows, enforce_sorted=node.sorted_indices is None)
        if isinstance(node, np.ndarray):
            return node[self._start : self._stop] if node.ndim and self._deals(node) else node
        if _is_list(node) and self._deals(node):
            return node[self._start : self._stop]
        found = children(node)
        if found is not None:
            parts, make = found
            return make([self(part) for part in parts])
        return node if isinstance(node, _PLAIN) else self._object(node)

    def _deals(self, node: Any) -> bool:
        """Whether it holds one element a sample."""
        known = next(self._known) if self._known is not None else self._guess(node)
        self.form.append(known)
        return known

    def _guess(self, node: Any) -> bool:
        if len(node) == self._size:
            rows = [tensor.size(0) if tensor.dim() else 0 for tensor in leaves(node) if isinstance(tensor, torch.Tensor)]
            return not rows or set(rows) != {self._size}
        plain = not any(isinstance(leaf, torch.Tensor) for leaf in leaves(node))
        if plain and self._size > 1 and len(node) and len(node) % self._size == 0:
            raise UserError(
                f"a batch of {self._size} samples has a {type(node).__name__} of {len(node)} elements, which may be {len(node) // self._size} a sample; make it a "
                f"list with an element for each sample, or, if every sample uses all of it: {SHARE}"
            )
        return False

    def _object(self, node: Any) -> Any:
        """What is no container that is known: cut if it can be sliced, passed on if it holds no tensors."""
        if hasattr(node, "__len__") and hasattr(node, "__getitem__") and self._deals_object(node):
            try:
                part = node[self._start : self._stop]
                fits = isinstance(part, type(node)) and len(part) == self._stop - self._start
            except Exception as error:
                raise self._refusal(node, f"slicing it failed ({type(error).__name__}: {error})") from error
            if not fits:
                raise self._refusal(node, f"slicing it gave a {type(part).__name__}")
            return part
        if any(isinstance(tensor, torch.Tensor) and tensor.dim() for tensor in leaves(getattr(node, "__dict__", {}))):
            raise self._refusal(node, "it holds tensors, and cannot be sliced")
        return node

    def _deals_object(self, node: Any) -> bool:
        try:
            known = next(self._known) if self._known is not None else len(node) == self._size
        except Exception:
            known = False
        self.form.append(known)
        return known

    def _refusal(self, node: Any, reason: str) -> UserError:
        kind = type(node).__name__
        return UserError(
            f"the batch holds a {kind}, whose samples cannot be dealt to ranks or micro-batches: {reason}; write a dataclass, named tuple or dict of tensors "
            f"instead, give {kind} a __len__ and a __getitem__ that takes slices of samples, or, if every sample uses all of it: {SHARE}"
        )

    # ------------------------------------------------------------------ tensors

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        start, stop = self._start, self._stop
        if tensor.layout is torch.strided and not tensor.is_nested:
            return tensor[start:stop] if tensor.ndim > 0 else tensor
        if tensor.is_nested:
            jagged: Any = tensor
            if tensor.layout is torch.jagged and jagged.lengths() is None:
                return self._jagged(tensor)
            return torch.nested.as_nested_tensor(list(tensor.unbind()[start:stop]), layout=tensor.layout)
        if tensor.layout is torch.sparse_coo:
            return tensor.narrow_copy(0, start, stop - start).coalesce()
        if tensor.layout is torch.sparse_csr and tensor.ndim == 2:
            rows = tensor.crow_indices()
            first, last = int(rows[start]), int(rows[stop])
            shape = (stop - start, tensor.shape[1])
            return torch.sparse_csr_tensor(
                rows[start : stop + 1] - first, tensor.col_indices()[first:last], tensor.values()[first:last], shape
            )
        raise UserError(
            f"the batch holds a tensor of layout {tensor.layout}, whose samples cannot be dealt to ranks or micro-batches; write it dense or sparse_csr"
        )

    def _jagged(self, tensor: Any) -> torch.Tensor:
        offsets = tensor.offsets()
        first, last = int(offsets[self._start]), int(offsets[self._stop])
        if id(offsets) not in self._offsets:
            self._offsets[id(offsets)] = offsets[self._start : self._stop + 1] - first
        return torch.nested.nested_tensor_from_jagged(tensor.values()[first:last], self._offsets[id(offsets)])

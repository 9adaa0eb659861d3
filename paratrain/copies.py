"""Copies of a module whose tensors are others: on meta, or without values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_Module = TypeVar("_Module", bound=nn.Module)
_FOREIGN = ("torch.", "paratrain.", "builtins", "numpy", "logging", "threading")


def copied(model: _Module, make: Callable[[Tensor], Any]) -> _Module:
    """A deep copy with make(tensor) in the place of every tensor that `model` can be seen to hold; what was shared is.

    Also in the place of those that no module registers: attributes that a hook computes from parameters (the `weight` of
    torch.nn.utils.weight_norm, which autograd does not let anybody copy), and those of modules in plain lists and of plain objects.

    Raises:
        Whatever the user's attributes raise when they are copied.
    """
    return copy.deepcopy(model, {id(tensor): make(tensor) for tensor in held(model)})


def held(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that `model` can be seen to hold, once."""
    seen: set[int] = set()
    open_: list[Any] = [model]
    while open_:
        owner = open_.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for leaf in tree_leaves(dict(vars(owner))):
            if isinstance(leaf, Tensor):
                if id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield leaf
            elif isinstance(leaf, nn.Module) or (hasattr(leaf, "__dict__") and not callable(leaf) and not _is_foreign(leaf)):
                open_.append(leaf)


def _is_foreign(leaf: Any) -> bool:
    return isinstance(leaf, type) or type(leaf).__module__.startswith(_FOREIGN)

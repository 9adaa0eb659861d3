"""Arguments of a block into which it can write: lists, dicts and the like that it shares with what calls it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def can_change(value: Any) -> bool:
    """Whether a block can write into an argument, other than into a tensor."""
    if value is None or isinstance(value, torch.Tensor):
        return False
    if isinstance(value, (list, dict, set)) or is_dataclass(value):
        return True
    return isinstance(value, tuple) and any(map(can_change, value))


def copied(value: Any) -> Any:
    """The same with containers of its own, however nested; tensors and whatever else is inside are the same objects."""
    if not can_change(value):
        return value
    if isinstance(value, tuple):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    new = copy.copy(value)
    if isinstance(value, list):
        new[:] = [copied(item) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            new[key] = copied(item)
    elif is_dataclass(value):
        for field in fields(value):
            if can_change(item := getattr(value, field.name)):
                object.__setattr__(new, field.name, copied(item))
    return new


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or dict, key) of every tensor with a gradient in a list or dict, however nested."""
    if isinstance(value, list | dict):
        for key, item in list(enumerate(value) if isinstance(value, list) else value.items()):
            if isinstance(item, torch.Tensor):
                if item.requires_grad:
                    yield value, key
            else:
                yield from places_in(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from places_in(item)

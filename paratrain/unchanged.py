"""Calls that are made only to look: whatever a function or module keeps between calls is given back as it was."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain import rng
from paratrain.parallel.pipeline_ghost import Ghost
from paratrain.reach import GENERATORS, Frozen

_DEPTH = 3  # a closure over an object that holds a list
_LARGEST = 1 << 24  # elements: what is larger is data, and no state


@contextmanager
def unchanged(*things: Any) -> Iterator[None]:
    """Give back tensors, lists, dicts and attributes that `things` (functions, modules, objects) hold or close over, and the generators.

    What a function reaches otherwise, such as files and attributes of objects in other modules, is its own affair.
    """
    undo: list[Callable[[], Any]] = []
    seen: set[int] = set()
    for thing in things:
        _remember(thing, undo, seen, _DEPTH)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with rng.all_preserved():
            yield
    finally:
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        with torch.no_grad():
            for action in undo:
                action()


def _remember(thing: Any, undo: list[Callable[[], Any]], seen: set[int], depth: int) -> None:
    if id(thing) in seen or depth < 0 or isinstance(thing, type | types.ModuleType | str | int | float):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if thing.is_leaf and not (thing.is_meta or isinstance(thing, nn.Parameter | DTensor | Ghost) or thing.numel() > _LARGEST):
            undo.append(functools.partial(_copy_back, thing, thing.detach().clone()))
    elif isinstance(thing, np.ndarray):
        if thing.size <= _LARGEST and thing.flags.writeable:
            undo.append(functools.partial(np.copyto, thing, thing.copy()))
    elif isinstance(thing, list):
        undo.append(functools.partial(thing.__setitem__, slice(None), list(thing)))
        _each(thing, undo, seen, depth)
    elif isinstance(thing, GENERATORS):
        undo.append(functools.partial(Frozen(thing).thaw, generators=True))
    elif isinstance(thing, set):
        undo.append(functools.partial(_refill, thing, set(thing)))
    elif isinstance(thing, dict):
        undo.append(functools.partial(_put_back, thing, dict(thing)))
        _each(thing.values(), undo, seen, depth)
    elif isinstance(thing, tuple):
        _each(thing, undo, seen, depth)
    elif isinstance(thing, functools.partial):
        _each((thing.func, *thing.args, *thing.keywords.values()), undo, seen, depth)
    elif isinstance(thing, types.MethodType):
        _each((thing.__self__, thing.__func__), undo, seen, depth)
    elif isinstance(thing, types.FunctionType):
        _of_function(thing, undo, seen, depth)
    elif isinstance(thing, nn.Module):
        for module in thing.modules():
            held = {name: value for name, value in module.__dict__.items() if name not in ("_parameters", "_modules")}
            undo.append(functools.partial(_put_back, module.__dict__, module.__dict__ | held))
            _each(held.values(), undo, seen, depth)
    elif type(getattr(thing, "__dict__", None)) is dict and not type(thing).__module__.startswith(("torch.", "paratrain.")):
        undo.append(functools.partial(_put_back, thing.__dict__, dict(thing.__dict__)))
        _each(thing.__dict__.values(), undo, seen, depth)


def _of_function(function: types.FunctionType, undo: list[Callable[[], Any]], seen: set[int], depth: int) -> None:
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        undo.append(functools.partial(setattr, cell, "cell_contents", held))
        _remember(held, undo, seen, depth - 1)
    values = (function.__globals__.get(name) for name in function.__code__.co_names)
    _each([value for value in values if isinstance(value, list | dict | set | torch.Tensor | nn.Module)], undo, seen, depth)


def _each(parts: Iterable[Any], undo: list[Callable[[], Any]], seen: set[int], depth: int) -> None:
    for part in parts:
        _remember(part, undo, seen, depth - 1)


def _copy_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.shape == value.shape and not torch.equal(tensor.detach(), value):
        tensor.detach().copy_(value)


def _put_back(container: dict, content: dict) -> None:
    for key in [key for key in container if key not in content]:
        del container[key]
    for key, value in content.items():
        if key not in container or container[key] is not value:
            container[key] = value


def _refill(container: set, content: set) -> None:
    container.clear()
    container.update(content)

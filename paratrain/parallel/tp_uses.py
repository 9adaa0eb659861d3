"""Weights that a program does not read from a module under tensor parallelism, but from `parameters()`: a penalty, or a regulariser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from paratrain.parallel.watched import as_is, asks_for_facts, watched, writes


class Reading:
    """Answers operations on the split weights of `model` by those on this rank's parts, from a forward on to the end of its backward."""

    def __init__(self, model: nn.Module):
        self._backward = False
        self._class = watched("SplitWeight", self._answer)
        self._places: dict[int, tuple[nn.Module, str]] = {}
        self._params: list[DTensor] = []
        for module in model.modules():
            if "_tensor_parallel" in module.__dict__:
                for name, param in module._parameters.items():
                    if isinstance(param, DTensor) and id(param) not in self._places:
                        self._places[id(param)] = module, name
                        self._params.append(param)
        model.register_forward_pre_hook(lambda *_: self._watch(True))

    def backward(self, loss: torch.Tensor) -> None:
        self._backward = True
        try:
            loss.backward()
        finally:
            self._backward = False
            self._watch(False)

    def settle(self) -> None:
        self._watch(False)

    def _watch(self, on: bool) -> None:
        kind = self._class if on else DTensor
        for param in self._params:
            param.__class__ = kind

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, self._class)}
        if asks_for_facts(func) or writes(func, kwargs) or (self._backward and not torch.is_grad_enabled()):
            return as_is(found.values(), func, args, kwargs)
        parts = {key: as_is([param], getattr, self._places[key], {}) for key, param in found.items()}
        args, kwargs = tree_map(lambda leaf: parts.get(id(leaf), leaf), (args, kwargs))
        return func(*args, **kwargs)

"""Any optimizer over sharded parameters: whole parameters, gathered one at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from paratrain.optim.matrix import part, whole
from paratrain.optim.one_by_one import States, one_by_one


@cache
def gathered(cls: Any) -> type:
    """The optimizer `cls`, computing each update from the whole parameter, gradient and states, on every rank alike.

    For classes whose update of an element depends on others (a norm, a row) and that DTensor cannot run. States of a parameter's shape
    stay sharded; others are whole on every rank. What a class computes over several parameters at once it computes over one.
    """

    def lend(param: torch.Tensor, kept: States, group: dict[str, Any]) -> tuple[torch.Tensor, States]:
        twin = whole(param.detach()).clone().requires_grad_()
        assert param.grad is not None
        twin.grad = whole(param.grad)
        return twin, {key: _map(whole, value) for key, value in kept.items()}

    def take_back(param: torch.Tensor, twin: torch.Tensor, kept: States, states: States) -> States:
        param.copy_(part(twin.detach(), param))
        return {
            key: part(value, param) if isinstance(value, torch.Tensor) and value.shape == param.shape else value
            for key, value in states.items()
        }

    return one_by_one(cls, f"Gathered{cls.__name__}", gathered.__doc__, lend, take_back)


def needs_gathering(cls: type, params: list[torch.Tensor]) -> bool:
    """Whether `cls` is known to fail on some of `params` as they are laid out."""
    return cls.__name__ in ("Adafactor", "Lamb") and any(isinstance(param, DTensor) for param in params)


def _map(function: Callable, value: Any) -> Any:
    return function(value) if isinstance(value, torch.Tensor) else value

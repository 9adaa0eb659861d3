"""Any optimizer over sharded parameters: whole parameters, gathered one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from paratrain.optim.matrix import part, whole


@cache
def gathered(cls: Any) -> type:
    """The optimizer `cls`, computing each update from the whole parameter, gradient and states, on every rank alike.

    For classes whose update of an element depends on others (a norm, a row) and that DTensor cannot run. States of a parameter's shape
    stay sharded; others are whole on every rank. What a class computes over several parameters at once it computes over one.
    """

    @torch.no_grad()
    def step(self: Any, closure: Callable | None = None) -> None:
        assert closure is None, "the engine passes none"
        groups, states = self.param_groups, self.state
        try:
            for group in groups:
                before = after = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    twin = whole(param.detach()).clone().requires_grad_()
                    twin.grad = whole(param.grad)
                    self.state = defaultdict(dict, {twin: {key: _map(whole, value) for key, value in states[param].items()}})
                    self.param_groups = [{**before, "params": [twin]}]
                    cls.step(self)
                    after = {key: value for key, value in self.param_groups[0].items() if key != "params"}
                    param.copy_(part(twin.detach(), param))
                    states[param] = {
                        key: part(value, param) if isinstance(value, torch.Tensor) and value.shape == param.shape else value
                        for key, value in self.state[twin].items()
                    }
                group.update(after)
        finally:
            self.param_groups, self.state = groups, states

    return type(f"Gathered{cls.__name__}", (cls,), {"step": step, "__doc__": gathered.__doc__})


def needs_gathering(cls: type, params: list[torch.Tensor]) -> bool:
    """Whether `cls` is known to fail on some of `params` as they are laid out."""
    return cls.__name__ in ("Adafactor", "Lamb") and any(isinstance(param, DTensor) for param in params)


def _map(function: Callable, value: Any) -> Any:
    return function(value) if isinstance(value, torch.Tensor) else value

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


_AS_THEY_ARE = {  # update each element by itself, with operators that DTensor has
    "torch": "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD",
    "pytorch_optimizer": "AdaBelief Lion ScheduleFreeAdamW",
}


def needs_gathering(cls: type, params: list[torch.Tensor]) -> bool:
    """Whether `cls` is to be run on whole parameters, because some of `params` are sharded and it is not known to be right then."""
    package = cls.__module__.partition(".")[0]
    knows_shards = package in ("paratrain", "torchao") or cls.__name__ in _AS_THEY_ARE.get(package, "").split()
    return not knows_shards and any(isinstance(param, DTensor) for param in params)


def takes_one_at_a_time(cls: Any, options: dict[str, Any]) -> bool:
    """Whether `cls` updates each parameter by itself: tried, for a few steps, on two small ones together and one after the other."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (5,))]
    # gradients of different sizes that keep their direction, which those that estimate a common rate wait for
    ways = [torch.randn(value.shape, generator=generator, dtype=torch.float64) * size for value, size in zip(first, (1, 100), strict=True)]
    steps = [[way * (1 + 0.1 * torch.randn(way.shape, generator=generator, dtype=torch.float64)) for way in ways] for _ in range(12)]
    results = []
    for made in (cls, gathered(cls)):
        params = [torch.nn.Parameter(value.clone()) for value in first]
        optimizer = made(params, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for grads in steps:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        results.append(params)
    return all(torch.allclose(one, other, rtol=1e-6, atol=1e-9) for one, other in zip(*results, strict=True))


def _map(function: Callable, value: Any) -> Any:
    return function(value) if isinstance(value, torch.Tensor) else value

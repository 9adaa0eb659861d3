"""What optimizers keep beside their tensors: numbers in groups, and a second set of weights to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Numbers = list[list[dict[str, int | float | bool]]]  # of each group of each optimizer


def numbers(optimizers: Sequence[torch.optim.Optimizer], since: Numbers | None = None) -> Numbers:
    """The numbers in the groups; with `since`, those that changed since then: step counts, not what the configuration says.

    The learning rate is left out: it is a function of the step.
    """
    now: Numbers = [
        [{key: value for key, value in group.items() if isinstance(value, int | float) and key != "lr"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    if since is None:
        return now
    return [
        [{k: v for k, v in new.items() if k not in old or old[k] != v} for new, old in zip(news, olds, strict=True)]
        for news, olds in zip(now, since, strict=True)
    ]


def set_numbers(optimizers: Sequence[torch.optim.Optimizer], saved: Sequence[Any]) -> None:
    """Give the groups the numbers that `numbers` returned."""
    for optimizer, groups in zip(optimizers, saved, strict=False):
        for group, values in zip(optimizer.param_groups, groups, strict=False):
            group.update(values)


@contextmanager
def averaged(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """The weights to evaluate and to export: schedule-free optimizers train others (Defazio et al. 2024). Puts back every bit."""
    switching: list[Any] = [optimizer for optimizer in optimizers if hasattr(optimizer, "eval") and hasattr(optimizer, "train")]
    params = [param for optimizer in switching for group in optimizer.param_groups for param in group["params"]]
    trained = [param.detach().clone() for param in params]
    for optimizer in switching:
        if any(optimizer.state.values()):
            optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switching:
            optimizer.train()
        with torch.no_grad():
            for param, value in zip(params, trained, strict=True):
                param.copy_(value)

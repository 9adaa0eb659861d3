"""A moving average of the weights, laid out as they are, to evaluate and to export (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

import torch

from paratrain import gradients
from paratrain.config import EMA as Options

PREFIX = "ema/"


class EMA:
    """average = decay * average + (1 - decay) * weights after every `every`-th update; it starts as the first weights.

    Kept in float32 where weights have fewer bits, since 1 - decay is less than their rounding. What is not trained, buffers too, is
    not averaged.

    Args:
        names: the trained parameters and their names.
    """

    def __init__(self, options: Options, names: Mapping[torch.Tensor, str]):
        self.options = options
        self._names = dict(names)
        self._averages = {param: param.detach().to(_wide(param), copy=True) for param in names}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after update number `updates`."""
        if updates % self.options.every:
            return
        params, averages = gradients.local(self._averages), gradients.local(self._averages.values())
        weights = [param.detach().to(average) for param, average in zip(params, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - self.options.decay)

    def follow(self, names: Mapping[torch.Tensor, str]) -> None:
        """Average these parameters from now on: what is new starts as it is, what is gone is forgotten."""
        self._averages = {
            param: self._averages[param] if param in self._averages else param.detach().to(_wide(param), copy=True) for param in names
        }
        self._names = dict(names)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average for its weights; afterwards it has its own again, bit by bit."""
        trained = {param: param.detach().clone() for param in self._averages}
        self._set(self._averages)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: Mapping[torch.Tensor, torch.Tensor]) -> None:
        for param, value in values.items():
            param.copy_(value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`ema/<parameter>` of every trained parameter, for a checkpoint to keep or to fill."""
        return {f"{PREFIX}{self._names[param]}": average for param, average in self._averages.items()}

    @torch.no_grad()
    def restart(self, but: Container[str] = ()) -> None:
        """Begin again from the weights as they are now; leave those `but` out, by their names in `tensors`."""
        for name, param in zip(self.tensors(), self._averages, strict=True):
            if name not in but:
                self._averages[param].copy_(param)


def _wide(param: torch.Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)

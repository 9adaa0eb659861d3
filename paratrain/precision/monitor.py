"""How near each module comes to the limits of float16: measured by hooks, on the device, in the steps that are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

LARGEST, SMALLEST_NORMAL = torch.finfo(torch.float16).max, torch.finfo(torch.float16).tiny
_MAXIMA, _SUMS = 4, 4


class Reading(NamedTuple):
    """What one module did in one step, over all micro-batches and ranks; infinite where a value was not finite.

    Attributes:
        inputs: largest absolute value among its floating inputs.
        outputs: likewise of its outputs.
        grad_outputs: likewise of the scaled gradients it was handed.
        grad_inputs: likewise of those it handed on.
        underflow: fraction of the gradients it handed on, zeros left out, that are below float16's smallest normal number, 2^-14, where
            digits are lost.
        snr: power of these gradients over the power of their rounding error in float16 (a spacing of 2^-10 relative, 2^-24 absolute;
            error uniform over it), in dB. About 70 where nothing is lost; NaN without gradients.
        half: whether its outputs were float16.
    """

    inputs: float
    outputs: float
    grad_outputs: float
    grad_inputs: float
    underflow: float
    snr: float
    half: bool

    @property
    def range_used(self) -> float:
        """Largest activation as a fraction of float16's largest number."""
        return max(self.inputs, self.outputs) / LARGEST

    @property
    def largest(self) -> float:
        """Largest number of all, gradients included."""
        return max(self.inputs, self.outputs, self.grad_outputs, self.grad_inputs)


class Monitor:
    """Hooks on modules, by their names. Costs one test a module and step, and three reductions a tensor in a step that is read.

    Attributes:
        names: the modules, outer ones first; "" is the model itself.
        reading: whether this step is measured.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device):
        self.names = list(modules)
        self.reading = True
        self._half = [False] * len(self.names)
        self._table = torch.zeros(
            len(self.names), _MAXIMA + _SUMS, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
        )
        for index, module in enumerate(modules.values()):
            module.register_forward_hook(partial(self._measure, index), with_kwargs=True)

    def read(self) -> dict[str, Reading]:
        """What was measured since the last reading, agreed by all ranks; every rank must call it. Waits for the device."""
        maxima, sums = self._table[:, :_MAXIMA].contiguous(), self._table[:, _MAXIMA:].contiguous()
        flags = torch.tensor(self._half, dtype=maxima.dtype, device=maxima.device).unsqueeze(1)
        maxima = torch.cat((maxima, flags), 1)
        if dist.get_world_size() > 1:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
            dist.all_reduce(sums)
        self._table.zero_()
        self._half = [False] * len(self.names)
        readings = {}
        for name, (inputs, outputs, grads, handed, half), (lost, counted, signal, noise) in zip(
            self.names, maxima.tolist(), sums.double().tolist(), strict=True
        ):
            snr = 10 * _log10(signal / noise) if noise > 0 and signal > 0 else float("nan")
            readings[name] = Reading(inputs, outputs, grads, handed, lost / counted if counted else 0.0, snr, half > 0)
        return readings

    def _measure(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.reading or not torch.is_grad_enabled():
            return
        for leaf in _floating((args, kwargs)):
            self._raise(index, 0, leaf)
            if leaf.requires_grad:
                leaf.register_hook(partial(self._handed_on, index))
        for leaf in _floating(output):
            self._raise(index, 1, leaf)
            self._half[index] |= leaf.dtype is torch.float16
            if leaf.requires_grad:
                leaf.register_hook(partial(self._raise, index, 2))

    def _raise(self, index: int, column: int, value: torch.Tensor) -> None:
        value = value.detach()
        if value.numel():
            largest = value.abs().amax().to(self._table.dtype).nan_to_num(nan=float("inf"), posinf=float("inf"))
            cell = self._table[index, column]
            torch.maximum(cell, largest, out=cell)

    def _handed_on(self, index: int, grad: torch.Tensor) -> None:
        self._raise(index, 3, grad)
        size = grad.detach().abs().float()
        spacing = (size.clamp(min=SMALLEST_NORMAL) * 2.0**-10).double()
        present = size > 0
        counts = [
            (present & (size < SMALLEST_NORMAL)).sum(),
            present.sum(),
            size.double().square().sum(),
            (spacing.square() * present).sum() / 12,
        ]
        self._table[index, _MAXIMA:] += torch.stack([count.to(self._table.dtype) for count in counts])


def _floating(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _log10(value: float) -> float:
    return math.log10(value) if math.isfinite(value) else float("nan")

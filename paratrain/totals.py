"""Numbers of a step, summed over the ranks that hold parts of it: losses, counts, votes, and which parameters were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from paratrain.layout import Layout
from paratrain.mesh import Mesh
from paratrain.result import Scalar, on_device


class Totals:
    """Sums numbers over ranks: floats on a CPU, 0-dim tensors that nobody waits for on a device.

    Args:
        params: what the optimizers of this rank update.
        names: of the parameters.
    """

    def __init__(self, mesh: Mesh, layout: Layout, params: Sequence[torch.Tensor], names: Mapping[torch.Tensor, str], device: torch.device):
        self._mesh, self._layout, self._params, self._device = mesh, layout, params, device
        self.ranks = mesh.loss.size()
        # where each parameter stands among those of all data ranks, and how many these are: ranks of ep may hold others by name
        self._slots, self._size = list(range(len(params))), len(params)
        if layout.experts.owners:
            position = {name: index for index, name in enumerate(layout.experts.forms)}
            self._slots, self._size = [position[names[param]] for param in params], len(position)

    def scalar(self, value: torch.Tensor | float) -> Scalar:
        if self._device.type == "cpu":
            return float(value.item()) if isinstance(value, torch.Tensor) else float(value)
        return on_device(value, self._device)

    def add(self, window: tuple[Scalar, Scalar], total: torch.Tensor, count: Any) -> tuple[Scalar, Scalar]:
        return window[0] + self.scalar(total), window[1] + self.scalar(count)

    def over_ranks(self, values: Sequence[Scalar], over: DeviceMesh | None = None) -> list[Scalar]:
        """Each value summed over the ranks that hold parts of the loss, or those of `over`, in one collective."""
        if (self.ranks if over is None else over.size()) == 1:
            return list(values)
        return self._scalars(_all_reduced(self._vector(values), self._mesh.loss if over is None else over))

    def largest(self, value: float, over: DeviceMesh) -> float:
        """The largest of the values that the ranks of `over` bring."""
        return float(_all_reduced(self._vector([value]), over, dist.ReduceOp.MAX))

    def of_step(self, values: Sequence[Scalar]) -> list[Scalar]:
        """`over_ranks` of the values of a step; a parameter that no data rank used has no gradient afterwards.

        Where gradients are sharded, one that some ranks did not use is reduced with zeros from them, so only the ranks together know.
        """
        used, order = self._layout.used, self._layout.order
        if used is None:
            return self.over_ranks(values)
        here = [param in used for param in self._params]
        used.clear()
        digest = order.digest() if order else 0
        marks = [digest, digest**2, *[0.0] * self._size]
        for slot, mark in zip(self._slots, here, strict=True):
            marks[slot + 2] = float(mark)
        users = torch.tensor(marks, dtype=torch.float64).to(self._device, non_blocking=True)
        if self._mesh.loss is self._mesh.weights:
            together = _all_reduced(torch.cat((self._vector(values), users)), self._mesh.weights)
            totals, users = self._scalars(together[: len(values)]), together[len(values) :]
        else:
            totals, users = self.over_ranks(values), _all_reduced(users, self._mesh.weights)
        if not all(here) or self._device.type == "cpu":  # only then is there anything to wait for
            total, squares, *counts = users.tolist()
            if order:
                order.check(total, squares)
            for slot, param in zip(self._slots, self._params, strict=True):
                if not counts[slot]:
                    param.grad = None
        return totals

    def _vector(self, values: Sequence[Scalar]) -> torch.Tensor:
        return torch.stack([on_device(value, self._device) for value in values])

    def _scalars(self, vector: torch.Tensor) -> list[Scalar]:
        return vector.tolist() if self._device.type == "cpu" else list(vector)


def _all_reduced(vector: torch.Tensor, over: DeviceMesh, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    if over.size() > 1:
        dist.all_reduce(vector, op, group=over.get_group())
    return vector


def or_one(count: Scalar) -> Scalar:
    """`count`; 1 where nothing counts, so that gradients of nothing stay zero."""
    return torch.where(count == 0, 1.0, count) if isinstance(count, torch.Tensor) else count or 1.0

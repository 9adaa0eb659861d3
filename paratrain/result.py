"""What a step was: numbers that may still be on their way from the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Scalar = float | torch.Tensor  # a float where nothing has to be waited for (CPU), a 0-dim float64 tensor on a device that runs behind


def on_device(value: Scalar, device: torch.device) -> torch.Tensor:
    """`value` as a 0-dim float64 tensor; a number is written by the device itself, which the host does not wait for."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)


class StepResult:
    """What a step was, equal on every rank. Reading an attribute waits for that step, holding the result does not.

    Attributes:
        loss: mean over `count`.
        count: what the loss is a mean over (tokens, samples), summed over micro-batches and ranks.
        device_count: `count`, without waiting for the device.
        grad_norm: norm of the gradient of `loss` before clipping; NaN in evaluation.
        lr: learning rate of the first parameter group in this step.
        loss_scale: loss scale of this step.
        skipped: whether the update was skipped because float16 gradients overflowed.
        votes: sums over all ranks of the numbers given to `train_step`.
        losses: name -> (sum, count) of each loss of `trainer.loss_weights`, summed like `count`; empty without.
    """

    __slots__ = ("_arrived", "_names", "_numbers", "device_count", "loss_scale", "lr", "skipped")

    def __init__(self, totals: Sequence[Scalar], norm: Scalar, lr: float, loss_scale: float, skipped: bool, names: Sequence[str] = ()):
        """`totals`: sum and count of the loss, a sum and a count for each of `names`, votes."""
        self._names = tuple(names)
        self.device_count = totals[1]
        self.lr, self.loss_scale, self.skipped = lr, loss_scale, skipped
        self._arrived: torch.cuda.Event | None = None
        self._numbers: torch.Tensor | Sequence[float]
        numbers = [norm, *totals]
        devices = [number.device for number in numbers if isinstance(number, torch.Tensor)]
        if not devices:
            self._numbers = numbers  # type: ignore[assignment]
            return
        # copied now, behind the work of this step alone: a later read does not wait for what the device is told after it
        self._numbers = torch.stack([on_device(number, devices[0]) for number in numbers]).to("cpu", non_blocking=True)
        if devices[0].type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def _read(self) -> Sequence[float]:
        if isinstance(self._numbers, torch.Tensor):
            if self._arrived is not None:
                self._arrived.synchronize()
            self._numbers = self._numbers.tolist()
        return self._numbers

    @property
    def loss(self) -> float:
        _, total, count, *_ = self._read()
        return total / count if count else math.nan

    @property
    def count(self) -> int | float:
        count = float(self._read()[2])
        return int(count) if count.is_integer() else count

    @property
    def grad_norm(self) -> float:
        return self._read()[0]

    @property
    def votes(self) -> list[float]:
        return list(self._read()[3 + 2 * len(self._names) :])

    @property
    def losses(self) -> dict[str, tuple[float, float]]:
        numbers = self._read()[3:]
        return {name: (numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(self._names)}

    def __repr__(self) -> str:
        return f"StepResult(loss={self.loss:.6g}, grad_norm={self.grad_norm:.6g}, count={self.count}, lr={self.lr:.4g}, skipped={self.skipped})"

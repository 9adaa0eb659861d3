"""The gradient noise scale: beyond which global batch more samples stop helping (McCandlish et al. 2018, arXiv 1812.06162, appendix A).

The parts of a step (one micro-batch on one rank) are small batches, the step is the large one. With g_i the gradient of the sum of
part i, c_i its count, and g, c those of the step,

    E sum_i |g_i|^2 / c_i = c |G|^2 + n tr S,        E |g|^2 / c = c |G|^2 + tr S,

where G is the true gradient of the mean, S the covariance of a single count's gradient and n the number of parts; both are solved for
without bias, whatever the parts' sizes. The simple noise scale is tr S / |G|^2, in what the loss counts (tokens, samples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from paratrain.config import NoiseScale as Options
from paratrain.errors import UserError
from paratrain.result import Scalar


class NoiseScale:
    """Measures the parts of the steps it reads with hooks on the parameters, and averages both quantities over the readings."""

    def __init__(self, options: Options, model: nn.Module, device: torch.device):
        self.options, self.device = options, device
        self.trace: Scalar = 0.0  # running averages of tr S and |G|^2, both short of the same factor
        self.square: Scalar = 0.0
        self._hooked: set[torch.Tensor] = set()
        for module in model.modules():
            if module is model or isinstance(module, FSDPModule):  # whose weights are whole from here on
                module.register_forward_pre_hook(self._watch)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin step number `step`."""
        self.reading = step % self.options.every == 0
        self._part: Scalar = 0.0
        self._sum: Scalar = 0.0
        self._parts: Scalar = 0.0
        self._seen = 0

    def _watch(self, module: nn.Module, args: Any) -> None:
        for param in module.parameters():
            if param.requires_grad and not isinstance(param, DTensor) and param not in self._hooked:
                self._hooked.add(param)
                param.register_hook(self._measure)

    def _measure(self, grad: torch.Tensor) -> None:
        if self.reading:
            square = torch.linalg.vector_norm(grad.detach()).double().square()
            self._part = self._part + (float(square) if self.device.type == "cpu" else square)

    def end_part(self, count: Scalar) -> None:
        """A backward over `count` is done."""
        if self.reading:
            counts = count > 0  # a part that counts nothing has no gradient
            self._sum = self._sum + self._part / (count + ~counts if isinstance(count, torch.Tensor) else count or 1.0)
            self._parts = self._parts + (counts.double() if isinstance(counts, torch.Tensor) else float(counts))
            self._part, self._seen = 0.0, self._seen + 1

    def totals(self, ranks: int) -> tuple[Scalar, ...]:
        """Numbers of this rank to be summed over the `ranks` data ranks; none in a step that is not read.

        Raises:
            UserError: the step is one part, which tells nothing about noise.
        """
        if not self.reading:
            return ()
        if self._seen * ranks < 2:
            raise UserError(
                "trainer.noise_scale compares the micro-batches of a step, and this one is a single micro-batch on one rank; write a smaller "
                "data.micro_batch_size, or trainer.noise_scale=null"
            )
        return self._sum, self._parts

    def update(self, totals: Sequence[Scalar], factor: float, norm: Scalar, count: Scalar) -> None:
        """Take in a step.

        Args:
            totals: `totals` summed over the ranks.
            factor: by which the gradients of the parts were too large.
            norm: of the gradient of the mean, before clipping.
            count: of the step.
        """
        if not totals:
            return
        parts, number = totals
        large = norm * norm * count
        trace = (parts / factor**2 - large) / (number - 1)
        square = norm * norm - trace / count
        if not isinstance(trace, torch.Tensor) and not (math.isfinite(trace) and number > 1):
            return
        decay = self.options.decay
        self.trace = decay * self.trace + (1 - decay) * trace
        self.square = decay * self.square + (1 - decay) * square

    @property
    def value(self) -> float:
        """The noise scale; NaN before the first reading, and where noise hides the gradient. Waits for the device."""
        trace, square = float(self.trace), float(self.square)
        return trace / square if square > 0 else math.nan

    def state_dict(self) -> dict[str, float]:
        return {"trace": float(self.trace), "square": float(self.square)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.trace, self.square = float(state["trace"]), float(state["square"])

"""The loss of whole sequences where each rank has a part of them.

Sums over positions add up over the ranks of cp: then each takes the loss of its part, and nothing more travels. A loss that is no such sum (counted in
samples, a mean over each sequence, a function of such a sum, one that shifts labels or looks at the last position) is that of the whole sequence. So
the first micro-batches are measured both ways; where the ways differ, the outputs are gathered from then on, and each rank has the loss of the
whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paratrain import batch as batches
from paratrain.parallel.tp_split import plain

log = logging.getLogger(__name__)
_LOOKS = 8
"""Micro-batches that are measured both ways: a loss may add up where nothing is padded and otherwise not."""


class Targets(NamedTuple):
    """The targets of this rank's positions, and of all."""

    part: Any
    whole: Any


class WholeLoss:
    """Chooses on one rank of the cp axis what loss_fn is given.

    Args:
        group: the ranks that share the sequences.

    Attributes:
        gathers: whether outputs are gathered.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._looked, self.gathers = group, 0, False

    def choose(
        self,
        outputs: Any,
        targets: Targets,
        real: int,
        length: int,
        inverse: torch.Tensor,
        pairs: Callable[[Any, Any, int], Sequence[tuple[float, float]] | None],
    ) -> tuple[Any, Any]:
        """Outputs and targets for loss_fn; every rank of the group must call it.

        Args:
            outputs: of this rank's `length` positions, along dim 1.
            real: samples that count.
            inverse: [whole length], for each position where it is in the concatenation of the parts.
            pairs: (sum, count) of each loss of outputs and targets; None if it cannot be computed. Leaves everything as it was.
        """
        if not self.gathers and real and self._looked < _LOOKS:
            self._looked += 1
            self._look(outputs, targets, real, length, inverse, pairs)
        if not self.gathers:
            return outputs, targets.part
        return self.whole(outputs, length, inverse), targets.whole

    def _look(self, outputs: Any, targets: Targets, real: int, length: int, inverse: torch.Tensor, pairs: Callable) -> None:
        with torch.no_grad():
            detached = batches.map_tensors(lambda leaf: plain(leaf).detach(), outputs)
            whole = pairs(self.whole(detached, length, inverse), targets.whole, real)
            part = pairs(detached, targets.part, real)
        found: list[Any] = [None] * self._group.size()
        dist.all_gather_object(found, part, group=self._group)
        if whole is None:
            return  # then what is said about it in training counts
        if any(one is None for one in found) or not _add_up(whole, found, _tolerance(outputs)):
            self.gathers = True
            log.info(
                "parallel.cp=%d: the loss of a sequence is not the sum over its positions, so outputs are gathered and each rank computes the loss of whole "
                "sequences: exact, for their memory and traffic. A loss that returns the sum over positions and their number needs neither",
                self._group.size(),
            )

    def whole(self, outputs: Any, length: int, inverse: torch.Tensor) -> Any:
        """The outputs for every position, with gradients; every rank of the group must call it."""

        def gather(leaf: torch.Tensor) -> torch.Tensor:
            if leaf.ndim < 2 or leaf.shape[1] != length:
                return leaf
            return _Gather.apply(plain(leaf), self._group)[:, inverse.to(leaf.device)]

        return batches.map_tensors(gather, outputs)

    def weight(self) -> float:
        """Of the loss of this rank in the sum over the ranks."""
        return 1.0 if not self.gathers or self._group.rank() == 0 else 0.0


class _Gather(torch.autograd.Function):
    """Parts along dim 1, one after another; their gradients are summed over the ranks, each of which computed something of all of them."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.length = group, part.shape[1]
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        first = ctx.group.rank() * ctx.length
        return total[:, first : first + ctx.length], None


def _tolerance(outputs: Any) -> float:
    eps = max((torch.finfo(leaf.dtype).eps for leaf in batches.tensors(outputs) if leaf.is_floating_point()), default=1e-7)
    return 1e-9 if eps < 1e-12 else 1e-4 if eps < 1e-5 else 8 * eps


def _add_up(whole: Sequence[tuple[float, float]], parts: Sequence[Sequence[tuple[float, float]]], tolerance: float) -> bool:
    for number, pair in enumerate(whole):
        for place in range(2):  # sum and count
            values = [part[number][place] for part in parts]
            if not abs(pair[place] - sum(values)) <= tolerance * max(abs(pair[place]), sum(map(abs, values)), 1e-12):
                return False
    return True

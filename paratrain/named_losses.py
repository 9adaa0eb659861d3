"""Several losses in one step (`trainer.loss_weights`): each a mean over its own count, together their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from paratrain.errors import UserError
from paratrain.result import Scalar
from paratrain.totals import or_one


class NamedLosses:
    """The losses of a step by name; without names there is nothing to it.

    Args:
        weights: name -> weight.
        scalar: a number for sums over ranks.
        over_data: sums numbers over the ranks that hold other parts of the batch.

    Attributes:
        sums: (sum, count) of each loss, one after another, on this rank since `begin`.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        scalar: Callable[[Any], Scalar],
        over_data: Callable[[Sequence[Scalar]], list[Scalar]],
    ):
        self.weights, self._scalar, self._over_data = weights, scalar, over_data
        self.begin()

    def begin(self, micro_batches: int | None = None) -> None:
        """Forget what was summed; `micro_batches` that a rank has in the step to come, None in a loop of the user's own."""
        self.sums: list[Scalar] = [0.0] * (2 * len(self.weights))
        self._micro_batches = micro_batches

    def add(self, losses: Sequence[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, Any]:
        """(sum, count) of which the mean is that of several losses, each weighed and divided by its own count over the whole step.

        The division comes after all backwards, by the count of the first; so each of the others is brought to that count before, which is
        possible where it is the same count, or where one micro-batch a step lets the ranks add up theirs between forward and backward.
        """
        self.sums = [had + self._scalar(new) for had, new in zip(self.sums, (x for pair in losses for x in pair), strict=True)]
        counts = [count for _, count in losses]
        factors = zip(self.weights.values(), self._ratios(counts), strict=True)
        return torch.stack([total * (weight * ratio) for (total, _), (weight, ratio) in zip(losses, factors, strict=True)]).sum(), counts[0]

    def add_nothing(self) -> None:
        """Take part in what the ranks of `add` do together, for a micro-batch in which nothing counts."""
        self._ratios([0] * len(self.weights))

    def _ratios(self, counts: Sequence[Any]) -> list[Scalar]:
        """The first of several counts over each of them, in the whole step; 1 in evaluation, which needs none."""
        if not torch.is_grad_enabled():
            return [1.0] * len(counts)
        if counts and self._micro_batches == 1:
            sums = self._over_data([self._scalar(count) for count in counts])
            return [or_one(sums[0]) / or_one(one) for one in sums]
        tensors = any(isinstance(count, torch.Tensor) for count in counts)
        if any(count is not counts[0] and (tensors or count != counts[0]) for count in counts):
            raise UserError(
                f"trainer.loss_weights: {', '.join(self.weights)} have counts of their own, which a step of several micro-batches knows too late; "
                "write data.micro_batch_size=null and a smaller data.global_batch, or return one count (the same object) with all of them"
            )
        return [1.0] * len(counts)

    def weighed(self, totals: list[Scalar]) -> list[Scalar]:
        """Totals whose first is that of the weighed losses that follow it, if there are several."""
        if not self.weights:
            return totals
        pairs = zip(self.weights.values(), totals[2::2], totals[3::2], strict=False)
        mean: Scalar = sum((weight * total / or_one(count) for weight, total, count in pairs), 0.0)
        return [mean * or_one(totals[1]), *totals[1:]]

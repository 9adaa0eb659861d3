"""The largest micro-batch that fits, found by rehearsals: forward and backward without communication or consequences.

Running out of memory in the middle of a step would leave the other ranks waiting in a collective. So every rank rehearses the same
sizes at the same time, on its own, and afterwards they agree on the largest that fits on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from paratrain import deal
from paratrain.batch import LocalBatch, samples

log = logging.getLogger(__name__)
_WARM = 2
"""Steps that are rehearsed whatever their batches: the first, and the next, once the optimizer has its states."""


class AutoMicroBatch:
    """Finds how many samples a rank runs at once; again when samples grow, as longer sequences do.

    Args:
        rehearse: whether micro-batches of so many samples of a batch fit on this rank.
        largest: the largest of the numbers that the ranks bring.
        none_fits: makes the error for a batch of which not even single samples fit.
    """

    def __init__(
        self, rehearse: Callable[[LocalBatch, int], bool], largest: Callable[[float], float], none_fits: Callable[[], BaseException]
    ):
        self._rehearse, self._largest, self._none_fits = rehearse, largest, none_fits
        self.size: int | None = None
        self._steps = 0
        self._share = 0  # most samples of a rank, and numbers in a sample, that were rehearsed
        self._weight = 0

    def fit(self, share: LocalBatch) -> int:
        """Samples a rank runs at once of this batch; equal on every rank, all of which must call it.

        Raises:
            UserError: on every rank: single samples do not fit.
        """
        weight = _numbers_per_sample(share)
        new = self._steps < _WARM or weight > self._weight or share.largest > self._share
        self._steps += 1
        if not self._largest(float(new)) and self.size is not None:
            return self.size
        whole = self.size is None or self.size >= self._share
        found = self._search(share, share.largest if whole else self.size or 1)
        self._share, self._weight = max(self._share, share.largest), max(self._weight, weight)
        if found != self.size:
            log.info("data.micro_batch_size=auto: %d of %d samples at once", found, share.largest)
        self.size = found
        return found

    def _search(self, share: LocalBatch, most: int) -> int:
        """By the number of micro-batches: doubled until they fit, then halved into what lies between."""

        def size(parts: int) -> int:
            return -(-share.largest // parts)

        parts = size(most)
        too_few = parts - 1
        while not self._fits(share, size(parts)):
            if size(parts) == 1:
                raise self._none_fits()
            too_few, parts = parts, min(2 * parts, share.largest)
        while parts - too_few > 1:
            middle = (parts + too_few) // 2
            if self._fits(share, size(middle)):
                parts = middle
            else:
                too_few = middle
        return size(parts)

    def _fits(self, share: LocalBatch, size: int) -> bool:
        return not self._largest(float(not self._rehearse(share, size)))


def _numbers_per_sample(share: LocalBatch) -> int:
    tensors: list[Any] = [leaf for leaf in deal.leaves((share.inputs, share.targets)) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() for leaf in tensors) // samples((share.inputs, share.targets))

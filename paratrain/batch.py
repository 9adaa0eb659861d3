"""What a step is fed: a pair (inputs, targets) of nested tensors whose first dim counts samples."""

from __future__ import annotations

from typing import Any, NamedTuple


class LocalBatch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        inputs: tensor, tuple, list or dict of tensors, samples first.
        targets: likewise.
        size: samples of the global batch, over all ranks.
        real: leading samples here that belong to the global batch; 0 where the batch has fewer samples than there are ranks
            and this rank holds one filler sample, which takes part in the collectives and weighs nothing.
        largest: most samples that any rank holds, from which all ranks derive the same number of micro-batches.
    """

    inputs: Any
    targets: Any
    size: int
    real: int
    largest: int

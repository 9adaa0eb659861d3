"""What a rank runs that has no sample of a batch, as a batch with fewer samples than ranks leaves some.

It takes part in the collectives of the layout, so it runs a sample of the batch, which weighs nothing. Where forward itself combines something over
the ranks (sums and numbers of rows, for a running mean), this sample would be counted. So before the first such batch the ranks find out, together:

    forward is run with other filler samples, and two      the other ranks see no difference: a filler sample it is
    forward is run on no samples, by every rank            it does not fail: the ranks without samples run none
                                                           it does: refused

All of them run the same thing at the same time, so that collectives of the user's own find their partners, and fail together where they fail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paratrain import batch as batches
from paratrain import deal, rng
from paratrain.batch import LocalBatch
from paratrain.compat import collectives_started
from paratrain.errors import UserError
from paratrain.forward_state import ForwardState


@dataclass(frozen=True)
class _Outcome:
    """What a forward returned, the digests of what it left, and how many collectives it started."""

    outputs: list[torch.Tensor]
    state: dict[str, str]
    collectives: int


class Fillers:
    """Decides for one engine, in training and in evaluation.

    Args:
        run: what forward returns for some inputs, in a mode (training: True); every rank must call it.
        state: what forward moves, which is given back.
        anywhere: the largest of the numbers that the ranks bring.
        paused: a context for forwards beside those of a step.
        ranks: that hold parts of a batch.
    """

    def __init__(
        self,
        run: Callable[[Any, bool], Any],
        state: ForwardState,
        anywhere: Callable[[float], float],
        paused: Callable[[], AbstractContextManager],
        device: torch.device,
        ranks: int,
    ):
        self._run, self._state, self._anywhere, self._paused, self._device, self._ranks = run, state, anywhere, paused, device, ranks
        self._empty: dict[bool, bool] = {}  # training -> whether ranks without samples run none

    def filled(self, share: LocalBatch, micro: list[tuple[Any, Any, int]], training: bool) -> list[tuple[Any, Any, int]]:
        """The micro-batch of a step, of no samples where forward needs that. Every rank must call it, with its part of the same batch.

        Raises:
            UserError: on every rank: forward would count the filler sample, and takes no batch without samples.
        """
        if share.size >= self._ranks or len(micro) != 1:
            return micro
        if training not in self._empty:
            self._empty[training] = self._needs_empty(share, training)
        return micro if share.real or not self._empty[training] else [(*_of_nothing(share), 0)]

    def _needs_empty(self, share: LocalBatch, training: bool) -> bool:
        here = share.inputs
        if not _of_tensors(share):  # on every rank: it is a matter of its form
            return False
        first, again = self._tried(here, training), self._tried(here, training)
        if first is None or again is None:
            return False
        for change in (changed, _twice):  # of one shape first, which collectives may rely on
            there = batches.map_tensors(change, here)
            if self._tried(there, training) is None:  # on every rank: those that have samples cannot wait for one that fails
                continue
            other = self._tried(here if share.real else there, training)
            if self._anywhere(float(other is None or bool(share.real and _differ(first, again, other)))):
                break
        else:
            return False
        nothing = self._tried(_of_nothing(share)[0], training)
        fits = nothing is not None and nothing.collectives == again.collectives
        if self._anywhere(float(not fits)):
            raise UserError(
                f"the model: forward combines something over the ranks that hangs on how many samples they have, and of this batch, of {share.size} samples, "
                f"{self._ranks - share.size} of {self._ranks} ranks have none; they would add a sample that is not theirs, and forward does not take a batch of "
                f"no samples (tensors of shape [0, ...]), with which they would add nothing; let it, or give every batch at least {self._ranks} samples"
            )
        return True

    def _tried(self, inputs: Any, training: bool) -> _Outcome | None:
        """What comes of a forward; None where it fails on any rank."""
        began, found = collectives_started(), None
        with self._state.preserved(), self._paused(), rng.preserved(self._device), rng.all_preserved():
            rng.seed_all(0)
            rng.reseed(self._device, 0)
            try:
                outputs = self._run(inputs, training)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, ArithmeticError, UserError):
                failed = True
            else:
                failed = False
                found = _Outcome(
                    [leaf.detach().clone() for leaf in batches.tensors(outputs)], self._state.digests(), collectives_started() - began
                )
        return None if self._anywhere(float(failed)) else found


def _differ(first: _Outcome, again: _Outcome, other: _Outcome) -> bool:
    """Whether `other` differs from two that should not."""
    if any(value == again.state.get(path) and value != other.state.get(path) for path, value in first.state.items()):
        return True
    return _same(first.outputs, again.outputs) and not _same(first.outputs, other.outputs)


def _same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """But for rounding; a filler sample that is counted makes another difference."""
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and _near(a, b) for a, b in zip(some, others, strict=True)
    )


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not (a.is_floating_point() or a.is_complex()) or not a.numel():
        return torch.equal(a, b)
    slack = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=slack, atol=slack * float(a.abs().nan_to_num().max()), equal_nan=True)


def _of_nothing(share: LocalBatch) -> tuple[Any, Any]:
    return deal.Cut(0, 0, 1, share.form).pair(share.inputs, share.targets)


def changed(x: torch.Tensor) -> torch.Tensor:
    """Another sample as good as the first: in reverse, and of smaller numbers where they are no indices."""
    x = x.flip(tuple(range(1, x.dim()))) if x.dim() > 1 else x
    return x * 0.5 if x.dim() and x.is_floating_point() else x


def _twice(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.dim() else x


def _of_tensors(share: LocalBatch) -> bool:
    """Whether samples can be made of a sample: it is made of dense tensors, and no list holds one element a sample."""
    leaves = list(deal.leaves(share.inputs))
    plain = all(not isinstance(leaf, torch.Tensor) or (leaf.layout is torch.strided and not leaf.is_nested) for leaf in leaves) and not any(
        isinstance(leaf, np.ndarray | torch.nn.utils.rnn.PackedSequence) for leaf in leaves
    )
    return plain and any(isinstance(leaf, torch.Tensor) for leaf in leaves) and not any(share.form or ())

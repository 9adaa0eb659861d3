"""Whether what forward returns for a sample depends on the other samples of its batch: looked at in the first step.

A layout deals the samples of a batch to ranks and micro-batches, so a forward that takes a mean over them, mixes them or compares them computes
something else with every layout. In evaluation mode the first micro-batch runs whole, in part, and whole again (a forward that draws numbers says
nothing). Where a sample's outputs change with the others of this rank, but also with those of other ranks, forward combines them over the
ranks by itself, and is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from paratrain import batch as batches
from paratrain import deal, rng
from paratrain.errors import UserError
from paratrain.fillers import changed
from paratrain.parallel.batch_norm import training_call
from paratrain.unchanged import unchanged

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_ROUGH = 0.1  # of the largest output: kernels of half precision round otherwise for fewer samples


def refuse_mixed(
    inputs: Any,
    real: int,
    run: Callable[[Sequence[Any]], list[Any]],
    kept: Sequence[Any],
    everywhere: Callable[[float], list[float]],
    rank: int,
    ranks: int,
    asked: str,
    rough: bool,
    in_stages: bool,
) -> None:
    """Look at some samples. Every rank must call it.

    Args:
        real: how many of them count; 0 for a filler sample.
        run: the model's outputs for each of several inputs, in evaluation mode; none where another rank has them.
        kept: what may change when it is called.
        everywhere: what each rank brings.
        rank: among `ranks`, which hold other samples.
        asked: what of the configuration deals samples out.
        rough: forward computes in half precision.
        in_stages: a pipeline runs it, where a stage that fails leaves the others waiting: other samples take the place of those left out, since
            a forward may be written for batches of one size alone.

    Raises:
        UserError: on every rank: the outputs of samples depend on each other.
    """
    held = max(real, 1)
    half = max(held // 2, 1)
    part = batches.map_tensors(partial(_others_changed, half, held), inputs) if in_stages else deal.Cut(0, half, held)(inputs)

    def tried(several: Sequence[Any]) -> list[Any]:
        with unchanged(*kept), _Statistics() as taken:
            rng.seed_all(0)
            try:
                found = run(several)
            except Exception:  # not written for fewer samples, or for evaluation: nothing can be said
                return []
        return [] if taken.any else found

    found = tried([inputs, part, inputs])
    off = max(everywhere(_changed_by(found, held, rough) if len(found) == 3 and real > 1 else 0.0))
    if not off:
        return
    if ranks > 1:
        others = tried([inputs if rank % 2 == 0 else batches.map_tensors(changed, inputs)])
        over_ranks = len(others) == 1 and len(found) == 3 and rank % 2 == 0 and _differ(found[0], others[0], held, held, rough) > 0
        if any(everywhere(float(over_ranks))):
            return
    raise UserError(
        f"model: what forward returns for a sample depends on the other samples of its batch (with other ones in the place of half of them, or without these, it changes by {off:.2g} of the largest "
        f"output), and under {asked} these are not those of the whole batch, so the loss would depend on the layout; compute each sample by itself, mix samples where "
        "batches are made (the data), take what is of all samples over the ranks (torch.distributed.nn.functional.all_reduce), or train with one process and "
        "data.micro_batch_size=null; trainer.loss_check=false accepts it"
    )


def _others_changed(half: int, held: int, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:half], changed(x[half:])]) if x.dim() and len(x) == held and x.layout is torch.strided else x


class _Statistics(TorchFunctionMode):
    """Notices a BatchNorm that takes the statistics of a batch in evaluation, too; in training they are synchronised, or refused, or accepted."""

    any = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any = self.any or training_call(func, args, kwargs or {}) is not None
        return func(*args, **(kwargs or {}))


def _changed_by(found: Sequence[Any], held: int, rough: bool) -> float:
    whole, part, again = found
    return 0.0 if _differ(whole, again, held, held, rough) else _differ(whole, part, held, held // 2, rough)


def _differ(some: Any, others: Any, held: int, rows: int, rough: bool) -> float:
    """By how much of its largest number an output of the first `rows` samples differs, where it does for most of these samples; else 0."""
    most = 0.0
    for a, b in zip(batches.tensors(some), batches.tensors(others), strict=False):
        if not (a.is_floating_point() and a.dim() and a.layout is torch.strided and a.numel() and len(a) == held):
            continue
        if a.dtype != b.dtype or len(b) not in (rows, held) or b.shape[1:] != a.shape[1:]:
            continue
        a, b = (each[:rows].detach().flatten(1) if each.dim() > 1 else each[:rows].detach()[:, None] for each in (a, b))
        size, off = a.abs().amax(), (a - b).abs().amax(1).nan_to_num(nan=torch.inf)
        limit = _ROUGH if rough else _TOLERANCES.get(a.dtype, _ROUGH)
        if torch.isfinite(size) and float((off > limit * size).double().mean()) >= 0.5:
            most = max(most, float(off.amax() / size))
    return most

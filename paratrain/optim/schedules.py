"""Learning-rate schedules: `factor(scheduler, step, total)`, a pure function, so that there is no state to save or to lose.

Sources: cosine, Loshchilov and Hutter 2017 (SGDR, without restarts); inverse square root, Vaswani et al. 2017; warmup-stable-decay,
Hu et al. 2024 (MiniCPM), with a linear decay.
"""

from __future__ import annotations

import math

from paratrain.config import Scheduler
from paratrain.errors import UserError


def factor(scheduler: Scheduler, step: int, total: int | None) -> float:
    """Factor on the peak learning rate for the update number `step`, counted from 0.

    Warmup takes the values 1/w, 2/w, ..., 1, so that no update is wasted on a rate of zero. `total` is the number of updates
    in training; steps past it keep the final rate. None is accepted by the shapes that have no end, and before the first update.

    Raises:
        UserError: a schedule that decays to an end goes on without one.
    """
    if total is None and step and scheduler.name in ("cosine", "linear", "wsd"):
        raise UserError(
            f"scheduler={scheduler.name} decays to the end of training, and nothing says which update that is; write scheduler.total_steps=..., "
            "trainer.max_steps=..., or scheduler=constant"
        )
    warmup = scheduler.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    shape, floor = scheduler.name, scheduler.min_ratio
    if shape == "constant":
        return 1.0
    if shape == "inverse_sqrt":
        return max(floor, math.sqrt(max(warmup, 1) / (step + 1)))
    if total is None:
        return 1.0
    if shape == "wsd":
        decay = scheduler.decay_steps if scheduler.decay_steps is not None else max(1, total // 10)
        start = max(warmup, total - decay)
        progress = (step + 1 - start) / max(1, total - start)
    else:
        progress = (step - warmup) / max(1, total - warmup)
    progress = min(max(progress, 0.0), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return floor + (1 - floor) * remaining

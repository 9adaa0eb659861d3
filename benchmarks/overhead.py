"""Host time that a train step adds to the same step written by hand, on a model so small that little else is measured.

Rivals run their own loop on the same model, data and optimizer settings; each writes what its documentation tells users to write.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report

STEPS, ROUNDS = 200, 25
INPUTS, TARGETS = torch.randn(16, 32), torch.randint(0, 8, (16,))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the two parameter groups that every recipe has: biases are not decayed."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3, fused=True)


def by_hand() -> Callable[[], None]:
    module = model()
    optim = optimizer(module)

    def step() -> None:
        loss = F.cross_entropy(module(INPUTS), TARGETS)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optim.step()
        optim.zero_grad()

    return step


def paratrain() -> Callable[[], None]:
    import paratrain as pt

    cfg = pt.load_config(["strategy=single", "trainer.clip_norm=1.0", "trainer.device=cpu"])
    engine = pt.setup(model, lambda outputs, targets: (F.cross_entropy(outputs, targets, reduction="sum"), len(targets)), cfg)

    def step() -> None:
        engine.train_step((INPUTS, TARGETS))

    return step


def accelerate() -> Callable[[], None]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module = model()
    module, optim = accelerator.prepare(module, optimizer(module))

    def step() -> None:
        loss = F.cross_entropy(module(INPUTS), TARGETS)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optim.step()
        optim.zero_grad()

    return step


def fabric() -> Callable[[], None]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    module = model()
    module, optim = fabric.setup(module, optimizer(module))

    def step() -> None:
        loss = F.cross_entropy(module(INPUTS), TARGETS)
        fabric.backward(loss)
        fabric.clip_gradients(module, optim, max_norm=1.0)
        optim.step()
        optim.zero_grad()

    return step


def timed(step: Callable[[], None]) -> Callable[[], float]:
    """Microseconds a step, over `STEPS` steps."""

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - began) / STEPS * 1e6

    measure()
    return measure


def main() -> None:
    torch.set_num_threads(1)
    loops = {"by hand": by_hand, "paratrain": paratrain, "Fabric": fabric, "Accelerate": accelerate}
    taken = report.interleaved({name: timed(make()) for name, make in loops.items()}, ROUNDS)
    hand = taken["by hand"]
    rows = {}
    for name, values in taken.items():
        added = [value - base for value, base in zip(values, hand, strict=True)]
        rows[name] = {"us_per_step": report.median(values), "added_us": report.median(added), "spread_of_added": report.spread(added)}
        print(f"{name:12} {report.spread(values):>26} us a step   added {report.spread(added)} us")
    report.write("overhead", rows, f"median of {ROUNDS} interleaved rounds of {STEPS} steps, one process, one thread, with clipping")


if __name__ == "__main__":
    main()

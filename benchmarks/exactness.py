"""How far two ranks with accumulation are from one process, on masked tokens: each library's loop as its documentation writes it.

A small GPT in float64 on the CPU, 20 steps of AdamW with clipping; the reference is the whole global batch at once on one process, its loss the
mean over all tokens that are not masked. A loop is exact where the difference is rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report

STEPS, GLOBAL, MICRO, RANKS = 20, 8, 2, 2
VOCAB, LENGTH = 64, 16


def model() -> nn.Module:
    from paratrain.models.gpt import GPT

    torch.manual_seed(0)
    return GPT(VOCAB, LENGTH, layers=2, dim=32, heads=2).double()


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)


def batches(masked: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches; masked ones keep between one and all targets of a sequence, as instruction tuning does."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB, (GLOBAL, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        if masked:
            kept = torch.randint(1, LENGTH + 1, (GLOBAL, 1), generator=generator)
            targets[torch.arange(LENGTH) >= kept] = -100
        made.append((tokens[:, :-1].clone(), targets))
    return made


def mean_loss(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(module(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)


def one_process(masked: bool) -> list[torch.Tensor]:
    module = model()
    optim = optimizer(module)
    for inputs, targets in batches(masked):
        mean_loss(module, inputs, targets).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
    return [param.detach() for param in module.parameters()]


def shares(masked: bool, rank: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """By step, the micro-batches of a rank."""
    per_rank = GLOBAL // RANKS
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    return [list(zip(x[mine].split(MICRO), y[mine].split(MICRO), strict=True)) for x, y in batches(masked)]


def accelerate(masked: bool) -> list[torch.Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=GLOBAL // RANKS // MICRO)
    module = model()
    module, optim = accelerator.prepare(module, optimizer(module))
    for micro_batches in shares(masked, accelerator.process_index):
        for inputs, targets in micro_batches:
            with accelerator.accumulate(module):
                accelerator.backward(mean_loss(module, inputs, targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), 1.0)
                optim.step()
                optim.zero_grad()
    return [param.detach() for param in module.parameters()]


def fabric(masked: bool) -> list[torch.Tensor]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    # not "64-true", which changes torch's default dtype in forward, and so the constants of the model: the module is float64 as it is
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=DDPStrategy())
    fabric.launch()
    module = model()
    module, optim = fabric.setup(module, optimizer(module))
    for micro_batches in shares(masked, fabric.global_rank):
        for number, (inputs, targets) in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with fabric.no_backward_sync(module, enabled=not last):
                fabric.backward(mean_loss(module, inputs, targets) / len(micro_batches))
        fabric.clip_gradients(module, optim, max_norm=1.0)
        optim.step()
        optim.zero_grad()
    return [param.detach() for param in module.parameters()]


def paratrain(masked: bool) -> list[torch.Tensor]:
    import paratrain as pt

    overrides = ["strategy=ddp", "precision=fp64", "optimizer.no_decay=none", "trainer.clip_norm=1.0", f"data.micro_batch_size={MICRO}"]
    engine = pt.setup(model, pt.cross_entropy, pt.load_config([*overrides, "trainer.device=cpu", "strategy.find_unused_parameters=false"]))
    for batch in batches(masked):
        engine.train_step(engine.local(batch))
    return [param.detach() for param in engine.model.parameters()]


LOOPS = {"paratrain": paratrain, "Accelerate": accelerate, "Fabric": fabric}


def furthest(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, reference, strict=True))


def main() -> None:
    from paratrain import spawn

    rows: dict[str, dict[str, float]] = {}
    references = {masked: one_process(masked) for masked in (False, True)}
    for name, loop in LOOPS.items():
        rows[name] = {
            key: furthest(spawn.run(loop, RANKS, masked, init=False)[0], references[masked])
            for key, masked in (("equal_lengths", False), ("masked_tokens", True))
        }
        print(
            f"{name:12} furthest weight from one process: {rows[name]['equal_lengths']:.1e}, with masked tokens {rows[name]['masked_tokens']:.1e}"
        )
    spawn.close()
    versions = ", ".join(f"{name} {version}" for name, version in report.versions("torch", "accelerate", "lightning").items())
    report.write(
        "exactness", rows, f"largest difference of a weight after {STEPS} steps, {RANKS} ranks, accumulation 2, float64; {versions}"
    )


if __name__ == "__main__":
    main()

"""The training of examples/overflow.py, whose activations leave float16, under each library's loop as its documentation writes it.

python -m benchmarks.overflow
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import paratrain as pt
from benchmarks import report
from examples import overflow

STEPS, BATCH, LR, CLIP = 200, 64, 3e-4, 1.0


def ours(name: str) -> tuple[list[float | None], dict[str, Any]]:
    """Losses by step, None where one is not finite; and what the monitor says."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = overflow.jobs([f"trainer.max_steps={STEPS}", f"output_dir={folder}"])[name]
        lines = overflow.train(pt.load_config(options), "run")
    half = [line["precision/half_modules"] for line in lines if "precision/half_modules" in line]
    rest: dict[str, Any] = {"skipped": int(lines[-1].get("train/skipped_steps", 0))} if lines else {}
    return [line.get("train/loss") for line in lines], rest | ({"moved": 1 - min(half)} if half else {})


def batches(order: Any, data: Any) -> Any:
    for step in range(STEPS):
        samples = [data[i] for i in order.batch(step)]
        yield torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def parts() -> tuple[Any, Any, Any]:
    """The model with the weights, the optimizer and the order of the data that paratrain's own runs have."""
    from paratrain import optim
    from paratrain.data import Order

    cfg = pt.load_config(overflow.jobs([])["fp32"])
    torch.manual_seed(cfg.seed)
    model, data = overflow.Grows(), overflow.Chain()
    (optimizer,) = optim.build(replace(cfg.optimizer, fused=False), model)  # Fabric does not clip for fused ones
    return model, optimizer, batches(Order(len(data), BATCH, cfg.seed, True), data)


def mean_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.float().flatten(0, 1), targets.flatten())


def grad_scaler() -> tuple[list[float | None], dict[str, Any]]:
    """torch.amp by hand: autocast and GradScaler."""
    model, optimizer, stream = parts()
    scaler, losses, skipped = torch.amp.GradScaler("cpu"), [], 0
    for x, y in stream:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mean_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        losses.append(_finite(loss))
    return losses, {"skipped": skipped, "scale at the end": scaler.get_scale()}


def accelerate(machinery: bool) -> tuple[list[float | None], dict[str, Any]]:
    """mixed_precision="fp16", which Accelerate drops on a CPU without a word; `machinery` gives it the context and the scaler that it uses on
    a GPU, so that its loop can be seen in half precision here."""
    from accelerate import Accelerator

    model, optimizer, stream = parts()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    if machinery:
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    model, optimizer = accelerator.prepare(model, optimizer)
    losses, skipped, dtypes = [], 0, set()
    hook = model.head.register_forward_hook(lambda module, args, output: dtypes.add(str(output.dtype).removeprefix("torch.")))
    for x, y in stream:
        with accelerator.autocast():
            loss = mean_loss(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        skipped += bool(optimizer.step_was_skipped)
        optimizer.zero_grad()
        losses.append(_finite(loss))
    hook.remove()
    return losses, {"skipped": skipped, "computed in": " ".join(sorted(dtypes))}


def fabric() -> tuple[list[float | None], dict[str, Any]]:
    """precision=16-mixed with Fabric's MixedPrecision plugin and torch's scaler for the CPU."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision

    model, optimizer, stream = parts()
    scaler = torch.amp.GradScaler("cpu")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    losses, skipped = [], 0
    for x, y in stream:
        loss = mean_loss(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
        before = scaler.get_scale()
        optimizer.step()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        losses.append(_finite(loss))
    return losses, {"skipped": skipped, "scale at the end": scaler.get_scale()}


def _finite(loss: torch.Tensor) -> float | None:
    return float(loss.detach()) if math.isfinite(float(loss.detach())) else None


RUNS: dict[str, Callable[[], tuple[list[float | None], dict[str, Any]]]] = {
    "paratrain, fp32": partial(ours, "fp32"),
    "paratrain, fp16": partial(ours, "fp16"),
    "paratrain, fp16, fallback=module": partial(ours, "fp16, fallback=module"),
    "torch.amp by hand": grad_scaler,
    "Accelerate, as documented": partial(accelerate, machinery=False),
    "Accelerate, with the scaler it has on GPUs": partial(accelerate, machinery=True),
    "Fabric": fabric,
}


def main() -> None:
    rows = {}
    for name, run in RUNS.items():
        losses, rest = run()
        tail = losses[-20:]
        done = len(losses) == STEPS and None not in tail
        rows[name] = {
            "steps": len(losses),
            "loss": sum(tail) / 20 if done else None,
            "finite_losses": len(losses) - losses.count(None),
            **rest,
        }
        print(name, rows[name], flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions("accelerate", "lightning").items())
    report.write("overflow", rows, f"the model, data and optimizer of `examples/overflow.py`, {STEPS} steps, one process; {versions}")


if __name__ == "__main__":
    main()

"""Train steps of GPTs on one GPU, next to a loop written by hand: tokens/s, MFU and peak memory.

Both train the same model from the same kind of weights, in bf16 under autocast with float32 weights, by fused AdamW with clipping;
they stand in memory side by side and are timed in turn. MFU is defined in docs/metrics.md.

python -m benchmarks.gpu --seconds=240
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report

VOCAB = 50304
ROUNDS = 5
WINDOW = 1.0  # seconds that a timed window takes at least


@dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on.

    Attributes:
        model: arguments of `GPT`.
        batch: sequences a step.
    """

    model: dict
    batch: int

    def build(self) -> nn.Module:
        from paratrain.models.gpt import GPT

        return GPT(**self.model)

    @property
    def tokens(self) -> int:
        return self.batch * self.model["seq_len"]


CASES = {
    "GPT 124M": Case({"vocab_size": VOCAB, "seq_len": 1024, "layers": 12, "dim": 768, "heads": 12, "tied": True}, 16),
    "GPT 1B": Case(
        {"vocab_size": VOCAB, "seq_len": 2048, "layers": 16, "dim": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "tied": True}, 4
    ),
}


def by_hand(case: Case, device: torch.device, compiled: bool) -> Callable[[], torch.Tensor]:
    """A step as one writes it; it returns the loss."""
    with device:
        model = case.build()
        tokens = torch.randint(0, model.embed.weight.shape[0], (case.batch, case.model["seq_len"] + 1))
    if compiled:
        for block in model.blocks:
            block.compile()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def paratrain(case: Case, device: torch.device, compiled: bool) -> Callable[[], torch.Tensor]:
    import paratrain as pt

    overrides = ["strategy=single", "precision=bf16", "optimizer.lr=1e-4", "trainer.clip_norm=1.0", "memory.init=meta"]
    cfg = pt.load_config([*overrides, f"trainer.device={device.type}", f"compile={str(compiled).lower()}"])
    engine = pt.setup(case.build, pt.cross_entropy, cfg)
    tokens = torch.randint(0, case.model["vocab_size"], (case.batch, case.model["seq_len"] + 1), device=device)
    batch = engine.local((tokens[:, :-1], tokens[:, 1:]))
    return lambda: engine.train_step(batch)


LOOPS = {"by hand": by_hand, "paratrain": paratrain}


def measure(case: Case, device: torch.device, compiled: bool, deadline: float) -> dict[str, dict[str, float]]:
    """By loop: tokens/s over a window as median and quartiles, and the peak of memory of one loop alone in bytes.

    Raises:
        torch.OutOfMemoryError: both do not fit side by side.
    """
    steps, alone, counts = {}, {}, {}
    for name, make in LOOPS.items():
        held = _allocated(device)
        _reset_peak(device)
        steps[name] = make(case, device, compiled)
        for _ in range(2):
            steps[name]()
        alone[name] = _peak(device) - held
        taken = min(_timed(steps[name], 1, device) for _ in range(2))
        counts[name] = max(1, round(WINDOW / taken))
    taken_by: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(ROUNDS):
        if done >= 2 and time.monotonic() > deadline:
            break
        for name, step in steps.items():
            taken_by[name].append(_timed(step, counts[name], device) / counts[name])
    return {
        name: {
            "tokens_per_sec": case.tokens / report.median(seconds),
            "ms_per_step": report.median(seconds) * 1e3,
            "spread_ms": report.spread([value * 1e3 for value in seconds]),
            "peak_bytes": alone[name],
        }
        for name, seconds in taken_by.items()
    }


def rows(case: Case, device: torch.device, compiled: bool, deadline: float) -> dict[str, dict]:
    """`measure` with utilisation, and paratrain's time as a ratio to the loop by hand."""
    from paratrain.metrics import flops, peaks

    inputs = torch.zeros(1, case.model["seq_len"], dtype=torch.int64)
    with torch.device("meta"):
        counted = flops.count(case.build(), inputs)
    peak = peaks.peak(peaks.device_name(device), "bf16")
    found: dict[str, dict] = dict(measure(case, device, compiled, deadline))
    for row in found.values():
        sequences = row["tokens_per_sec"] / case.model["seq_len"]
        row["tflops"] = counted.full * sequences / 1e12
        if peak:
            row["mfu"], row["mfu_causal"] = counted.full * sequences / peak, counted.causal * sequences / peak
        row["time_over_hand"] = row["ms_per_step"] / found["by hand"]["ms_per_step"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="time to take; cases that would begin later are left out, and said to be"
    )
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: needs an NVIDIA GPU; torch finds none here", file=sys.stderr)
        return 2
    device, began = torch.device("cuda", 0), time.monotonic()
    torch.cuda.set_device(device)
    results: dict[str, dict] = {}
    for case_name, compiled in [(name, compiled) for compiled in (False, True) for name in CASES]:
        label = f"{case_name}, {'compiled' if compiled else 'eager'}"
        if time.monotonic() - began > 0.8 * asked.seconds:
            results[label] = {"left_out": "no time left"}
            continue
        try:
            for name, row in rows(CASES[case_name], device, compiled, began + asked.seconds).items():
                results[f"{label}, {name}"] = row
                print(_line(f"{label}, {name}", row), flush=True)
        except torch.OutOfMemoryError as error:
            results[label] = {"left_out": f"out of memory: {str(error).splitlines()[0]}"}
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        shapes = "; ".join(f"{name} {case.batch} x {case.model['seq_len']} tokens a step" for name, case in CASES.items())
        report.write(f"gpu-{slug}", results, f"bf16-mixed, fused AdamW, clipping; medians of up to {ROUNDS} interleaved windows; {shapes}")
    for label, row in results.items():
        if "left_out" in row:
            print(f"{label}: left out, {row['left_out']}")
    return 0


def _line(label: str, row: dict) -> str:
    mfu = f"MFU {row['mfu']:.1%} ({row['mfu_causal']:.1%} causal)  " if "mfu" in row else ""
    return (
        f"{label:32} {row['tokens_per_sec']:10.0f} tokens/s  {row['tflops']:6.1f} TFLOP/s  {mfu}{row['ms_per_step']:8.2f} ms a step  "
        f"peak {row['peak_bytes'] / 2**30:.2f} GiB  x {row['time_over_hand']:.3f}"
    )


def _timed(step: Callable[[], object], count: int, device: torch.device) -> float:
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())

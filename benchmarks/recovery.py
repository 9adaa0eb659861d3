"""What faults cost: how long a save makes training wait, and how long after a SIGKILL the next new step is done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from paratrain.callbacks import Callback

ROUNDS = 9
BATCH = 1024
WIDTH = 2048  # of 4 square matrices: 64 MiB of weights, 192 MiB of state with AdamW
STEP = 8


class Killed(Callback):
    """Kills rank 1 once, and writes down when, and when each step was done."""

    def on_step_end(self, trainer, result):
        step, marker = trainer.engine.global_step, trainer.output_dir / "killed"
        if trainer.engine.is_main_process:
            with open(trainer.output_dir / "times", "a") as file:
                file.write(f"{step} {time.time()}\n")
        if os.environ["RANK"] == "1" and step == STEP and not marker.exists():
            marker.write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def stalls(directory: Path) -> tuple[list[float], list[float], int]:
    """Seconds by which a save in the foreground and one in the background lengthen a step, and bytes of the state."""
    import torch

    import paratrain as pt
    from paratrain.checkpoint.saver import Saver
    from paratrain.config import Checkpoint

    cfg = pt.load_config(["strategy=single", "trainer.device=cpu"])
    engine = pt.setup(
        lambda: torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))),
        lambda out, target: (out - target).square().mean(),
        cfg,
    )
    batch = (torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH))
    engine.train_step(batch)
    saver = Saver(engine, directory, Checkpoint(keep=1))

    def step(save: str) -> float:
        began = time.perf_counter()
        if save != "none":
            saver.begin(1, {}, wait=save == "sync")
        engine.train_step(batch)
        waited = time.perf_counter() - began
        if save != "none":
            saver.settle()
        return waited

    step("async")  # first use of the buffers
    taken = report.interleaved({kind: lambda kind=kind: step(kind) for kind in ("none", "sync", "async")}, ROUNDS)  # type: ignore[misc]
    sync, background = ([with_ - without for with_, without in zip(taken[kind], taken["none"], strict=True)] for kind in ("sync", "async"))
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return sync, background, size


def recovery(directory: Path) -> float:
    """Seconds from the kill to the end of the first step that had not been done before."""
    arguments = ["data=synthetic", "data.samples=64", "data.seq_len=16", "model.layers=1", "model.dim=32", "model.heads=2"]
    arguments += [
        "trainer.max_steps=12",
        "checkpoint.every=2",
        f"hydra.run.dir={directory}",
        "+callbacks.killed._target_=benchmarks.recovery.Killed",
    ]
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "paratrain.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    killed = float((directory / "killed").read_text())
    lines = (line.split() for line in (directory / "times").read_text().splitlines())
    return min(float(when) for step, when in lines if int(step) == STEP + 1) - killed


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="paratrain-"))
    try:
        sync, background, size = stalls(directory / "stall")
        recovered = [recovery(directory / f"job-{number}") for number in range(3)]
    finally:
        shutil.rmtree(directory)
    ratio = report.median(background) / report.median(sync)
    print(f"state of {size / 2**20:.0f} MiB: a save stalls training {report.spread([1e3 * s for s in sync])} ms in the foreground,")
    print(f"  {report.spread([1e3 * s for s in background])} ms in the background: {100 * ratio:.1f} %")
    print(
        f"SIGKILL of a rank of 2 to the next new step: {report.median(recovered):.1f} s (of 3: {', '.join(f'{s:.1f}' for s in recovered)})"
    )
    rows = {"state_mib": size / 2**20, "sync_s": sync, "async_stall_s": background, "ratio": ratio, "sigkill_to_next_step_s": recovered}
    report.write("recovery", rows, "2 ranks over gloo; checkpoints on the local disk")


if __name__ == "__main__":
    main()

"""What faults cost: how long a save makes training wait, and how long after a SIGKILL the next new step is done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from paratrain.callbacks import Callback

ROUNDS = 9
BATCH = 256
WIDTHS = (2048, 3072)  # of 4 square matrices: 192 and 432 MiB of state with AdamW
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


def stalls(directory: Path, width: int) -> dict[str, Any]:
    """What a save of four square matrices under AdamW costs training, in seconds a save.

    A step and a save are timed together: the save in the foreground (hashed, written, synced, renamed) before the step, or in the
    background beside it. `sync` and `stall` are the time that the training thread spends in the saver, waiting for copies included;
    `beside` is by how much the whole is longer than a step alone, with what the writing takes from the step's processors and memory.
    """
    import torch

    import paratrain as pt
    from paratrain.checkpoint.saver import Saver
    from paratrain.config import Checkpoint

    cfg = pt.load_config(["strategy=single", "trainer.device=cpu"])
    engine = pt.setup(
        lambda: torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))),
        lambda out, target: (out - target).square().mean(),
        cfg,
    )
    batch = (torch.randn(BATCH, width), torch.randn(BATCH, width))
    engine.train_step(batch)
    saver = Saver(engine, directory, Checkpoint(keep=1))
    spent = [0.0]

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            call(*args, **kwargs)
            spent[0] += time.perf_counter() - began

        return wrapped

    saver.begin, saver.wait_for_copy = timed(saver.begin), timed(saver.wait_for_copy)  # type: ignore[method-assign]

    def step(save: str) -> tuple[float, float]:
        began, spent[0] = time.perf_counter(), 0.0
        if save != "none":
            saver.begin(1, {}, wait=save == "sync")
        engine.train_step(batch)
        whole = time.perf_counter() - began
        if save != "none":
            saver.settle()
        return whole, spent[0]

    step("async")  # first use of the buffers
    taken = report.interleaved({kind: lambda kind=kind: step(kind) for kind in ("none", "sync", "async")}, ROUNDS)  # type: ignore[misc]
    sync, stall = ([inside for _, inside in taken[kind]] for kind in ("sync", "async"))
    beside = [with_ - without for (with_, _), (without, _) in zip(taken["async"], taken["none"], strict=True)]
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    ratio = report.median(stall) / report.median(sync)
    row = {"state_mib": size / 2**20, "step_s": report.median([whole for whole, _ in taken["none"]])}
    return row | {"sync_s": sync, "async_stall_s": stall, "async_beside_s": beside, "ratio": ratio}


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
        saves = [stalls(directory / f"stall-{width}", width) for width in WIDTHS]
        recovered = [recovery(directory / f"job-{number}") for number in range(3)]
    finally:
        shutil.rmtree(directory)
    for row in saves:
        shown = {name: report.spread([1e3 * seconds for seconds in row[name]]) for name in ("sync_s", "async_stall_s", "async_beside_s")}
        print(
            f"state of {row['state_mib']:.0f} MiB, a step of {row['step_s']:.2f} s: a save stalls training {shown['sync_s']} ms in the foreground,"
        )
        print(
            f"  {shown['async_stall_s']} ms in the background ({100 * row['ratio']:.1f} %); step and save are {shown['async_beside_s']} ms longer"
        )
    print(
        f"SIGKILL of a rank of 2 to the next new step: {report.median(recovered):.1f} s (of 3: {', '.join(f'{s:.1f}' for s in recovered)})"
    )
    report.write("recovery", {"saves": saves, "sigkill_to_next_step_s": recovered}, "2 ranks over gloo; checkpoints on the local disk")


if __name__ == "__main__":
    main()

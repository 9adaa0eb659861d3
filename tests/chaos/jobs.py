"""Jobs under torchrun for the tests of faults: started, hurt, and compared with one that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from paratrain import checkpoint

HERE = Path(__file__).parent
STEPS = 12
TINY = [
    "data=synthetic", "data.seq_len=16", "data.vocab_size=32", "data.samples=40", "data.eval_samples=0", "data.global_batch=6",
    "model.layers=1", "model.dim=32", "model.heads=2", "model.dropout=0.2", "trainer.clip_norm=1.0", "scheduler=cosine",
    "seed=3", f"trainer.max_steps={STEPS}", "checkpoint.every=3", "trainer.log_every=1", "+callbacks.weights._target_=injected.Weights",
]  # fmt: skip


def environment() -> dict[str, str]:
    root = str(Path(checkpoint.__file__).parents[2])
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**ours, "PYTHONPATH": f"{root}:{HERE}", "OMP_NUM_THREADS": "1"}


def start(
    directory: Path,
    *overrides: str,
    ranks: int = 2,
    restarts: int = 2,
    launcher: tuple[str, ...] = ("torch.distributed.run",),
    before: Sequence[str] = (),
    env: dict[str, str] | None = None,
):
    """A job under torchrun, in a process group of its own.

    Args:
        before: words of a command that runs the rest.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", *launcher, "--standalone", *options, "-m", "paratrain.train", *TINY, f"hydra.run.dir={directory}"]
    with open(directory / "output.txt", "a") as output:
        return subprocess.Popen(
            [*before, *command, *overrides], env=env or environment(), stdout=output, stderr=output, start_new_session=True
        )


def finish(process: subprocess.Popen, directory: Path, code: int | None = 0, seconds: float = 400.0) -> str:
    try:
        ended = process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (directory / "output.txt").read_text()
    assert code is None or ended == code, text[-6000:]
    return text


def train(directory: Path, *overrides: str, code: int | None = 0, seconds: float = 400.0, **options) -> str:
    return finish(start(directory, *overrides, **options), directory, code, seconds)


def fault(kind: str, step: int, **more: int) -> list[str]:
    options = {"_target_": "injected.Fault", "kind": kind, "step": step, **more}
    return [f"+callbacks.{kind}.{name}={value}" for name, value in options.items()]


def same(directory: Path, expected: dict[str, torch.Tensor], last: int = STEPS) -> None:
    found = torch.load(directory / "weights.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 1))


def attempts(directory: Path) -> list[int]:
    return [attempt["step"] for attempt in json.loads((directory / "attempts.json").read_text())]


def logged(directory: Path) -> list[int]:
    path = directory / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line)["step"] for line in whole.splitlines()]


def wait_for(condition, *processes, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

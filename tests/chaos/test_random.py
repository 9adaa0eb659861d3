"""Ranks and launchers killed at random moments, over and over: the job ends with the weights of one that nothing happened to.

PARATRAIN_CHAOS_SECONDS=600 python -m pytest tests/chaos/test_random.py -m slow    # longer than the minute it takes by default
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from jobs import finish, same, start

from paratrain import checkpoint

SECONDS = float(os.environ.get("PARATRAIN_CHAOS_SECONDS", "60"))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_kills_at_random_moments(strategy, tmp_path, undisturbed):
    how = [f"strategy={strategy}", "checkpoint.every=1", "data.workers=1"]
    hurt = [*how, "+callbacks.slow._target_=injected.Slow", "+callbacks.slow.seconds=0.2", "trainer.max_stuck_restarts=1000"]
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown when the test fails
    chance, killed = random.Random(seed), 0
    ends = time.monotonic() + SECONDS
    process = start(tmp_path, *hurt, restarts=1000)
    try:
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(chance.uniform(0, 3.0) ** 2)
            ranks = children(process.pid)
            victims = [process.pid] if chance.random() < 0.1 else [pid for rank in ranks for pid in (rank, *children(rank))]
            if victims and process.poll() is None:
                os.kill(chance.choice(victims), signal.SIGKILL)
                killed += 1
            if process.poll() is not None and process.returncode == -signal.SIGKILL:
                process = start(tmp_path, *hurt, restarts=1000)
    finally:
        if process.poll() == -signal.SIGKILL:
            process = start(tmp_path, *hurt, restarts=1000)
        finish(process, tmp_path, seconds=600)
    assert killed >= SECONDS // 20
    same(tmp_path, undisturbed(f"strategy={strategy}"))
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [10, 11, 12]
    left = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".") and "damaged" not in path.name]
    assert left == []

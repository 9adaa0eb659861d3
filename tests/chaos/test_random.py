"""Ranks and launchers killed at random moments, over and over: the job ends with the weights of one that nothing happened to.

PARATRAIN_CHAOS_SECONDS=600 python -m pytest tests/chaos/test_random.py -m slow    # longer than the minute it takes by default
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import five_hundred
import pytest
from jobs import finish, logged, same, start

from paratrain import checkpoint

STEPS = 100
SECONDS = float(os.environ.get("PARATRAIN_CHAOS_SECONDS", "60"))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def steps_done(directory: Path, count: int, process: subprocess.Popen) -> None:
    """Wait for `count` more steps in the log than a restart begins with, at most a minute."""
    ends, last = time.monotonic() + 60, max(logged(directory), default=0)
    while time.monotonic() < ends and process.poll() is None and max(logged(directory), default=0) < last + count:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_kills_at_random_moments(strategy, tmp_path, undisturbed):
    how = [f"strategy={strategy}", "checkpoint.every=1", "data.workers=1", f"trainer.max_steps={STEPS}"]
    hurt = [*how, "+callbacks.slow._target_=injected.Slow", "+callbacks.slow.seconds=0.2", "trainer.max_stuck_restarts=1000"]
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown when the test fails
    chance, killed = random.Random(seed), 0
    ends = time.monotonic() + SECONDS
    process = start(tmp_path, *hurt, restarts=1000)
    try:
        while time.monotonic() < ends and process.poll() is None:
            if chance.random() < 0.7:  # mostly in or shortly after a step, else in whatever happens at the start
                steps_done(tmp_path, chance.randrange(1, 10), process)
                time.sleep(chance.uniform(0, 0.5))
            else:
                time.sleep(chance.uniform(0, 5))
            if chance.random() < 0.1:
                process.kill()
                if process.wait() == 0:  # it was through
                    break
                process = start(tmp_path, *hurt, restarts=1000)
            elif victims := [pid for rank in children(process.pid) for pid in (rank, *children(rank))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(victims), signal.SIGKILL)
            killed += 1
    finally:
        finish(process, tmp_path, seconds=600)
    assert killed >= 3
    same(tmp_path, undisturbed(*how), STEPS)
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [STEPS - 2, STEPS - 1, STEPS]
    left = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".") and "damaged" not in path.name]
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_faults_of_every_kind_lose_nothing():
    """A tenth of the 500 of five_hundred.py: each is survived, bit-equal, or stopped by name."""
    table = five_hundred.main(50, seed=1)
    bad = {kind: end for kind, ends in table.items() for end in ends if end not in ("survived", "stopped")}
    assert bad == {}
    assert sum(ends["survived"] for ends in table.values()) > 30

"""A rank that gloo or a signal ends while it has something to say: the cause is what is printed last, and not the rank that was ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from paratrain import notes

PROGRAM = """
import os, signal, sys, torch
import torch.distributed as dist
import paratrain as pt
from torch import nn

cfg = pt.load_config(["strategy=ddp", "trainer.device=cpu", "data.global_batch=4", "trainer.timeout_minutes=1"])
engine = pt.setup(lambda: nn.Linear(3, 1), nn.functional.mse_loss, cfg)
batch = engine.local((torch.ones(4, 3), torch.ones(4, 1)))
for step in range(3):
    engine.train_step(batch)
    if step == 1 and dist.get_rank() == 1:
        HURT
"""


def ends(directory: Path, hurt: str) -> list[tuple[int, str]]:
    """(exit code, what was printed) of each of two ranks, of which the second one runs `hurt` between two steps."""
    (directory / "program.py").write_text(PROGRAM.replace("HURT", hurt))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen([sys.executable, "program.py"], cwd=directory, env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=120)[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, texts, strict=True)]


def test_a_collective_that_one_rank_makes_alone_is_named_and_nobody_is_aborted(tmp_path):
    found = ends(tmp_path, "dist.all_reduce(torch.ones(100_000))")
    for code, text in found:
        assert code in (1, 2), (code, text)
        assert "the ranks make different collectives, and what one sent is not what another expects" in text
        assert re.search(
            r"rank 1 waits in code outside of the engine, program.py:\d+ `dist.all_reduce\(torch.ones\(100_000\)\)`, all_reduce", text
        )
        assert re.search(r"rank 0 waits in engine.train_step\(\)", text)


@pytest.mark.parametrize("hurt", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"])
def test_a_rank_that_is_gone_is_told_to_have_ended(tmp_path, hurt):
    (code, text), (other, _) = ends(tmp_path, hurt)
    assert other in (-signal.SIGKILL, 3)
    assert code == 1
    assert re.search(r"PeerError: rank 1 \(process \d+ on \S+\) has ended, though its peers wait for it", text.splitlines()[-1]), text


def test_a_collective_of_ones_own_that_breaks_is_explained_at_the_end(tmp_path):
    (code, text), _ = ends(tmp_path, "os._exit(3)\n    elif step == 1:\n        dist.all_reduce(torch.ones(3))")
    assert code == 1
    assert re.search(
        r"error: rank 1 \(process \d+ on \S+\) has ended.*Seen by rank 0, which was in .*program.py:\d+", text.splitlines()[-1]
    ), text


def test_a_rank_that_is_to_end_tells_of_its_own_error_first():
    code = """
import os, signal, time
from paratrain.faults import signals
try:
    with signals.listening(signals.Asked()):
        raise RuntimeError
except RuntimeError:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print("told", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.returncode) == ("told\n", -signal.SIGTERM), done.stderr


def test_the_last_that_torchrun_prints_is_why(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    notes.for_launcher("nobody reads it")  # without a launcher
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    notes.for_launcher("the loss is nan\nat step 3")
    report = str(ChildFailedError("train", {0: ProcessFailure(0, 1, 2, str(path))}))
    assert re.search(r"exitcode  : 2 .*traceback : the loss is nan\n\s+at step 3", report, re.DOTALL)
    assert list(tmp_path.iterdir()) == [path]

"""Every fault for real, under torchrun: afterwards the job has the weights of one that nothing happened to, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


def start(directory: Path, *overrides: str, ranks: int = 2, restarts: int = 2, launcher: tuple[str, ...] = ("torch.distributed.run",)):
    """A job under torchrun, in a process group of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    options = [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", *launcher, "--standalone", *options, "-m", "paratrain.train", *TINY, f"hydra.run.dir={directory}"]
    with open(directory / "output.txt", "a") as output:
        return subprocess.Popen([*command, *overrides], env=environment(), stdout=output, stderr=output, start_new_session=True)


def finish(process: subprocess.Popen, directory: Path, code: int | None = 0) -> str:
    try:
        ended = process.wait(150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (directory / "output.txt").read_text()
    assert code is None or ended == code, text[-6000:]
    return text


def train(directory: Path, *overrides: str, code: int | None = 0, **options) -> str:
    return finish(start(directory, *overrides, **options), directory, code)


def fault(kind: str, step: int, **more: int) -> list[str]:
    options = {"kind": kind, "step": step, **more}
    return ["+callbacks.fault._target_=injected.Fault", *(f"+callbacks.fault.{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Weights of a job that nothing happened to."""

    @functools.cache
    def weights(*overrides: str, ranks: int = 2) -> dict[str, torch.Tensor]:
        directory = tmp_path_factory.mktemp("undisturbed")
        train(directory, *overrides, ranks=ranks)
        return torch.load(directory / "weights.pt", weights_only=True)

    return weights


def same(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch.load(directory / "weights.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def attempts(directory: Path) -> list[int]:
    return [attempt["step"] for attempt in json.loads((directory / "attempts.json").read_text())]


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path, undisturbed):
    text = train(tmp_path, *fault("sigkill", 8, on=1))
    same(tmp_path, undisturbed())
    assert attempts(tmp_path) in ([0, 6], [0, 3])
    assert "resumed from" in text
    assert "goodput" in text
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert seconds["restart"] > 1
    assert seconds["recomputed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
@pytest.mark.parametrize("kind", ["sigkill", "segv", "raise", "save-data", "save-manifest", "save-rename"])
def test_a_rank_that_dies_anyhow(kind, strategy, tmp_path, undisturbed):
    train(
        tmp_path,
        *fault(kind, 5 if kind.startswith("save") else 8, on=0 if kind in ("save-manifest", "save-rename") else 1),
        f"strategy={strategy}",
    )
    same(tmp_path, undisturbed(f"strategy={strategy}"))
    assert len(attempts(tmp_path)) == 2
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if ".tmp-" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_ranks_and_two_deaths(strategy, tmp_path, undisturbed):
    train(tmp_path, *fault("sigkill", 5, on=3, times=2), f"strategy={strategy}", ranks=4)
    same(tmp_path, undisturbed(f"strategy={strategy}", ranks=4))
    assert len(attempts(tmp_path)) == 3


@pytest.mark.slow
def test_a_failed_save_is_no_death(tmp_path, undisturbed):
    text = train(tmp_path, *fault("save-full", 5, on=1))
    same(tmp_path, undisturbed())
    assert attempts(tmp_path) == [0]
    assert "No space left on device" in text
    assert "failed saves in a row: 1 of 3" in text


@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGUSR1"])
def test_preemption(name, tmp_path, undisturbed):
    """The queue's signal to the launcher: a checkpoint, code 75, and the same command goes on."""
    slow = ["+callbacks.slow._target_=injected.Slow", "+callbacks.slow.seconds=0.3"]
    process = start(tmp_path, *slow, launcher=("paratrain", "launch"))
    wait_for(lambda: len(logged(tmp_path)) >= 2, process)
    process.send_signal(getattr(signal, name))
    text = finish(process, tmp_path, code=75)
    assert "interrupted after step" in text
    assert "start the same command again" in text
    assert "Traceback" not in text
    (saved,) = [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")][-1:]
    assert saved == logged(tmp_path)[-1]
    train(tmp_path)
    same(tmp_path, undisturbed())


def test_a_hang_is_noticed_told_and_restarted(tmp_path, undisturbed):
    text = train(tmp_path, *fault("hang", 8, on=1), "trainer.step_timeout=3s")
    same(tmp_path, undisturbed())
    assert "no progress for" in text
    stacks = [(tmp_path / "hang" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "injected.py" in stacks[1]
    assert "all_reduce" in stacks[0]
    assert "collective" in stacks[0].split("Thread")[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGSTOP", "hang-with-gil"])
def test_a_rank_that_cannot_speak_is_told_of_by_the_others(kind, tmp_path, undisturbed):
    train(tmp_path, *fault(kind, 8, on=1), "trainer.step_timeout=3s")
    same(tmp_path, undisturbed())
    assert "all_reduce" in (tmp_path / "hang" / "rank0.txt").read_text()


@pytest.mark.slow
def test_a_killed_loader_worker_is_named_and_the_job_restarts(tmp_path, undisturbed):
    text = train(tmp_path, *fault("loader", 8, on=1), "data.workers=1")
    same(tmp_path, undisturbed())
    assert "DataLoader worker (pid" in text
    assert "killed by signal" in text


@pytest.mark.slow
def test_a_restart_loop_gives_up(tmp_path):
    text = train(tmp_path, *fault("raise", 4, times=100), "trainer.max_stuck_restarts=2", restarts=4, code=None)
    assert "started 3 times in a row from step 3" in text
    assert attempts(tmp_path)[:3] == [0, 3, 3]


@pytest.mark.slow
def test_workers_die_with_their_launcher(tmp_path):
    process = start(tmp_path, "+callbacks.slow._target_=injected.Slow", "+callbacks.slow.seconds=1")
    wait_for(lambda: len(logged(tmp_path)) >= 2, process)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_for(
        lambda: not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers)
    )
    train(tmp_path)


@pytest.mark.slow
def test_a_vanished_node_leaves_a_smaller_job_that_goes_on(tmp_path, undisturbed):
    """Two agents of a rank each, elastic; one is killed with its rank: the other goes on alone, from the last checkpoint."""
    port = free_port()
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    options += ["--rdzv-id=7", "--monitor-interval=0.1", "--rdzv-conf=join_timeout=60,last_call_timeout=3"]
    overrides = [*TINY, f"hydra.run.dir={tmp_path}", "+callbacks.slow._target_=injected.Slow", "+callbacks.slow.seconds=0.5"]
    agents = []
    for number in (0, 1):
        with open(tmp_path / "output.txt", "a") as output:
            command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "paratrain.train", *overrides, "model.dropout=0"]
            agents.append(subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True))
        if number == 0:
            time.sleep(2)  # the first agent holds the store
    wait_for(lambda: len(logged(tmp_path)) >= 5, *agents)
    agents[1].kill()
    agents[1].wait()
    finish(agents[0], tmp_path)
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in undisturbed("model.dropout=0").items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert logged(tmp_path) == list(range(1, STEPS + 1))


def logged(directory: Path) -> list[int]:
    path = directory / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


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

"""Every fault for real, under torchrun: afterwards the job has the weights of one that nothing happened to, bit for bit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import STEPS, TINY, attempts, environment, fault, finish, free_port, logged, same, start, train, wait_for

from paratrain import checkpoint

pytestmark = pytest.mark.timeout(900)  # of several jobs with restarts, on a machine that does other work


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
def test_resume_none_goes_on_from_what_its_own_launch_wrote_and_from_nothing_else(tmp_path, undisturbed):
    text = train(tmp_path, *fault("sigkill", 8, on=1), "resume=none")
    same(tmp_path, undisturbed())
    assert attempts(tmp_path) in ([0, 6], [0, 3])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".jsonl")}
    text = train(tmp_path, "resume=none", restarts=1, code=1).removeprefix(text)
    assert text.count("holds checkpoints of an earlier run; write resume=auto") == 2, (
        "the restart of a launch that was refused is refused too"
    )
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_ranks_and_two_deaths(strategy, tmp_path, undisturbed):
    train(tmp_path, *fault("sigkill", 5, on=3, times=2), f"strategy={strategy}", ranks=4)
    same(tmp_path, undisturbed(f"strategy={strategy}", ranks=4))
    assert len(attempts(tmp_path)) == 3


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
    waits = stacks[0].split("Thread")[0]  # for the gradients of rank 1, or for its part of a checkpoint
    assert re.search(r"collective \d+ gloo:\w+ .* in group", waits)


@pytest.mark.slow
def test_a_rank_that_is_stopped_inside_a_save_is_the_one_that_is_named(tmp_path, undisturbed):
    text = train(tmp_path, *fault("save-stop", 6, on=1), "trainer.step_timeout=15s", seconds=200)
    same(tmp_path, undisturbed())
    assert re.search(r"rank 1 \(process \d+ on \S+\) is stopped \(SIGSTOP, or a debugger\)", text)


@pytest.mark.slow
def test_a_restart_loop_gives_up(tmp_path):
    text = train(tmp_path, *fault("raise", 4, times=100), "trainer.max_stuck_restarts=2", restarts=4, code=None)
    assert "started 3 times in a row from step 3" in text
    assert attempts(tmp_path)[:3] == [0, 3, 3]


APART = """
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.environ.get("RANK", "0")))
"""
UPDATED = """
import os, pathlib, signal
import torch.distributed as dist
from paratrain.callbacks import Callback

class Updated(Callback):
    def on_step_end(self, trainer, result):
        if trainer.engine.global_step == 8 and dist.get_rank() == 1 and not (trainer.output_dir / "did").exists():
            (trainer.output_dir / "did").touch()
            with open(__file__, "a") as file:
                file.write("# of tomorrow\\n")
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_rank_that_restarts_with_another_version_of_the_code(tmp_path, undisturbed):
    """Each rank has a copy of the user's module, as on hosts of their own; one is changed while it is down. With the old one back the job goes on."""
    homes, run = tmp_path / "homes", tmp_path / "run"
    for rank in "01":
        (homes / rank).mkdir(parents=True)
        (homes / rank / "own_callback.py").write_text(UPDATED)
    (homes / "sitecustomize.py").write_text(APART)
    env = environment()
    env["PYTHONPATH"] = f"{homes}:{env['PYTHONPATH']}"
    own = "+callbacks.own._target_=own_callback.Updated"
    text = train(run, own, restarts=1, code=1, env=env)
    assert re.search(r"error: .*different versions of the program(.|\n)*rank 1 on \S+: own_callback \w+ and not \w+", text)
    assert logged(run)[-1] in (7, 8)
    (homes / "1" / "own_callback.py").write_text(UPDATED)
    train(run, own, env=env)
    same(run, undisturbed())


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

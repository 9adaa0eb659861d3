import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist

from paratrain import spawn
from paratrain.errors import UserError
from paratrain.spawn import RankError, run


def rank_here():
    return int(os.environ["RANK"])


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_each_rank_returns_its_value():
    def work(base, *, factor):
        total = torch.tensor([rank_here() + base])
        dist.all_reduce(total)
        return rank_here() * factor, total, dist.get_rank(), dist.get_world_size()

    results = run(work, 3, 10, factor=2)
    assert [r[0] for r in results] == [0, 2, 4]
    assert all(r[1].item() == 33 for r in results)
    assert [r[2:] for r in results] == [(0, 3), (1, 3), (2, 3)]


def test_functions_of_test_modules_go_by_reference_and_classes_come_back():
    assert run(rank_here, 2) == [0, 1]
    assert isinstance(run(lambda: UserError("a fault"), 1)[0], UserError)


def test_environment_is_the_callers_with_torchruns(monkeypatch, tmp_path):
    monkeypatch.setenv("PARATRAIN_TEST", "seen")
    monkeypatch.chdir(tmp_path)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "PARATRAIN_TEST"]
    results = run(lambda: ([os.environ[name] for name in names], os.getcwd(), torch.get_num_threads()), 2)
    assert results == [([str(r), str(r), "2", "2", "127.0.0.1", "seen"], str(tmp_path), 1) for r in range(2)]


def test_function_may_initialise_the_process_group_itself():
    def work():
        assert not dist.is_initialized()
        dist.init_process_group("gloo")  # env://, as under torchrun
        value = torch.ones(1)
        dist.all_reduce(value)
        return value.item()

    assert run(work, 2, init=False) == [2.0, 2.0]


def test_a_call_knows_nothing_of_the_last():
    def look():
        modes = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
        draws = torch.initial_seed(), torch.rand(1).item(), random.random(), numpy.random.rand()
        return *modes, *draws, os.getcwd(), sys.path[0], os.environ.get("LEFT")

    def dirty():
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        torch.manual_seed(5)
        os.environ["LEFT"] = "over"
        os.chdir("/")
        sys.path.insert(0, "/nowhere")
        torch.left_over = True
        random.random()

    before = run(look, 2)
    run(dirty, 2)
    assert run(look, 2) == before
    assert before[0] == before[1]
    assert run(lambda: hasattr(torch, "left_over"), 2) == [False, False]


def test_the_warm_process_is_reused_and_makes_calls_cheap():
    run(rank_here, 2)
    warm = spawn._warm.process.pid
    assert run(os.getppid, 4) == [warm] * 4
    assert spawn._warm.process.pid == warm


def test_every_rank_that_raises_is_reported_first_failure_first():
    def work():
        if rank_here() == 2:
            raise ValueError("the cause")
        if rank_here() == 0:
            time.sleep(0.3)
            raise KeyError("the consequence")

    with pytest.raises(RankError) as caught:
        run(work, 3)
    message = str(caught.value)
    assert list(caught.value.failures) == [2, 0]
    assert "ValueError: the cause" in caught.value.failures[2]
    assert "KeyError: 'the consequence'" in caught.value.failures[0]
    assert message.index("--- rank 2: Traceback") < message.index("--- rank 0: Traceback")
    assert "finished: 1" in message


def test_ranks_stuck_behind_a_failure_are_stopped_early():
    def work():
        if rank_here() == 1:
            raise ValueError("the cause")
        time.sleep(1000)

    with pytest.raises(RankError, match=r"--- rank 1: Traceback[\s\S]*the cause[\s\S]*--- rank 0: stopped: still running") as caught:
        run(work, 2, timeout=600)  # twice what pytest gives a test
    assert "in work" in caught.value.failures[0]  # the stack in which it was stuck


def test_hung_ranks_are_named_with_their_stacks_and_killed():
    def sleeps():
        time.sleep(1000)

    def work(directory):
        (Path(directory) / str(rank_here())).write_text(str(os.getpid()))
        if rank_here() == 1:
            sleeps()
        if rank_here() == 2:
            dist.recv(torch.zeros(1), src=1)

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        with pytest.raises(RankError) as caught:
            run(work, 3, directory, timeout=6)
        pids = [int(path.read_text()) for path in Path(directory).iterdir()]
    assert list(caught.value.failures) == [1, 2]
    assert "finished: 0" in str(caught.value)
    assert "hung: still running after 6 s" in caught.value.failures[1]
    assert "in sleeps" in caught.value.failures[1]
    assert "in recv" in caught.value.failures[2]
    assert all(gone(pid) for pid in pids)
    assert run(rank_here, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("end", "said"), [(lambda: os._exit(7), "exit code 7"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL")]
)
def test_a_death_is_named_and_the_next_call_works(end, said):
    def work():
        if rank_here() == 1:
            end()
        dist.barrier()

    with pytest.raises(RankError) as caught:
        run(work, 2)
    assert next(iter(caught.value.failures)) == 1
    assert said in caught.value.failures[1]
    assert run(rank_here, 2) == [0, 1]


def test_sys_exit_and_unpicklable_results_are_failures():
    with pytest.raises(RankError, match="SystemExit: 3"):
        run(lambda: sys.exit(3), 1)
    with pytest.raises(RankError, match="cannot pickle"):
        run(lambda: (i for i in range(3)), 1)


def test_death_of_the_warm_process_is_reported_and_mended():
    run(rank_here, 1)
    with pytest.raises(RankError, match="has died"):
        run(lambda: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(60), 2)
    assert run(rank_here, 2) == [0, 1]


def test_output_reaches_the_caller(capfd):
    run(lambda: print(f"hello from {rank_here()}\n", end="", flush=True), 2)  # one write a rank, or their lines mix
    assert sorted(capfd.readouterr().out.splitlines()) == ["hello from 0", "hello from 1"]


def test_ranks_die_with_the_caller(tmp_path):
    script = f"""
import os, pathlib, time
from paratrain.spawn import run
def work():
    pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(f"{{os.getpid()}} {{os.getppid()}}")
    time.sleep(1000)
run(work, 2)
"""
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size > 0 for path in tmp_path.iterdir()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    pids = {int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()}
    assert len(pids) == 3  # two ranks and the warm process
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_number_of_ranks_is_checked():
    with pytest.raises(ValueError, match="ranks=0"):
        run(rank_here, 0)

"""What a machine does to a job in weeks: memory that grows, a host with another version, a disk that does not answer."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time

import pytest
import torch
from torch import nn

import paratrain as pt
from paratrain import lock, same_code
from paratrain.checkpoint import saver as saving
from paratrain.errors import UserError
from paratrain.faults.growth import Growth, bytes_left, own_bytes
from paratrain.spawn import run

MIB = 1 << 20


def watched(used, room, last=None, steps=200, *, caplog):
    growth = Growth(lambda: used(step), lambda: room(step))
    for step in range(1, steps + 1):
        growth.note(step, last)
    return [record.getMessage() for record in caplog.records if "memory of this process grows" in record.getMessage()]


def test_memory_that_grows_by_a_mebibyte_a_step_is_named_before_the_end(caplog):
    told = watched(lambda step: 500 * MIB + step * MIB, lambda step: (1000 - step) * MIB, caplog=caplog)
    assert "grows by 1 MiB a step" in told[0]
    assert "in about" in told[0]
    assert 1 <= len(told) <= 4, "again when half of the way is gone, and not at every step"


@pytest.mark.parametrize("used", [
    lambda step: 500 * MIB, lambda step: (500 + min(step, 40)) * MIB, lambda step: (500 + 60 * (step % 7)) * MIB,
    lambda step: int((500 + 400 * (1 - 0.95**step)) * MIB),
], ids=["flat", "warm-up", "saw", "levelling off"])  # fmt: skip
def test_memory_that_does_not_grow_for_ever_is_no_news(used, caplog):
    assert watched(used, lambda step: 1000 * MIB, caplog=caplog) == []


def test_growth_that_the_job_outlives_is_no_news(caplog):
    assert watched(lambda step: step * MIB, lambda step: 10_000 * MIB, last=1000, caplog=caplog) == []


def test_the_machine_tells_both_numbers():
    before, kept = own_bytes(), torch.ones(64 * MIB // 4)
    assert before is not None
    assert own_bytes() - before > 32 * MIB, kept.shape
    assert 0 < bytes_left() < 1 << 50


def test_a_rank_of_another_version_is_named(tmp_path):
    """Each rank has a copy of the user's module of its own, as hosts that were not updated together have."""

    def body():
        rank = int(os.environ["RANK"])
        home = tmp_path / str(rank)
        home.mkdir()
        (home / "my_net.py").write_text(f"width = {4 if rank == 0 else 5}\n")
        sys.path.insert(0, str(home))
        import my_net  # noqa: F401

        cfg = pt.load_config(["strategy=ddp", "trainer.device=cpu", "data.global_batch=4"])
        with pytest.raises(UserError, match=r"different versions of the program(.|\n)*rank 1 on \S+: my_net \w+ and not \w+"):
            pt.setup(lambda: nn.Linear(3, 1), nn.functional.mse_loss, cfg)
        sys.path.remove(str(home))
        del sys.modules["my_net"]
        pt.setup(lambda: nn.Linear(3, 1), nn.functional.mse_loss, cfg)
        return True

    assert run(body, 2) == [True, True]


def test_versions_name_the_library_and_the_users_modules():
    found = same_code.versions()
    assert {"paratrain", "torch", "Python", __name__} <= found.keys()
    assert not [name for name in found if name.startswith(("torch.", "numpy", "paratrain.checkpoint"))]


def test_a_file_system_that_does_not_answer_is_named_while_training_waits(tmp_path, monkeypatch, caplog):

    sync, ends = os.fsync, time.monotonic() + 30

    def stalled(fd):
        while "waits for the file system of" not in caplog.text and time.monotonic() < ends:
            time.sleep(0.05)
        sync(fd)

    monkeypatch.setattr(saving, "_SLOW", 0.2)
    monkeypatch.setattr(os, "fsync", stalled)
    caplog.set_level(logging.WARNING)
    cfg = pt.load_config([
        "trainer.max_steps=4", "checkpoint.every=2", "data.global_batch=4", "trainer.device=cpu", f"output_dir={tmp_path}", "logger.sinks=[]",
        "trainer.prove=off",
    ])  # fmt: skip
    data = [(torch.full((3,), float(i)), torch.ones(1)) for i in range(8)]
    pt.Trainer(cfg, lambda: nn.Linear(3, 1), nn.functional.mse_loss, data).fit()
    assert re.search(r"training has waited \d+ s for the end of the save of \S+, which waits for the file system of", caplog.text)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000002", "step-000004"}


def test_a_second_job_is_refused_before_it_writes_a_file(tmp_path):
    (tmp_path / ".hydra").mkdir()
    kept = tmp_path / ".hydra" / "config.yaml"
    kept.write_text("of the first\n")

    def second():
        import subprocess

        command = [sys.executable, "-m", "paratrain.train", "data=synthetic", f"hydra.run.dir={tmp_path}", "trainer.max_steps=1"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    with lock.held(tmp_path):
        done = second()
    assert done.returncode == 2
    assert f"another job, process {os.getpid()} on host" in done.stderr
    assert kept.read_text() == "of the first\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hydra", ".lock"]


class Shards(torch.utils.data.Dataset):
    """A file a sample, read as it is needed."""

    def __init__(self, directory):
        self.directory = directory
        for number in range(16):
            torch.save(torch.full((3,), number / 16), directory / f"shard-{number}.pt")

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.load(self.directory / f"shard-{index}.pt"), torch.ones(1)


@pytest.mark.parametrize("jump", [86_400, -86_400], ids=["forward", "back"])
def test_a_clock_that_jumps_by_a_day_is_not_seen(tmp_path, monkeypatch, jump, caplog):
    real, jumped = time.time, []

    class Jump(pt.Callback):
        def on_step_end(self, trainer, result):
            if trainer.engine.global_step == 3:
                jumped.append(jump)

    def fit(name, *callbacks):
        cfg = pt.load_config([
            "trainer.max_steps=6", "trainer.max_time=1h", "trainer.step_timeout=10min", "checkpoint.every=2", "checkpoint.keep=2", "data.global_batch=4",
            "trainer.device=cpu", f"output_dir={tmp_path / name}", "logger.sinks=[jsonl]", "trainer.prove=off", "trainer.log_every=1",
        ])  # fmt: skip
        data = [(torch.full((3,), float(i)), torch.ones(1)) for i in range(8)]
        trainer = pt.Trainer(cfg, lambda: nn.Linear(3, 1), nn.functional.mse_loss, data, callbacks=list(callbacks))
        trainer.fit()
        return trainer.engine.full_state_dict()

    expected = fit("undisturbed")
    monkeypatch.setattr(time, "time", lambda: real() + sum(jumped))
    found = fit("hurt", Jump())
    assert jumped == [jump]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sorted(path.name for path in (tmp_path / "hurt" / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    rows = [json.loads(line) for line in (tmp_path / "hurt" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["time/step"] < 600 and 0 <= row["goodput/ratio"] <= 1 for row in rows)
    seconds = json.loads((tmp_path / "hurt" / "goodput.json").read_text())["seconds"]
    assert all(0 <= value < 600 for value in seconds.values()), seconds


def test_a_shard_that_vanishes_is_named_and_back_again_training_ends_bit_equal(tmp_path):
    def fit(name, data, **callbacks):
        cfg = pt.load_config([
            "trainer.max_steps=4", "checkpoint.every=1", "data.global_batch=4", "trainer.device=cpu", f"output_dir={tmp_path / name}",
            "logger.sinks=[jsonl]", "trainer.prove=off", "trainer.log_every=1",
        ])  # fmt: skip
        trainer = pt.Trainer(cfg, lambda: nn.Linear(3, 1), nn.functional.mse_loss, data, callbacks=list(callbacks.values()))
        trainer.fit()
        return trainer.engine.full_state_dict()

    (tmp_path / "data").mkdir()
    data = Shards(tmp_path / "data")
    expected = fit("undisturbed", data)

    class Vanish(pt.Callback):
        def on_step_end(self, trainer, result):
            if trainer.engine.global_step == 2:
                self.gone = tmp_path / "data" / f"shard-{trainer.order.batch(3)[1]}.pt"
                self.gone.rename(self.gone.with_suffix(".away"))

    vanish = Vanish()
    with pytest.raises(FileNotFoundError) as caught:
        fit("hurt", data, vanish=vanish)
    assert vanish.gone.name in str(caught.value)
    assert any("while reading sample" in note and "of a Shards" in note for note in caught.value.__notes__)
    vanish.gone.with_suffix(".away").rename(vanish.gone)
    found = fit("hurt", data)
    assert all(torch.equal(found[name], value) for name, value in expected.items())

"""Every run proves itself: what is proven, what stops a job, what cannot be said, and that it costs once."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest
import torch
from faults import models
from practice import BASE, run
from torch import nn

import paratrain as pt
from paratrain.errors import UserError
from paratrain.verify import background

VECTORS = [(x, y) for x, y in zip(*models.vectors(64, 1)[0], strict=True)]


class Centred(nn.Module):
    """Takes the mean over the samples that it is given, which no state tells of and no loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(torch.tanh(hidden - hidden.mean(0)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PARATRAIN_PROVE")


def trainer(tmp_path, model_fn, *overrides, loss_fn=models.square_loss, data=VECTORS):
    more = [f"output_dir={tmp_path / 'run'}", "data.global_batch=8", "data.micro_batch_size=2", "trainer.max_steps=3", *overrides]
    return pt.Trainer(pt.load_config([*BASE, "strategy=ddp", *more]), model_fn, loss_fn, data)


def test_before_the_first_step_and_known_from_then_on(tmp_path, caplog):
    """The verdict is in the log, in config.json and in the checkpoint; a second run of the same job costs nothing."""
    caplog.set_level(logging.INFO)
    first = trainer(tmp_path, models.mlp, "trainer.prove=before")
    first.fit()
    assert first.proof.line.startswith("proven: 4 steps, 1 rank, largest difference")
    assert first.proof.line in caplog.text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["proof"]["status"] == "proven"
    saved = pt.checkpoint.read_meta(pt.checkpoint.latest(first.checkpoint_dir))
    assert saved["extra"]["proof"]["line"] == first.proof.line
    assert 0 < first.proof.seconds < 30
    began = time.monotonic()
    again = trainer(tmp_path / "again", models.mlp, "trainer.prove=before")
    again.fit()
    assert (again.proof.kept, again.proof.line) == (True, first.proof.line)
    assert time.monotonic() - began < 10


def test_a_difference_stops_the_job_before_its_first_step(tmp_path):
    job = trainer(tmp_path, Centred, "trainer.prove=before")
    with pytest.raises(UserError, match=r"(?s)does not train as one process does: .*trainer\.prove=off") as caught:
        job.fit()
    assert job.engine.global_step == 0
    assert "step 0" in str(caught.value)


def test_beside_training_a_difference_stops_it_at_a_step_boundary_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "NICE", 0)  # tests run beside each other
    job = trainer(tmp_path, Centred, "trainer.max_steps=null", "trainer.max_time=10min", "checkpoint.every=1000000")
    with pytest.raises(UserError, match=r"stopped after step \d+ and saved in"):
        job.fit()
    assert job.proof.status == "different"
    assert pt.checkpoint.steps(job.checkpoint_dir)[-1][0] == job.engine.global_step


def test_what_cannot_be_proven_says_why_and_trains_on(tmp_path, caplog):
    lock = threading.Lock()

    def model():
        assert lock
        return models.mlp()

    job = trainer(tmp_path, model)
    began = time.monotonic()
    job.fit()
    assert job.proof.line.startswith("not proven: the model or the loss cannot be sent to another process (TypeError")
    assert job.proof.line in caplog.text
    assert job.engine.global_step == 3
    assert time.monotonic() - began < 10


def test_short_runs_do_not_wait_long(tmp_path, caplog):
    """A fit of three steps waits no longer than it trained; without a proof that is said, too."""
    caplog.set_level(logging.INFO)
    job = trainer(tmp_path, models.mlp)
    began = time.monotonic()
    job.fit()
    assert job.proof.line.startswith("not proven: training ended first")
    assert time.monotonic() - began < 10
    off = trainer(tmp_path / "off", models.mlp, "trainer.prove=off")
    off.fit()
    assert off.proof.line in caplog.text
    assert off.proof.status == "off"


def test_a_model_given_with_its_values_is_proven_with_them(tmp_path):
    """What set-up does to the module and to a loss that is one does not reach the proof."""
    torch.manual_seed(5)
    job = trainer(tmp_path, models.mlp(), "trainer.prove=before", "memory.recompute=full", loss_fn=nn.MSELoss())
    job.fit()
    assert job.proof.status == "proven", job.proof


def test_the_environment_overrides_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("PARATRAIN_PROVE", "perhaps")
    with pytest.raises(UserError, match="PARATRAIN_PROVE=perhaps"):
        trainer(tmp_path, models.mlp).fit()


def proves(batches, model_fn, overrides):
    engine = pt.setup(model_fn, models.square_loss, pt.load_config([*BASE, *overrides]))
    try:
        return engine.prove(batches).line
    except UserError as error:
        return str(error)


def test_a_loop_of_ones_own_is_proven_on_every_rank():
    """engine.prove is called by every rank, and each has the verdict; the process group of the job is not touched."""
    batches = models.vectors(9, 3)
    lines = run(proves, 2, batches, models.mlp, ["strategy=fsdp", "data.micro_batch_size=2"], timeout=400)
    assert lines[0] == lines[1]
    assert lines[0].startswith("proven: 4 steps, 2 ranks"), lines[0]
    lines = run(proves, 2, batches, Centred, ["strategy=ddp"], timeout=400)
    assert lines[0] == lines[1]
    assert "does not train as one process does" in lines[0]

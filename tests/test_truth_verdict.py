"""What a verdict is worth: comparisons that could not fail are no proof, what is accepted or only written down stops no job."""

from __future__ import annotations

import itertools

import cloudpickle
import pytest
import torch
from faults import models, programs
from faults.corpus import config
from torch import nn

from paratrain.config import DDP, Optimizer, SyntheticData, Trainer
from paratrain.forward_state import _tensor
from paratrain.mesh import AXES
from paratrain.verify import smaller, verify
from paratrain.verify.core import examine
from paratrain.verify.run import Job, exact
from paratrain.verify.worker import Task, prove


class Inner(programs.Inner):
    def __init__(self) -> None:
        super().__init__(False)


class MostlyUnreached(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(64, 64)


class ALittleUnreached(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(2, 2)


class WritesDown(Inner):
    """Keeps a log, a sum and the last output of its own, and reads none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[float] = []
        self.total, self.last = 0.0, None

    def between(self, x):
        y = torch.tanh(x)
        self.log.append(float(y.detach().mean()))
        self.total, self.last = self.total + float(x.detach().sum()), y.detach()
        return y


class Centre(Inner):
    """A moving mean that the next forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def between(self, x):
        y = torch.tanh(x - self.centre)
        self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        return y


class OnlyFloat32(Inner):
    def between(self, x):
        if x.dtype is torch.float64:
            raise TypeError("no float64 here")
        return torch.tanh(x)


class OnlyFloat32AndWrong(OnlyFloat32):
    def between(self, x):
        return super().between(x - x.detach().mean(0))


class LevelInLoss:
    """A loss with a level in a number of Python, which is float64."""

    def __init__(self) -> None:
        self.level = 1.0

    def __call__(self, outputs, targets):
        error = (outputs - targets).square()
        total = error.sum() / self.level
        self.level = 0.9 * self.level + 0.1 * float(error.detach().mean())
        return total, targets.numel()


def same_samples(steps=2):
    return [(torch.ones(8, 4), torch.ones(8, 3))] * steps


def twice_the_same():
    """Each rank's share is the same, its samples are not."""
    return [(torch.cat([x, x]), torch.cat([t, t])) for x, t in models.vectors(4)]


@pytest.mark.parametrize(
    ("model", "batches", "cfg", "says"),
    [
        (models.mlp, same_samples(), config(2), "ranks 0 and 1 are given the same samples in every step"),
        (models.mlp, twice_the_same(), config(), "ranks 0 and 1 are given the same samples in every step"),
        (MostlyUnreached, models.vectors(9), config(2, strategy=DDP()), "the loss reaches 4 of 6 trained weights"),
        (models.mlp, models.vectors(9), config(2, optimizer=Optimizer("torch.optim.SGD", lr=0.0)), "no weight moves in these steps"),
    ],
    ids=["one sample", "one share", "unreached weights", "a rate of zero"],
)
def test_a_comparison_that_could_not_fail_proves_nothing(model, batches, cfg, says):
    report = verify(model, models.square_loss, batches, cfg, 2)
    assert not report.ok
    assert report.first_difference is None
    assert says in report.unproven, report.text()


def test_weights_that_nothing_reached_are_named():
    report = verify(ALittleUnreached, models.square_loss, models.vectors(9), config(2, strategy=DDP()), 2)
    assert report.ok, report.text()
    assert report.left_out[0].startswith("2 of 6 weights, whose gradients are zero")
    assert "small.weight" in report.text()


def test_what_forward_only_writes_is_named_and_is_no_difference():
    report = verify(WritesDown, models.square_loss, models.vectors(9), config(2), 2)
    assert report.ok, report.text()
    assert report.left_out == ["what forward writes and does not read (log, total, last)"]


@pytest.mark.parametrize("rule", ["local", "rank0"])
def test_a_state_that_is_left_to_each_rank_stops_no_job(rule):
    cfg = config(2, trainer=Trainer(forward_state={"centre": rule}, device="cpu"))
    report = verify(Centre, models.square_loss, models.vectors(9), cfg, 2)
    assert report.first_difference is None
    assert "trainer.forward_state leaves centre to each rank, and what is trained depends on it" in report.unproven


def test_a_state_that_is_made_exact_is_proven_and_a_wrong_rule_is_named():
    told = Trainer(forward_state={"centre": "mean"}, device="cpu")
    report = verify(Centre, models.square_loss, models.vectors(9), config(2, trainer=told), 2)
    assert report.ok, report.text()
    report = verify(
        Centre, models.square_loss, models.vectors(9), config(2, trainer=Trainer(forward_state={"centre": "sum"}, device="cpu")), 2
    )
    assert report.first_difference is not None
    assert "trainer.forward_state={centre: sum}" in report.explanation, report.text()


def test_a_level_in_a_number_of_python_keeps_its_digits():
    assert float(_tensor(0.1, torch.device("cpu"))) == 0.1
    told = Trainer(forward_state={"loss.level": "mean"}, device="cpu")
    job = Job(models.mlp, LevelInLoss(), models.vectors(9), exact(config(2, trainer=told)), 3, 2)
    report = examine(job, 120.0, with_life=False)  # no checkpoint holds it
    assert report.ok, report.text()


def test_batches_from_an_iterator_are_read_as_far_as_needed():
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield models.vectors(9)[0]

    report = verify(models.mlp, models.square_loss, endless(), config(2), 2)
    assert report.ok, report.text()
    assert len(read) == report.setup["steps"]


def proof(model_fn, batches, cfg):
    small = smaller.smaller(cfg, dict.fromkeys(AXES, 1) | {"dp_replicate": 2}, len(batches[0][0]))
    payload = cloudpickle.dumps((model_fn, models.square_loss)), cloudpickle.dumps(batches)
    return prove(Task(*payload, small, None, 100, 60.0, 120.0, 0, [], "."))


def test_a_model_that_knows_no_float64_is_proven_in_float32():
    cfg = config(2, data=SyntheticData(global_batch=8, micro_batch_size=2))
    verdict = proof(OnlyFloat32, models.vectors(8, 4), cfg)
    assert verdict.status == "proven", verdict
    assert "float64, in which the model does not train (TypeError: no float64 here): proven in float32" in verdict.line
    assert proof(OnlyFloat32AndWrong, models.vectors(8, 4), cfg).status == "different"


def test_the_proof_keeps_what_becomes_of_state():
    cfg = config(2, trainer=Trainer(forward_state={"centre": "mean", "queue": "local"}, device="cpu"))
    small = smaller.smaller(cfg, dict.fromkeys(AXES, 1) | {"dp_replicate": 2}, 8)
    assert small.cfg.trainer.forward_state == cfg.trainer.forward_state
    assert "what trainer.forward_state leaves to each rank (queue)" in small.left_out

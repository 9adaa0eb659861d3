"""The proof is neither vacuous nor a false alarm: programs that are right pass, whatever they draw or keep, and what proves nothing says so."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults import models, programs
from faults.corpus import config
from safetensors.torch import save_file
from torch import nn

from paratrain.config import DDP, FSDP, HSDP, Config, Memory, Optimizer, Parallel, Pipeline, SyntheticData, Trainer, Verify
from paratrain.verify import verify
from paratrain.verify.draws import comparable
from paratrain.verify.smaller import Shallow, smaller


class Inner(programs.Inner):
    def __init__(self) -> None:
        super().__init__(False)


class Float32Inside(Inner):
    """A norm in float32, as models of transformers have it."""

    def between(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class KeepsItsBatch(Inner):
    """Keeps what the last forward saw in an attribute and in a buffer, both as long as the micro-batch, and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, 8), persistent=False)
        self.shown, self.mean = None, 0.0

    def between(self, x):
        self.seen, self.shown, self.mean = x.detach(), x.detach()[:, 0], float(x.detach().mean())
        return torch.tanh(x)


class WithoutElements(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x):
        return super().forward(x) + F.linear(x, self.none).sum(-1, keepdim=True)


class ByNumpy(Inner):
    """Draws once a sample, where nothing can make it the same for any number of samples."""

    def between(self, x):
        return torch.tanh(x) * torch.from_numpy(np.random.rand(len(x), 1)).to(x.dtype)


class Mixed(Inner):
    """Mixes each sample with another one at random."""

    def between(self, x):
        return torch.tanh(x) + 0.1 * x[torch.randperm(len(x))]


def weighed(outputs, targets):
    """A count that is a sum of float32 weights."""
    weights = torch.linspace(0.3, 1.7, len(targets[0])).expand(len(targets), -1)
    return (weights * (outputs - targets).square()).sum(), weights.sum()


SOUND = {
    "float32 inside": (Float32Inside, models.square_loss, config(2)),
    "a count of float32 weights": (Inner, weighed, config(2)),
    "state as long as the micro-batch": (KeepsItsBatch, models.square_loss, config(2, strategy=DDP(broadcast_buffers=False))),
    "a weight without elements": (WithoutElements, models.square_loss, config(2)),
    "stochastic depth, by torch and by Python": (lambda: programs.Dropped(False), models.square_loss, config(2)),
    "values drawn by each module": (models.mlp, models.square_loss, config(2, memory=Memory(init="meta"))),
}


@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name):
    model, loss, cfg = SOUND[name]
    report = verify(model, loss, models.vectors(9), cfg, 2)
    assert report.ok, report.text()
    assert report.largest < 1e-6


def test_pretrained_weights_are_those_that_are_proven(tmp_path):
    torch.manual_seed(8)
    save_file(models.mlp().state_dict(), tmp_path / "model.safetensors")
    cfg = config(2, memory=Memory(pretrained=str(tmp_path / "model.safetensors")))
    report = verify(models.mlp, models.square_loss, models.vectors(9), cfg, 2)
    assert report.ok, report.text()


@pytest.mark.parametrize(("model", "says"), [(ByNumpy, "depends on the samples at hand"), (Mixed, "a permutation")])
def test_draws_that_depend_on_the_samples_prove_nothing(model, says):
    report = verify(model, models.square_loss, models.vectors(9), config(2), 2)
    assert not report.ok
    assert report.first_difference is None
    assert says in report.unproven
    assert report.verdict().startswith("NOT PROVEN")


def test_a_tolerance_that_could_hide_a_factor_of_two_is_no_pass():
    """A model whose output hangs on the last bits of its weights."""

    class Chaotic(Inner):
        def between(self, x):
            for _ in range(40):
                x = torch.sin(6 * x)
            return x

    report = verify(Chaotic, models.square_loss, models.vectors(9), config(2, verify=Verify(steps=1)), 2)
    assert not report.ok
    assert "a factor of two could hide in it" in report.unproven, report.text()


def test_a_loss_that_compares_samples_is_called_that():
    """Ranks of equal counts: not a mean of means of unequal ones."""

    def loss(outputs, targets):
        return F.cross_entropy(outputs @ targets.T, torch.arange(len(targets)), reduction="sum"), len(targets)

    report = verify(models.mlp, loss, models.vectors(8), config(), 2)
    assert report.first_difference is not None
    assert report.first_difference.error == "own samples", report.text()


def test_draws_are_the_same_for_any_number_of_samples():
    class Draws(nn.Module):
        def forward(self, x):
            rows = torch.rand(len(x), 3), torch.empty(len(x)).bernoulli_(0.5), torch.randn_like(x), torch.randint(0, 9, (len(x),))
            return [row[0] for row in rows], random.random(), float(np.random.rand()), F.dropout(x, 0.5)

    model = Draws()
    before = torch.rand
    with comparable(model) as draws:
        first, again = model(torch.ones(7, 2)), model(torch.ones(3, 2))
        draws.step = 1
        other = model(torch.ones(3, 2))
    assert torch.rand is before
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert first[1:3] == again[1:3]
    assert first[1] != other[1]
    assert torch.equal(first[3], torch.ones(7, 2))
    assert torch.nn.functional.dropout(torch.ones(64), 0.5).min() == 0, "as it was"


def test_a_job_is_made_small():
    """Axes at their least degree, samples as ragged as the job's, several micro-batches, and what cannot be compared left out by name."""
    shape = {"pp": 1, "dp_replicate": 4, "dp_shard": 8, "ep": 1, "cp": 1, "tp": 3}
    cfg = Config(strategy=HSDP(reshard_after_forward=4), parallel=Parallel(tp=3), data=SyntheticData(global_batch=511, micro_batch_size=4))
    small = smaller(cfg, shape, 511)
    degrees = small.cfg.parallel
    assert (small.ranks, degrees.dp_replicate, degrees.dp_shard, degrees.tp) == (12, 2, 2, 3)
    assert (small.samples, small.cfg.data.micro_batch_size) == (15, 2)
    assert small.cfg.strategy.reshard_after_forward == 2
    assert small.left_out == ("precision=32-true",)
    shape = {"pp": 4, "dp_replicate": 1, "dp_shard": 1, "ep": 1, "cp": 1, "tp": 1}
    pipeline = Pipeline(cuts=["b.2", "b.4", "b.6"], place={"head*": 3}, micro_batches=16)
    cfg = Config(
        strategy=DDP(comm_hook="fp16"),
        parallel=Parallel(pp=4),
        pipeline=pipeline,
        optimizer=Optimizer(target="paratrain.optim.LowBitAdamW", args={"bits": 8}),
        trainer=Trainer(clip_norm=0.5, max_steps=10),
        compile=True,
    )
    small = smaller(cfg, shape, 32)
    assert (small.ranks, small.cfg.pipeline.cuts, small.cfg.pipeline.place) == (2, ["b.4"], {"head*": 1})
    assert small.cfg.optimizer.target == "torch.optim.AdamW"
    assert [part.partition("=")[0] for part in small.left_out] == [
        "precision",
        "strategy.comm_hook",
        "compile",
        "the rounding of the optimizer (AdamW was proven)",
    ]
    assert small.cfg.trainer.clip_norm == 0.5
    assert smaller(Config(strategy=FSDP()), dict.fromkeys(shape, 1) | {"dp_shard": 1}, 32).ranks == 1


def test_depth_is_cut_where_blocks_repeat():
    def deep():
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(9))
        model.num_layers, model.forward = 9, lambda x: [x := model.layers[i](x) for i in range(model.num_layers)][-1]
        return model

    model = Shallow(deep, 2)()
    assert (len(model.layers), model.num_layers) == (2, 2)
    assert model(torch.ones(1, 4)).shape == (1, 4)

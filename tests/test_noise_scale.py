"""The gradient noise scale: against its formula, against a distribution whose value is known, and on every layout with the same parts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss
from sharding_zoo import gpt
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, LossScale, NoiseScale, Optimizer, Parallel, Precision, Single, Zero1, from_dict
from paratrain.errors import ConfigError, UserError
from paratrain.spawn import run


def cfg(micro, every=1, decay=0.0, **sections):
    base = config(micro, **sections)
    return replace(base, trainer=replace(base.trainer, noise_scale=NoiseScale(every, decay)))


class Dot(nn.Module):
    """A linear loss: the gradient of a sample is the sample."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return x @ self.weight


def total(outputs, targets):
    return outputs.sum(), len(targets)


def still(**sections):
    return {"optimizer": Optimizer("torch.optim.SGD", lr=0.0, weight_decay=0.0), **sections}


@pytest.mark.parametrize("precision", [Precision("64-true"), Precision("16-mixed", LossScale(init=64.0))], ids=lambda p: p.name)
def test_the_formula_with_parts_of_different_sizes(precision):
    dtype = torch.float64 if precision.name == "64-true" else torch.float32  # autocast leaves float64 inputs as they are
    x = 2 + torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    engine = setup(Dot(3), total, cfg(3, strategy=Single(), precision=precision, **still()))
    step = engine.train_step(engine.local((x, x)))
    sums = [part.sum(0) for part in x.split(3)]
    small, large = sum(float(g @ g) / n for g, n in zip(sums, (3, 3, 1), strict=True)), float(x.sum(0) @ x.sum(0)) / 7
    trace = (small - large) / 2
    bound = 1e-12 if precision.name == "64-true" else 5e-3
    assert engine.noise_scale.trace == pytest.approx(trace, rel=bound)
    assert engine.noise_scale.value == pytest.approx(trace / (float(x.mean(0) @ x.mean(0)) - trace / 7), rel=bound * 10)
    assert step.grad_norm == pytest.approx(float(x.mean(0).norm()), rel=bound)


def test_a_distribution_whose_noise_scale_is_known():
    """Gradients of variance 4 in each of 10 dims around a mean of norm 3: tr S / |G|^2 = 40 / 9 samples."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.zeros(10, dtype=torch.float64)
    mean[0] = 3.0
    engine = setup(Dot(10), total, cfg(4, decay=0.995, strategy=Single(), **still()))
    for _ in range(600):
        x = mean + 2.0 * torch.randn(16, 10, generator=generator, dtype=torch.float64)
        engine.train_step(engine.local((x, x)))
    assert engine.noise_scale.value == pytest.approx(40 / 9, rel=0.05)


LAYOUTS = {
    "ddp": {"strategy": DDP()},
    "zero1": {"strategy": Zero1()},
    "fsdp": {"strategy": FSDP()},
    "hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2, dp_shard=1)},
    "compiled": {"strategy": FSDP(), "compile": "aot_eager"},
}


def test_layouts_with_the_same_parts_agree(tmp_path):
    """Micro-batches of 2 of masked tokens, in float64: six of one process, three of each of two ranks; read in every second step."""
    batches = token_batches(5, 12, True)

    def train(save=None, **sections):
        engine = setup(gpt(), token_loss, cfg(2, every=2, decay=0.5, **sections))
        values = []
        for number, batch in enumerate(batches):
            engine.train_step(engine.local(batch))
            values.append(engine.noise_scale.value)
            if number == 2 and save:
                engine.save(save)
        if save:
            again = setup(gpt(), token_loss, cfg(2, every=2, decay=0.5, **sections))
            again.load(save)
            for batch in batches[3:]:
                again.train_step(again.local(batch))
            assert again.noise_scale.state_dict() == engine.noise_scale.state_dict()
        return values

    expected = train(strategy=Single())
    assert expected[0] == expected[1] != expected[2] == expected[3] != expected[4]
    assert all(math.isfinite(value) for value in expected)
    found, _ = run(lambda: {name: train(tmp_path / name if name == "fsdp" else None, **layout) for name, layout in LAYOUTS.items()}, 2)
    for name, values in found.items():
        assert values == pytest.approx(expected, rel=1e-9), name


def test_refused_where_there_are_no_parts():
    engine = setup(Dot(3), total, cfg(None, strategy=Single()))
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"trainer.noise_scale .* single micro-batch on one rank; write a smaller data.micro_batch_size"):
        engine.train_step(engine.local((x, x)))
    with pytest.raises(ConfigError, match=r"trainer.noise_scale: compares gradients of micro-batches, but parallel.tp shares"):
        from_dict({"trainer": {"noise_scale": {}}, "parallel": {"tp": 2}})

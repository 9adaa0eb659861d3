"""The moving average of weights under every layout, against one written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss
from sharding_zoo import gpt

from paratrain.api import setup
from paratrain.config import DDP, EMA, FSDP, HSDP, LossScale, Memory, Parallel, Precision, Single, Zero1, check
from paratrain.errors import ConfigError, UserError
from paratrain.spawn import run

LAYOUTS = {
    "ddp": {"strategy": DDP()},
    "zero1": {"strategy": Zero1()},
    "fsdp": {"strategy": FSDP()},
    "offload": {"strategy": FSDP(), "memory": Memory(offload="params")},
}
HYBRID = {"hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2)}}
BATCHES = token_batches(5, 8, True)


def by_hand(decay: float, every: int):
    """Weights, their average, and its loss on the last batch, on one process."""
    engine = setup(gpt(), token_loss, config(strategy=Single()))
    average = engine.full_state_dict()
    for number, batch in enumerate(BATCHES, 1):
        engine.train_step(engine.local(batch))
        if number % every == 0:
            average = {name: decay * average[name] + (1 - decay) * value for name, value in engine.full_state_dict().items()}
    weights = engine.full_state_dict()
    model = gpt()().double()
    model.load_state_dict(average)
    total, count = token_loss(model(BATCHES[-1][0]).detach(), BATCHES[-1][1])
    return weights, average, float(total / count)


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_written_by_hand(ranks, tmp_path):
    """Evaluated, exported, and the same after a resume under another layout; the weights that are trained stay as they are."""
    layouts = LAYOUTS | (HYBRID if ranks == 4 else {})
    ema = EMA(decay=0.8, every=2)

    def body():
        results = {}
        for name, sections in layouts.items():
            engine = setup(gpt(), token_loss, config(2, ema=ema, **sections))
            for batch in BATCHES[:3]:
                engine.train_step(engine.local(batch))
                engine.eval_step(engine.local(batch))
            engine.save(tmp_path / f"{name}{ranks}")
        for name, sections in layouts.items():
            for source in ("fsdp", "ddp"):
                engine = setup(gpt(), token_loss, config(ema=ema, **sections))
                engine.train_step(engine.local(BATCHES[0]))
                engine.load(tmp_path / f"{source}{ranks}")
                for batch in BATCHES[3:]:
                    engine.train_step(engine.local(batch))
                loss = engine.eval_step(engine.local(BATCHES[-1])).loss
                results[name, source] = engine.full_state_dict(), engine.ema_state_dict(), loss
        return results

    weights, average, loss = by_hand(0.8, 2)
    for case, result in run(body, ranks)[0].items():
        assert furthest(result[0], weights) < 1e-10, case
        assert furthest(result[1], average) < 1e-10, case
        assert result[2] == pytest.approx(loss, abs=1e-10), case


def test_evaluate_false_evaluates_what_is_trained():
    engine = setup(gpt(), token_loss, config(strategy=Single(), ema=EMA(decay=0.9, evaluate=False)))
    other = setup(gpt(), token_loss, config(strategy=Single()))
    for batch in BATCHES:
        engine.train_step(engine.local(batch))
        other.train_step(other.local(batch))
    assert engine.eval_step(engine.local(BATCHES[0])).loss == other.eval_step(other.local(BATCHES[0])).loss
    with pytest.raises(UserError, match=r"ema_state_dict\(\) without"):
        other.ema_state_dict()


def test_skipped_steps_and_low_precision():
    """A step that float16 skips is none; bfloat16 weights have an average in float32, which moves by less than they can."""
    cfg = config(strategy=Single(), ema=EMA(decay=0.5), precision=Precision("16-mixed", LossScale(init=2.0**24)))
    engine = setup(gpt(), token_loss, cfg)
    before = engine.ema_state_dict()
    while engine.train_step(engine.local(BATCHES[0])).skipped:
        assert furthest(engine.ema_state_dict(), before) == 0
    assert engine.global_step > 1
    assert furthest(engine.ema_state_dict(), before) > 0

    engine = setup(gpt(), token_loss, config(strategy=Single(), ema=EMA(decay=0.99999), precision=Precision("bf16-true")))
    first = {name: average.clone() for name, average in engine.ema.tensors().items()}
    engine.train_step(engine.local(BATCHES[0]))
    moved = {name: average - first[name] for name, average in engine.ema.tensors().items()}
    for param, name in engine._names().items():
        expected = 1e-5 * (param.detach().float() - first[f"ema/{name}"])
        assert moved[f"ema/{name}"].dtype is torch.float32
        assert torch.allclose(moved[f"ema/{name}"], expected, atol=2e-7)


def test_checkpoints_with_and_without(tmp_path):
    """A checkpoint without an average starts it from its weights; one with an average resumes without."""
    plain, averaged = config(strategy=Single()), config(strategy=Single(), ema=EMA(decay=0.9))
    for name, cfg in (("plain", plain), ("averaged", averaged)):
        engine = setup(gpt(), token_loss, cfg)
        engine.train_step(engine.local(BATCHES[0]))
        engine.save(tmp_path / name)
    weights = engine.full_state_dict()
    engine = setup(gpt(), token_loss, averaged)
    engine.load(tmp_path / "plain")
    assert furthest(engine.ema_state_dict(), weights) == 0
    engine = setup(gpt(), token_loss, plain)
    engine.load(tmp_path / "averaged")
    assert furthest(engine.full_state_dict(), weights) == 0


def test_refused():
    with pytest.raises(ConfigError, match=r"ema\.decay: is the weight of the past"):
        check(replace(config(), ema=EMA(decay=1.0)))

"""`trainer.update_in_backward`: the same steps, without all gradients ever being there at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss, train_by_hand
from sharding_zoo import gpt, zoo
from test_sharding import ON_FOUR, STRATEGIES, TOLERANCE, difference, train

from paratrain.api import setup
from paratrain.config import DDP, EMA, FSDP, LossScale, Memory, Optimizer, Parallel, Precision, Single, Trainer, Zero1, check
from paratrain.errors import ConfigError, UserError
from paratrain.spawn import RankError, run

IN_BACKWARD = Trainer(device="cpu", update_in_backward=True)
LAYOUTS = {name: sections for name, sections in STRATEGIES.items() if name != "offload"} | {
    "recomputed": {"strategy": FSDP(), "memory": Memory(recompute="full")},
    "states on the host": {"strategy": Zero1(), "memory": Memory(offload="optimizer")},
    "kept": {"strategy": FSDP(reshard_after_forward=False)},
}
BATCHES = token_batches(4, 10, True)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_steps(ranks):
    """Loss, gradient norm and weights of a hand-written loop without clipping; tied weights get one update a step."""
    layouts = {"single": {"strategy": Single()}} if ranks == 1 else LAYOUTS | (ON_FOUR if ranks == 4 else {})

    def body():
        found = {
            name: train(config(None, trainer=IN_BACKWARD, **sections), gpt(), token_loss, BATCHES) for name, sections in layouts.items()
        }
        for name in ("single", "fsdp"):
            if name in layouts:
                found[name, "muon"] = [
                    train(
                        config(None, trainer=replace(IN_BACKWARD, update_in_backward=early), optimizer=muon, **layouts[name]),
                        gpt(),
                        token_loss,
                        BATCHES,
                    )
                    for early in (True, False)
                ]
        return found

    muon = Optimizer("paratrain.optim.Muon", lr=1e-2)
    found = run(body, ranks)[0]
    expected = train_by_hand(gpt()().double(), BATCHES, clip=None)
    for name, result in found.items():
        if isinstance(name, tuple):
            assert difference(*result) < TOLERANCE, name
        else:
            assert difference(result, expected) < TOLERANCE, name


def test_zero_dim_parameters_are_updated_after_their_reduction():
    """Of those that nobody uses, sharded ones would be updated with zeros, so this model has none in use elsewhere."""
    build, loss_fn, batches = zoo(3, 8)["recurrent"]

    def body():
        return train(config(None, trainer=IN_BACKWARD, strategy=FSDP()), build, loss_fn, batches), _scaled()

    def _scaled():
        return train(config(None, trainer=IN_BACKWARD, strategy=FSDP()), _Gated, loss_fn, batches)

    recurrent, gated = run(body, 2)[0]
    assert difference(recurrent, train_by_hand(build().double(), batches, clip=None, loss_fn=loss_fn)) < TOLERANCE
    assert difference(gated, train_by_hand(_Gated().double(), batches, clip=None, loss_fn=loss_fn)) < TOLERANCE


class _Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.inner = zoo()["recurrent"][0]()
        self.gate = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.gate * self.inner(x)


def test_one_gradient_at_a_time():
    engine = setup(gpt(tied=False), token_loss, config(None, trainer=IN_BACKWARD, strategy=Single()))
    alive = []
    for optimizer in engine.optimizers:
        optimizer.register_step_pre_hook(lambda *_: alive.append(sum(param.grad is not None for param in engine.model.parameters())))
    engine.train_step(BATCHES[0])
    assert max(alive) == 1
    assert alive.count(1) == sum(1 for _ in engine.model.parameters())


def test_average_and_resume(tmp_path):
    def body():
        cfg = config(None, trainer=IN_BACKWARD, strategy=FSDP(), ema=EMA(decay=0.5))
        engine = setup(gpt(), token_loss, cfg)
        for batch in BATCHES[:2]:
            engine.train_step(engine.local(batch))
        engine.save(tmp_path / "state")
        other = setup(gpt(), token_loss, replace(cfg, trainer=Trainer(device="cpu")))
        other.load(tmp_path / "state")
        for going in (engine, other):
            for batch in BATCHES[2:]:
                going.train_step(going.local(batch))
        return engine.ema_state_dict(), other.ema_state_dict()

    early, late = run(body, 2)[0]
    assert max(float((early[name] - value).abs().max()) for name, value in late.items()) < TOLERANCE


def test_refused():
    def accumulating():
        engine = setup(gpt(), token_loss, config(2, trainer=IN_BACKWARD, strategy=FSDP()))
        engine.train_step(engine.local(BATCHES[0]))

    with pytest.raises(RankError, match="a step has 3 micro-batches, and the first would change the weights of the next"):
        run(accumulating, 2)
    with pytest.raises(RankError, match="strategy=ddp reduces gradients in buckets"):
        run(lambda: setup(gpt(), token_loss, config(None, trainer=IN_BACKWARD, strategy=DDP())), 2)
    engine = setup(gpt(), token_loss, config(None, trainer=IN_BACKWARD, strategy=Single()))
    with pytest.raises(UserError, match=r"call engine\.train_step\(\)"):
        engine.backward(token_loss(engine(BATCHES[0][0]), BATCHES[0][1]))
    for sections, message in (
        ({"trainer": replace(IN_BACKWARD, clip_norm=1.0)}, "trainer.clip_norm clips by all"),
        ({"trainer": replace(IN_BACKWARD, nonfinite="skip")}, "trainer.nonfinite skip comes too late"),
        ({"trainer": IN_BACKWARD, "precision": Precision("16-mixed", LossScale())}, "precision.name float16 skips"),
        ({"trainer": IN_BACKWARD, "strategy": FSDP(), "memory": Memory(offload="params")}, "memory.offload params update"),
        ({"trainer": IN_BACKWARD, "parallel": Parallel(pp=2)}, "parallel.pp reduces gradients after"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(config(**sections))

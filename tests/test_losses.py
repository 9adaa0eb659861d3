"""Several losses: each over its own count in the whole step, weighed, against plain torch on one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import Tiny, config, token_batches, token_loss

from paratrain import Trainer
from paratrain.api import setup
from paratrain.config import DDP, FSDP, LossScale, Precision, Single
from paratrain.errors import UserError
from paratrain.spawn import run

BATCHES = token_batches(3, 7, True)  # 7 samples: shares of 4 and 3
WEIGHTS = {"ce": 1.0, "z": 0.3, "norm": 2.0}


def apart(outputs, targets):
    """Over tokens, over samples, and a mean over the last token of each sample; counts that differ."""
    z = outputs.logsumexp(-1).square()
    return {"norm": outputs[:, -1].square().mean(), "ce": token_loss(outputs, targets), "z": (z[:, 0].sum(), len(targets))}


def together(outputs, targets):
    """All over the tokens that count."""
    total, count = token_loss(outputs, targets)
    real = (targets != -100).unsqueeze(-1)
    return {
        "ce": (total, count),
        "z": ((outputs.logsumexp(-1, keepdim=True).square() * real).sum(), count),
        "norm": ((outputs.square() * real).sum(), count),
    }


def cfg(micro=None, weights=WEIGHTS, **sections):
    base = config(micro, **sections)
    return replace(base, trainer=replace(base.trainer, loss_weights=weights, loss_count="samples"))


def model():
    torch.manual_seed(11)
    return Tiny()


def train(configuration, loss):
    engine = setup(model, loss, configuration)
    results = [engine.train_step(engine.local(batch)) for batch in BATCHES]
    evaluated = engine.eval_step(engine.local(BATCHES[0]))
    steps = [(r.loss, r.grad_norm, {name: total / count for name, (total, count) in r.losses.items()}, r.votes) for r in results]
    return steps, evaluated.loss, evaluated.losses, engine.full_state_dict()


def by_hand(loss):
    """The same loss of the whole batch through an engine that is told one sum and one count."""

    def summed(outputs, targets):
        losses = loss(outputs, targets)
        means = {name: value if isinstance(value, torch.Tensor) else value[0] / value[1] for name, value in losses.items()}
        return sum(WEIGHTS[name] * mean for name, mean in means.items()), 1

    return train(cfg(weights=None, strategy=Single()), summed)


@pytest.mark.parametrize("loss", [apart, together])
def test_layouts_equal_the_sum_of_means(loss):
    def body():
        found = {"ddp": train(cfg(strategy=DDP()), loss), "fsdp": train(cfg(strategy=FSDP()), loss)}
        if loss is together:
            found["accumulated"] = train(cfg(1, strategy=DDP()), loss)
        return found

    steps, evaluated, _, weights = by_hand(loss)
    for name, (found, at_the_end, losses, trained) in run(body, 2)[0].items():
        for (total, norm, parts, votes), (expected, expected_norm, *_) in zip(found, steps, strict=True):
            assert total == pytest.approx(expected, abs=1e-10), name
            assert norm == pytest.approx(expected_norm, abs=1e-10), name
            assert total == pytest.approx(sum(WEIGHTS[key] * mean for key, mean in parts.items()), abs=1e-12)
            assert list(parts) == list(WEIGHTS)
            assert votes == []
        assert at_the_end == pytest.approx(evaluated, abs=1e-10), name
        assert losses["ce"][1] == float((BATCHES[0][1] != -100).sum())
        assert max(float((trained[key] - value).abs().max()) for key, value in weights.items()) < 1e-9, name


def test_ranks_without_samples_take_part():
    batch = tuple(part[:1] for part in BATCHES[0])

    def body():
        engine = setup(model, apart, cfg(strategy=DDP()))
        return engine.train_step(engine.local(batch)).loss

    (one, two) = run(body, 2)
    assert one == two == pytest.approx(setup(model, apart, cfg(strategy=Single())).train_step(batch).loss, abs=1e-10)


def test_half_precision_scales_their_sum():
    half = cfg(strategy=Single(), precision=Precision("16-mixed", LossScale(init=256.0)))
    steps, *_ = train(half, apart)
    expected, *_ = by_hand(apart)
    assert [step[0] for step in steps] == pytest.approx([step[0] for step in expected], rel=5e-3)


def test_they_are_logged(tmp_path):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return BATCHES[0][0][i], BATCHES[0][1][i]

    base = cfg(strategy=Single(), output_dir=str(tmp_path))
    trainer = Trainer(
        replace(base, trainer=replace(base.trainer, max_steps=1), data=replace(base.data, global_batch=7)), model, apart, Data(), Data()
    )
    metrics = trainer.fit()
    for prefix in ("train", "eval"):
        assert metrics[f"{prefix}/loss"] == pytest.approx(sum(w * metrics[f"{prefix}/loss/{name}"] for name, w in WEIGHTS.items()))


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"loss_fn returned several losses; .* trainer.loss_weights=\{norm: 1.0, ce: 1.0, z: 1.0\}"):
        train(cfg(weights=None), apart)
    with pytest.raises(UserError, match=r"trainer.loss_weights names ce, and loss_fn returned norm, ce, z"):
        train(cfg(weights={"ce": 1.0}), apart)
    with pytest.raises(UserError, match="ce, z, norm have counts of their own, which a step of several micro-batches knows too late"):
        train(cfg(2), apart)

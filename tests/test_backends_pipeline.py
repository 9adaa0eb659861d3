"""Steps that DeepSpeed's pipeline engine runs: equal to one process in float32, saved, resumed and moved to other engines.

The bound is 5e-6, as in `test_backends.py`; the learning rate is 1e-3, since AdamW makes steps of its size of the rounding of small gradients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import VOCAB, token_batches, token_loss, train_by_hand
from test_backends import BOUND, assert_close, cfg_of, largest, needs, train
from test_pipeline import gpt, logit_loss, skips
from torch import nn

from paratrain import verify
from paratrain.api import setup
from paratrain.config import FSDP, DeepSpeedZero1, DeepSpeedZero2, DeepSpeedZero3, Memory, Optimizer, Parallel, Pipeline, Precision, Zero1
from paratrain.config import check as checked
from paratrain.errors import ConfigError
from paratrain.models.gpt import generate
from paratrain.spawn import RankError, run

pytestmark = needs("deepspeed")


def four_blocks(tied=False):
    return gpt(tied, layers=4)


def small_steps(micro, strategy, decay=0.1, **sections):
    return cfg_of(strategy, micro, optimizer=Optimizer(lr=1e-3, weight_decay=decay), **sections)


def piped(pp=2, micro=2, strategy=None, **sections):
    return small_steps(micro, strategy or DeepSpeedZero1(), parallel=Parallel(pp=pp), **sections)


def by_hand(model, batches, loss_fn=token_loss, decay=0.1):
    return train_by_hand(model(), batches, loss_fn=loss_fn, lr=1e-3, weight_decay=decay)


def test_equals_one_process():
    """Masked batches that do not divide by the ranks, ranks without samples, tied weights, and what crosses beside the residual stream."""
    batches = [*token_batches(6, 9, True), *token_batches(2, 1, False)]

    def tied():
        return four_blocks(tied=True)

    def bags():
        torch.manual_seed(5)
        return Bags()

    models = [
        (bags, token_loss, {}, batches),
        (four_blocks, token_loss, {}, batches),
        (tied, token_loss, {}, batches[:6]),
        (skips, logit_loss, {"place": {"start": 0}}, batches),
    ]
    layouts = [(2, 2), (2, None), (4, 1)]
    expected = [by_hand(model, steps, loss) for model, loss, _, steps in models]

    def body():
        return [
            train(piped(pp, micro, pipeline=Pipeline(**options)), steps, model, loss)
            for model, loss, options, steps in models
            for pp, micro in layouts
        ]

    results = run(body, 4, timeout=300)
    for case, result in enumerate(results[0]):
        assert_close(result, expected[case // len(layouts)])
    for other in results[1:]:
        assert [result[:3] for result in other] == [result[:3] for result in results[0]]


def test_options_that_change_the_way_and_not_the_result():
    batches = token_batches(6, 8, True)
    options = [
        {"strategy": DeepSpeedZero1(offload_optimizer="cpu")},
        {"strategy": DeepSpeedZero1(reduce_bucket_size=100, allgather_bucket_size=100)},
        {"memory": Memory(recompute="full")},
        {"pipeline": Pipeline(cuts=["blocks.3"], micro_batches=3), "micro": None},
    ]
    expected = by_hand(four_blocks, batches)
    for result in run(lambda: [train(piped(**more), batches, four_blocks) for more in options], 2, timeout=300)[0]:
        assert_close(result, expected)


def test_moves_between_engines(tmp_path):
    """Its state goes on under FSDP2, native pipelines, ZeRO-2 and back; under itself, to the same bits."""
    legs = [
        (4, piped()),
        (2, small_steps(None, FSDP())),
        (3, piped(pp=3, micro=None)),
        (2, small_steps(None, DeepSpeedZero2())),
        (2, piped(strategy=Zero1())),
        (2, piped()),
    ]
    batches = token_batches(2 * len(legs), 9, True)

    def leg(number, cfg):
        results = []
        for _ in range(2):
            engine = setup(four_blocks, token_loss, cfg)
            if number:
                engine.load(tmp_path / str(number - 1))
            losses = [engine.train_step(engine.local(batch)).loss for batch in batches[2 * number : 2 * number + 2]]
            results.append((losses, engine.full_state_dict()))
        engine.save(tmp_path / str(number))
        return results

    losses, weights = [], {}
    for number, (ranks, cfg) in enumerate(legs):
        (part, weights), (again, same) = run(leg, ranks, number, cfg)[0]
        assert part == again
        assert all(torch.equal(same[name], value) for name, value in weights.items())
        losses += part
    expected = by_hand(four_blocks, batches)
    assert max(abs(a - b) for a, b in zip(losses, expected[0], strict=True)) < BOUND
    assert largest(weights, expected[2]) < BOUND


def test_evaluates_samples_and_skips():
    """Evaluation and sampling on all stages; a loss that is not finite on one of them changes nothing anywhere."""
    batches = token_batches(3, 8, True)
    now = {"step": 0}

    def loss(outputs, targets):
        total, count = token_loss(outputs, targets)
        return total * (float("inf") if now["step"] == 1 else 1.0), count

    def body():
        cfg = piped()
        engine = setup(four_blocks, loss, replace(cfg, trainer=replace(cfg.trainer, nonfinite="skip")))
        skipped = []
        for step, batch in enumerate(batches):
            now["step"] = step
            skipped.append(engine.train_step(engine.local(batch)).skipped)
        with torch.no_grad():
            tokens = generate(engine.model, batches[0][0][:2, :3], 3, temperature=0)
        return skipped, engine.eval_step(engine.local(batches[0])).loss, tokens, engine.full_state_dict()

    results = run(body, 2)
    skipped, evaluated, tokens, weights = results[0]
    assert skipped == [False, True, False]
    assert results[1][:2] == (skipped, evaluated)
    assert torch.equal(results[1][2], tokens)
    assert largest(weights, by_hand(four_blocks, [batches[0], batches[2]])[2]) < BOUND
    whole = four_blocks()
    whole.load_state_dict(weights)
    with torch.no_grad():
        total, count = token_loss(whole(batches[0][0]), batches[0][1])
        assert abs(evaluated - float(total / count)) < BOUND
        assert torch.equal(tokens, generate(whole, batches[0][0][:2, :3], 3, temperature=0))


class Bags(nn.Module):
    """A stage whose parameters are in one group of the optimizer, and one with two groups."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(VOCAB, 8, mode=mode) for mode in ("sum", "mean", "max", "sum"))
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens):
        return self.head(torch.cat([bag(tokens) for bag in self.bags], -1))[:, None].expand(-1, tokens.shape[1], -1)


class Partly(nn.Module):
    """A first stage without anything to train, a parameter that no step uses, and masks that cross."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB)
        self.embed.requires_grad_(False)
        self.layers[:2].requires_grad_(False)

    def forward(self, tokens):
        x = self.embed(tokens)
        mask = x.sum(-1, keepdim=True) > 0
        weights = mask.to(x.dtype)
        for layer in self.layers:
            x = torch.where(mask, x, x.sin()) + layer(x).tanh() * weights
        return self.head(x)


def test_stages_with_nothing_to_train_and_weights_without_use():
    batches = token_batches(4, 8, True)

    def body():
        return train(piped(decay=0.0, pipeline=Pipeline(cuts=["layers.2"], place={"unused.*": 1})), batches, Partly)

    assert_close(run(body, 2)[0], by_hand(Partly, batches, decay=0.0))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_follows_float32(precision):
    batches = token_batches(10, 8, True)
    losses, *_ = run(lambda: train(replace(piped(), precision=Precision(precision)), batches, four_blocks), 2)[0]
    expected = by_hand(four_blocks, batches)[0]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.05
    assert losses != expected


def test_verify():
    report = verify(four_blocks, token_loss, token_batches(1, 8, True)[0], piped(), ranks=2)
    assert report.ok, report.text()
    assert {line.kind for line in report.lines} >= {"loss", "gradient norm", "weight"}
    assert any("does not show every rank's gradients" in note for note in report.notes)


def test_refusals():
    for strategy in (DeepSpeedZero2(), DeepSpeedZero3()):
        with pytest.raises(ConfigError, match=r"parallel.pp: 2, but DeepSpeed says 'ZeRO-2 and ZeRO-3 are incompatible"):
            checked(piped(strategy=strategy))
    with pytest.raises(ConfigError, match=r"pipeline.schedule: gpipe, but strategy=deepspeed_zero1 runs DeepSpeed's own, which is 1f1b"):
        checked(piped(pipeline=Pipeline("gpipe")))

    class Complex(Partly):
        def forward(self, tokens):
            x = self.embed(tokens)
            turns = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            for layer in self.layers:
                x = layer(x)
            return self.head(torch.view_as_real(turns).flatten(-2) + x)

    with pytest.raises(RankError, match=r"a tensor of torch.complex64 crosses from stage 0 .* write strategy=fsdp parallel.pp=2"):
        run(lambda: train(piped(), token_batches(1, 8, True), Complex), 2)

"""What else a training job does with a pipeline: evaluates, samples, saves, resumes elsewhere, overflows, and is configured wrongly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import LENGTH, VOCAB, config, token_batches, token_loss
from test_pipeline import assert_same, by_hand, gpt, logit_loss, piped, skips, train
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, LossScale, Memory, Parallel, ParamGroup, Precision, check
from paratrain.errors import ConfigError, UserError
from paratrain.models.gpt import generate
from paratrain.spawn import run


def small(tied=False):
    return gpt(tied, layers=4)


def test_evaluation_sampling_and_other_shapes():
    batches = token_batches(4, 7, True)
    short = (batches[0][0][:5, :4], batches[0][1][:5, :4])

    def body():
        engine = setup(small, token_loss, piped(2, "interleaved", 2))
        first = engine.eval_step(engine.local(batches[0]))
        losses = [engine.train_step(engine.local(batch)).loss for batch in (*batches, short, batches[0])]
        tokens = generate(engine.model, batches[0][0][:2, :3], 4, temperature=0)
        again = engine.eval_step(engine.local(short))
        with pytest.raises(UserError, match="train_step"):
            engine.model(batches[0][0])
        return first.loss, first.count, losses, tokens, again.loss, engine.model.training

    model = small().double()
    total, count = token_loss(model(batches[0][0]), batches[0][1])
    losses, _, weights = by_hand(small, [*batches, short, batches[0]])
    model.load_state_dict(weights)
    expected_tokens = generate(model, batches[0][0][:2, :3], 4, temperature=0)
    short_total, short_count = token_loss(model(short[0]), short[1])
    for result in run(body, 2):
        assert result[:2] == (pytest.approx(float(total / count), abs=1e-10), int(count))
        assert result[2] == pytest.approx(losses, abs=1e-10)
        assert torch.equal(result[3], expected_tokens)
        assert result[4] == pytest.approx(float(short_total / short_count), abs=1e-10)
        assert result[5] is True


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_cross_pipelines(tmp_path, tied):
    """Saved by 2 stages x 2 replicas, resumed by one process, by 4 stages, and by interleaved shards."""
    batches = token_batches(6, 6, True)

    def save():
        engine = setup(lambda: gpt(tied), token_loss, piped(2, "1f1b", 2))
        for batch in batches[:3]:
            engine.train_step(engine.local(batch))
        engine.save(tmp_path / "checkpoint")

    def resume(cfg):
        engine = setup(lambda: gpt(tied), token_loss, cfg)
        engine.load(tmp_path / "checkpoint")
        steps = [engine.train_step(engine.local(batch)) for batch in batches[3:]]
        return [s.loss for s in steps], [s.grad_norm for s in steps], [s.count for s in steps], engine.full_state_dict()

    run(save, 4)
    losses, norms, weights = by_hand(lambda: gpt(tied), batches)
    expected = losses[3:], norms[3:], weights
    for ranks, cfg in [(1, config(3)), (4, piped(4, "zbv", 2)), (4, piped(2, "interleaved", 2, FSDP()))]:
        assert_same(run(resume, ranks, cfg), expected)


def test_recomputation_and_dropout():
    """Recomputation changes nothing, dropout included; masks differ between stages, and repeat."""
    batches = token_batches(3, 6, True)

    def build():
        torch.manual_seed(11)
        from paratrain.models.gpt import GPT

        return GPT(VOCAB, 8, layers=4, dim=16, heads=2, ffn=24, dropout=0.3)

    def body():
        plain = train(piped(2, "zbv", 2), batches, build)
        again = train(piped(2, "zbv", 2), batches, build)
        cfg = replace(piped(2, "zbv", 2), memory=Memory(recompute="full"))
        return plain, again, train(cfg, batches, build)

    (plain, again, recomputed), _ = run(body, 2)
    assert plain[:3] == again[:3]
    assert recomputed[0] == pytest.approx(plain[0], abs=1e-12)
    assert recomputed[1] == pytest.approx(plain[1], abs=1e-12)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.masks = nn.Linear(8, 8), []

    def forward(self, x):
        mask = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks.append(mask.clone())
        return x + self.linear(x * mask)


def test_dropout_masks_are_of_one_stage_replica_and_micro_batch():
    """But the two ranks of tp, which hold the same activations, draw the same."""

    def build():
        torch.manual_seed(1)
        return nn.Sequential(*(Masked() for _ in range(4)))

    def body():
        cfg = piped(2, "interleaved", 2, parallel=Parallel(pp=2, dp_replicate=2, tp=2, tp_plan={"3.linear": "rowwise"}))
        engine = setup(build, lambda outputs, targets: (outputs.square().sum(), len(outputs)), cfg)
        for _ in range(2):
            engine.train_step(engine.local((torch.ones(8, 8, dtype=torch.float64), None)))
        return [(number, [tuple(mask.flatten().tolist()) for mask in block.masks]) for number, block in enumerate(engine.model)]

    ranks = run(body, 8, timeout=200)  # (stage, replica, tp)
    seen = set()
    for first, second in zip(ranks[::2], ranks[1::2], strict=True):
        assert first == second
        masks = [mask for _, drawn in first for mask in drawn]
        assert len(masks) == 2 * 2 * 2, "blocks, steps, micro-batches"
        seen.update(masks)
    assert len(seen) == 4 * 8


def test_an_overflow_on_one_stage_skips_all():
    class Spike(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x, factor):
            x = self.layers[0](x)
            return self.layers[1](x) * factor

    def build():
        torch.manual_seed(1)
        return Spike()

    def body():
        scale = Precision("16-mixed", LossScale(init=1024.0, growth_interval=2))
        cfg = replace(piped(2, "1f1b", 1), precision=scale, memory=Memory(blocks=["layers.*"]))
        engine = setup(build, lambda o, t: (o.float().square().sum(), len(o)), cfg)
        history = []
        for step in range(4):
            factor = torch.ones(2, 1) * (3e18 if step == 1 else 1.0)  # the loss is finite, its gradient is not
            before = [param.detach().clone() for param in engine.model.parameters()]
            result = engine.train_step(engine.local((({"x": torch.ones(2, 4), "factor": factor}), None)))
            moved = any(not torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
            history.append((result.skipped, result.loss_scale, moved))
        return history

    for history in run(body, 2):
        assert [h[0] for h in history] == [False, True, False, False]
        assert [h[1] for h in history] == [1024.0, 1024.0, 512.0, 512.0]
        assert [h[2] for h in history] == [True, False, True, True]


def test_schedules_from_files_and_cuts(tmp_path):
    batches = token_batches(3, 4, True)
    good, late = tmp_path / "good.csv", tmp_path / "late.csv"
    good.write_text("0F0,0F1,,0B0,0B1\n,1F0,1F1,1I0,1W0,1B1\n")
    late.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0\n")

    def body():
        cut = piped(2, str(good), None, cuts=["blocks.3"], micro_batches=2)
        engine = setup(small, token_loss, cut)
        held = [name for name, _ in engine.model.named_parameters()]
        return train(cut, batches, small), held

    (first, mine), (second, theirs) = run(body, 2)
    assert_same([first, second], by_hand(small, batches))
    assert [name.split(".")[:2] for name in (mine[-1], theirs[0])] == [["blocks", "2"], ["blocks", "3"]]
    assert (mine[0], theirs[-1]) == ("embed.weight", "head.weight")
    with pytest.raises(RuntimeError, match="waits for what nobody"):
        run(lambda: setup(small, token_loss, piped(2, str(late))), 2)


def test_frozen_stages_and_parameter_groups():
    """A stage without gradients to send back, a rank with nothing to train, and groups that match nothing on some stage."""

    def build():
        model = small()
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith(("blocks.2", "blocks.3", "head")))
        return model

    batches = token_batches(4, 4, True)

    def hand(model):
        decay = [p for p in model.parameters() if p.ndim >= 2 and p.requires_grad]
        rest = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)
        for inputs, targets in batches:
            total, count = token_loss(model(inputs), targets)
            (total / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    def body():
        return [train(piped(2, schedule, 2), batches, build)[3] for schedule in ("zbv", "1f1b")]

    expected = hand(build().double())
    for weights in run(body, 2)[0]:
        assert max(float((weights[name] - value).abs().max()) for name, value in expected.items()) < 1e-10


def refused(message, cfg, build=small, batch=None, loss_fn=token_loss, ranks=2):
    def body():
        engine = setup(build, loss_fn, cfg)
        engine.train_step(engine.local(batch or token_batches(1, 4, False)[0]))

    with pytest.raises(RuntimeError, match=message):
        run(body, ranks)


class Elsewhere(nn.Module):
    """Weights that are not used where they are defined: tied through a function, read twice, a query that crosses, a norm before its blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.norm = nn.LayerNorm(8)
        self.embed = nn.Embedding(VOCAB, 8)
        self.scale = nn.Parameter(torch.rand(8))
        self.query = nn.Embedding(LENGTH, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(4))
        self.start = nn.Parameter(torch.rand(8))

    def forward(self, tokens):
        query = self.query.weight[: tokens.shape[1]].expand(len(tokens), -1, -1)
        x = self.embed(tokens) + self.start * self.scale.to(self.norm.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return torch.nn.functional.linear(self.norm(x + query) * self.scale, self.embed.weight)


def test_weights_are_held_where_they_are_used():
    batches = token_batches(4, 8, True)
    layouts = [piped(2, micro=2), piped(4, micro=2), piped(2, "zbv", micro=2), piped(2, micro=2, parallel=Parallel(pp=2, tp=2))]
    layouts.append(piped(2, micro=2, strategy=FSDP()))
    expected = by_hand(Elsewhere, batches)
    for results in zip(*run(lambda: [train(cfg, batches, Elsewhere) for cfg in layouts], 4, timeout=300), strict=True):
        assert_same(results, expected)


def test_refusals_name_the_fix():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
            self.head = nn.Linear(8, VOCAB)

        def forward(self, tokens):
            x = self.embed(tokens)
            for block in reversed(self.blocks):
                x = block(x)
            return self.head(x)

    class Peeks(Backwards):
        def forward(self, tokens):
            x = self.embed(tokens)
            if x.sum() > 0:
                x = -x
            return self.head(self.blocks[1](self.blocks[0](x)))

    class Normalised(Backwards):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

    refused("order in which they are defined", piped(2), Backwards)
    refused("parallel.pp=2: the model has BatchNorm .* write parallel.pp=1", piped(2), Normalised)
    refused("without its values", piped(2), Peeks)
    refused("needs 8 stages", piped(2, "interleaved", stages_per_rank=4))
    refused("'start' matches no parameter", piped(2, place={"start": 0}))
    refused("pipeline.cuts", piped(2, cuts=["nowhere"]))
    refused(r"uses 'start', which it does not hold", piped(2, place={"start": 1}), skips, loss_fn=logit_loss)
    refused("no such schedule", piped(2, "1b1f"))


def test_combinations_that_are_refused():
    for cfg, key in [
        (piped(2, "zbv", strategy=FSDP()), "strategy.reshard_after_forward"),
        (replace(piped(2, "dualpipev"), compile=True), "compile"),
        (piped(2, strategy=DDP(comm_hook="fp16")), "strategy.comm_hook"),
        (piped(1, "zbv", parallel=Parallel()), "pipeline.schedule"),
        (replace(piped(2, micro=2, micro_batches=4)), "pipeline.micro_batches"),
    ]:
        with pytest.raises(ConfigError, match=key):
            check(cfg)


def test_models_cut_anywhere_keep_their_optimizer_groups():
    batches = token_batches(3, 4, False)

    def body():
        cfg = piped(2, "1f1b", 2)
        cfg = replace(cfg, optimizer=replace(cfg.optimizer, groups=[ParamGroup("head*", {"lr": 1e-3})]))
        return train(cfg, batches, small)

    def one():
        cfg = config(2)
        cfg = replace(cfg, optimizer=replace(cfg.optimizer, groups=[ParamGroup("head*", {"lr": 1e-3})]))
        return train(cfg, batches, small)

    (losses, norms, _, weights), _ = run(body, 2)
    ref = one()
    assert losses == pytest.approx(ref[0], abs=1e-10)
    assert norms == pytest.approx(ref[1], abs=1e-10)
    assert max(float((weights[name] - value).abs().max()) for name, value in ref[3].items()) < 1e-10

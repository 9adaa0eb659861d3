"""Losses as people write them: the mean over the whole batch under every layout, or refused by name."""

from __future__ import annotations

from dataclasses import replace

import practice
import pytest
import torch
import torch.distributed as dist
from practice import assert_exact, assert_refused, assert_same
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

import paratrain as pt
from paratrain.spawn import run

F64 = torch.float64


def rows(sizes=(8, 8, 8), width=6, out=1):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, width, generator=generator, dtype=F64) + torch.arange(n)[:, None] * 0.3,
            torch.randn(n, out, generator=generator, dtype=F64),
        )
        for n in sizes
    ]


def tokens(sizes=(8, 8), time=8, padded=False):
    generator, batches = torch.Generator().manual_seed(1), []
    for n in sizes:
        inputs, targets = (torch.randint(16, (n, time), generator=generator) for _ in range(2))
        lengths = torch.randint(3, time + 1, (n, 1), generator=generator)
        batches.append((inputs, targets.masked_fill(torch.arange(time) >= lengths, -100) if padded else targets))
    return batches


def net(out=1):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, out))


class Block(nn.Module):
    def __init__(self, d=8, heads=2):
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = heads, nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.out = nn.Embedding(16, 8), nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 16)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


# ---------------------------------------------------------------- sequences over ranks


def by_token(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


def count_samples(outputs, targets):
    return by_token(outputs, targets)[0], len(targets)


def each_sequence(outputs, targets):
    nll = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
    return (nll.sum(1) / (targets != -100).sum(1)).sum(), len(targets)


def preference(outputs, targets):
    """A function of a sum over the sequence, as in direct preference optimisation."""
    return -F.logsigmoid(-0.1 * F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)).sum(), len(targets)


def shifted(outputs, targets):
    return by_token(outputs[:, :-1], targets[:, 1:])


def last_token(outputs, targets):
    return F.cross_entropy(outputs[:, -1], targets[:, -1], reduction="sum"), len(targets)


def plain_mean(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


OF_SEQUENCES = [count_samples, each_sequence, preference, shifted, last_token]


@pytest.mark.parametrize("loss", OF_SEQUENCES, ids=lambda loss: loss.__name__)
def test_the_loss_of_whole_sequences_under_cp(loss):
    assert_exact(Gpt, tokens(padded=loss in (each_sequence, shifted)), loss, "cp")


def test_whole_sequences_in_the_order_of_the_ring_and_with_fillers():
    ring = ("context.method=ring", "parallel.cp=2", "strategy=ddp")
    assert_exact(Gpt, tokens((2, 1)), shifted, "ddp", ranks=4, more=ring[:2])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*OF_SEQUENCES, by_token, plain_mean], ids=lambda loss: loss.__name__)
def test_sequences_under_cp_with_other_axes(loss):
    data = tokens((8, 5), padded=loss is not last_token and loss is not count_samples)
    assert_exact(Gpt, data, loss, "fsdp", "ddpm", ranks=4, more=("parallel.cp=2",))
    assert_exact(Gpt, data, loss, "pp", ranks=4, more=("parallel.cp=2",))


def test_sums_over_positions_are_not_gathered():
    def body(loss):
        engine = pt.setup(Gpt, loss, pt.load_config([*practice.BASE, "parallel.cp=2"]))
        for batch in tokens(padded=True):
            engine.train_step(engine.local(batch))
        return engine._layout.context.loss.gathers

    assert run(body, 2, by_token) == [False, False]
    assert run(body, 2, plain_mean) == [False, False]
    assert run(body, 2, count_samples) == [True, True]


class TrainsTogether(Gpt):
    """Positions meet outside of attention, but only while it trains."""

    def forward(self, x):
        h = super().forward(x)
        return h + h.mean(1, keepdim=True) if self.training else h


def test_positions_that_meet_in_training_only():
    assert_refused(TrainsTogether, tokens(), by_token, "cp", says="positions of the sequence meet elsewhere")


# ---------------------------------------------------------------- means that are no mean over what is counted


CLASSES = [(x, torch.tensor([0, 0, 0, 1, 2, 3, 0, 3])) for x, _ in rows((8, 8))]
WEIGHT = torch.tensor([0.1, 1.0, 2.0, 3.0], dtype=F64)


def dice(outputs, targets):
    p, t = outputs.softmax(-1), F.one_hot(targets, 4)
    return 1 - 2 * (p * t).sum() / (p.square().sum() + t.sum())


def in_batch(outputs, targets):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def focal_of_mean(outputs, targets):
    ce = F.cross_entropy(outputs, targets)
    return (1 - torch.exp(-ce)) ** 2 * ce


NO_MEANS = {
    "reduction=sum": lambda out, t: F.cross_entropy(out, t, reduction="sum"),
    "weight": lambda out, t: F.cross_entropy(out, t, weight=WEIGHT),
    "ignore_index": lambda out, t: F.cross_entropy(out, t, ignore_index=0),
    "dice": dice,
    "contrastive": in_batch,
    "focal of a mean": focal_of_mean,
    "not detached from the batch": lambda out, t: (F.cross_entropy(out, t, reduction="sum") / len(t) ** 0.5, len(t)),
}


@pytest.mark.parametrize("name", ["reduction=sum", "ignore_index", "contrastive"])
def test_no_means_are_refused(name):
    assert_refused(lambda: net(4), CLASSES, NO_MEANS[name], "ddp", says="loss_fn is no sum over what it counts")


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_MEANS)
def test_no_means_are_refused_under_every_layout(name):
    assert_refused(
        lambda: net(4), CLASSES, NO_MEANS[name], "ddp", "ddpm", "z1m", "fsdp", "hsdp", says="loss_fn is no sum over what it counts"
    )


def test_micro_batches_of_one_sample_are_looked_at_together():
    assert_refused(lambda: net(4), CLASSES, NO_MEANS["weight"], "fsdp", says="loss_fn is no sum over", more=("data.micro_batch_size=1",))


def test_it_can_be_accepted():
    engine = run(lambda: practice.ours(lambda: net(4), CLASSES, in_batch, ("strategy=ddp", "trainer.loss_check=false")), 2)
    assert len(engine[0].losses) == 2


def test_a_mean_counted_once_is_right_while_parts_are_equal():
    data = rows((8, 8))

    def once(outputs, targets):
        return F.mse_loss(outputs, targets), 1

    assert_exact(net, data, once, "ddp", "ddpm")
    report = pt.verify(net, once, data, practice.configured(("strategy=ddp", "verify.steps=2", "data.micro_batch_size=2")), ranks=2)
    assert report.ok, report.text()  # the counts differ, which changes nothing
    assert "the loss counts 1" in report.text()
    assert_refused(net, rows((8, 7)), once, "ddp", says="loss_fn is no sum over what it counts")


def test_integer_and_float_targets_are_counted_in_samples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return self.a(h), self.b(h)

    def loss(outputs, targets):
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

    assert_exact(Two, [(x, (torch.arange(len(x)) % 3, y)) for x, y in rows((8, 5))], loss, "ddp")


class Stateful:
    """A loss that keeps what it saw, draws numbers, and goes on."""

    def __init__(self):
        self.calls, self.log = 0, []

    def __call__(self, outputs, targets):
        self.calls += 1
        self.log.append(len(targets))
        return (outputs - targets).square().sum(), targets.numel()


def test_looking_changes_nothing_that_the_loss_keeps():
    def body():
        loss, seen = Stateful(), []

        def closure(outputs, targets):
            seen.append(len(targets))
            return loss(outputs, targets)

        engine = pt.setup(net, closure, pt.load_config([*practice.BASE, "strategy=ddp"]))
        for batch in rows():
            engine.train_step(engine.local(batch))
        return loss.calls, loss.log, seen

    assert run(body, 2) == [(3, [4, 4, 4], [4, 4, 4])] * 2


def test_a_loss_that_draws_numbers_is_not_refused():
    def noisy(outputs, targets):
        return (outputs + 0.1 * torch.randn_like(outputs) - targets).square().sum(), targets.numel()

    results = run(lambda: practice.ours(net, rows(), noisy, ("strategy=ddp",)), 2)
    assert results[0].losses == results[1].losses


# ---------------------------------------------------------------- Hugging Face


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def documents(sizes=(6, 5)):
    generator, batches = torch.Generator().manual_seed(1), []
    for n in sizes:
        ids, length = torch.randint(1, 64, (n, 12), generator=generator), torch.randint(3, 13, (n, 1), generator=generator)
        mask = (torch.arange(12) < length).long()
        batches.append((ids, mask, ids.masked_fill(mask == 0, -100)))
    return batches


def test_the_loss_that_a_hugging_face_model_computes():
    data = [(dict(input_ids=ids, attention_mask=mask, labels=labels), None) for ids, mask, labels in documents()]
    assert_refused(llama, data, lambda out, t: out.loss, "ddp", says="with loss=huggingface (paratrain.huggingface_loss)")


def test_hugging_faces_loss_by_name():
    data = [(dict(input_ids=ids, attention_mask=mask), labels) for ids, mask, labels in documents()]
    expected = practice.plain(llama, data, pt.huggingface_loss)
    results = run(lambda: practice.ours(llama, data, pt.huggingface_loss, practice.LAYOUTS["ddpm"]), 2)
    assert_same(results[0], expected, tolerance=1e-6)  # the model rounds to float32 inside
    ids, mask, labels = documents()[0]
    torch.manual_seed(0)
    model = llama()
    total, count = pt.huggingface_loss(model(input_ids=ids, attention_mask=mask), labels)
    assert float(total / count) == pytest.approx(float(model(input_ids=ids, attention_mask=mask, labels=labels).loss), rel=1e-5)
    built = pt.load_config(["loss=huggingface"]).loss
    assert built["shift"] is True
    logits, classes = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])
    total, count = pt.huggingface_loss({"logits": logits}, classes, shift=False)
    assert count == 4
    assert float(total / count) == pytest.approx(float(F.cross_entropy(logits, classes)))


# ---------------------------------------------------------------- ranks that meet in the loss, and ranks with nothing


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(1, 8)

    def forward(self, a, b):
        return F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)


def together(x):
    """Rows of all ranks, with gradient; ranks may have other numbers of them."""
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)]))
    counts = [int(n) for n in sizes]
    parts = all_gather(F.pad(x, (0, 0, 0, max(counts) - len(x))))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), sum(counts[: dist.get_rank()])


def contrast(outputs, targets):
    a, b = outputs
    everyone, first = together(b)
    return F.cross_entropy(5 * a @ everyone.T, first + torch.arange(len(a)), reduction="sum"), len(a)


def alone(model, inputs, targets):
    a, b = model(*inputs)
    return F.cross_entropy(5 * a @ b.T, torch.arange(len(a)))


def pairs(*sizes):
    return [((x, y), torch.arange(len(x))) for x, y in rows(sizes)]


@pytest.mark.parametrize("sizes", [(8, 1), (1, 8)])
def test_a_rank_without_samples_comes_to_the_collectives_of_the_loss(sizes):
    assert_exact(Towers, pairs(*sizes), contrast, "ddp", mean=alone)


@pytest.mark.slow
def test_contrast_under_other_layouts():
    assert_exact(Towers, pairs(8, 1, 5), contrast, "fsdp", "z1", mean=alone)
    assert_exact(Towers, pairs(8, 2, 1), contrast, "ddp", mean=alone, ranks=3)


def test_contrast_over_micro_batches_is_refused():
    says = "loss_fn communicates between ranks once a micro-batch"
    assert_refused(Towers, pairs(8, 5), contrast, "ddp", says=says, more=("data.micro_batch_size=1",))


def test_a_loss_that_is_a_constant_where_nothing_is_assigned():
    hit = torch.arange(8) < 4

    def loss(outputs, targets):
        if not targets.any():
            return torch.zeros((), dtype=outputs.dtype), 0
        return (outputs[targets] - 1).abs().sum(), targets.sum()

    data = [(x, hit) for x, _ in rows()]
    assert_exact(net, data, loss, "ddp", "fsdpm")
    assert_refused(net, rows(), lambda out, t: (t.square().sum(), len(t)), "ddp", says="does not depend on any trainable parameter")


def weighed(outputs, targets):
    weight = torch.sigmoid(outputs[:, 1:])
    return (weight * (outputs[:, :1] - targets).square()).sum(), weight.sum()


def test_a_count_with_a_gradient():
    assert_exact(lambda: net(2), rows((8, 5)), weighed, "single", "ddp")
    assert_refused(lambda: net(2), rows(), weighed, "z1m", says="loss_fn returned a count with a gradient")


@pytest.mark.slow
def test_a_count_with_a_gradient_under_other_layouts():
    assert_exact(lambda: net(2), rows((8, 1)), weighed, "fsdp", "z1", ranks=2)
    assert_exact(lambda: net(2), rows((8, 2)), weighed, "ddp", ranks=3)


def test_reports_are_those_of_all_samples():
    """Looking does not count: losses and counts of the first step are those without it."""

    def body(check):
        cfg = pt.load_config([*practice.BASE, "strategy=ddp", "data.micro_batch_size=2"])
        engine = pt.setup(
            net, lambda out, t: ((out - t).square().sum(), len(t)), replace(cfg, trainer=replace(cfg.trainer, loss_check=check))
        )
        steps = [engine.train_step(engine.local(batch)) for batch in rows()]
        return [(float(step.loss), float(step.count), float(step.grad_norm)) for step in steps]

    assert run(body, 2, True) == run(body, 2, False)

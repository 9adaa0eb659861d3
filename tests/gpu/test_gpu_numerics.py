"""Precisions, fused optimizers, compilation and layouts on a device, each against plain torch in float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from reference import config, token_batches, token_loss
from sharding_zoo import gpt, seeded, zoo
from test_sharding import by_hand, difference, train
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain.api import setup
from paratrain.config import DDP, FSDP, LossScale, Memory, Optimizer, Precision, Zero1, Zero2
from paratrain.spawn import run

EXACT = 1e-8  # float64 on another device: Adam divides rounding of 1e-16 by roots as small as 1e-8


def losses(result):
    return result[0]


def backend():
    return dist.get_backend()


def furthest(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("64-true", 0.0, EXACT), ("32-true", 1e-12, 2e-4), ("bf16-mixed", 1e-7, 2e-2), ("16-mixed", 1e-8, 5e-3), ("bf16-true", 1e-6, 5e-2)],
)
def test_precisions_are_as_far_from_float64_as_their_rounding(device, on, name, least, most):
    """Also no nearer: a precision that was not applied would be."""
    batches = token_batches(4, 8, True)
    scale = LossScale() if name == "16-mixed" else None
    expected = by_hand(gpt(), token_loss, batches)
    for micro in (None, 3):
        result = train(on(config(micro, precision=Precision(name, scale))), gpt(), token_loss, batches)
        assert least <= furthest(losses(result), losses(expected)) <= most
        if name == "64-true":
            assert difference(result, expected) <= EXACT


@pytest.mark.parametrize("model", ["scalars", "routed", "conv", "recurrent"])
def test_any_module(device, on, model):
    build, loss_fn, batches = zoo()[model]
    assert difference(train(on(config()), build, loss_fn, batches), by_hand(build, loss_fn, batches)) <= EXACT


def test_overflow_in_float16_skips_and_lowers_the_scale(device, on):
    scale = LossScale(init=1024.0, growth_interval=2)
    engine = setup(
        seeded(lambda: nn.Linear(4, 4, bias=False)),
        lambda outputs, targets: (outputs.float()[:, 0].square().sum(), len(targets)),
        on(config(precision=Precision("16-mixed", scale))),
    )
    history = []
    for step in range(5):
        x = torch.full((4, 4), 6e4 if step == 1 else 1.0)
        before = engine.full_state_dict()["weight"]
        result = engine.train_step(engine.local((x, torch.zeros(4, 1))))
        history.append((result.skipped, result.loss_scale, torch.equal(before, engine.full_state_dict()["weight"])))
    assert history == [(False, 1024.0, False), (True, 1024.0, True), (False, 512.0, False), (False, 512.0, False), (False, 1024.0, False)]
    assert (engine.updates, engine.scaler.skipped) == (4, 1)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_optimizers_equal_their_plain_loops(device, on, name):
    """With the kernel that is chosen for this device, fused where torch has one."""
    batches = token_batches(4, 8, False)
    arguments = {"weight_decay": 0.0, "args": {"momentum": 0.9} if name == "SGD" else {}}
    cfg = on(config(optimizer=Optimizer(f"torch.optim.{name}", lr=1e-2, no_decay="none", **arguments)))
    engine = setup(gpt(), token_loss, cfg)
    assert engine.optimizers[0].defaults.get("fused"), "torch has a fused kernel for all four"
    ours = [engine.train_step(engine.local(batch)).loss for batch in batches]

    model = gpt()().double()
    plain = getattr(torch.optim, name)(model.parameters(), lr=1e-2, weight_decay=0.0, foreach=False, **arguments["args"])
    theirs = []
    for inputs, targets in batches:
        total, count = token_loss(model(inputs), targets)
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        theirs.append(float(total.detach() / count))
    assert furthest(ours, theirs) <= EXACT
    state = engine.full_state_dict()
    assert max(float((state[n] - value).abs().max()) for n, value in model.state_dict().items()) <= EXACT


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_compute_the_same(device, on, recompute):
    """By inductor on a GPU; on the CPU by a backend that needs no compiler. Dropout would show a replay with other masks."""
    batches = token_batches(3, 8, True)
    memory = Memory(recompute=recompute)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(on(config(2, compile=True if device == "cuda" else "aot_eager", memory=memory)), gpt(), token_loss, batches)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert difference(compiled, by_hand(gpt(), token_loss, batches)) <= EXACT
    with_dropout = [train(on(config(2, memory=kind)), gpt(dropout=0.3), token_loss, batches) for kind in (Memory(), memory)]
    assert difference(*with_dropout) <= EXACT


def test_one_rank_offloads_to_pinned_host_memory(device, on):
    """`fully_shard` on one rank, its shards on the host."""
    batches = token_batches(4, 8, True)

    def body():
        engine = setup(gpt(), token_loss, on(config(2, strategy=FSDP(), memory=Memory(offload="params"))))
        places = {param.to_local().device.type for param in engine.model.parameters() if isinstance(param, DTensor)}
        steps = [engine.train_step(engine.local(batch)) for batch in batches]
        return places, ([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict())

    [(places, result)] = run(body, 1, init=False)
    assert places == {"cpu"}
    assert difference(result, by_hand(gpt(), token_loss, batches)) <= EXACT


@pytest.mark.parametrize("strategy", [DDP(), FSDP(), Zero1(), Zero2()], ids=lambda strategy: strategy.name)
def test_two_ranks_equal_one(device, on, strategy):
    """On one GPU they share it, and talk over gloo."""
    batches = token_batches(4, 10, True)

    def body():
        exact = train(on(config(2, strategy=strategy)), gpt(), token_loss, batches)
        mixed = train(on(config(2, strategy=strategy, precision=Precision("bf16-mixed"))), gpt(), token_loss, batches)
        return exact, mixed, backend()

    results = run(body, 2, init=False)
    expected = by_hand(gpt(), token_loss, batches)
    for exact, mixed, spoken in results:
        assert "gloo" in spoken
        assert furthest(losses(exact), losses(expected)) <= EXACT
        assert 1e-7 <= furthest(losses(mixed), losses(expected)) <= 2e-2
    assert difference(results[0][0], expected) <= EXACT


@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda strategy: strategy.name)
def test_batch_norm_is_over_both_ranks(device, on, strategy):
    build, loss_fn, batches = zoo()["conv"]

    def body():
        return train(on(config(strategy=strategy)), build, loss_fn, batches)

    assert difference(run(body, 2, init=False)[0], by_hand(build, loss_fn, batches)) <= EXACT


def test_one_shard_overflows_and_both_ranks_skip(device, on):
    def body():
        cfg = on(config(strategy=FSDP(), precision=Precision("16-mixed", LossScale(init=1024.0))))
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4, bias=False)))
        engine = setup(model, lambda outputs, targets: (outputs.float()[:, 0].square().sum(), len(targets)), cfg)
        history = []
        for step in range(3):
            x = torch.ones(4, 4)
            if step == 1:
                x[-1] = 6e4  # a sample of the last rank, of which only the shard on rank 0 gets a gradient
            result = engine.train_step(engine.local((x, torch.zeros(4, 1))))
            history.append((result.skipped, result.loss_scale))
        return history

    for history in run(body, 2, init=False):
        assert history == [(False, 1024.0), (True, 1024.0), (False, 512.0)]


def test_dropout_on_the_device_resumes_bit_by_bit(device, on, tmp_path):
    """Its random numbers are a function of (seed, step); deterministic kernels leave no other difference."""
    batches = token_batches(6, 8, True)
    cfg = on(config(2))
    cfg = replace(cfg, trainer=replace(cfg.trainer, deterministic=True))

    def body():
        whole = setup(gpt(dropout=0.3), token_loss, cfg)
        uninterrupted = [whole.train_step(whole.local(batch)).loss for batch in batches]
        first = setup(gpt(dropout=0.3), token_loss, cfg)
        ours = [first.train_step(first.local(batch)).loss for batch in batches[:3]]
        first.save(tmp_path / "checkpoint")
        second = setup(gpt(dropout=0.3), token_loss, cfg)
        second.load(tmp_path / "checkpoint")
        return uninterrupted, ours + [second.train_step(second.local(batch)).loss for batch in batches[3:]]

    [(uninterrupted, resumed)] = run(body, 1, init=False)
    assert resumed == uninterrupted

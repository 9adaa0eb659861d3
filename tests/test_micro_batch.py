"""`data.micro_batch_size=auto`: the largest that fits on all ranks, whatever runs out of memory where, and the same steps as ever."""

from __future__ import annotations

import pytest
import torch
from reference import config, token_batches, token_loss, train_by_hand
from sharding_zoo import gpt, zoo
from test_sharding import ON_FOUR, STRATEGIES, TOLERANCE, by_hand, difference
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, DeepSpeedZero1, LossScale, Parallel, Precision, Single, check
from paratrain.distributed import rank
from paratrain.errors import ConfigError, UserError
from paratrain.faults.memory import OutOfMemory
from paratrain.micro_batch import AutoMicroBatch
from paratrain.spawn import RankError, run

LAYOUTS = STRATEGIES | {"ddp": {"strategy": DDP()}}


class Full(torch.autograd.Function):
    """Runs out of memory in forward or in backward, when there are more numbers than `room`."""

    @staticmethod
    def forward(ctx, x, room, where):
        ctx.full = where == "backward" and x.numel() > room
        if where == "forward" and x.numel() > room:
            raise torch.OutOfMemoryError("no memory in forward")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.full:
            raise torch.OutOfMemoryError("no memory in backward")
        return grad, None, None


def limit(engine, room, where):
    """Let the second of the blocks of this rank have room for so many tokens."""
    block = engine.model.blocks[1]
    block.register_forward_pre_hook(lambda _, args: (Full.apply(args[0], room * args[0].shape[-1], where), *args[1:]))


def train(sections, rooms, where, batches, dropout=0.0):
    """Sizes of every step, and what `test_sharding.train` gives; `rooms` has the samples of six tokens that fit on each rank."""
    engine = setup(gpt(dropout=dropout), token_loss, config("auto", **sections))
    limit(engine, rooms[rank() % len(rooms)] * 6, where)
    sizes, steps = [], []
    for batch in batches:
        steps.append(engine.train_step(engine.local(batch)))
        sizes.append(engine.micro_batch_size)
    return sizes, ([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_largest_that_fits_on_all_ranks(ranks):
    """One rank has less memory than the others; a share of 10 (of 5 on 4 ranks) in runs of at most 3 samples is 4 (2) micro-batches."""
    layouts = LAYOUTS | (ON_FOUR if ranks == 4 else {})
    batches = token_batches(4, 20, True)

    def body():
        return {
            (name, where): train(sections, [20] * (ranks - 1) + [3], where, batches)
            for name, sections in layouts.items()
            for where in ("forward", "backward")
        }

    results = run(body, ranks)
    expected = by_hand(gpt(), token_loss, batches)
    for case, (sizes, result) in results[0].items():
        assert sizes == [3] * 4, case
        assert difference(result, expected) < TOLERANCE, case
    assert all(other[case][0] == sizes for other in results for case, (sizes, _) in results[0].items())


def test_nothing_is_left_of_a_rehearsal():
    """Weights, dropout, running statistics and the gradient of what is unused are those of a run that was told the size."""
    batches = token_batches(3, 8, True)

    def body():
        found = {}
        for name in ("ddp", "fsdp", "zero1"):
            found[name, "auto"] = train(LAYOUTS[name], [2], "backward", batches, dropout=0.3)[1]
            engine = setup(gpt(dropout=0.3), token_loss, config(2, **LAYOUTS[name]))
            steps = [engine.train_step(engine.local(batch)) for batch in batches]
            found[name, "told"] = [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()
            for model in ("scalars", "routed", "recurrent"):
                build, loss_fn, data = zoo(3, 8)[model]
                engine = setup(build, loss_fn, config("auto", **LAYOUTS[name]))
                steps = [engine.train_step(engine.local(batch)) for batch in data]
                found[name, model] = [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()
                assert engine.micro_batch_size == 4
        return found

    found = run(body, 2)[0]
    for name, kind in found:
        if kind == "auto":
            assert difference(found[name, kind], found[name, "told"]) < TOLERANCE, name
        elif kind != "told":
            assert difference(found[name, kind], by_hand(*zoo(3, 8)[kind])) < TOLERANCE, (name, kind)


def test_longer_samples_are_rehearsed_again():
    """Room for 24 tokens: 4 samples of 6, and after that 2 of 9, which nobody had seen when the first size was found."""
    short, long = token_batches(3, 8, True), []
    for inputs, targets in token_batches(3, 12, True, seed=9):
        long.append((inputs.flatten().reshape(8, 9), targets.flatten().reshape(8, 9)))
    batches = short + long

    def body():
        cfg = config("auto", strategy=STRATEGIES["fsdp"]["strategy"])
        engine = setup(_longer, token_loss, cfg)
        limit(engine, 24, "forward")
        sizes, steps = [], []
        for batch in batches:
            steps.append(engine.train_step(engine.local(batch)))
            sizes.append(engine.micro_batch_size)
        evaluated = engine.eval_step(engine.local(batches[0])).loss
        return sizes, ([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()), evaluated

    sizes, result, evaluated = run(body, 2)[0]
    assert sizes == [4, 4, 4, 2, 2, 2]
    model = _longer().double()
    assert difference(result, train_by_hand(model, batches)) < TOLERANCE
    total, count = token_loss(model(batches[0][0]).detach(), batches[0][1])
    assert evaluated == pytest.approx(float(total / count), abs=TOLERANCE)


def _longer() -> nn.Module:
    from paratrain.models.gpt import GPT

    torch.manual_seed(11)
    return GPT(17, 9, layers=3, dim=16, heads=2, tied=True)


def test_float16_and_one_process():
    precision = Precision("16-mixed", LossScale(init=1024.0))
    batches = token_batches(3, 8, True)
    cfg = config("auto", strategy=Single(), precision=precision)
    engine = setup(gpt(), token_loss, cfg)
    limit(engine, 18, "forward")
    told = setup(gpt(), token_loss, config(3, strategy=Single(), precision=precision))
    for batch in batches:
        assert engine.train_step(batch).loss == told.train_step(batch).loss
        assert engine.micro_batch_size == 3
    assert engine.scaler.skipped == 0


def test_search():
    """Every size from 1 to 12 of a share of 12 is found in few rehearsals, and as large as its number of micro-batches allows."""
    share = setup(gpt(), token_loss, config(strategy=Single())).local(token_batches(1, 12, False)[0])
    for room in range(1, 13):
        tried = []

        def rehearse(_, size, room=room, tried=tried):
            tried.append(size)
            return size <= room

        auto = AutoMicroBatch(rehearse, lambda value: value, lambda: UserError("none"))
        found = auto.fit(share)
        assert found == max(-(-12 // parts) for parts in range(1, 13) if -(-12 // parts) <= room)
        assert len(tried) <= 7
        tried.clear()
        assert auto.fit(share) == found
        assert tried == [found], "the second step has the states of the optimizer too, and is rehearsed once more"
        assert auto.fit(share) == found
        assert len(tried) == 1


def test_what_does_not_fit_or_is_refused():
    def body():
        engine = setup(gpt(), token_loss, config("auto", **STRATEGIES["fsdp"]))
        limit(engine, 5 if rank() else 100, "forward")
        engine.train_step(engine.local(token_batches(1, 8, False)[0]))

    with pytest.raises(RankError, match="cannot train on a single sample") as caught:
        run(body, 2)
    assert set(caught.value.failures) == {0, 1}
    assert OutOfMemory.__name__ in str(caught.value)
    with pytest.raises(UserError, match=r"data\.micro_batch_size=auto: the model has BatchNorm"):
        setup(zoo()["conv"][0], zoo()["conv"][1], config("auto", strategy=Single()))
    for sections, message in (
        ({"strategy": DDP(), "parallel": Parallel(tp=2)}, "parallel.tp does not allow"),
        ({"strategy": DDP(static_graph=True)}, "auto changes the graph"),
        ({"strategy": DeepSpeedZero1(), "precision": Precision()}, "is told it beforehand"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(config("auto", **sections))

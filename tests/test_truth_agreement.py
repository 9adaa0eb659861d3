"""What one rank refuses all refuse, and who waits in vain is told for whom: programs in which the ranks part."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import timeit

import pytest
import torch
import torch.distributed as dist
from torch import nn

import paratrain as pt
from paratrain.errors import PeerError, UserError
from paratrain.spawn import RankError, run
from tests.practice import BASE, LAYOUTS

SHORT = "trainer.timeout_minutes=0.15"


def rank() -> int:
    return int(os.environ["RANK"])


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(samples=8):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(samples, 6, generator=generator, dtype=torch.float64),
        torch.randn(samples, 1, generator=generator, dtype=torch.float64),
    )


def made(model_fn=net, loss_fn=square, layout="ddp", *more):
    return pt.setup(model_fn, loss_fn, pt.load_config([*BASE, *LAYOUTS[layout], *more]))


def outcomes(body, ranks=2, **kw):
    """(error, how long it took) of each rank; None for one that raised nothing."""

    def one():
        began = time.monotonic()
        try:
            body()
        except Exception as error:
            return error, time.monotonic() - began
        return None, time.monotonic() - began

    return run(one, ranks, **kw)


class Refuses(nn.Module):
    """A model that refuses its inputs on one rank."""

    def __init__(self, error, culprit=1):
        super().__init__()
        self.net, self.error, self.culprit = net(), error, culprit

    def forward(self, x):
        if rank() == self.culprit:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize(("layout", "ranks", "culprit"), [("ddp", 2, 1), ("ddp", 3, 0), pytest.param("fsdp", 2, 1, marks=pytest.mark.slow)])
def test_what_the_model_refuses_on_one_rank_all_refuse(layout, ranks, culprit):
    def body():
        engine = made(lambda: Refuses(UserError("inputs: too long"), culprit), square, layout)
        engine.train_step(engine.local(batch()))

    for number, (error, _) in enumerate(outcomes(body, ranks)):
        assert isinstance(error, UserError)
        assert str(error) == ("inputs: too long" if number == culprit else f"rank {culprit}: inputs: too long")


def test_a_bug_on_one_rank_is_named_on_the_others():
    def loss(out, target):
        if rank() == 1:
            raise ZeroDivisionError("no targets")
        return square(out, target)

    def body():
        engine = made(net, loss)
        engine.train_step(engine.local(batch()))

    (other, _), (own, _) = outcomes(body)
    assert isinstance(own, ZeroDivisionError)
    assert isinstance(other, PeerError)
    assert "rank 1 failed with ZeroDivisionError: no targets" in str(other)
    assert "in engine.train_step()" in str(other)


def test_set_up_that_fails_on_one_rank_fails_on_all():
    def model():
        if rank() == 1:
            raise FileNotFoundError("vocabulary.txt")
        return net()

    (other, _), (own, _) = outcomes(lambda: made(model))
    assert isinstance(own, FileNotFoundError)
    assert "rank 1" in str(other)
    assert "FileNotFoundError: vocabulary.txt" in str(other)


def test_after_a_refusal_of_all_ranks_training_goes_on():
    """The process groups are whole: a program may catch what it did wrong, and do it right."""

    def body():
        engine = made()
        for _ in range(2):
            with pytest.raises(UserError, match="step\\(\\) without gradients"):
                engine.step()
        return engine.train_step(engine.local(batch())).loss

    first, second = run(body, 2)
    assert first == second


def test_a_refusal_that_one_rank_meets_later_is_still_that_of_all():
    def body():
        engine = made()
        if rank() == 1:
            time.sleep(1.5)  # as a rank whose data come late
        with pytest.raises(UserError, match="step\\(\\) without gradients"):
            engine.step()
        return engine.train_step(engine.local(batch())).loss

    first, second = run(body, 2)
    assert first == second


class Broken(torch.utils.data.Dataset):
    def __init__(self, samples=64):
        self.inputs, self.targets = batch(samples)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if rank() == 1 and index > 20:
            raise OSError("shard 7 is gone")
        return self.inputs[index], self.targets[index]


def test_data_that_fail_on_one_rank_end_fit_on_all(tmp_path):
    def body():
        cfg = pt.load_config([*BASE, "strategy=ddp", "data.global_batch=8", "trainer.max_steps=8", f"output_dir={tmp_path}/run"])
        pt.Trainer(cfg, net, square, Broken()).fit()

    (other, _), (own, _) = outcomes(body)
    assert isinstance(own, OSError)
    assert isinstance(other, PeerError)
    assert "rank 1 failed with OSError: shard 7 is gone" in str(other)


@pytest.mark.parametrize("stage", [0, 1])
def test_what_a_stage_of_a_pipeline_refuses_all_refuse(stage):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, x):
            if (
                rank() == stage
                and not x.is_meta
                and torch.is_grad_enabled()
                and type(x) is torch.Tensor
                and x.dtype == torch.float64
                and ready
            ):
                raise UserError("a block refuses")
            return x + self.up(x)

    ready = []

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.out = nn.ModuleList(Block() for _ in range(4)), nn.Linear(6, 1)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    def body():
        engine = made(Stack, square, "pp")
        engine.train_step(engine.local(batch()))
        ready.append(True)
        engine.train_step(engine.local(batch()))

    for number, (error, _) in enumerate(outcomes(body)):
        assert isinstance(error, UserError), error
        assert str(error) == ("a block refuses" if number == stage else f"rank {stage}: a block refuses")


# ---------------------------------------------------------------- hangs


def test_a_forward_on_one_rank_alone_is_refused_before_it_communicates():
    def body():
        engine = made(net, square, "fsdp")
        engine.train_step(engine.local(batch()))
        if engine.is_main_process:
            with torch.no_grad():
                engine.model(batch()[0])
        for _ in range(3):
            engine.train_step(engine.local(batch()))

    for error, _ in outcomes(body, init=False):
        assert isinstance(error, UserError), error
        assert "rank 0 called the forward of the engine's model (" in str(error)
        assert "where rank 1 called engine.train_step() (" in str(error)


@pytest.mark.parametrize("rank_alone", [0, 2])
def test_a_save_on_one_rank_alone_is_refused_before_it_communicates(rank_alone, tmp_path):
    def body():
        engine = made(net, square, "ddp")
        engine.train_step(engine.local(batch()))
        if rank() == rank_alone:
            engine.save(tmp_path / "checkpoint")
        engine.train_step(engine.local(batch()))

    for error, _ in outcomes(body, 3):
        assert isinstance(error, UserError), error
        assert "called engine.save() (" in str(error)
        assert "called engine.train_step() (" in str(error)


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_what_one_rank_may_do_alone_it_may(layout):
    """Weights that every rank holds whole, a forward that needs nobody, micro-batches of unequal number under no_sync."""

    def body():
        engine = made(net, square, layout)
        engine.train_step(engine.local(batch()))
        if layout == "ddp":
            if rank() == 0:
                with torch.no_grad():
                    engine.model(batch()[0])
                assert engine.full_state_dict()
            with engine.no_sync():
                for _ in range(rank()):
                    engine.backward(square(engine(batch()[0]), batch()[1]))
            engine.backward(square(engine(batch()[0]), batch()[1]))
            engine.step()
        engine.full_state_dict()
        for _ in range(2):
            engine.model(batch()[0])
        return engine.eval_step(engine.local(batch())).loss

    first, second = run(body, 2)
    assert first == second


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_with_the_line_where_it_is():
    for number, (error, _) in enumerate(outcomes(_samples_alone, init=False)):
        assert isinstance(error, UserError), (number, error)
        assert re.search(r"rank 0 waits in engine.train_step\(\), test_truth_agreement.py:\d+ `engine.train_step", str(error))
        assert re.search(r"rank 1 is in code outside of the engine, test_truth_agreement.py:\d+ `time.sleep\(25\)", str(error))


def _samples_alone():
    engine = made(net, square, "ddp", SHORT)
    engine.train_step(engine.local(batch()))
    if rank() == 1:
        time.sleep(25)
    engine.train_step(engine.local(batch()))


@pytest.mark.slow
def test_a_collective_of_ones_own_on_one_rank_is_named():
    """It pairs with another of the same size, so that one is missing in the end."""

    def loss(out, target):
        if rank() == 0 and out.requires_grad and len(calls) > 3:
            dist.all_reduce(torch.ones(1, dtype=torch.float64), group=own[0])
        calls.append(1)
        return square(out, target)

    own: list = []
    calls: list = []

    def body():
        engine = made(net, loss, "ddp", SHORT)
        own.append(dist.new_group())
        for _ in range(8):
            engine.train_step(engine.local(batch()))

    for error, _ in outcomes(body, init=False):
        assert isinstance(error, UserError), error
        assert re.search(r"(rank 0 waits|ranks 0, 1 wait) in engine.train_step\(\), .*, all_reduce", str(error)), error


@pytest.mark.slow
def test_micro_batches_of_unequal_number_are_named():
    """Under sharding each forward gathers the weights: the ranks must run as many."""

    def body():
        engine = made(net, square, "fsdp", SHORT)
        for _ in range(4):
            engine.train_step(engine.local(batch()))  # in the first forwards the order of blocks is compared
        for _ in range(1 + rank()):
            engine.backward(square(engine(batch()[0]), batch()[1]))
        engine.step()

    for error, _ in outcomes(body, init=False):
        assert isinstance(error, UserError), error
        assert "rank 0 called engine.step()" in str(error)
        assert "rank 1 called engine()" in str(error)


# ---------------------------------------------------------------- ranks that are gone


@pytest.mark.parametrize("how", ["exit", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_named(how, tmp_path):
    def body():
        engine = made()
        engine.train_step(engine.local(batch()))
        if rank() == 1:
            os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
        try:
            engine.train_step(engine.local(batch()))
        except Exception as error:
            (tmp_path / str(rank())).write_text(f"{type(error).__name__}: {error}")

    with pytest.raises(RankError):
        run(body, 3, timeout=30)
    for other in (0, 2):
        text = (tmp_path / str(other)).read_text()
        assert re.search(r"PeerError: rank 1 \(process \d+ on .*\) has ended, though its peers wait for it", text), text


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named():
    def body():
        engine = made(net, square, "ddp", SHORT)
        engine.train_step(engine.local(batch()))
        if rank() == 1:
            subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(25); os.kill({os.getpid()}, 18)"])
            os.kill(os.getpid(), signal.SIGSTOP)
        engine.train_step(engine.local(batch()))

    (waiting, _), (stopped, _) = outcomes(body, init=False)
    assert isinstance(waiting, PeerError), waiting
    assert re.search(r"rank 1 \(process \d+ on .*\) is stopped \(SIGSTOP", str(waiting))
    assert isinstance(stopped, PeerError), stopped


# ---------------------------------------------------------------- the pieces


def test_a_call_costs_next_to_nothing():
    from paratrain.agreement import Agreement, agreed

    class Has:
        agreement = Agreement(0, "", 1.0)

        def plain(self):
            return 1

        @agreed("it")
        def watched(self):
            return 1

    has = Has()

    def seconds(call):
        return min(timeit.repeat(call, number=50, repeat=500)) / 50  # short enough for one turn on a busy processor

    assert seconds(has.watched) - seconds(has.plain) < 5e-6


def test_messages_need_the_token_of_their_receiver():
    from dataclasses import replace

    from paratrain.agreement.channel import Channel, ask

    ours = Channel(0, "127.0.0.1", lambda message: message)
    try:
        assert ask([ours.me], {"kind": "x"}, 2.0) == {0: {"kind": "x"}}
        assert ask([replace(ours.me, token="other")], {"kind": "x"}, 2.0) == {}
    finally:
        ours.close()
    assert ask([ours.me], {"kind": "x"}, 0.5) == {}

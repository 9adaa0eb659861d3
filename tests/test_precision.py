"""Loss scaling, the monitor, and the fallback out of float16 and back."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import config
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, Fallback, Float8, LossScale, Precision, Zero2, from_dict
from paratrain.errors import ConfigError, UserError
from paratrain.precision import LossScaler
from paratrain.precision.monitor import LARGEST, Monitor
from paratrain.spawn import run

# ---------------------------------------------------------------------- loss scale


def scales(options: LossScale, overflows: str) -> list[float]:
    """The scale after each step of e.g. `..x.`, in which x overflows."""
    scaler, seen = LossScaler(options), []
    for mark in overflows:
        scaler.update(mark == "x")
        seen.append(scaler.scale)
    return seen


def test_loss_scale_rules():
    assert scales(LossScale(init=8, growth_interval=2), "...x..") == [8, 16, 16, 8, 8, 16]
    assert scales(LossScale(init=8, hysteresis=2, growth_interval=3), "xx...x.x") == [8, 4, 4, 4, 8, 8, 8, 4]
    assert scales(LossScale(init=8, dynamic=False, growth_interval=1), "..xx.") == [8] * 5
    with pytest.raises(UserError, match=r"at the floor of the loss scale \(4; .*fallback.policy=module"):
        scales(LossScale(init=8, min=4), "xx")


def test_raised_floor_and_history():
    scaler = LossScaler(LossScale(init=8, max=16))
    assert scaler.raise_floor()
    assert (scaler.scale, scaler.floor, scaler.at_floor) == (16, 16, True)
    assert not scaler.raise_floor(), "at its largest"
    scaler.update(True, relieved=True)
    assert (scaler.scale, scaler.skipped, scaler.changes) == (16, 1, 1)
    again = LossScaler(LossScale(init=8, max=16))
    again.load_state_dict(scaler.state_dict())
    assert vars(again) == vars(scaler)


# ---------------------------------------------------------------------- monitor


def squares(outputs, targets):
    return (outputs.float() - targets).square().sum(), len(targets)


def test_readings_are_what_happened():
    """One linear layer, whose every number is known."""

    def body():
        engine_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        assert engine_ranks == 2
        layer = nn.Sequential(nn.Linear(2, 2, bias=False))
        monitor = Monitor(dict(layer.named_modules()), torch.device("cpu"))
        rank = torch.distributed.get_rank()
        x = torch.tensor([[1.0, -3.0 - rank]], requires_grad=True)
        with torch.no_grad():
            layer[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1e-5]]))
        with torch.autocast("cpu", dtype=torch.float16):
            out = layer(x)
        out.backward(torch.ones_like(out))
        first = monitor.read()
        with torch.autocast("cpu", dtype=torch.float16):
            layer(torch.full((1, 2), 7e4))
        return first, monitor.read()

    def with_group():
        from datetime import timedelta

        from paratrain import distributed

        distributed.init(torch.device("cpu"), timedelta(seconds=60))
        return body()

    (first, second), (theirs, _) = run(with_group, 2)
    assert str(first) == str(theirs)
    reading = first["0"]
    assert (reading.inputs, reading.outputs, reading.grad_outputs, reading.grad_inputs) == (4.0, 2.0, 1.0, 2.0)
    assert reading.half
    assert reading.underflow == 0.5, "of 2 and 1e-5, one is below 2^-14"
    noise = ((2 * 2**-10) ** 2 + 2.0**-48) / 12
    assert reading.snr == pytest.approx(10 * math.log10(4 / noise), abs=1e-3)
    assert reading.range_used == pytest.approx(4 / LARGEST)
    assert second["0"].inputs == 7e4
    assert second["0"].outputs == math.inf
    assert math.isnan(second["0"].snr)


# ---------------------------------------------------------------------- fallback


class Hot(nn.Module):
    """Three layers, of which the second multiplies by `heat`."""

    def __init__(self, heat: float = 1e5):
        super().__init__()
        self.first, self.hot, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 1)
        self.register_buffer("heat", torch.tensor(heat))
        with torch.no_grad():
            self.hot.weight.copy_(torch.eye(4))

    def forward(self, x):
        return self.last(self.hot(self.first(x).float() * self.heat) / self.heat.clamp(min=1))


def seeded_hot():
    torch.manual_seed(1)
    return Hot()


def half(fallback: Fallback | None = None, **scale) -> Precision:
    return Precision("16-mixed", LossScale(**{"init": 256.0, **scale}), fallback=fallback or Fallback("module", every=2, calm=4))


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(count)]


def steps(engine, data):
    return [engine.train_step(engine.local(batch)) for batch in data]


def events(engine):
    return [(event["step"], event["module"], event["event"]) for event in engine.fallback.events]


def test_without_fallback_it_fails():
    with pytest.raises(UserError, match=r"the loss is nan.*precision.fallback.policy=module"):
        steps(setup(seeded_hot, squares, config(precision=half(Fallback("monitor")))), batches(30))


@pytest.mark.parametrize("to", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda s: s.name)
def test_the_module_that_overflows_moves(strategy, to):
    def body():
        precision = half(Fallback("module", every=2, to=to))
        engine = setup(seeded_hot, squares, config(precision=precision, strategy=strategy))
        seen = steps(engine, batches(8))
        return [s.skipped for s in seen], [s.loss for s in seen], events(engine), engine.fallback.half_fraction, engine.scaler.scale

    (skipped, losses, happened, fraction, scale), theirs = run(body, 2)
    assert theirs == (skipped, losses, happened, fraction, scale) or str(theirs[1:]) == str((losses, happened, fraction, scale))
    assert skipped == [True] + [False] * 7
    assert happened == [(1, "hot", to)]
    assert fraction == pytest.approx(2 / 3)
    assert scale == 256.0, "the scale is not to blame"
    full = setup(seeded_hot, squares, config(precision=Precision("32-true")))
    reference = [s.loss for s in steps(full, batches(8)[1:])]
    assert losses[1:] == pytest.approx(reference, rel=0.05 if to == "bf16" else 0.01)


class Tower(nn.Module):
    """Blocks of one class, of which the third works on large numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Hot() for _ in range(4))
        for number, block in enumerate(self.blocks):
            block.last = nn.Linear(4, 4)
            block.heat.fill_(1e5 if number == 2 else 1.0)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda s: s.name)
def test_compiled_blocks_move_as_a_whole(strategy):
    """The block leaves half and comes back again and again; its code is compiled for half and for float32, and not anew each time."""

    def body():
        from torch._dynamo.utils import counters

        cfg = config(precision=half(Fallback("module", every=1, calm=2)), strategy=strategy, compile="aot_eager")
        engine = setup(Tower, squares, cfg)
        counters.clear()
        losses, graphs, (hot,) = [], [], [b for b in engine.model.blocks if float(b.heat) > 1]
        for batch in batches(40):
            hot.heat.fill_(1e5 if engine.global_step % 8 < 3 else 1.0)
            losses.append(engine.train_step(engine.local(batch)).loss)
            graphs.append(counters["stats"]["unique_graphs"])
        return events(engine), losses, graphs, engine.fallback.half_fraction

    (happened, losses, graphs, _), (theirs, *_) = run(body, 2)
    assert happened == theirs
    assert {module for _, module, _ in happened} == {"blocks.2"}
    assert [event for *_, event in happened][:4] == ["fp32", "half", "fp32", "half"]
    assert graphs[-1] == graphs[20] <= 4, "no code for each move"
    assert all(math.isfinite(loss) for loss in losses[1:2])


def test_global_moves_everything():
    engine = setup(seeded_hot, squares, config(precision=half(Fallback("global", every=2))))
    steps(engine, batches(3))
    assert events(engine) == [(1, "", "fp32")]
    assert engine.fallback.half_fraction == 0
    assert engine.fallback.events[0]["why"] == "hot: its outputs overflow"


def test_near_the_limit_moves_before_it_overflows_and_returns_when_calm():
    engine = setup(seeded_hot, squares, config(precision=half()))
    engine.model.heat.fill_(4e4)
    assert not any(s.skipped for s in steps(engine, batches(4)))
    assert events(engine)[0] == (1, "hot", "fp32")
    engine.model.heat.fill_(1.0)
    steps(engine, batches(6))
    assert events(engine)[1] == (5, "hot", "half")
    engine.model.heat.fill_(1e6)
    steps(engine, batches(4))
    assert events(engine)[2][1:] == ("hot", "fp32")
    engine.model.heat.fill_(1.0)
    before = engine.global_step
    steps(engine, batches(12))
    returned = events(engine)[-1]
    assert returned[1:] == ("hot", "half")
    assert returned[0] - events(engine)[2][0] >= 8, "a relapse doubles the calm window"
    assert returned[0] > before


def test_gradients_that_overflow_at_the_floor():
    """Activations fit, gradients do not, and the scale cannot shrink: what hands on the overflow leaves half."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.steep = nn.Linear(4, 4), nn.Linear(4, 1, bias=False)
            with torch.no_grad():
                self.steep.weight.fill_(300.0)

        def forward(self, x):
            return self.steep(self.flat(x) * 1e-4)

    engine = setup(
        Steep,
        lambda o, t: ((o.float() - t).square().sum() * 50, len(t)),
        config(precision=half(Fallback("module", every=2, max_moved=1.0), init=64.0, min=64.0)),
    )
    seen = steps(engine, batches(8))
    assert any(s.skipped for s in seen[:3])
    assert not any(s.skipped for s in seen[-3:])
    assert [(module, event) for _, module, event in events(engine)] == [("steep", "fp32"), ("flat", "fp32")]
    assert engine.scaler.scale == 64.0


def test_underflow_raises_the_floor():
    def tiny(outputs, targets):
        return squares(outputs, targets)[0] * 1e-7, len(targets)

    engine = setup(lambda: Hot(1.0), tiny, config(precision=half(Fallback("module", every=1, patience=2), init=64.0)))
    steps(engine, batches(9))
    assert {event[2] for event in events(engine)} == {"floor"}
    assert engine.scaler.scale == engine.scaler.floor > 64.0
    metrics = engine.fallback.metrics()
    assert metrics["precision/scale_floor"] == engine.scaler.floor
    assert metrics["precision/half_modules"] == 1.0
    assert 0 < metrics["precision/underflow"] <= 1


@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda s: s.name)
def test_resume_replays_the_decisions(strategy, tmp_path):
    def grow(engine, data):
        seen = []
        for batch in data:
            engine.model.heat.fill_(10.0 ** (engine.global_step % 12 - 2))
            seen.append(engine.train_step(engine.local(batch)))
        return [(s.loss, s.grad_norm, s.loss_scale, s.skipped) for s in seen]

    def body():
        cfg = config(precision=half(max=1024.0, growth_interval=3), strategy=strategy)
        data = batches(40)
        whole = setup(seeded_hot, squares, cfg)
        expected = grow(whole, data)
        for cut in (8, 9, 10, 21) if strategy.name == "ddp" else (9,):
            first = setup(seeded_hot, squares, cfg)
            grow(first, data[:cut])
            first.save(tmp_path / f"at-{cut}")
            second = setup(seeded_hot, squares, cfg)
            second.load(tmp_path / f"at-{cut}")
            assert str(grow(second, data[cut:])) == str(expected[cut:]), cut
            assert second.fallback.events == whole.fallback.events
            assert second.fallback.moved == whole.fallback.moved
            mine, theirs = whole.full_state_dict(), second.full_state_dict()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        return len(whole.fallback.events)

    assert run(body, 2)[0] > 4


def test_a_copy_of_the_model_computes_its_own_weights():
    engine = setup(seeded_hot, squares, config(precision=half()))
    twin = copy.deepcopy(engine.model)
    with torch.no_grad():
        twin.last.weight.zero_()
        twin.last.bias.zero_()
    assert torch.equal(twin(torch.ones(1, 4)), torch.zeros(1, 1))
    assert not torch.equal(engine.model(torch.ones(1, 4)), torch.zeros(1, 1))


def test_impossible_combinations_are_refused():
    with pytest.raises(ConfigError) as caught:
        from_dict({"precision": {"name": "bf16-mixed", "fallback": {"policy": "module", "low": 0.9}}})
    assert "precision.fallback.policy: module, but precision.name=bf16-mixed has float32's range" in str(caught.value)
    assert "precision.fallback.low: must be below high=0.5" in str(caught.value)
    half = {"name": "16-mixed", "loss_scale": {}, "fallback": {"policy": "module"}}
    with pytest.raises(ConfigError, match=r"needs? weights in float32, which strategy.param_dtype=compute does not gather; write master"):
        from_dict({"precision": half, "strategy": {"name": "fsdp", "param_dtype": "compute"}})
    with pytest.raises(ConfigError, match=r"precision.fallback.policy: ranks of ep have other experts each"):
        from_dict({"precision": half, "parallel": {"ep": 2}})
    with pytest.raises(ConfigError, match=r"precision.fallback.policy: stages of a pipeline have other modules each"):
        from_dict({"precision": half, "parallel": {"pp": 2}})


@pytest.mark.slow
def test_the_run_that_overflows_reaches_float32(tmp_path, monkeypatch):
    """examples/overflow.py: plain float16 fails, fallback=module is within 1 % of float32 with at most 20 % of the modules moved."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.chdir(tmp_path)
    import overflow

    overflow.main([])
    del sys.modules["overflow"]
    lines = {name: overflow.logged(Path("runs/overflow") / name) for name in ("fp32", "fp16", "fp16-module")}
    tail = {name: [line["train/loss"] for line in run_[-20:]] for name, run_ in lines.items() if name != "fp16"}
    assert all(line.get("train/loss") is None for line in lines["fp16"]), "plain dynamic scaling never takes a step"
    assert sum(tail["fp16-module"]) == pytest.approx(sum(tail["fp32"]), rel=0.01)
    assert min(line["precision/half_modules"] for line in lines["fp16-module"] if "precision/half_modules" in line) >= 0.8
    assert Path("overflow.png").stat().st_size > 10_000


# ---------------------------------------------------------------------- float8


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.odd(self.b(self.a(x).relu()))


def seeded_two():
    torch.manual_seed(2)
    return Two()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_follows_bfloat16(recipe):
    """Emulated: 2 ranks under ddp and fsdp equal one to the rounding of scales found per rank, and follow bfloat16 to float8's."""
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 32, generator=generator), torch.randn(16, 3, generator=generator)) for _ in range(5)]

    def body(fp8, strategy):
        engine = setup(seeded_two, squares, config(precision=Precision("bf16-mixed", fp8=fp8), strategy=strategy))
        kinds = {name: type(module).__name__ for name, module in engine.model.named_children()}
        return [s.loss for s in steps(engine, data)], kinds

    wide, _ = body(None, DDP())
    alone, kinds = body(Float8(recipe, emulate=True), DDP())
    assert kinds == {"a": "Float8Linear", "b": "Float8Linear", "odd": "Linear"}
    assert alone == pytest.approx(wide, rel=0.05)
    assert alone != wide
    for strategy in (DDP(), FSDP()):
        (together, found), _ = run(body, 2, Float8(recipe, emulate=True), strategy)
        assert together == pytest.approx(alone, rel=0.02)
        assert [kind.removeprefix("FSDP") for kind in found.values()] == list(kinds.values())


def test_float8_weights_travel_in_float8(tmp_path):
    """To the same bits as if they were gathered in float32 and rounded then; a checkpoint holds float32 and loads either way."""
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 32, generator=generator), torch.randn(16, 3, generator=generator)) for _ in range(5)]

    def body():
        engines, kinds = [], set()
        for strategy in (FSDP(), Zero2()):
            for gathers in (False, True):
                fp8 = Float8(emulate=True, all_gather=gathers)
                engines.append(setup(seeded_two, squares, config(2, precision=Precision("bf16-mixed", fp8=fp8), strategy=strategy)))
        engines[1].model.a.register_forward_pre_hook(lambda module, args: kinds.add(type(module.weight).__name__))
        losses = [[s.loss for s in steps(engine, data)] for engine in engines]
        engines[1].save(tmp_path / "saved")
        engines[0].load(tmp_path / "saved")
        one, other = engines[0].full_state_dict(), engines[1].full_state_dict()
        same = all(torch.equal(one[name], other[name]) and other[name].dtype is torch.float32 for name in one)
        return losses, kinds, same

    (fsdp, sent, zero2, sent2), kinds, same = run(body, 2)[0]
    assert fsdp == sent
    assert zero2 == sent2
    assert kinds == {"Float8TrainingTensor"}
    assert same
    fp8 = {"recipe": "rowwise", "all_gather": True, "emulate": True}
    with pytest.raises(ConfigError) as caught:
        from_dict({"precision": {"name": "bf16-mixed", "fp8": fp8}, "strategy": {"name": "ddp"}})
    assert "precision.fp8.all_gather: one scale has to fit the whole weight, but precision.fp8.recipe=rowwise" in str(caught.value)
    assert "precision.fp8.all_gather: gathers float8 weights, which sharded strategies do" in str(caught.value)


def test_float8_is_chosen_by_name_and_refused_with_a_reason():
    pytest.importorskip("torchao")
    only = config(precision=Precision("bf16-mixed", fp8=Float8(emulate=True, include=["a", "b"], exclude=["b"])))
    engine = setup(seeded_two, squares, only)
    assert [type(m).__name__ for m in (engine.model.a, engine.model.b)] == ["Float8Linear", "Linear"]
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8.9 or later, and this is the cpu; write precision=bf16"):
        setup(seeded_two, squares, config(precision=Precision("bf16-mixed", fp8=Float8())))
    with pytest.raises(ConfigError, match=r"precision.fp8.exclude: 'heads.\*' matches no linear layer; their names look like a, b, odd"):
        setup(seeded_two, squares, config(precision=Precision("bf16-mixed", fp8=Float8(emulate=True, exclude=["heads.*"]))))
    with pytest.raises(ConfigError, match=r"precision.fp8: computes the rest in bfloat16, but precision.name=32-true"):
        from_dict({"precision": {"name": "32-true", "fp8": {}}})

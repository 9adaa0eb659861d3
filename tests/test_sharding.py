"""Every sharded strategy against a hand-written single-process loop, in float64."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss, train_by_hand
from sharding_zoo import Routed, float_batches, gpt, seeded, squares, zoo
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, LossScale, Memory, Parallel, Precision, Zero1, Zero2, Zero3, check
from paratrain.errors import ConfigError, UserError
from paratrain.spawn import RankError, run

TOLERANCE = 1e-10

STRATEGIES = {
    "fsdp": {"strategy": FSDP()},
    "fsdp, reduced once": {"strategy": FSDP(reduce_each_micro_batch=False)},
    "zero1": {"strategy": Zero1()},
    "zero2": {"strategy": Zero2()},
    "zero3": {"strategy": Zero3()},
    "offload": {"strategy": FSDP(), "memory": Memory(offload="params")},
}
ON_FOUR = {
    "hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2)},
    "hsdp, reduced once": {"strategy": HSDP(reduce_each_micro_batch=False), "parallel": Parallel(dp_shard=2)},
    "zero1 x 2": {"strategy": Zero1(), "parallel": Parallel(dp_replicate=2)},
    "resharded to 2": {"strategy": FSDP(reshard_after_forward=2)},
}


def train(cfg, build, loss_fn, batches):
    engine = setup(build, loss_fn, cfg)
    steps = [engine.train_step(engine.local(batch)) for batch in batches]
    return [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()


def by_hand(build, loss_fn, batches):
    """The reference; what requires no gradient, or never gets one, stays."""
    return train_by_hand(build().double(), batches, loss_fn=loss_fn)


def difference(result, expected):
    losses, norms, weights = result
    ref_losses, ref_norms, ref_weights = expected
    assert weights.keys() == ref_weights.keys()
    return max(
        *(abs(a - b) for a, b in zip(losses + norms, ref_losses + ref_norms, strict=True)),
        *(float((weights[name] - value).abs().max()) for name, value in ref_weights.items()),
    )


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_strategy_equals_one_process(ranks):
    """Masked batches of 10 samples, whole and in micro-batches of 1, clipped; on 4 ranks also two-dimensional layouts."""
    layouts = STRATEGIES | (ON_FOUR if ranks == 4 else {})
    batches = token_batches(4, 10, True)

    def body():
        return {
            (name, micro): train(config(micro, **sections), gpt(), token_loss, batches)
            for name, sections in layouts.items()
            for micro in (None, 1)
        }

    results = run(body, ranks)
    expected = by_hand(gpt(), token_loss, batches)
    for case, result in results[0].items():
        assert difference(result, expected) < TOLERANCE, case
        for other in results[1:]:
            assert other[case][:2] == result[:2], "every rank reports the same numbers"
            assert other[case][2] == {}, "only rank 0 holds the full state"


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_module(ranks):
    """0-dim, frozen, tied and unused parameters, experts that some ranks do not use, buffers, modules called several times or never."""
    layouts = {name: STRATEGIES[name] for name in ("fsdp", "zero1")} | {"ddp": {"strategy": DDP()}}
    layouts |= {"hsdp": ON_FOUR["hsdp"]} if ranks == 4 else {}
    cases = [(name, model, micro) for name in layouts for model in zoo() for micro in ((None,) if model == "conv" else (None, 2))]

    def body():
        return {case: train(config(case[2], **layouts[case[0]]), *zoo()[case[1]]) for case in cases}

    results = run(body, ranks)[0]
    expected = {model: by_hand(*parts) for model, parts in zoo().items()}
    for case, result in results.items():
        assert difference(result, expected[case[1]]) < TOLERANCE, case
    start = zoo()["scalars"][0]().double().state_dict()
    for name in ("idle", "blocks.0.unused.weight", "blocks.2.up.weight", "blocks.1.down.weight"):
        assert torch.equal(results["fsdp", "scalars", None][2][name], start[name]), (
            f"{name}: what is not used or frozen is not decayed either"
        )


def test_what_is_sharded():
    """Per rank: parameters, gradients and optimizer states as the strategy promises, between steps and before the update."""

    def body():
        sizes = {}
        for name, sections in STRATEGIES.items():
            engine = setup(gpt(tied=False), token_loss, config(2, **sections))
            seen = []
            reduce = engine._layout.reduce
            held = [p for p in engine.model.parameters()]

            def before_update(params, seen=seen, held=held, reduce=reduce):
                seen.append(sum(p.grad.to_local().numel() for p in held))
                reduce(params)

            engine._layout = replace(engine._layout, reduce=before_update)
            engine.train_step(engine.local(token_batches(1, 8, False)[0]))
            params = [p.to_local().numel() for p in engine.model.parameters() if isinstance(p, DTensor)]
            states = [s["exp_avg"].to_local().numel() for o in engine.optimizers for s in o.state.values()]
            sizes[name] = sum(params), sum(states), seen[0]
        return sizes

    total = sum(p.numel() for p in gpt(tied=False)().parameters())
    for sizes in run(body, 2):
        for name, counts in sizes.items():
            for kind, count in zip(("params", "states", "grads"), counts, strict=True):
                assert abs(count - total / 2) < 0.02 * total, (name, kind)


def test_weights_and_gradients_live_as_long_as_promised():
    """zero1 and zero2 gather a block once a step, zero3 for each forward and backward; only zero1 waits to reduce."""

    def body():
        counts = {}
        for name in ("zero1", "zero2", "zero3"):
            engine = setup(gpt(), token_loss, config(2, **STRATEGIES[name]))
            batch = token_batches(1, 8, False)[0]
            engine.train_step(engine.local(batch))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                engine.train_step(engine.local(batch))
            events = [event.name for event in profile.events()]
            counts[name] = [
                sum(event.startswith(f"FSDP::{kind}") for event in events) for kind in ("all_gather_copy_out", "post_backward_reduce")
            ]
        return counts

    counts = run(body, 2)[0]
    groups, micro = 4, 2  # three blocks and the root; 4 samples a rank in micro-batches of 2
    assert counts["zero1"] == [groups, groups]
    assert counts["zero2"] == [groups, groups * micro]
    assert counts["zero3"][0] == (groups - 1) * 2 * micro + micro
    assert counts["zero3"][1] == groups * micro


def test_evaluation_leaves_shards():
    """Ranks without samples take part; nothing stays gathered, so weights changed behind the model's back are used next time."""
    batches = token_batches(2, 3, True)

    def body():
        results = []
        for name in ("fsdp", "zero2"):
            engine = setup(gpt(dropout=0.5), token_loss, config(1, **STRATEGIES[name]))
            first = [engine.eval_step(engine.local(batch)).loss for batch in batches]
            assert all(isinstance(param, DTensor) for param in engine.model.parameters())
            with torch.no_grad():
                for param in engine.model.parameters():
                    param.mul_(0.5)
            results.append((first, engine.eval_step(engine.local(batches[0])).loss))
        return results

    model = gpt()().double().eval()
    expected = [float(total / count) for total, count in (token_loss(model(x).detach(), y) for x, y in batches)]
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    halved = float(torch.div(*token_loss(model(batches[0][0]).detach(), batches[0][1])))
    for first, second in run(body, 4)[0]:
        assert first == pytest.approx(expected, abs=TOLERANCE)
        assert second == pytest.approx(halved, abs=TOLERANCE)


def test_own_loop_survives_exceptions():
    """An exception inside no_sync() does not leave the model without reduction."""
    batches = token_batches(3, 8, True)

    def body():
        engine = setup(gpt(), token_loss, config(strategy=FSDP(reduce_each_micro_batch=False)))
        with pytest.raises(RuntimeError, match="mine"), engine.no_sync():
            raise RuntimeError("mine")
        losses = []
        for batch in batches:
            share = engine.local(batch)
            with engine.no_sync():
                engine.backward(token_loss(engine(share.inputs[:1]), share.targets[:1]))
            engine.backward(token_loss(engine(share.inputs[1:]), share.targets[1:]))
            losses.append(engine.step().loss)
        return losses, engine.full_state_dict()

    losses, weights = run(body, 2)[0]
    expected = by_hand(gpt(), token_loss, batches)
    assert difference((losses, [], weights), (expected[0], [], expected[2])) < TOLERANCE


def test_low_precision_equals_one_process_of_the_same_precision():
    """Autocast on sharded float32 weights rounds as it does on one process; sums over ranks and gathering in 16 bits add a little."""
    batches = token_batches(4, 8, True)
    cases = {
        (precision, name): {"precision": Precision(precision, LossScale() if precision == "16-mixed" else None), **sections}
        for precision in ("bf16-mixed", "16-mixed", "bf16-true")
        for name, sections in (STRATEGIES | {"compute": {"strategy": FSDP(param_dtype="compute")}}).items()
        if not (precision == "bf16-true" and name == "compute")
    }

    def body(micro):
        return {case: train(config(micro, **sections), gpt(), token_loss, batches) for case, sections in cases.items()}

    expected = {
        precision: train(
            config(precision=Precision(precision, LossScale() if precision == "16-mixed" else None)), gpt(), token_loss, batches
        )
        for precision in ("bf16-mixed", "16-mixed", "bf16-true")
    }
    bounds = {"bf16-mixed": 2e-3, "16-mixed": 3e-4, "bf16-true": 2e-2}
    for micro in (None, 2):
        for case, (losses, _, weights) in run(body, 2, micro)[0].items():
            bound = bounds[case[0]] * (10 if case[1] == "compute" else 1)
            assert max(abs(a - b) for a, b in zip(losses, expected[case[0]][0], strict=True)) < bound, case
            assert all(w.dtype is (torch.bfloat16 if case[0] == "bf16-true" else torch.float32) for w in weights.values())


def test_one_shard_overflows_all_skip():
    """fp16: an overflow whose gradients are sharded to one rank skips the step on all, and leaves the weights alone."""

    def body():
        results = []
        for sections in (STRATEGIES["fsdp"], STRATEGIES["zero1"], STRATEGIES["offload"]):
            cfg = config(precision=Precision("16-mixed", LossScale(init=1024.0, growth_interval=2)), **sections)
            engine = setup(
                seeded(lambda: nn.Sequential(nn.Linear(4, 4, bias=False))), lambda o, t: (o.float()[:, 0].square().sum(), len(t)), cfg
            )
            history = []
            for step in range(4):
                x = torch.ones(4, 4)
                if step == 1:
                    x[-1] = 6e4  # only the last rank holds this sample, and only the first row of weights, on rank 0, sees it
                before = engine.full_state_dict()
                result = engine.train_step(engine.local((x, torch.zeros(4, 1))))
                after = engine.full_state_dict()
                history.append((result.skipped, result.loss_scale, all(torch.equal(before[n], after[n]) for n in before)))
            results.append((history, engine.updates, engine.scaler.skipped))
        return results

    ours, theirs = run(body, 2)
    for (history, updates, skipped), other in zip(ours, theirs, strict=True):
        assert history == [(False, 1024.0, False), (True, 1024.0, True), (False, 512.0, False), (False, 512.0, False)]
        assert (updates, skipped) == (3, 1)
        assert [h[:2] for h in other[0]] == [h[:2] for h in history]


def test_what_cannot_be_sharded_is_refused():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x):
            return x @ self.layers[0][0].weight

    batch = float_batches(1, (4, 4), (4, 4))[0]

    def body(model, sections):
        engine = setup(model, squares, config(**sections))
        engine.train_step(engine.local(batch))

    run(body, 2, Outside, STRATEGIES["fsdp"])
    with pytest.raises(RankError, match="must be true, false or a divisor of the 2 shard ranks"):
        run(body, 2, Outside, {"strategy": FSDP(reshard_after_forward=3)})
    with pytest.raises(RankError, match="'nothing' matches no module"):
        run(body, 2, Outside, {"strategy": FSDP(), "memory": Memory(blocks=["nothing"])})
    run(body, 2, Outside, {"strategy": FSDP(), "memory": Memory(blocks=[])})


class Chooses(nn.Module):
    """Which of its layers a rank calls is the business of `choose`."""

    def __init__(self, choose):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.choose, self.calls = choose, 0

    def forward(self, x):
        self.calls += 1
        for number in self.choose(self.calls, int(os.environ["RANK"])):
            x = x + self.layers[number](x)
        return x


def test_ranks_that_run_different_blocks_are_told():
    """FSDP would mix up their weights without a word, or hang."""
    batches = float_batches(6, (4, 4), (4, 4))

    def refused(choose, **sections):
        with pytest.raises(UserError) as caught:
            train(config(**sections), lambda: Chooses(choose), squares, batches)
        return str(caught.value)

    def at_once():
        return refused(lambda call, rank: [0, 1 + rank], **STRATEGIES["fsdp"])

    def one_less():
        return refused(lambda call, rank: [0, 1][: 1 + rank], **STRATEGIES["zero1"])

    def late():
        return refused(lambda call, rank: [0, 1] if call < 5 or rank else [0, 2], **STRATEGIES["zero1"])

    for message in run(at_once, 2):
        assert "rank 0: layers.1, rank 1: layers.2" in message
        assert "memory.blocks=[...]" in message
    for message in run(one_less, 2):
        assert "rank 0: no block, rank 1: layers.1" in message
    for message in run(late, 2):
        assert "ran different blocks in this step" in message


def test_ranks_may_choose_inside_a_block():
    batches = float_batches(3, (4, 4), (4, 4))
    routed = [((x, torch.arange(4) * 0 + step), y) for step, (x, y) in enumerate(batches)]
    routed[0] = ((batches[0][0], torch.tensor([0, 0, 1, 2])), batches[0][1])
    build = seeded(Routed)
    for result in run(lambda: train(config(**STRATEGIES["fsdp"]), build, squares, routed), 2)[:1]:
        assert difference(result, by_hand(build, squares, routed)) < TOLERANCE


class Hidden:
    def __init__(self, x):
        self.x = x


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return Hidden(self.linear(x.x if isinstance(x, Hidden) else x))


class Stack(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.x if isinstance(x, Hidden) else x


class Views(nn.Module):
    """Blocks that return views, alone and in a tuple, which the model changes in place."""

    class Block(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.up, self.down, self.number = nn.Linear(4, 8), nn.Linear(8, 4), number

        def forward(self, x):
            out = self.down(self.up(x).tanh()).t()
            return (out, x) if self.number else out

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Block(number) for number in range(3))

    def forward(self, x):
        for layer in self.layers:
            out = layer(x)
            out = out[0] if isinstance(out, tuple) else out
            out += x.t()
            x = out.t()
        return x.relu_()


@pytest.mark.filterwarnings("error")
def test_views_may_be_changed_in_place(capfd):
    batches = float_batches(3, (4, 4), (4, 4))
    build = seeded(Views)
    expected = by_hand(build, squares, batches)
    for result in run(lambda: train(config(**STRATEGIES["fsdp"]), build, squares, batches), 2)[:1]:
        assert difference(result, expected) < TOLERANCE
    assert capfd.readouterr().err == ""


def test_outputs_inside_objects():
    """Of blocks, and of a model without any."""
    batches = float_batches(3, (4, 4), (4, 4))
    models = {"blocks": seeded(lambda: Stack(Opaque)), "no blocks": seeded(Opaque)}

    def loss_fn(outputs, targets):
        return squares(outputs.x if isinstance(outputs, Hidden) else outputs, targets)

    def body():
        return {name: train(config(**STRATEGIES["fsdp"]), build, loss_fn, batches) for name, build in models.items()}

    for name, result in run(body, 2)[0].items():
        assert difference(result, by_hand(models[name], loss_fn, batches)) < TOLERANCE


def test_config_refuses_contradictions():
    for sections, message in (
        ({"strategy": DDP(), "memory": Memory(offload="params")}, "memory.offload"),
        ({"strategy": FSDP(param_dtype="compute")}, "strategy.param_dtype"),
        ({"strategy": replace(Zero2(), reshard_after_forward=True)}, "strategy.reshard_after_forward"),
        ({"memory": Memory(recompute_every=2)}, "memory.recompute_every"),
        ({"strategy": DDP(), "parallel": Parallel(dp_shard=2)}, "parallel.dp_shard"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(config(**sections))


def test_one_rank_needs_no_shards():
    engine = setup(gpt(), token_loss, config(strategy=FSDP()))
    assert not any(isinstance(param, DTensor) for param in engine.model.parameters())
    with pytest.raises(UserError, match=r"memory\.blocks"):
        setup(gpt(), token_loss, config(strategy=FSDP(), memory=Memory(blocks=["no_such.*"])))


def test_checkpoints_cross_layouts(tmp_path):
    """Saved sharded after two steps, resumed under every other layout and number of ranks: the same third and fourth step."""
    build, loss_fn, batches = zoo(4, 8)["scalars"]
    layouts = {"fsdp": STRATEGIES["fsdp"], "zero1": STRATEGIES["zero1"], "ddp": {"strategy": DDP()}, "offload": STRATEGIES["offload"]}

    def begin(sections, name):
        engine = setup(build, loss_fn, config(2, **sections))
        for batch in batches[:2]:
            engine.train_step(engine.local(batch))
        engine.save(tmp_path / name)

    def resume(sections, name):
        engine = setup(build, loss_fn, config(2, seed=3, **sections))
        engine.train_step(engine.local(batches[3]))  # what is loaded replaces what was trained, gathered or padded
        engine.load(tmp_path / name)
        steps = [engine.train_step(engine.local(batch)) for batch in batches[2:]]
        return [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()

    run(lambda: [begin(sections, name) for name, sections in layouts.items()], 3)
    losses, norms, weights = by_hand(build, loss_fn, batches)
    for ranks, resumed in ((4, {**layouts, "hsdp": ON_FOUR["hsdp"]}), (2, layouts), (1, {"fsdp": STRATEGIES["fsdp"]})):
        found = run(lambda resumed=resumed: {(a, b): resume(resumed[b], a) for a in layouts for b in resumed}, ranks)[0]
        for case, result in found.items():
            assert difference(result, (losses[2:], norms[2:], weights)) < TOLERANCE, (ranks, case)

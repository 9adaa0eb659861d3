"""The engine against a hand-written single-process loop, in float64."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import Tiny, config, token_batches, token_loss, train_by_hand
from torch import nn
from torch.utils.checkpoint import checkpoint

from paratrain import verify
from paratrain.api import setup
from paratrain.config import DDP, FSDP, LossScale, Parallel, Precision, Scheduler
from paratrain.errors import UserError
from paratrain.spawn import run

TOLERANCE = 1e-10  # float64, the same sums in another order


def seeded(build):
    def model():
        torch.manual_seed(11)
        return build()

    return model


tiny = seeded(Tiny)


def train(cfg, batches, build=tiny, loss_fn=token_loss):
    """Train under `cfg` on every step of `batches`: what a rank saw, and the weights."""
    engine = setup(build, loss_fn, cfg)
    steps = [engine.train_step(engine.local(batch)) for batch in batches]
    return [s.loss for s in steps], [s.grad_norm for s in steps], [s.count for s in steps], engine.full_state_dict()


def assert_same(result, expected):
    losses, norms, _, weights = result
    ref_losses, ref_norms, ref_weights = expected
    assert max(abs(a - b) for a, b in zip(losses, ref_losses, strict=True)) < TOLERANCE
    assert max(abs(a - b) for a, b in zip(norms, ref_norms, strict=True)) < TOLERANCE
    assert weights.keys() == ref_weights.keys()
    assert max(float((weights[name] - value).abs().max()) for name, value in ref_weights.items()) < TOLERANCE


@pytest.fixture(scope="module")
def by_hand():
    """The reference, once for equal and once for masked batches; 10 samples do not divide by 3 or 4 ranks."""
    return {masked: train_by_hand(seeded(Tiny)().double(), token_batches(20, 10, masked)) for masked in (False, True)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ddp_equals_one_process(ranks, by_hand):
    cases = [(masked, micro) for masked in (False, True) for micro in (None, 1, 2, 3)]

    def body():
        return [train(config(micro), token_batches(20, 10, masked)) for masked, micro in cases]

    every_rank = run(body, ranks)
    for (masked, _micro), *results in zip(cases, *every_rank, strict=True):
        assert_same(results[0], by_hand[masked])
        for other in results[1:]:
            assert other[:3] == results[0][:3], "every rank reports the same numbers"
            assert other[3] == {}, "only rank 0 holds the full state"
        assert results[0][2] == [int((t != -100).sum()) for _, t in token_batches(20, 10, masked)]


def test_fewer_samples_than_ranks(by_hand):
    """Ranks without a sample take part with weight nothing."""
    batches = token_batches(6, 2, True)
    results = run(lambda: train(config(), batches), 4)
    assert_same(results[0], train_by_hand(seeded(Tiny)().double(), batches))


@dataclass
class Inner:
    logits: torch.Tensor
    note: str = "text"


@dataclass
class Outer:
    inner: Inner


class Returns(nn.Module):
    """Returns what `wrap` makes of its result."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


def test_fewer_samples_than_ranks_with_outputs_of_any_kind():
    """The rank without a sample finds the tensors in objects, and its own loss that is not finite weighs nothing."""

    def own_loss(out):
        return {"loss": F.cross_entropy(out, torch.full((len(out),), -100)), "logits": out}

    wraps = {"dataclass": lambda out: Outer(Inner(out)), "loss of its own": own_loss, "complex": lambda out: torch.complex(out, out)}
    reads = {"dataclass": lambda out: out.inner.logits, "loss of its own": lambda out: out["logits"], "complex": lambda out: out.real}
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(2, size, generator=generator, dtype=torch.float64) for size in (4, 3)) for _ in range(3)]

    def losses(kind):
        return lambda outputs, targets: ((reads[kind](outputs) - targets).square().sum(), len(targets))

    def body():
        return {kind: train(config(), batches, seeded(partial(Returns, wraps[kind])), losses(kind)) for kind in wraps}

    for kind, result in run(body, 3)[0].items():
        assert_same(result, train_by_hand(seeded(partial(Returns, wraps[kind]))().double(), batches, loss_fn=losses(kind)))


def test_ddp_is_quiet(capfd):
    """torch would warn on every rank that no parameter was unused."""
    run(lambda: train(config(), token_batches(2, 4, False)), 2)
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out == ""


def test_what_ddp_cannot_see_is_refused():
    class Opaque:
        def __init__(self, out):
            self.out = out

    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=True)

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.never = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x)

    def squares(outputs, targets):
        return (getattr(outputs, "out", outputs) - targets).square().sum(), len(targets)

    batches = [(torch.ones(4, 4), torch.ones(4, 3))] * 2

    def body(model, unused):
        with pytest.raises(UserError) as caught:
            train(config(strategy=DDP(find_unused_parameters=unused)), batches, model, squares)
        return str(caught.value)

    def cases():
        return body(lambda: Returns(Opaque), True), body(Reentrant, True), body(Sometimes, False)

    opaque, reentrant, unused = run(cases, 2)[0]
    assert "returns a Opaque" in opaque
    assert "use_reentrant=False" in reentrant
    assert "strategy.find_unused_parameters=true" in unused


def test_plain_mean_losses():
    """A mean over tokens, over samples, and a scalar mean whose micro-batch has nothing to count."""

    def token_mean(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def mse(outputs, targets):
        return F.mse_loss(outputs, targets)

    batches = token_batches(5, 7, True)
    for _, targets in batches:
        targets[1] = -100
    generator = torch.Generator().manual_seed(0)
    floats = [
        (torch.randn(7, 4, generator=generator, dtype=torch.float64), torch.randn(7, 3, generator=generator, dtype=torch.float64))
        for _ in range(5)
    ]
    linear = seeded(lambda: nn.Linear(4, 3))

    def body():
        return train(config(1), batches, loss_fn=token_mean), train(config(2), floats, linear, mse)

    (tokens, values), *_ = run(body, 2)
    assert_same(tokens, train_by_hand(seeded(Tiny)().double(), batches))
    reference = train_by_hand(linear().double(), floats, loss_fn=lambda o, t: ((o - t).square().sum() / 3, len(t)))
    assert_same(values, reference)


def test_own_loop_equals_train_step():
    """forward, backward, no_sync, clip and step by hand are the same step."""
    batches = token_batches(4, 8, True)

    def own_loop():
        engine = setup(seeded(Tiny), token_loss, config())
        losses = []
        for batch in batches:
            share = engine.local(batch)
            half = len(share.inputs) // 2
            with engine.no_sync():
                engine.backward(token_loss(engine(share.inputs[:half]), share.targets[:half]))
            engine.backward(token_loss(engine(share.inputs[half:]), share.targets[half:]))
            norm = engine.clip_grad_norm_(0.5)
            result = engine.step()
            assert result.grad_norm == float(norm)
            losses.append(result.loss)
        return losses, engine.full_state_dict()

    def body():
        return own_loop(), train(config(), batches)

    ((losses, weights), (ref_losses, _, _, ref_weights)), *_ = run(body, 2)
    assert losses == pytest.approx(ref_losses, abs=TOLERANCE)
    assert all(torch.allclose(weights[n], ref_weights[n], atol=TOLERANCE, rtol=0) for n in weights)


def test_one_rank_overflows_all_skip():
    """fp16: an overflow on one rank skips the step on all, halves the scale once, and leaves weights and schedule alone."""

    class Spike(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x):
            return self.linear(x)

    def body():
        precision = Precision("16-mixed", LossScale(init=1024.0, growth_interval=2))
        cfg = config(precision=precision, scheduler=Scheduler("constant", warmup_steps=10))
        engine = setup(seeded(Spike), lambda o, t: ((o.float() - t).square().sum(), len(t)), cfg)
        history = []
        for step in range(6):
            x = torch.ones(4, 4)
            if step == 1:
                x[0] = 300.0  # only rank 0 holds this sample: the loss is finite, its gradient leaves the range of float16
            result = engine.train_step(engine.local((x, torch.zeros(4, 1))))
            history.append((result.skipped, result.loss_scale, result.lr, engine.model.linear.weight.detach().clone()))
        return history, engine.scaler.skipped, engine.updates, engine.global_step

    ours, theirs = run(body, 2)
    history, skipped, updates, steps = ours
    assert [h[0] for h in history] == [False, True, False, False, False, False]
    assert [h[1] for h in history] == [1024.0, 1024.0, 512.0, 512.0, 1024.0, 1024.0]
    assert torch.equal(history[0][3], history[1][3])
    assert not torch.equal(history[1][3], history[2][3])
    assert [h[2] for h in history] == pytest.approx([1e-3, 2e-3, 2e-3, 3e-3, 4e-3, 5e-3])
    assert (skipped, updates, steps) == (1, 5, 6)
    for mine, other in zip(history, theirs[0], strict=True):
        assert mine[:3] == other[:3]
        assert torch.equal(mine[3], other[3])


def test_low_precision_follows_float32():
    """bf16-mixed, bf16-true and 16-mixed on 2 ranks stay within the rounding of 8 (11) bits of one float32 process."""
    batches = token_batches(5, 8, True)

    def body(name):
        scale = LossScale() if name == "16-mixed" else None
        return train(config(4, precision=Precision(name, scale)), batches)

    full = train(config(precision=Precision("32-true")), batches)
    for name, bound in (("bf16-mixed", 0.02), ("bf16-true", 0.05), ("16-mixed", 0.003)):
        (losses, _, _, weights), _ = run(body, 2, name)
        assert max(abs(a - b) for a, b in zip(losses, full[0], strict=True)) < bound, name
        assert losses != full[0], "the precision asked for is the one used"
        assert weights["up.weight"].dtype is (torch.bfloat16 if name == "bf16-true" else torch.float32)


def test_dropout_differs_between_ranks_and_repeats():
    """Masks are a function of (seed, step, micro-batch, data rank); the user's generator is not disturbed."""

    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.drawn = []

        def forward(self, x):
            self.drawn.append(F.dropout(torch.ones(64), 0.5))
            return x * self.scale

    def body():
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        engine = setup(Mask, lambda o, t: (o.sum(), len(o)), config(1))
        for _ in range(2):
            engine.train_step(engine.local((torch.ones(4, 1), None)))
        return torch.stack(engine.model.drawn), torch.equal(torch.rand(3), expected)

    (first, kept), (second, _) = run(body, 2)
    again, _ = run(body, 2)[0]
    masks = [*first, *second]
    assert kept
    assert torch.equal(first, again)
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_unused_parameters_and_conditional_use():
    """A module that a step does not call keeps its weights, in any layout."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.never, self.odd = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x, flag):
            out = self.used(x)
            return out + self.odd(x) if bool(flag[0]) else out

    generator = torch.Generator().manual_seed(0)
    batches = [
        ((torch.randn(6, 4, generator=generator), torch.full((6,), step % 2)), torch.randn(6, 3, generator=generator)) for step in range(4)
    ]

    def loss_fn(outputs, targets):
        return (outputs - targets).square().sum(), targets.numel()

    one = train(config(), batches, seeded(Sometimes), loss_fn)
    two, _ = run(lambda: train(config(), batches, seeded(Sometimes), loss_fn), 2)
    assert_same(two, (one[0], one[1], one[3]))
    start = seeded(Sometimes)().double().state_dict()
    assert torch.equal(two[3]["never.weight"], start["never.weight"])


def test_batch_norm_is_over_the_global_batch():
    build = seeded(lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6, 2)))
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(7, 3, 8, generator=generator, dtype=torch.float64) * 3 + 1,
            torch.randn(7, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(6)
    ]

    def loss_fn(outputs, targets):
        return (outputs - targets).square().sum(), len(targets)

    few = [tuple(part[:2] for part in batch) for batch in batches[:3]] + batches[3:]  # the third rank has no sample of the first three
    full, ragged = run(lambda: [train(config(), some, build, loss_fn) for some in (batches, few)], 3)[0]
    assert_same(full, train_by_hand(build().double(), batches, loss_fn=loss_fn))
    assert_same(ragged, train_by_hand(build().double(), few, loss_fn=loss_fn))
    with pytest.raises(UserError, match="BatchNorm"):
        setup(build, loss_fn, config(2))
    local_cfg = config(3)
    local_cfg = replace(local_cfg, trainer=replace(local_cfg.trainer, batch_norm="local"))
    local, _ = run(lambda: train(local_cfg, batches, build, loss_fn), 2)
    assert abs(local[0][0] - full[0][0]) > 1e-6


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_equals_one_process_and_refuses_micro_batches(norm):
    """Its estimate improves once a forward."""
    build = seeded(lambda: nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)))
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (4, 2)) for _ in range(3)]

    def loss_fn(outputs, targets):
        return (outputs - targets).square().sum(), len(targets)

    found, _ = run(lambda: train(config(), batches, build, loss_fn), 2)
    assert_same(found, train_by_hand(build().double(), batches, loss_fn=loss_fn))
    with pytest.raises(UserError, match="spectral norm"):
        setup(build, loss_fn, config(1))


def test_batch_norm_of_a_single_value_is_refused():
    build = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))

    def body():
        with pytest.raises(UserError, match="BatchNorm has a single value per channel"):
            train(config(), [(torch.randn(1, 4), torch.randn(1, 2))], build, F.mse_loss)

    run(body, 2)


def test_nested_batches_and_modules_instead_of_callables():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, extra):
            return {"out": self.linear(x) + extra["bias"], "note": "text"}

    def loss_fn(outputs, targets):
        return (outputs["out"] - targets["y"]).square().sum(), 1.0 * len(targets["y"])

    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batches = [({"x": rand(5, 3), "extra": {"bias": rand(5, 2)}}, {"y": rand(5, 2)}) for _ in range(3)]
    one = train(config(2), batches, seeded(Nested)(), loss_fn)
    two, _ = run(lambda: train(config(2), batches, seeded(Nested)(), loss_fn), 2)
    assert_same(two, (one[0], one[1], one[3]))


def test_eval_step_is_exact_and_changes_nothing():
    batches = token_batches(2, 7, True)

    def body():
        engine = setup(seeded(lambda: Tiny(dropout=0.5)), token_loss, config(2))
        engine.model.up.eval()
        before = engine.full_state_dict()
        results = [engine.eval_step(engine.local(batch)) for batch in batches]
        modes = engine.model.training, engine.model.up.training, engine.model.down.training
        after = engine.full_state_dict()
        return [(r.loss, r.count) for r in results], modes, all(torch.equal(before[k], after[k]) for k in before)

    (results, modes, unchanged), _, (other, _, _) = run(body, 3)
    model = seeded(Tiny)().double().eval()
    for (loss, count), (inputs, targets) in zip(results, batches, strict=True):
        total, number = token_loss(model(inputs).detach(), targets)
        assert (loss, count) == (pytest.approx(float(total / number), abs=TOLERANCE), int(number))
    assert results == other
    assert modes == (True, False, True)
    assert unchanged


def test_misuse_says_what_to_call():
    engine = setup(seeded(Tiny), token_loss, config())
    inputs, targets = token_batches(1, 4, False)[0]
    with pytest.raises(UserError, match=r"engine\.backward\(loss\)"):
        token_loss(engine(inputs), targets)[0].backward()
    with pytest.raises(UserError, match=r"engine\.backward\(loss\)"):
        engine.step()
    with pytest.raises(UserError, match="pair"):
        engine.train_step(inputs)
    with pytest.raises(UserError, match="disagree"):
        engine.train_step((inputs, targets[:3]))
    with pytest.raises(UserError, match="detach"):
        setup(seeded(Tiny), lambda o, t: (o.detach().sum(), 1), config()).train_step((inputs, targets))
    with pytest.raises(UserError, match="reduce it to a scalar"):
        setup(seeded(Tiny), lambda o, t: (o, 1), config()).train_step((inputs, targets))
    with pytest.raises(UserError, match="float16"):
        setup(seeded(lambda: Tiny().half()), token_loss, config(precision=Precision("16-mixed", LossScale())))


def test_nonfinite_loss_stops_before_the_update():
    engine = setup(seeded(Tiny), lambda o, t: (o.sum() * math.inf, 1), config())
    before = engine.full_state_dict()
    with pytest.raises(UserError, match=r"step 0: the loss is (nan|-?inf)"):
        engine.train_step(token_batches(1, 4, False)[0])
    assert all(torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())


@pytest.mark.parametrize("hook", ["fp16", "powersgd"])
def test_compressed_reductions_train(hook):
    """Compression changes the result, a little and not silently: the loss still follows the plain reduction."""
    batches = token_batches(8, 8, False)
    precision = Precision("32-true")
    compressed = replace(DDP(), comm_hook=hook, powersgd_rank=4, powersgd_start_step=2, find_unused_parameters=False)

    def body(strategy):
        return train(config(precision=precision, strategy=strategy), batches)

    (plain, *_), _ = run(body, 2, DDP())
    (losses, *_), (other, *_) = run(body, 2, compressed)
    assert losses == other
    assert losses != plain
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < (0.01 if hook == "fp16" else 0.1)


def test_bf16_hook_needs_nccl():
    with pytest.raises(RuntimeError, match="gloo has no bfloat16 all-reduce"):
        run(lambda: setup(seeded(Tiny), token_loss, config(strategy=DDP(comm_hook="bf16"))), 2)


def test_a_step_with_nothing_to_count_changes_nothing_and_goes_on():
    """Every target is masked: no loss, a norm of zero, and the next step is a step like any other."""
    inputs, targets = token_batches(1, 4, False)[0]

    def body():
        engine = setup(seeded(Tiny), token_loss, config())
        nothing = engine.train_step(engine.local((inputs, torch.full_like(targets, -100))))
        after = engine.train_step(engine.local((inputs, targets)))
        return nothing.count, nothing.grad_norm, math.isnan(nothing.loss), math.isfinite(after.loss)

    assert run(body, 2) == [(0, 0.0, True, True)] * 2


def test_engines_of_one_layout_share_their_process_groups():
    """gloo's threads of a group end with the process, so groups of their own would slow down whoever sets up often."""

    def body():
        threads = []
        for _ in range(3):
            setup(seeded(Tiny), token_loss, config())
            threads.append(len(os.listdir("/proc/self/task")))
        return threads

    for first, *others in run(body, 2):
        assert others == [first] * 2


def test_embeddings_that_rescale_their_weights_are_refused_on_several_ranks():
    """Each rank would rescale the rows of its own samples, and the replicas would train apart."""

    def body():
        with pytest.raises(UserError, match=r"model: 0 rescales its weights in forward \(max_norm\).*build it with max_norm=None"):
            setup(lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), token_loss, config())

    run(body, 2)
    setup(lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), token_loss, config())


def test_modules_compiled_by_torchscript_train_unsplit():
    build = seeded(lambda: nn.Sequential(nn.Linear(4, 5), torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh())), nn.Linear(5, 2)))
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (4, 2)) for _ in range(3)]

    def loss_fn(outputs, targets):
        return (outputs - targets).square().sum(), len(targets)

    def body():
        for key, other in {"strategy=fsdp": {"strategy": FSDP()}, "parallel.tp=2": {"parallel": Parallel(tp=2)}}.items():
            with pytest.raises(UserError, match=f"{key}: 1 is compiled by TorchScript, .* write strategy=ddp"):
                setup(build, loss_fn, config(**other))
        with pytest.raises(UserError, match="compiled by TorchScript as a whole"):
            setup(lambda: torch.jit.script(build()), loss_fn, config())
        return train(config(2), batches, build, loss_fn)

    found, _ = run(body, 2)
    assert_same(found, train_by_hand(build().double(), batches, loss_fn=loss_fn))
    report = verify(build, loss_fn, batches[0], config(), ranks=2)
    assert report.ok, report.text()

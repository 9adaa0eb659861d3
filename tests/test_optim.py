"""Optimizers: groups by name, every optimizer under every layout, and schedules by closed formula."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from reference import Tiny, config, token_batches, token_loss
from sharding_zoo import gpt
from torch import nn
from torch.distributed.tensor import Shard

from paratrain import optim
from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, LossScale, Optimizer, Parallel, ParamGroup, Precision, Scheduler, Single
from paratrain.errors import ConfigError, UserError
from paratrain.optim import low_bit, matrix
from paratrain.optim.build import not_matrices, undecayed
from paratrain.optim.schedules import factor
from paratrain.spawn import run

LIBRARY = {
    "adamw": Optimizer(lr=1e-2),
    "sgd": Optimizer("torch.optim.SGD", lr=1e-1, args={"momentum": 0.9}),
    "adafactor": Optimizer("torch.optim.Adafactor", lr=1e-2, weight_decay=0.0),
    "adabelief": Optimizer("pytorch_optimizer.AdaBelief", lr=1e-2),
    "lion": Optimizer("pytorch_optimizer.Lion", lr=1e-3),
    "lamb": Optimizer("pytorch_optimizer.Lamb", lr=1e-2),
    "came": Optimizer("pytorch_optimizer.CAME", lr=1e-3),  # by its name alone, and not known to be right when sharded
    "schedule_free": Optimizer("pytorch_optimizer.ScheduleFreeAdamW", lr=1e-2),
    "muon": Optimizer("paratrain.optim.Muon", lr=1e-2),
    "shampoo": Optimizer("paratrain.optim.Shampoo", lr=1e-2, args={"frequency": 3}),
    "soap": Optimizer("paratrain.optim.SOAP", lr=1e-2, args={"frequency": 3}),
    "adamw_8bit": Optimizer("paratrain.optim.LowBitAdamW", lr=1e-2, args={"bits": 8, "block": 32}),
    "adamw_4bit": Optimizer("paratrain.optim.LowBitAdamW", lr=1e-2, args={"bits": 4, "block": 32}),
    "adamw_offload": Optimizer("paratrain.optim.OffloadedAdamW", lr=1e-2),
}
REFUSED = {("fsdp", "adamw_offload"): "memory.offload=params"}
BATCHES = token_batches(6, 8, True)


def model():
    torch.manual_seed(11)
    return Tiny()


def train(cfg, batches=BATCHES, build=model):
    engine = setup(build, token_loss, cfg)
    losses = [engine.train_step(engine.local(batch)).loss for batch in batches]
    return losses, engine.full_state_dict()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The test's matrices are quantised too."""
    monkeypatch.setattr(low_bit, "SMALLEST", 64)


# ---------------------------------------------------------------------- groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.a, self.b = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.b.bias.requires_grad_(False)


def placed(options: Optimizer, net: nn.Module | None = None) -> dict[str, tuple]:
    """name -> (class, learning rate, decay)."""
    return {
        name: (type(optimizer).__name__, group["lr"], group.get("weight_decay"))
        for optimizer in optim.build(options, net or Net())
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_decay_leaves_norms_and_biases_alone():
    expected = {"norm.weight", "norm.bias", "a.bias", "b.bias"}
    assert undecayed(Net()) == expected
    decays = {name for name, (_, _, decay) in placed(Optimizer(weight_decay=0.3)).items() if decay == 0.3}
    assert decays == {"embed.weight", "a.weight", "b.weight", "head.weight"}
    assert {decay for _, _, decay in placed(Optimizer(weight_decay=0.3, no_decay="none")).values()} == {0.3}


def test_the_first_group_that_matches_wins():
    groups = [ParamGroup("a.*", {"lr": 1.0}), ParamGroup(["*.weight", "a.bias"], {"lr": 2.0, "weight_decay": 0.5})]
    found = placed(Optimizer(lr=3.0, weight_decay=0.1, groups=groups))
    assert found["a.weight"][1:] == (1.0, 0.1)
    assert found["a.bias"][1:] == (1.0, 0.0)
    assert found["norm.weight"][1:] == (2.0, 0.5), "a group's own decay holds for its norms too"
    assert found["norm.bias"][1:] == (3.0, 0.0)
    assert "b.bias" not in found, "frozen"


def test_several_classes_at_once():
    groups = [ParamGroup("embed.*", {"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.9})]
    found = placed(Optimizer(groups=groups))
    assert found["embed.weight"][:2] == ("SGD", 0.5)
    assert {kind for name, (kind, _, _) in found.items() if name != "embed.weight"} == {"AdamW"}


def test_all_mistakes_at_once():
    groups = [ParamGroup(["heads.*", "head.*"], {}), ParamGroup("a.*", {"momentum": 0.9})]
    with pytest.raises(ConfigError) as caught:
        optim.build(Optimizer(groups=groups, args={"beta": 3}), Net())
    text = str(caught.value)
    assert "groups[0].match: 'heads.*' matches no trainable parameter; their names look like embed.weight, norm.weight" in text
    assert "optimizer.momentum: torch.optim.AdamW takes no such argument (it takes lr, betas" in text
    assert "optimizer.beta: torch.optim.AdamW takes no such argument" in text
    with pytest.raises(ConfigError, match=r"optimizer.momentum: pytorch_optimizer.Lion takes no such argument"):
        optim.build(Optimizer("pytorch_optimizer.Lion", args={"momentum": 0.9}), Net())
    with pytest.raises(ConfigError, match="no trainable parameter"):
        optim.build(Optimizer(), Net().requires_grad_(False))
    with pytest.raises(ConfigError, match="refused its arguments: Invalid beta"):
        optim.build(Optimizer(args={"betas": [2.0, 0.9]}), Net())
    with pytest.raises(ConfigError, match="has no fused kernel"):
        optim.build(Optimizer("torch.optim.NAdam", fused=True), Net())
    with pytest.raises(ConfigError, match=r"optimizer.others: torch.optim.AdamW updates every parameter"):
        optim.build(Optimizer(others={"lr": 1.0}), Net())
    with pytest.raises(UserError, match=r"needs apex, which is not installed; .*pip install .*optimizer.fused=true"):
        optim.build(Optimizer("apex.optimizers.FusedAdam"), Net())


def test_matrices_and_others():
    assert not_matrices(Net()) == {"embed.weight", "norm.weight", "norm.bias", "a.bias", "b.bias", "head.weight"}
    assert not_matrices(Tiny()) == {"embed.weight", "up.bias", "down.bias", "norm.weight", "norm.bias"}
    found = placed(Optimizer("paratrain.optim.Muon", lr=0.1, weight_decay=0.2, others={"lr": 0.3}))
    assert {n for n, (kind, _, _) in found.items() if kind == "Muon"} == {"a.weight", "b.weight"}
    assert found["a.weight"][1:] == (0.1, 0.2)
    assert found["head.weight"] == ("AdamW", 0.3, 0.2)
    assert found["a.bias"] == ("AdamW", 0.3, 0.0)
    own = Optimizer("paratrain.optim.Muon", groups=[ParamGroup("head.*", {"_target_": "paratrain.optim.Muon", "lr": 0.7})])
    assert placed(own)["head.weight"][:2] == ("Muon", 0.7)
    with pytest.raises(ConfigError, match=r"a.bias has shape \(4,\), and Muon updates matrices; leave it to optimizer.others"):
        optim.build(Optimizer("paratrain.optim.Muon", groups=[ParamGroup("a.*", {"_target_": "paratrain.optim.Muon"})]), Net())


# ---------------------------------------------------------------------- what they compute


def twin_steps(ours, theirs, shape=(48, 80), steps=4, dtype=torch.float32):
    """Weights after the same gradients."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape, dtype=dtype), [torch.randn(shape, dtype=dtype) for _ in range(steps)]
    results = []
    for make in (ours, theirs):
        weight = nn.Parameter(start.clone())
        optimizer = make([weight])
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        results.append(weight.detach())
    return results


def test_muon_is_torchs():
    for mine, theirs in (("original", "original"), ("match_rms_adamw", "match_rms_adamw")):
        a, b = twin_steps(
            lambda p, m=mine: optim.Muon(p, lr=0.1, adjust_lr=m), lambda p, t=theirs: torch.optim.Muon(p, lr=0.1, adjust_lr_fn=t)
        )
        assert torch.allclose(a, b, atol=2e-3)  # torch adds bfloat16 steps, this adds them in float32


def test_orthogonalised():
    values = torch.linalg.svdvals(matrix.orthogonalise(torch.randn(20, 50, dtype=torch.float64)))
    assert 0.6 < values.min() < values.max() < 1.3


def test_soap_and_shampoo_by_their_papers():
    """In closed form: the sign of the gradient in the eigenbasis of the one before; U V^T scaled to the norm of Adam's sign."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 6, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(first)

    def moved(cls, grads, **args):
        weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
        optimizer = cls([weight], lr=1.0, weight_decay=0.0, **args)
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        return -weight.detach()

    assert torch.allclose(moved(optim.SOAP, [first, second]), u @ (u.T @ second @ vt.T).sign() @ vt, atol=1e-3)
    assert torch.allclose(moved(optim.Shampoo, [first]), u @ vt * math.sqrt(36 / 6), atol=1e-6)


def test_low_bit_codes():
    quant = pytest.importorskip("torchao.optim.quant_utils")
    for bits, exponents, signed in ((8, 7, True), (8, 7, False), (4, 3, True)):
        assert torch.equal(low_bit.code_book(bits, signed), torch.tensor(quant.create_dynamic_map(signed, exponents, bits)))
    value = torch.randn(3, 70)
    for bits, bound in ((8, 0.05), (4, 0.3)):
        codes, scale = low_bit._encode(value, bits, 32, "exp_avg")
        assert (codes.shape[-1], scale.shape) == (70 * bits // 8, (3, 3))
        back = low_bit._decode(codes, scale, value.shape, bits, 32, "exp_avg")
        assert float((back - value).abs().max() / value.abs().max()) < bound


def test_low_bit_follows_adamw():
    exact, _ = twin_steps(lambda p: torch.optim.AdamW(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1), steps=10)
    for bits, bound in ((32, 1e-6), (8, 0.05), (4, 0.5)):
        mine, _ = twin_steps(lambda p, b=bits: optim.LowBitAdamW(p, lr=0.1, bits=b), lambda p: torch.optim.AdamW(p), steps=10)
        start, _ = twin_steps(lambda p: torch.optim.SGD(p), lambda p: torch.optim.SGD(p), steps=0)
        assert float((mine - exact).norm() / (exact - start).norm()) < bound, bits


def test_stochastic_rounding_keeps_what_rounding_loses():
    """1000 updates of a thousandth of the weight's spacing: lost to rounding, kept on average."""
    spacing = 2.0**-7

    def moved(stochastic):
        weight = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        optimizer = optim.LowBitAdamW([weight], lr=spacing / 1000, weight_decay=0.0, bits=32, stochastic_rounding=stochastic)
        for _ in range(1000):
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
        return float(weight.float().mean().detach() - 1) / spacing

    assert moved(False) == 0.0
    assert moved(True) == pytest.approx(1.0, abs=0.1)


def test_stochastic_rounding_is_unbiased_and_the_same_however_weights_are_split():
    value = torch.linspace(1, 2, 4097)[:-1].repeat(64, 1)
    up = low_bit.stochastic_round(value, low_bit.random_bits(value, 7)).float()
    assert set((up - value.bfloat16().float()).abs().unique().tolist()) <= {0.0, 2.0**-7}
    error = (up.mean(0) - value[0]) / 2.0**-7  # of a mean of 64 draws, in spacings: standard deviation at most 1 / 16
    assert float(error.abs().max()) < 5 / 16
    assert abs(float(error.mean())) < 5 / 16 / 4096**0.5
    assert float(torch.corrcoef((up - value)[:2])[0, 1].abs()) < 0.1, "rows draw for themselves"

    def body():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        from paratrain import distributed

        distributed.init(torch.device("cpu"), timedelta(seconds=60))
        mesh = init_device_mesh("cpu", (2, 2))
        torch.manual_seed(0)
        start, grads = torch.randn(7, 6, 5).bfloat16(), [torch.randn(7, 6, 5).bfloat16() for _ in range(4)]
        results = []
        for placements in (None, (Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(2)), (Replicate(), Replicate())):
            place = (lambda x: x) if placements is None else (lambda x, p=placements: distribute_tensor(x, mesh, p))
            weight = nn.Parameter(place(start.clone()))
            optimizer = optim.LowBitAdamW([weight], lr=1e-3, bits=32, stochastic_rounding=True)
            for grad in grads:
                weight.grad = place(grad.clone())
                optimizer.step()
            results.append(matrix.whole(weight.detach()))
        return results

    for first, *others in run(body, 4):
        for other in others:
            assert torch.equal(first, other)


def test_sgd_updates_16_bit_weights():
    """torch's fused kernel for the CPU does not (2.13), and says nothing."""
    weight = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    (optimizer,) = optim.build(Optimizer("torch.optim.SGD", lr=0.5, weight_decay=0.0), nn.ParameterDict({"w": weight}))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((3, 3), 0.5, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"optimizer.fused: .*does not update 16-bit weights on the CPU"):
        optim.build(Optimizer("torch.optim.SGD", fused=True), nn.ParameterDict({"w": weight}))


# ---------------------------------------------------------------------- every layout


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_bit, "SMALLEST", 64)
        return {(name, kind): train(cfg_of(name, kind)) for name in LIBRARY for kind in ("64-true", "32-true")}


def cfg_of(name, kind, **sections):
    return config(optimizer=LIBRARY[name], precision=Precision(kind), **sections)


@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda s: s.name)
def test_layouts_equal_one_process(strategy, alone):
    """float64, and float32 where that quantises: 2 ranks, ragged batches, clipping."""
    cases = [(name, kind) for name in LIBRARY for kind in ("64-true", "32-true") if (strategy.name, name) not in REFUSED]

    def body():
        low_bit.SMALLEST = 64
        return [train(cfg_of(name, kind, strategy=strategy)) for name, kind in cases]

    results, _ = run(body, 2)
    for case, (losses, weights) in zip(cases, results, strict=True):
        expected, reference = alone[case]
        bound = {"64-true": 1e-7, "32-true": 2e-2}[case[1]] if case[0] == "soap" else {"64-true": 1e-10, "32-true": 2e-3}[case[1]]
        assert losses == pytest.approx(expected, abs=bound), case
        assert max(float((weights[n] - w).abs().max()) for n, w in reference.items()) < bound * 10, case
        assert len(set(expected)) == len(expected)


MODEL_PARALLEL = {
    "tp": (2, {"strategy": DDP(), "parallel": Parallel(tp=2)}),
    "pp": (2, {"strategy": DDP(), "parallel": Parallel(pp=2)}),
    "hsdp": (4, {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2, dp_shard=2)}),
    "fsdp-tp": (4, {"strategy": FSDP(), "parallel": Parallel(tp=2)}),
    "fsdp-pp": (4, {"strategy": FSDP(), "parallel": Parallel(pp=2)}),
}


@pytest.mark.parametrize("layout", [*MODEL_PARALLEL][:2] + [pytest.param(name, marks=pytest.mark.slow) for name in [*MODEL_PARALLEL][2:]])
def test_model_parallel_layouts_equal_one_process(layout):
    """Where a matrix is split by rows, by columns or both, or lies on another stage; float64, clipping by row, element and norm, too."""
    ranks, sections = MODEL_PARALLEL[layout]
    names = (
        [name for name in LIBRARY if name != "adamw_offload"] if ranks == 4 else ["adamw", "adafactor", "muon", "shampoo", "soap", "came"]
    )

    def cfg(name, **sections):
        made = cfg_of(name, "64-true", **sections)
        return replace(made, trainer=replace(made.trainer, clip_adaptive=0.05, clip_value=0.01))

    def body():
        return {name: train(cfg(name, **sections), BATCHES[:4], gpt()) for name in names}

    found = run(body, ranks)[0]
    for name in names:
        losses, weights = train(cfg(name, strategy=Single()), BATCHES[:4], gpt())
        bound = 1e-7 if name == "soap" else 1e-10
        assert found[name][0] == pytest.approx(losses, abs=bound), name
        assert max(float((found[name][1][n] - w).abs().max()) for n, w in weights.items()) < bound * 10, name


def test_refused_where_weights_are_sharded():
    def body():
        with pytest.raises(ConfigError, match=r"pytorch_optimizer.Prodigy updates a parameter by what it sees of the others.*strategy=ddp"):
            train(config(optimizer=Optimizer("pytorch_optimizer.Prodigy", lr=1.0), strategy=FSDP()))
        with pytest.raises(ConfigError, match=r"memory.offload=params"):
            train(cfg_of("adamw_offload", "32-true", strategy=FSDP()))

    run(body, 2)


@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda s: s.name)
def test_resume_is_bit_exact(strategy, tmp_path):
    def body():
        low_bit.SMALLEST = 64
        for name in LIBRARY:
            if (strategy.name, name) in REFUSED:
                continue
            for kind in ("32-true", "bf16-true") if name in ("muon", "adamw_8bit", "adamw_offload") else ("32-true",):
                cfg = cfg_of(name, kind, strategy=strategy)
                engine = setup(model, token_loss, cfg)
                for batch in BATCHES[:3]:
                    engine.train_step(engine.local(batch))
                path = tmp_path / f"{name}-{kind}"
                engine.save(path)
                again = setup(model, token_loss, cfg)
                again.load(path)
                for batch in BATCHES[3:]:
                    a, b = (e.train_step(e.local(batch)) for e in (engine, again))
                    assert (a.loss, a.grad_norm, a.lr) == (b.loss, b.grad_norm, b.lr), (name, kind)
                mine, other = engine.full_state_dict(), again.full_state_dict()
                assert all(torch.equal(mine[key], other[key]) for key in mine), (name, kind)

    run(body, 2)


def test_another_layout_continues(tmp_path):
    """Saved by one process, continued by two sharded ones, and back."""

    def first(strategy, name):
        low_bit.SMALLEST = 64
        engine = setup(model, token_loss, cfg_of(name, "32-true", strategy=strategy))
        for batch in BATCHES[:3]:
            engine.train_step(engine.local(batch))
        engine.save(tmp_path / f"{name}-{strategy.name}")

    def then(strategy, name, source):
        low_bit.SMALLEST = 64
        engine = setup(model, token_loss, cfg_of(name, "32-true", strategy=strategy))
        engine.load(tmp_path / f"{name}-{source}")
        return [engine.train_step(engine.local(batch)).loss for batch in BATCHES[3:]]

    names = [name for name in LIBRARY if ("fsdp", name) not in REFUSED]
    run(lambda: [first(DDP(), name) for name in names], 1)
    run(lambda: [first(FSDP(), name) for name in names], 2)
    one, *_ = run(lambda: [then(DDP(), name, "fsdp") for name in names], 1)
    two, *_ = run(lambda: [then(FSDP(), name, "ddp") for name in names], 2)
    straight = [train(cfg_of(name, "32-true"))[0][3:] for name in names]
    for name, a, b, c in zip(names, one, two, straight, strict=True):
        bound = 2e-2 if name == "soap" else 2e-3  # the sign of a gradient in an eigenbasis that float32 barely determines
        assert a == pytest.approx(c, abs=bound), name
        assert b == pytest.approx(c, abs=bound), name


@pytest.mark.parametrize("name", LIBRARY)
def test_an_overflow_changes_nothing(name):
    """fp16: neither weights nor any state of the optimizer move in a skipped step."""
    engine = setup(model, token_loss, replace(cfg_of(name, "32-true"), precision=Precision("16-mixed", LossScale(init=256.0))))
    engine.train_step(engine.local(BATCHES[0]))

    def snapshot():
        states = [
            [(k, v.clone() if isinstance(v, torch.Tensor) else v) for k, v in o.state[p].items()]
            for o in engine.optimizers
            for g in o.param_groups
            for p in g["params"]
        ]
        groups = [{k: v for k, v in g.items() if k != "params"} for o in engine.optimizers for g in o.param_groups]
        return states, groups, [p.detach().clone() for p in engine.model.parameters()]

    before = snapshot()
    engine.scaler.scale = 2.0**40
    assert engine.train_step(engine.local(BATCHES[1])).skipped
    after = snapshot()
    assert str(before) == str(after)
    assert not engine.train_step(engine.local(BATCHES[1])).skipped or engine.scaler.scale < 2.0**40


def test_schedule_free_evaluates_its_average():
    engine = setup(model, token_loss, cfg_of("schedule_free", "64-true"))
    for batch in BATCHES:
        engine.train_step(engine.local(batch))
    trained = engine.model.up.weight.detach().clone()
    state = engine.optimizers[0].state[engine.model.up.weight]
    average = engine.full_state_dict()["up.weight"]
    assert torch.allclose(trained, 0.9 * average + 0.1 * state["z"], atol=1e-12)  # y = beta x + (1 - beta) z
    loss = engine.eval_step(engine.local(BATCHES[0])).loss
    assert torch.equal(engine.model.up.weight, trained), "evaluation puts back every bit"
    engine.model.load_state_dict(engine.full_state_dict())
    total, count = token_loss(engine.model.eval()(BATCHES[0][0]), BATCHES[0][1])
    assert loss == pytest.approx(float(total.detach() / count), abs=1e-12)


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (Scheduler("constant", warmup_steps=4), {0: 0.25, 3: 1.0, 50: 1.0}),
        (Scheduler("linear", warmup_steps=10, min_ratio=0.1), {9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1, 500: 0.1}),
        (Scheduler("cosine", warmup_steps=0, min_ratio=0.2), {0: 1.0, 50: 0.6, 25: 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 100: 0.2}),
        (Scheduler("wsd", warmup_steps=10, decay_steps=20), {10: 1.0, 79: 1.0, 89: 0.5, 99: 0.0, 120: 0.0}),
        (Scheduler("wsd"), {89: 1.0, 94: 0.5, 99: 0.0}),
        (Scheduler("inverse_sqrt", warmup_steps=9, min_ratio=0.15), {8: 1.0, 35: 0.5, 99: 0.3, 9999: 0.15}),
    ],
    ids=lambda value: value.name if isinstance(value, Scheduler) else "",
)
def test_schedules(scheduler, expected):
    for step, value in expected.items():
        assert factor(scheduler, step, 100) == pytest.approx(value, abs=1e-12), step
    warm = [factor(scheduler, step, 100) for step in range(scheduler.warmup_steps)]
    assert warm == [(i + 1) / scheduler.warmup_steps for i in range(scheduler.warmup_steps)]


# ---------------------------------------------------------------------- limits on gradients


@pytest.mark.parametrize("strategy", [DDP(), FSDP()], ids=lambda s: s.name)
def test_clipping_by_value_and_by_row(strategy):
    """Against plain torch: rows to a tenth of their weights' norm, then elements to 0.002."""
    inputs, targets = BATCHES[0]
    reference = model().double()
    total, count = token_loss(reference(inputs), targets)
    (total / count).backward()
    expected = {}
    for name, param in reference.named_parameters():
        rows, grads = (x.reshape(len(x), -1) if param.ndim > 1 else x.reshape(1, -1) for x in (param.detach(), param.grad))
        factor = (0.1 * rows.norm(dim=1).clamp(min=1e-3) / grads.norm(dim=1).clamp(min=1e-6)).clamp(max=1)
        expected[name] = param.detach() - (grads * factor[:, None]).view_as(param).clamp(-0.002, 0.002)

    def body():
        base = config(clip=None, strategy=strategy, optimizer=Optimizer("torch.optim.SGD", lr=1.0, weight_decay=0.0))
        return train(replace(base, trainer=replace(base.trainer, clip_value=0.002, clip_adaptive=0.1)), BATCHES[:1])[1]

    weights, _ = run(body, 2)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, atol=1e-12, rtol=0), name

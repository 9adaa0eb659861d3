"""Expert parallelism against a hand-written single-process loop, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from expert_lists import Listed
from reference import LENGTH, VOCAB, Tiny, config, token_batches, token_loss, train_by_hand
from test_tensor_parallel import TOLERANCE, assert_same, seeded
from torch import nn

from paratrain import combinations
from paratrain.__main__ import main
from paratrain.api import setup
from paratrain.compat import grouped_product
from paratrain.config import DDP, FSDP, HSDP, Context, DeepSpeedZero2, LossScale, Memory, Parallel, Precision, Single, Zero1, Zero2
from paratrain.errors import UserError
from paratrain.loss import sequence_balance
from paratrain.metrics import flops
from paratrain.metrics.expert_load import ExpertLoad
from paratrain.models.moe import Experts, Mixture, MoE, balanced_cross_entropy
from paratrain.parallel import experts
from paratrain.spawn import run
from paratrain.verify import verify
from paratrain.verify.callback import check_replicas


def mixture(balance=True, top_k=2):
    return MoE(VOCAB, LENGTH, layers=2, dim=16, heads=2, experts=4, top_k=top_k, ffn=12, balance=balance)


def loss(outputs, targets):
    return balanced_cross_entropy(outputs, targets, 0.1)


def train(cfg, batches, build, loss_fn=loss):
    engine = setup(build, loss_fn, cfg)
    steps = [engine.train_step(engine.local(batch)) for batch in batches]
    if cfg.parallel.pp == 1:
        check_replicas(engine)
    return [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()


LAYOUTS = {
    "ep2": (2, Parallel(ep=2), DDP()),
    "ep4": (4, Parallel(ep=4), DDP()),
    "ep2 x ddp2": (4, Parallel(ep=2), DDP()),
    "ep2 x fsdp2": (4, Parallel(ep=2), FSDP()),
    "ep4 x fsdp2": (8, Parallel(ep=4), FSDP()),
    "ep2 x zero1": (4, Parallel(ep=2), Zero1()),
    "ep2 x zero2": (4, Parallel(ep=2), Zero2()),
    "ep2 x hsdp2x2": (8, Parallel(ep=2, dp_replicate=2, dp_shard=2), HSDP()),
    "tp2": (2, Parallel(tp=2), DDP()),
    "ep2 x tp2": (4, Parallel(ep=2, tp=2), DDP()),
    "ep2 x tp2, sequence": (4, Parallel(ep=2, tp=2, sp=True), DDP()),
    "ep2 x tp2 x fsdp2": (8, Parallel(ep=2, tp=2), FSDP()),
    "ep2 x tp2 x pp2": (8, Parallel(ep=2, tp=2, pp=2), DDP()),
    "ep2 x pp2": (4, Parallel(ep=2, pp=2), DDP()),
    "ep2 x pp2 x fsdp2": (8, Parallel(ep=2, pp=2), FSDP()),
}


BUILDS = {"mixture": (seeded(mixture), loss), "list": (seeded(Listed), token_loss)}


@pytest.fixture(scope="module")
def by_hand():
    return {kind: train_by_hand(build().double(), token_batches(10, 8, True), loss_fn=fn) for kind, (build, fn) in BUILDS.items()}


SLOW = {"ep2 x tp2 x fsdp2", "ep2 x tp2 x pp2", "ep4 x fsdp2", "ep2 x zero2", "ep2 x hsdp2x2", "ep2 x pp2 x fsdp2"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS])
def test_equals_one_process(name, by_hand):
    """A mixture of our own and experts in lists; masked, clipped, accumulated."""
    ranks, parallel, strategy = LAYOUTS[name]
    kinds = ("mixture",) if parallel.pp > 1 else BUILDS

    def body():
        cfg = config(2, parallel=parallel, strategy=strategy)
        return {kind: train(cfg, token_batches(10, 8, True), *BUILDS[kind]) for kind in kinds}

    first, *others = run(body, ranks)
    for kind in kinds:
        assert_same(first[kind], by_hand[kind])
        assert all(other[kind][:2] == first[kind][:2] for other in others), "every rank reports the same numbers"


def test_sequences_split_over_ranks_too():
    """The balance of a sequence is of the whole of it, so the loss goes without."""
    build = seeded(lambda: mixture(balance=False))
    expected = train_by_hand(build().double(), token_batches(4, 8, True), loss_fn=token_loss)
    cfg = config(2, parallel=Parallel(ep=2, cp=2), context=Context("all_to_all"))
    result, *_ = run(lambda: train(cfg, token_batches(4, 8, True), build, token_loss), 4)
    assert_same(result, expected)


def one_sided():
    """Every token goes to the first expert, so that ranks with others get no rows."""
    model = mixture(top_k=1)
    for block in model.blocks:
        torch.nn.init.zeros_(block.ffn.router.weight)
    return model


def test_uneven_loads_and_memory_options():
    """No rows for a rank; exchanges that are recomputed, activations on the host, weights drawn on meta."""
    options = {
        "one-sided": (seeded(one_sided), loss, Memory()),
        "recomputed": (*BUILDS["mixture"], Memory(recompute="full")),
        "list recomputed": (*BUILDS["list"], Memory(recompute="full")),
        "offloaded": (*BUILDS["mixture"], Memory(activations="offload")),
    }

    def body():
        cfg = config(2, parallel=Parallel(ep=2))
        found = {n: train(replace(cfg, memory=m), token_batches(3, 8, True), b, fn) for n, (b, fn, m) in options.items()}
        drawn = [
            setup(BUILDS[kind][0], BUILDS[kind][1], replace(cfg, parallel=Parallel(ep=ep), memory=Memory(init="meta"))).full_state_dict()
            for kind in BUILDS
            for ep in (1, 2)
        ]
        return found, drawn

    (found, drawn), _ = run(body, 2)
    for name, (build, fn, _) in options.items():
        assert_same(found[name], train_by_hand(build().double(), token_batches(3, 8, True), loss_fn=fn))
    for alone, dealt in zip(drawn[::2], drawn[1::2], strict=True):
        assert alone.keys() == dealt.keys()
        assert all(torch.equal(alone[name], dealt[name]) for name in alone)


def continued(path, cfg, kind, saves):
    """Losses of two steps, then of two more after what `path` holds: saved there in between, or loaded from there."""
    engine = setup(*BUILDS[kind], cfg)
    batches = token_batches(4, 8, True)
    if saves:
        for batch in batches[:2]:
            engine.train_step(engine.local(batch))
        engine.save(path)
    else:
        engine.load(path)
    return [engine.train_step(engine.local(batch)).loss for batch in batches[2:]], engine.full_state_dict()


@pytest.mark.parametrize("kind", BUILDS)
def test_a_checkpoint_goes_on_under_another_layout(kind, tmp_path):
    alone, dealt = (1, config(2)), (4, config(2, parallel=Parallel(ep=2), strategy=FSDP()))
    replicated, matrices = (2, config(2, parallel=Parallel(ep=2))), (4, config(2, parallel=Parallel(ep=2, tp=2)))
    for number, (first, others) in enumerate([(dealt, [alone, replicated]), (alone, [dealt, matrices]), (matrices, [alone])]):
        path = tmp_path / str(number)
        expected, *_ = run(continued, first[0], path, first[1], kind, True)
        for ranks, cfg in others:
            found, *_ = run(continued, ranks, path, cfg, kind, False)
            assert max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True)) < 1e-12
            assert max(float((found[1][name] - value).abs().max()) for name, value in expected[1].items()) < 1e-10


def test_an_overflow_in_one_expert_is_skipped_by_all_ranks():
    def body():
        cfg = config(precision=Precision("16-mixed", LossScale(init=64.0)), parallel=Parallel(ep=2))
        found = []
        for kind, (build, fn) in BUILDS.items():
            engine = setup(build, fn, cfg)
            before = engine.full_state_dict()
            (inputs, targets) = engine.local(token_batches(1, 4, False)[0])[:2]
            engine.backward(fn(engine(inputs), targets))
            if engine.mesh.data.get_local_rank() == 1:
                expert = next(p for n, p in engine.model.named_parameters() if "experts" in n and p.grad is not None)
                expert.grad.to_local().view(-1)[0] = float("inf")
            step = engine.step()
            after = engine.full_state_dict()
            found.append((kind, step.skipped, engine.scaler.scale, all(torch.equal(after[name], before[name]) for name in before)))
        return found

    for found in run(body, 2):
        assert found == [("mixture", True, 32.0, True), ("list", True, 32.0, True)]


def test_evaluation_and_ranks_without_samples():
    """3 samples for 4 ranks: one sends a filler, whose rows weigh nothing."""

    def body(ranks):
        found = []
        for build, fn in BUILDS.values():
            engine = setup(build, fn, config(parallel=Parallel(ep=2 if ranks > 1 else 1)))
            steps = [engine.train_step(engine.local(batch)) for batch in token_batches(3, 3, False)]
            found += [s.loss for s in steps] + [engine.eval_step(engine.local(token_batches(1, 3, False)[0])).loss]
        return found

    (expected,), (found, *_) = run(body, 1, 1), run(body, 4, 4)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < TOLERANCE


class Normalised(Experts):
    def forward(self, rows, index, weights):
        return super().forward(rows, index, weights / weights.sum(-1, keepdim=True))


class Mixed(Experts):
    def forward(self, rows, index, weights):
        return super().forward(rows - rows.mean(0), index, weights)


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for expert in self.experts:
            x = x + expert(x)
        return x


def planned(model, **parallel):
    return experts.planned(model.to("meta"), config(parallel=Parallel(**({"ep": 2} | parallel))))


def holding(module):
    model = nn.Module()
    model.add_module("inner", module)
    return model


def test_which_experts_are_found():
    plan = planned(mixture())
    assert experts.lines(plan, 2)[0] == "blocks.0.ffn.experts: experts 0-1 on rank 0, 2-3 on rank 1"
    assert list(planned(Listed())) == ["layers.0.moe.experts", "layers.1.moe.experts"]
    assert list(planned(mixture(), ep_plan=["blocks.1.*.experts"])) == ["blocks.1.ffn.experts"]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Tiny, {}, r"no experts found.*parallel\.ep=1"),
        (mixture, {"ep": 3}, r"blocks\.0\.ffn\.experts has 4 experts, which do not divide over 3 ranks; write parallel\.ep=2 or 4"),
        (mixture, {"ep_plan": ["nothing"]}, r"parallel\.ep_plan: 'nothing' matches no module"),
        (mixture, {"ep_plan": ["blocks.0.ffn"]}, r"blocks\.0\.ffn.*does not take three arguments"),
        (Listed, {"pp": 2}, r"inside a stage of parallel\.pp is not built yet"),
        (lambda: holding(Normalised(8, 4, 4, 0.02)), {}, r"not the sum over the chosen experts"),
        (lambda: holding(Mixed(8, 4, 4, 0.02)), {}, r"inner \(Mixed\).*(depends on the rows|not the sum)"),
        (lambda: Mixture(8, 4, 4, 2, 0.02), {"ep_plan": ["router"]}, r"router \(Linear\).*experts along dim 0"),
    ],
)
def test_what_cannot_be_dealt_is_refused(build, options, message):
    with pytest.raises(UserError, match=message):
        planned(build(), **options)


def test_a_list_whose_calls_depend_on_results_is_refused():
    def body():
        engine = setup(Reading, lambda out, target: ((out - target) ** 2).sum(), config(parallel=Parallel(ep=2)))
        with pytest.raises(UserError, match="what an expert is called with depends on the results of others"):
            engine.train_step((torch.randn(4, 4).double(), torch.randn(4, 4).double()))

    run(body, 2)


def test_the_balance_of_a_sequence():
    """Against the formula written out, for one sequence at a time."""
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
    for row, kept, found in zip(logits, mask, sequence_balance(logits, 2, mask=mask), strict=True):
        row = row[kept]
        chosen = row.topk(2).indices
        share = torch.stack([(chosen == e).sum() for e in range(4)]) * 4 / (2 * len(row))
        assert torch.allclose((share * row.softmax(-1).mean(0)).sum(), found)
    flat = [layer.flatten(0, 1) for layer in (logits, -logits)]
    assert torch.allclose(sequence_balance(flat, 2, 3), (sequence_balance(logits, 2) + sequence_balance(-logits, 2)) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_products(dtype):
    rows, matrices = torch.randn(7, 8, dtype=dtype, requires_grad=True), torch.randn(3, 8, 16, dtype=dtype, requires_grad=True)
    found = grouped_product(rows, matrices, torch.tensor([2, 2, 7]))
    expected = torch.cat([rows[:2] @ matrices[0], rows[2:] @ matrices[2]])
    weight = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (rows, matrices), weight) for x in (found, expected)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 if dtype != torch.bfloat16 else 1e-1)
    assert torch.allclose(found, expected, atol=1e-5 if dtype != torch.bfloat16 else 1e-1)


def test_loads_are_those_of_one_process():
    """Recomputed blocks and evaluation count once and not at all."""

    def body(parallel):
        engine = setup(*BUILDS["mixture"], config(2, parallel=parallel, memory=Memory(recompute="full")))
        trainer, callback, metrics = SimpleNamespace(engine=engine), ExpertLoad(), {}
        callback.on_fit_start(trainer)
        for batch in token_batches(2, 8, True):
            engine.train_step(engine.local(batch))
            engine.eval_step(engine.local(batch))
        counted = sum(int(load.sum()) for load in callback.loads)
        callback.on_log(trainer, metrics)
        return counted, metrics

    ((counted, expected),), dealt = run(body, 1, Parallel()), run(body, 2, Parallel(ep=2))
    assert counted == sum(count for count, _ in dealt) == 2 * 2 * 8 * LENGTH * 2
    assert all(metrics == expected for _, metrics in dealt)
    assert expected["moe/load_max"] > 1 > expected["moe/load_min"]


def test_verify_proves_a_layout():
    for tp in (1, 2):
        cfg = config(parallel=Parallel(ep=2, tp=tp), precision=Precision())
        for build, fn in BUILDS.values():
            report = verify(build, fn, token_batches(2, 8, True), cfg, ranks=4)
            assert report.ok, report.text()


def test_flops_are_those_of_the_chosen_experts():
    def of(top_k):
        with torch.device("meta"):
            model = MoE(VOCAB, LENGTH, layers=2, dim=16, heads=2, experts=4, top_k=top_k, ffn=12)
        return flops.count(model, torch.zeros(2, LENGTH, dtype=torch.long))

    one, two = of(1), of(2)
    assert two.source == "counted"
    assert two.forward - one.forward == 2 * LENGTH * 2 * (3 * 16 * 12)
    assert two.full - one.full == 3 * (two.forward - one.forward)


def test_inspect_shows_which_experts_go_where(capsys):
    assert main(["inspect", "model=moe", "parallel.ep=4", "strategy=fsdp", "model.layers=1"]) == 0
    assert "blocks.0.ffn.experts: experts 0-1 on rank 0, 2-3 on rank 1, 4-5 on rank 2, 6-7 on rank 3" in capsys.readouterr().out


def test_inspect_shows_what_tensor_and_pipeline_parallelism_do(capsys):
    assert main(["inspect", "model=moe", "parallel.tp=2", "parallel.pp=2", "strategy=ddp", "model.layers=2"]) == 0
    text = capsys.readouterr().out
    assert "1 on rank 1 of pp: blocks.1, 656,640 parameters" in text
    assert "blocks.*.attention.out.weight: dim 1 split (2 of them)" in text
    assert "blocks.*.ffn.router.weight: whole on every rank, because topk" in text


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"strategy": Single()}, "parallel.ep"),
        ({"strategy": DDP(static_graph=True)}, "strategy.static_graph"),
        ({"strategy": DeepSpeedZero2()}, "parallel.ep"),
        ({"memory": Memory(recompute="selective")}, "memory.recompute"),
        ({"memory": Memory(recompute="auto", budget_gib=1.0)}, "memory.recompute"),
        ({"compile": True}, "compile"),
        ({"parallel": Parallel(ep_plan=["experts"])}, "parallel.ep_plan"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_built(sections, key):
    cfg = config(**({"parallel": Parallel(ep=2), "strategy": DDP()} | sections))
    assert key in [fault.key for fault, _ in combinations.faults_of(cfg)]

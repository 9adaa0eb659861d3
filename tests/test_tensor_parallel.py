"""Tensor and sequence parallelism against a hand-written single-process loop, in float64."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import zoo
from reference import LENGTH, VOCAB, config, token_batches, token_loss, train_by_hand
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Memory, Parallel, Precision
from paratrain.errors import UserError
from paratrain.models.gpt import GPT
from paratrain.parallel import tensor
from paratrain.spawn import run

TOLERANCE = 1e-10  # float64, the same sums in another order


def seeded(build):
    def model():
        torch.manual_seed(11)
        return build()

    return model


def gpt(tied=False, dropout=0.0):
    return GPT(VOCAB, LENGTH, layers=2, dim=16, heads=4, kv_heads=4, ffn=20, tied=tied, dropout=dropout)


def loss(outputs, targets):
    outputs = getattr(outputs, "logits", outputs)
    if outputs.ndim == 3:
        return token_loss(outputs, targets)
    return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)


def train(cfg, batches, build):
    engine = setup(build, loss, cfg)
    steps = [engine.train_step(engine.local(batch)) for batch in batches]
    return [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()


def assert_same(result, expected, tolerance=TOLERANCE):
    losses, norms, weights = result
    ref_losses, ref_norms, ref_weights = expected
    assert max(abs(a - b) for a, b in zip(losses, ref_losses, strict=True)) < tolerance
    assert max(abs(a - b) for a, b in zip(norms, ref_norms, strict=True)) < tolerance
    assert weights.keys() == ref_weights.keys()
    assert max(float((weights[name] - value).abs().max()) for name, value in ref_weights.items()) < tolerance


LAYOUTS = {
    "tp2": (2, Parallel(tp=2), DDP()),
    "tp2 sp": (2, Parallel(tp=2, sp=True), DDP()),
    "tp4": (4, Parallel(tp=4), DDP()),
    "tp3 of 4 heads": (3, Parallel(tp=3), DDP()),
    "tp2 x dp2": (4, Parallel(tp=2), DDP()),
    "tp2 sp x dp2": (4, Parallel(tp=2, sp=True), DDP()),
    "tp2 x fsdp2": (4, Parallel(tp=2), FSDP()),
    "tp2 sp x fsdp2": (4, Parallel(tp=2, sp=True), FSDP()),
    "hsdp2x2 x tp2": (8, Parallel(tp=2, dp_replicate=2, dp_shard=2), HSDP()),
}


@pytest.fixture(scope="module")
def by_hand():
    return {tied: train_by_hand(seeded(lambda tied=tied: gpt(tied))().double(), token_batches(10, 8, True)) for tied in (False, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, by_hand):
    """Tied and untied, masked, clipped, accumulated; 17 tokens in the vocabulary, which no degree divides."""
    ranks, parallel, strategy = LAYOUTS[name]

    def body():
        cfg = config(2, parallel=parallel, strategy=strategy)
        return [train(cfg, token_batches(10, 8, True), seeded(lambda tied=tied: gpt(tied))) for tied in (False, True)]

    first, *others = run(body, ranks)
    for tied in (False, True):
        assert_same(first[tied], by_hand[tied])
        assert all(other[tied][:2] == first[tied][:2] for other in others), "every rank reports the same numbers"


class Rows(nn.Module):
    """Embedding and head of numbers of rows that neither tp nor the shards divide."""

    def __init__(self, rows, bias):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(rows, 8), nn.LayerNorm(8), nn.Linear(8, rows, bias=bias)

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def test_rows_that_neither_tp_nor_shards_divide():
    """torch's _StridedShard misplaces rows then; 17 rows on 2 x 4 ranks trained silently wrong."""
    batches, sizes = token_batches(3, 8, True), (17, 18, 19, 21, 30)
    plan = {"embed": "vocab", "head": "colwise"}

    def body():
        cfg = config(parallel=Parallel(tp=2, tp_plan=plan), strategy=FSDP())
        with pytest.raises(UserError, match=r"head\.bias has 17 rows.*no other dim"):
            setup(seeded(lambda: Rows(17, True)), loss, cfg)
        return [train(cfg, batches, seeded(lambda rows=rows: Rows(rows, rows % 2 == 0))) for rows in sizes]

    results, *_ = run(body, 8, timeout=200)
    for rows, result in zip(sizes, results, strict=True):
        assert_same(result, train_by_hand(seeded(lambda rows=rows: Rows(rows, rows % 2 == 0))().double(), batches))


def test_recomputation(by_hand):
    def body(memory):
        cfg = config(2, parallel=Parallel(tp=2, sp=True), memory=memory)
        return train(cfg, token_batches(10, 8, True), seeded(lambda: gpt(True)))

    for memory in (Memory(recompute="full"), Memory(recompute="selective", init="meta")):
        result, _ = run(body, 2, memory)
        if memory.init == "constructor":
            assert_same(result, by_hand[True])


def zoo_batches(name):
    generator = torch.Generator().manual_seed(0)
    if name in zoo.VISION:
        return [
            (torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64), torch.randint(0, 10, (4,), generator=generator))
            for _ in range(3)
        ]
    tokens = [torch.randint(0, zoo.VOCAB, (4, zoo.TIME + 1), generator=generator) for _ in range(3)]
    batches = [(t[:, :-1].clone(), t[:, 1:].clone()) for t in tokens]
    for _, targets in batches:
        targets[1, 3:] = -100
    return batches


ZOO = {**zoo.LANGUAGE, **zoo.VISION}
SPLIT = {  # what a good plan splits, (dim, runs); all else is whole
    "fused": {
        "h.0.c_attn.weight": (0, 3),
        "h.0.c_proj.weight": (1, 1),
        "h.1.c_fc.bias": (0, 1),
        "h.1.c_out.weight": (1, 1),
        "lm_head.weight": (0, 1),
    },
    "fused, tied": {"h.1.c_attn.bias": (0, 3), "lm_head.weight": (0, 1), "wte.weight": (0, 1)},
    "cut heads": {"h.0.c_attn.weight": (0, 3), "h.1.c_attn.bias": (0, 3), "h.0.c_proj.weight": (1, 1)},
    "shared heads": {"h.0.to_k.weight": (0, 1), "h.0.o.weight": (1, 1), "h.0.gate_up.weight": (0, 2), "h.0.down.weight": (1, 1)},
    "parallel": {"h.0.wide.weight": (0, 4), "h.1.attention_out.weight": (1, 1), "h.1.mlp_out.weight": (1, 1)},
    "torch": {"encoder.layers.0.self_attn.in_proj_weight": (0, 3), "encoder.layers.0.self_attn.out_proj.weight": (1, 1)},
    "torch, time first": {"encoder.layers.1.self_attn.in_proj_bias": (0, 3), "encoder.layers.1.linear2.weight": (1, 1)},
    "lstm": {"embed.weight": (0, 1), "out.weight": (0, 1)},
    "mixer": {"blocks.0.tokens.0.weight": (0, 1), "blocks.0.tokens.2.weight": (1, 1), "blocks.1.channels.2.weight": (1, 1)},
    "vit": {"blocks.0.qkv.weight": (0, 3), "blocks.0.proj.weight": (1, 1), "blocks.1.mlp.3.weight": (1, 1)},
    "convolutions": {"head.2.weight": (0, 1), "head.4.weight": (1, 1)},
}


@pytest.mark.parametrize("sequence", [False, True])
def test_plans_are_derived_for_modules_as_people_write_them(sequence):
    def body():
        results = {}
        for name, make in ZOO.items():
            engine = setup(seeded(make), loss, config(2, parallel=Parallel(tp=2, sp=sequence)))
            steps = [engine.train_step(engine.local(batch)) for batch in zoo_batches(name)]
            plan = engine._layout.placed.plan
            split = {param: (placement.dim, len(placement.parts)) for param, placement in plan.placements.items()}
            results[name] = [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict(), split
        return results

    results, _ = run(body, 2, timeout=300)
    for name, make in ZOO.items():
        *result, split = results[name]
        assert_same(result, train_by_hand(seeded(make)().double(), zoo_batches(name), loss_fn=loss))
        assert SPLIT[name].items() <= split.items(), name


class Translator(nn.Module):
    """Names its inputs on the device of its weights, as Hugging Face's BART does, looks at values, and calls its tokens by name."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)

    @property
    def dummy_inputs(self):
        return {"input_ids": torch.ones(2, 4, dtype=torch.int64, device=self.embed.weight.device)}

    def forward(self, input_ids=None, decoder_input_ids=None):
        if decoder_input_ids is None or bool((input_ids < 0).any()):
            raise ValueError("decoder_input_ids must be given")
        return self.head(self.embed(input_ids) + self.embed(decoder_input_ids))


def test_inputs_are_found_for_a_model_that_names_them():
    with torch.device("meta"):
        model = Translator()
    text = tensor.describe(tensor.planned(model, config(parallel=Parallel(tp=2))))
    assert all(f"{name}: dim 0 split" in text for name in ("embed.weight", "head.weight", "head.bias"))


def test_inputs_are_found_for_bags_of_embeddings():
    with torch.device("meta"):
        model = nn.Sequential(nn.EmbeddingBag(40, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    plan = tensor.planned(model, config(parallel=Parallel(tp=2)))
    assert {name: placement.dim for name, placement in plan.placements.items()} == {"1.weight": 0, "1.bias": 0, "3.weight": 1}


def test_what_stays_whole_is_listed_with_the_reason():
    def body():
        engine = setup(seeded(lambda: zoo.Decoder(zoo.SharedHeadsBlock)), loss, config(parallel=Parallel(tp=4)))
        return dict(engine._layout.placed.plan.reasons), list(engine._layout.placed.plan.lines())

    (reasons, lines), *_ = run(body, 4)
    assert "24 features become (6, 4), of which no dim can be split over 4 ranks" in reasons["h.*.to_q.weight"]
    assert reasons["h.*.o.weight"] == "its result meets a whole activation"
    assert "h.*.gate_up.weight: dim 0 split as 2 runs (36, 36) (2 of them)" in lines


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 / x.shape[-1]

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 / grad.shape[-1]


class Custom(nn.Module):
    """A function of its own between two matrices, which depends on how many features there are."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(VOCAB, 8), nn.Linear(8, 16), nn.Linear(16, VOCAB)

    def forward(self, tokens):
        return self.down(Doubled.apply(self.up(self.embed(tokens))))


def test_what_cannot_be_followed_is_refused_or_stays_whole():
    batches = token_batches(3, 4, True)
    asked = {"up": "colwise", "down": "rowwise"}

    def body():
        derived = train(config(parallel=Parallel(tp=2)), batches, seeded(Custom))
        told = train(config(parallel=Parallel(tp=2, tp_plan=asked)), batches, seeded(Custom))
        plan = {"h.*.to_q": "colwise", "h.*.o": "rowwise"}
        uneven = seeded(lambda: zoo.Decoder(lambda: zoo.SharedHeadsBlock(heads=3, groups=1)))
        with pytest.raises(UserError, match=r"h\.0\.to_q\.weight cannot stay split.*choose parallel\.tp that divides"):
            train(config(parallel=Parallel(tp=2, tp_plan=plan)), zoo_batches("fused"), uneven)
        with pytest.raises(UserError, match=r"'blocks\.\*\.q_prj' matches no module.*did you mean"):
            setup(seeded(lambda: gpt()), loss, config(parallel=Parallel(tp=2, tp_plan={"blocks.*.q_prj": "colwise"})))
        with pytest.raises(UserError, match="'columns' is no style"):
            setup(seeded(lambda: gpt()), loss, config(parallel=Parallel(tp=2, tp_plan={"head": "columns"})))
        return derived, told

    (derived, told), _ = run(body, 2)
    for result in (derived, told):
        assert_same(result, train_by_hand(seeded(Custom)().double(), batches))


def test_a_plan_of_the_users_own():
    plan = {
        "wte": "vocab",
        "h.*.c_attn": "colwise/3",
        "h.*.c_proj": "rowwise",
        "h.*.c_fc": "colwise",
        "h.*.c_out": "rowwise",
        "h.1.*": "replicate",
    }

    def body():
        cfg = config(2, parallel=Parallel(tp=2, tp_plan=plan))
        engine = setup(seeded(zoo.LANGUAGE["fused"]), loss, cfg)
        steps = [engine.train_step(engine.local(batch)) for batch in zoo_batches("fused")]
        split = sorted(engine._layout.placed.plan.placements)
        return ([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()), split

    (result, split), _ = run(body, 2)
    assert_same(result, train_by_hand(seeded(zoo.LANGUAGE["fused"])().double(), zoo_batches("fused"), loss_fn=loss))
    assert split == [
        f"h.0.{name}" for name in ("c_attn.bias", "c_attn.weight", "c_fc.bias", "c_fc.weight", "c_out.weight", "c_proj.weight")
    ] + ["wte.weight"]


RING = [
    (2, Parallel(tp=2), DDP()),
    (4, Parallel(tp=2, sp=True), FSDP()),
    (4, Parallel(tp=4), DDP()),
    (2, Parallel(), FSDP()),
    (1, Parallel(), DDP()),
]


@pytest.mark.parametrize("layouts", [RING[:2], pytest.param(RING, marks=pytest.mark.slow)], ids=["two", "all"])
def test_checkpoints_name_no_rank(layouts, tmp_path):
    """Fused matrices are kept in another order than the user's, and saved in the user's."""
    build, batches = seeded(zoo.LANGUAGE["fused, tied"]), zoo_batches("fused") * 2
    reference = train_by_hand(build().double(), batches, loss_fn=loss)

    def body(parallel, strategy, load, save):
        engine = setup(build, loss, config(2, parallel=parallel, strategy=strategy))
        if load:
            engine.load(tmp_path / load)
        part = batches[3:] if load else batches[:3]
        losses = [engine.train_step(engine.local(batch)).loss for batch in part]
        if save:
            engine.save(tmp_path / save)
        return losses, engine.full_state_dict()

    for number, (ranks, parallel, strategy) in enumerate(layouts):
        before, _ = run(body, ranks, parallel, strategy, None, f"step-{number}")[0]
        ranks, parallel, strategy = layouts[(number + 1) % len(layouts)]
        after, weights = run(body, ranks, parallel, strategy, f"step-{number}", None)[0]
        assert max(abs(a - b) for a, b in zip(before + after, reference[0], strict=True)) < TOLERANCE
        assert max(float((weights[name] - value).abs().max()) for name, value in reference[2].items()) < TOLERANCE


class Collectives(TorchDispatchMode):
    """Counts collectives by kind. (torch's CommDebugMode fails on modules whose names it cannot keep apart.)"""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def counted(parallel, layers):
    """Collectives of the forward, the loss and the backward of one step."""
    model = seeded(lambda: GPT(VOCAB, LENGTH, layers=layers, dim=16, heads=4, ffn=20))
    engine = setup(model, loss, config(parallel=parallel))
    inputs, targets = token_batches(1, 4, False)[0]
    with Collectives() as forward:
        outputs = engine._layout.run(inputs)
    with Collectives() as of_loss:
        total, _ = loss(outputs, targets)
    with Collectives() as backward:
        total.backward()
    return dict(forward.counts), dict(of_loss.counts), dict(backward.counts)


def test_collectives_are_those_of_the_theory():
    """Megatron-LM's: an all-reduce after attention and after the MLP, forward and backward; gathers and scatters for sequences."""
    layers = 3

    def body():
        return counted(Parallel(tp=2), layers), counted(Parallel(tp=2, sp=True), layers)

    (plain, sequence), _ = run(body, 2)
    forward, of_loss, backward = plain
    assert forward == {"allreduce": 2 * layers + 1}, "attention, MLP, and the embedding"
    assert of_loss == {"allreduce": 3}, "the greatest score, the sum of exponentials and the target's score"
    assert backward == {"allreduce": 2 * layers + 1}, "attention, MLP, and the head"
    forward, of_loss, backward = sequence
    assert forward == {"allgather": 2 * layers + 1, "reduce_scatter": 2 * layers + 1}
    assert backward == {"allgather": 2 * layers + 1, "reduce_scatter": 2 * layers + 1, "allreduce": 2 * layers + 1}, (
        "and the norms' gradients"
    )


class Noise(nn.Module):
    """Dropout of a whole and of a split activation."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x):
        self.kept = F.dropout(torch.ones_like(x), 0.5)
        h = F.dropout(self.up(x).mul(0).add(1), 0.5)
        self.inner = h
        return self.down(h) + x * self.kept


def test_dropout_differs_where_activations_do():
    from paratrain.parallel.tp_split import Split

    def body():
        plan = {"up": "colwise", "down": "rowwise"}
        engine = setup(Noise, lambda o, t: (o.sum(), len(o)), config(parallel=Parallel(tp=2, tp_plan=plan)))
        history = []
        for _ in range(2):
            engine.train_step(engine.local((torch.ones(4, 8, dtype=torch.float64), None)))
            assert isinstance(engine.model.inner, Split)
            history.append((engine.model.kept.clone(), engine.model.inner.local.detach().clone()))
        return history

    first, second = run(body, 2)
    for (kept, inner), (other_kept, other_inner) in zip(first, second, strict=True):
        assert torch.equal(kept, other_kept)
        assert not torch.equal(inner, other_inner)
    assert not torch.equal(first[0][1], first[1][1]), "new numbers every step"


def test_half_precision_follows_float32():
    batches = token_batches(5, 8, True)

    def body(name):
        return train(config(4, parallel=Parallel(tp=2), precision=Precision(name)), batches, seeded(gpt))

    full = train(config(precision=Precision("32-true")), batches, seeded(gpt))
    for name, bound in (("32-true", 1e-4), ("bf16-mixed", 0.03)):
        (losses, _, weights), _ = run(body, 2, name)
        assert max(abs(a - b) for a, b in zip(losses, full[0], strict=True)) < bound, name
        assert weights["head.weight"].dtype is torch.float32


def test_activations_are_freed():
    """What an activation remembers of its entry into a product does not keep it alive."""

    def body():
        import torch.distributed as dist

        from paratrain.parallel.tp_split import Peers, enter

        x = torch.ones(3, requires_grad=True) * 2
        seen = weakref.ref(enter(x, Peers(dist.group.WORLD, dist.get_rank(), 2)))
        alive = seen() is not None
        gc.disable()
        del x
        return alive, seen() is None

    assert run(body, 2) == [(True, True)] * 2


def test_config():
    from paratrain.config import from_dict
    from paratrain.errors import ConfigError

    for faulty, match in (
        ({"parallel": {"sp": True}}, "parallel.sp: is read under tensor parallelism only"),
        ({"parallel": {"tp": 2}, "strategy": {"name": "single"}}, "parallel.tp: 2, but strategy=single"),
        ({"parallel": {"tp": 2}, "compile": True}, "compile: "),
        ({"parallel": {"tp": 2}, "strategy": {"name": "ddp", "comm_hook": "fp16"}}, "strategy.comm_hook: belongs to"),
        ({"parallel": {"tp": 2, "tp_plan": 3}}, "parallel.tp_plan"),
    ):
        with pytest.raises(ConfigError, match=match):
            from_dict(faulty)
    assert from_dict({"parallel": {"tp": 2, "tp_plan": {"a.*": "colwise"}}}).parallel.tp_plan == {"a.*": "colwise"}


def test_example_shows_a_plan():
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, root / "examples/tp_plan.py", "2"], capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert "blocks.*.attention.out.weight: dim 1 split (4 of them)" in shown.stdout, shown.stderr

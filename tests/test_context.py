"""Sequences split over ranks against one process, in float64: every exchange, with data parallelism and shards; and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import VOCAB, config, token_loss
from test_pipeline import assert_same, by_hand, train
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Context, Memory, Parallel, Pipeline
from paratrain.models.gpt import GPT
from paratrain.spawn import run

METHODS = ["all_to_all", "all_gather", "ring"]


def gpt(tied=True, layers=2):
    torch.manual_seed(11)
    return GPT(VOCAB, 8, layers=layers, dim=16, heads=4, kv_heads=2, ffn=24, tied=tied)


def batches(steps, size, length=8):
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (size, length + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[torch.arange(length) >= torch.randint(1, length + 1, (size, 1), generator=generator)] = -100
        made.append((tokens[:, :-1].clone(), targets))
    return made


def split(method, cp=2, micro=None, strategy=None, **sections):
    return config(micro, parallel=Parallel(cp=cp), context=Context(method), strategy=strategy or DDP(), **sections)


@pytest.mark.parametrize("cp", [2, 4])
def test_every_exchange_equals_one_process(cp):
    data = batches(10, 5)

    def body():
        results = [train(split(method, cp, micro), data, gpt) for method in METHODS for micro in (None, 2)]
        return [*results, train(replace(split("ring", cp, 2), memory=Memory(recompute="full")), data, gpt)]

    expected = by_hand(gpt, data)
    for results in zip(*run(body, cp), strict=True):
        assert_same(results, expected)


def test_with_data_parallelism():
    data = batches(10, 5)

    def body():
        return [train(split(method, 2, 2, strategy), data, gpt) for method in METHODS for strategy in (DDP(), FSDP())]

    expected = by_hand(gpt, data)
    for results in zip(*run(body, 4), strict=True):
        assert_same(results, expected)


FOUR = {  # degrees, strategy, options of the pipeline
    "tp": (Parallel(cp=2, tp=2), DDP(), {}),
    "tp sp": (Parallel(cp=2, tp=2, sp=True), DDP(), {}),
    "pp": (Parallel(cp=2, pp=2), DDP(), {}),
    "pp zbv": (Parallel(cp=2, pp=2), DDP(), {"schedule": "zbv"}),
}
EIGHT = {
    "tp dp": (Parallel(cp=2, tp=2), DDP(), {}),
    "tp fsdp": (Parallel(cp=2, tp=2), FSDP(), {}),
    "tp hsdp": (Parallel(cp=2, tp=2, dp_replicate=2, dp_shard=1), HSDP(), {}),
    "pp dp": (Parallel(cp=2, pp=2), DDP(), {"schedule": "interleaved"}),
    "pp fsdp": (Parallel(cp=2, pp=2), FSDP(), {}),
    "tp sp pp": (Parallel(cp=2, tp=2, pp=2, sp=True), DDP(), {}),
}


def with_axes(ranks, layouts, tied, layers=4):
    """Masked, clipped, 2 samples a micro-batch. layouts: (degrees, strategy, options of the pipeline, method)."""
    data = batches(10, 5)

    def build():
        return gpt(tied, layers)

    def body():
        results = []
        for parallel, strategy, pipeline, method in layouts:
            cfg = config(2, parallel=parallel, strategy=strategy, pipeline=Pipeline(**pipeline), context=Context(method))
            results.append(train(cfg, data, build))
        return results

    expected = by_hand(build, data)
    for results in zip(*run(body, ranks, timeout=700), strict=True):
        assert_same(results, expected)


def test_with_tensor_and_pipeline_parallelism():
    with_axes(4, [(*FOUR["tp"], "all_to_all"), (*FOUR["tp sp"], "ring"), (*FOUR["pp"], "all_gather")], tied=True, layers=2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("method", METHODS)
def test_with_two_axes_more(method):
    with_axes(4, [(*layout, method) for layout in FOUR.values()], tied=False)
    with_axes(8, [(*layout, method) for layout in EIGHT.values()], tied=method != "ring")


def test_evaluation():
    data = batches(1, 3)[0]

    def body():
        engine = setup(gpt, token_loss, split("ring"))
        result = engine.eval_step(engine.local(data))
        return result.loss, result.count

    total, count = token_loss(gpt().double()(data[0]), data[1])
    for loss, counted in run(body, 2):
        assert loss == pytest.approx(float(total / count), abs=1e-10)
        assert counted == int(count)


class WrittenBlock(nn.Module):
    """As people write it: one matrix for q, k and v, heads counted by attributes, biases, an MLP beside the attention."""

    def __init__(self, heads, dim):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        h = self.norm(x)
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(h).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)
        return x + self.out(y) + self.down(F.gelu(self.up(h)))


class Written(nn.Module):
    def __init__(self, heads=4, dim=16, layers=2, tied=False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, dim), nn.Embedding(8, dim)
        self.layers = nn.ModuleList(WrittenBlock(heads, dim) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens, positions=None):
        positions = torch.arange(tokens.shape[1]) if positions is None else positions
        x = self.tokens(tokens) + self.places(positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def written():
    torch.manual_seed(3)
    return Written()


def llama():
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))


def logit_loss(outputs, targets):
    return token_loss(getattr(outputs, "logits", outputs), targets)


def test_models_of_other_people():
    pytest.importorskip("transformers")
    data = batches(4, 4)
    named = [({"input_ids": tokens, "use_cache": False}, targets) for tokens, targets in data]  # their way to packed documents is open
    layouts = [Parallel(cp=2), Parallel(cp=2, tp=2), Parallel(cp=2, pp=2)]

    def body():
        results = []
        for parallel, method in zip(layouts, METHODS, strict=True):
            cfg = config(2, parallel=parallel, context=Context(method), strategy=DDP())
            results.append((train(cfg, data, written, logit_loss), train(cfg, named, llama, logit_loss)))
        return results

    own, theirs = by_hand(written, data, logit_loss), by_hand(llama, named, logit_loss)
    for each in zip(*run(body, 4, timeout=300), strict=True):
        assert_same([result for result, _ in each], own)
        assert_same([result for _, result in each], theirs, 1e-5)  # norms in float32


class Noise(nn.Module):
    """Dropout of activations, and of attention to values that are all one."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(VOCAB, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        self.kept = F.dropout(torch.ones_like(x), 0.5, self.training)
        q = self.up(x).mul(0).unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q + 1, dropout_p=0.5 if self.training else 0)
        self.attended = getattr(y, "local", y)[..., 0].detach()
        return self.down(y.transpose(1, 2).flatten(2) + x * self.kept)


def test_dropout_differs_where_activations_do():
    """Between the ranks of cp, which hold other positions; between those of tp only where these hold other heads."""

    def body(method):
        plan = {"up": "colwise", "down": "rowwise"}
        cfg = config(parallel=Parallel(cp=2, tp=2, tp_plan=plan), context=Context(method), strategy=DDP())
        engine = setup(Noise, lambda o, t: (o.sum(), len(o)), cfg)
        history = []
        for _ in range(2):
            engine.train_step(engine.local((batches(1, 2, 16)[0][0], None)))
            history.append((engine.model.kept.clone(), engine.model.attended.clone()))
        return history

    for method in ("all_to_all", "all_gather"):
        ranks = run(body, 4, method)  # (cp, tp): (0, 0), (0, 1), (1, 0), (1, 1)
        for step in range(2):
            kept, attended = zip(*(history[step] for history in ranks), strict=True)
            assert torch.equal(kept[0], kept[1])
            assert torch.equal(kept[2], kept[3])
            assert not torch.equal(kept[0], kept[2])
            assert all(not torch.equal(attended[a], attended[b]) for a in range(4) for b in range(a))
            assert all(abs(float(each.mean()) - 1) < 0.3 for each in attended), "dropout keeps the mean"
        assert all(not torch.equal(first[0], second[0]) for first, second in ranks), "new numbers every step"
    with pytest.raises(RuntimeError, match="attention dropout"):
        run(body, 4, "ring")


class Hand(nn.Module):
    """Attention by hand: nothing that a call of a torch function would tell."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.sdpa(x)
        return self.head(self.mix(x))

    def sdpa(self, x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]

    def mix(self, x):
        weights = (x @ x.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9).softmax(-1)
        return weights @ x


class Convolution(Hand):
    def mix(self, x):
        return x + x.roll(1, dims=1)


class Counts(Hand):
    def mix(self, x):
        return x + torch.arange(x.shape[1])[:, None]


class Masked(Hand):
    def mix(self, x):
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


class Never(Hand):
    def sdpa(self, x):
        return x

    mix = sdpa


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Hand, "meet elsewhere"),
        (Convolution, "meet elsewhere"),
        (Counts, "counts positions by itself"),
        (Masked, "attention with a mask"),
        (Never, "never calls"),
    ],
)
def test_what_cannot_be_split_is_refused(build, message):
    def body():
        engine = setup(build, token_loss, split("all_gather"))
        engine.train_step(engine.local(batches(1, 2)[0]))

    with pytest.raises(RuntimeError, match=message):
        run(body, 2)


SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "Mistral",
            {"sliding_window": 6, "num_key_value_heads": 2, "max_position_embeddings": 32},
            "sliding_window=6 is shorter than the sequence of 8 positions",
        ),
        ("Llama", {"max_position_embeddings": 6, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "change with the length"),
        ("Roberta", {"max_position_embeddings": 32, "is_decoder": True}, "without position_ids the model does not count positions from 0"),
    ],
)
def test_what_depends_on_more_than_a_part_is_refused(name, options, message):
    """A rank's 4 positions of 8 show none of it: no mask for the window, no longer rotation, positions from another start."""
    transformers = pytest.importorskip("transformers")

    def build():
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **options))

    def body():
        engine = setup(build, logit_loss, split("all_to_all"))
        engine.train_step(engine.local(({"input_ids": (data := batches(1, 2)[0])[0]}, data[1])))

    with pytest.raises(RuntimeError, match=message):
        run(body, 2)


def test_shapes_that_do_not_divide():
    def body(method, length, build=gpt):
        engine = setup(build, token_loss, split(method))
        engine.train_step(engine.local(batches(1, 2, length)[0]))

    with pytest.raises(RuntimeError, match="pad or cut them to a multiple of 4"):
        run(body, 2, "ring", 6)
    with pytest.raises(RuntimeError, match=r"context.method=ring or all_gather"):
        run(body, 2, "all_to_all", 8, lambda: GPT(VOCAB, 8, layers=1, dim=18, heads=3, ffn=24))

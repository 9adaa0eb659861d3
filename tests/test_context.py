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
from paratrain.config import DDP, FSDP, Context, Memory, Parallel
from paratrain.models.gpt import GPT
from paratrain.spawn import run

METHODS = ["all_to_all", "all_gather", "ring"]


def gpt():
    torch.manual_seed(11)
    return GPT(VOCAB, 8, layers=2, dim=16, heads=4, kv_heads=2, ffn=24, tied=True)


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


def test_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")

    def build():
        torch.manual_seed(3)
        sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))

    def loss_fn(outputs, targets):
        return token_loss(outputs.logits, targets)

    data = [({"input_ids": tokens}, targets) for tokens, targets in batches(4, 4)]
    expected = by_hand(build, data, loss_fn)
    results = run(lambda: [train(split(method), data, build, loss_fn) for method in METHODS], 2)
    for each in zip(*results, strict=True):
        assert_same(each, expected, 1e-5)  # norms in float32


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


def test_shapes_that_do_not_divide():
    def body(method, length, build=gpt):
        engine = setup(build, token_loss, split(method))
        engine.train_step(engine.local(batches(1, 2, length)[0]))

    with pytest.raises(RuntimeError, match="pad or cut them to a multiple of 4"):
        run(body, 2, "ring", 6)
    with pytest.raises(RuntimeError, match=r"context.method=ring or all_gather"):
        run(body, 2, "all_to_all", 8, lambda: GPT(VOCAB, 8, layers=1, dim=18, heads=3, ffn=24))

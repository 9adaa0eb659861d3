"""Pipelines against one process, in float64: every schedule, tied and untied weights, ragged and masked batches, data parallelism."""

from __future__ import annotations

import pytest
import torch
from reference import LENGTH, VOCAB, config, token_batches, token_loss, train_by_hand
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Parallel, Pipeline, Zero1, Zero2
from paratrain.models.gpt import GPT
from paratrain.spawn import run

TOLERANCE = 1e-10
STEPS = 10
SCHEDULES = ["gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]


def gpt(tied=False, layers=8):
    torch.manual_seed(11)
    return GPT(VOCAB, 8, layers=layers, dim=16, heads=2, kv_heads=1, ffn=24, tied=tied)


def train(cfg, batches, build=gpt, loss_fn=token_loss):
    engine = setup(build, loss_fn, cfg)
    steps = [engine.train_step(engine.local(batch)) for batch in batches]
    return [s.loss for s in steps], [s.grad_norm for s in steps], [s.count for s in steps], engine.full_state_dict()


def by_hand(build, batches, loss_fn=token_loss):
    return train_by_hand(build().double(), batches, loss_fn=loss_fn)


def assert_same(results, expected, tolerance=TOLERANCE):
    ref_losses, ref_norms, ref_weights = expected
    losses, norms, _, weights = results[0]
    assert max(abs(a - b) for a, b in zip(losses, ref_losses, strict=True)) < tolerance
    assert max(abs(a - b) for a, b in zip(norms, ref_norms, strict=True)) < tolerance
    assert list(weights) == list(ref_weights)
    assert max(float((weights[name] - value).abs().max()) for name, value in ref_weights.items()) < tolerance
    for other in results[1:]:
        assert other[:3] == results[0][:3], "every rank reports the same numbers"
        assert other[3] == {}


def piped(pp, schedule="1f1b", micro=None, strategy=None, parallel=None, **options):
    return config(micro, parallel=parallel or Parallel(pp=pp), pipeline=Pipeline(schedule, **options), strategy=strategy or DDP())


@pytest.mark.parametrize(
    ("ranks", "tied"), [(2, False), (4, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, True), (4, False)))]
)
def test_every_schedule_equals_one_process(ranks, tied):
    batches = token_batches(STEPS, 9, True)

    def build():
        return gpt(tied)

    expected = by_hand(build, batches)

    def body():
        return [train(piped(ranks, name, micro=2), batches, build) for name in SCHEDULES]

    for results in zip(*run(body, ranks, timeout=300), strict=True):
        assert_same(results, expected)


STRATEGIES = {
    "ddp": (DDP(), Parallel(pp=2)),
    "fsdp": (FSDP(), Parallel(pp=2)),
    "zero1": (Zero1(), Parallel(pp=2)),
    "zero2": (Zero2(), Parallel(pp=2)),
    "fsdp_keeps": (FSDP(reshard_after_forward=False), Parallel(pp=2)),
}


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_data_parallelism(tied):
    """Ranks with fewer samples, and with none, take part in every micro-batch."""
    batches = [*token_batches(STEPS - 2, 9, True), *token_batches(2, 1, False)]

    def build():
        return gpt(tied, layers=4)

    def body():
        results = [train(piped(2, "1f1b", 2, *case), batches, build) for case in STRATEGIES.values()]
        results.append(train(piped(2, "interleaved", 2, FSDP()), batches, build))
        for name in ("zbv", "dualpipev", "interleaved_zero_bubble"):
            results += [train(piped(2, name, 2, strategy), batches, build) for strategy in (DDP(), FSDP(reshard_after_forward=False))]
        return results

    expected = by_hand(build, batches)
    for results in zip(*run(body, 4, timeout=300), strict=True):
        assert_same(results, expected)


def test_with_replicated_shards():
    batches = token_batches(STEPS, 9, True)
    results = run(lambda: train(piped(2, "1f1b", 2, HSDP(), Parallel(pp=2, dp_replicate=2, dp_shard=2)), batches), 8, timeout=300)
    assert_same(results, by_hand(gpt, batches))


class Skips(nn.Module):
    """What crosses stages beside the residual stream: the embedding, a norm of it, a list of block outputs, an integer, a direct weight."""

    def __init__(self, layers: int = 4, dim: int = 8):
        super().__init__()
        self.start = nn.Parameter(torch.randn(dim))
        self.embed = nn.Embedding(VOCAB, dim)
        self.first_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Mixed(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Linear(2 * dim, VOCAB)

    def forward(self, tokens, scale=None):
        x = x0 = self.embed(tokens) + self.start
        smooth = self.first_norm(x0)
        best = x0.argmax(-1)
        positions = torch.arange(tokens.shape[1]) / tokens.shape[1]
        outputs = []
        for index, layer in enumerate(self.layers):
            x, extra = layer(x, context={"first": x0 if index % 2 else smooth}, positions=positions, best=best)
            x = x + 0.1 * extra
            outputs.append(x)
        x = torch.cat([outputs[0] + x, outputs[1].tanh() * x0], dim=-1)
        return {"logits": self.head(self.norm(x)), "first": outputs[0]}


class Mixed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x, context, positions, best):
        y = self.down(torch.sin(self.up(x + context["first"]))) * positions[:, None]
        return x + y, y * (best[..., None] % 2)


def skips():
    torch.manual_seed(5)
    return Skips()


def logit_loss(outputs, targets):
    total, count = token_loss(outputs["logits"], targets)
    return total + 0.01 * outputs["first"].square().sum(), count


@pytest.mark.parametrize("ranks", [2, 4])
def test_skip_connections_are_carried(ranks):
    batches = token_batches(STEPS, 5, True)
    names = ["gpipe", "1f1b"] if ranks == 4 else SCHEDULES

    def body():
        return [train(piped(ranks, name, 1, place={"start": 0}), batches, skips, logit_loss) for name in names]

    expected = by_hand(skips, batches, logit_loss)
    for results in zip(*run(body, ranks), strict=True):
        assert_same(results, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_hugging_face_models(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}

    def build():
        torch.manual_seed(3)
        if family == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
        if family == "gpt2":
            small = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
            return transformers.GPT2LMHeadModel(small)
        if family == "bert":
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **still))
        small = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
        return transformers.T5ForConditionalGeneration(small)

    def loss_fn(outputs, targets):
        return token_loss(outputs.logits, targets)

    batches = []
    for tokens, targets in token_batches(4, 6, True):
        keep = torch.ones_like(tokens)
        keep[1, LENGTH - 2 :] = 0
        inputs = {"input_ids": tokens, "attention_mask": keep}
        if family == "t5":
            inputs["decoder_input_ids"] = tokens.flip(1)
        batches.append((inputs, targets))

    expected = by_hand(build, batches, loss_fn)
    results = run(lambda: [train(piped(2, name, 2), batches, build, loss_fn) for name in ("1f1b", "zbv")], 2, timeout=300)
    for each in zip(*results, strict=True):
        assert_same(each, expected, 1e-5)  # these models compute norms and softmaxes in float32, whatever the weights

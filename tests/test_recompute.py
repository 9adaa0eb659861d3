"""Recomputation, compilation and their combinations with sharding: the same step, with fewer activations kept."""

from __future__ import annotations

import pytest
import torch
from reference import LENGTH, VOCAB, config, token_batches, token_loss
from sharding_zoo import gpt, seeded, squares, zoo
from test_sharding import by_hand, difference, train
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, Memory, Single, Zero1, Zero2
from paratrain.errors import UserError
from paratrain.models.gpt import GPT
from paratrain.spawn import run

TOLERANCE = 1e-10
KINDS = {
    "full": Memory(recompute="full"),
    "every second": Memory(recompute="full", recompute_every=2),
    "selective": Memory(recompute="selective"),
}


def test_recomputed_steps_are_the_same_steps():
    """With dropout, so that a replay that draws other masks would show; running statistics are updated once."""
    batches = token_batches(3, 8, True)
    strategies = {"ddp": DDP(), "fsdp": FSDP(), "zero1": Zero1()}

    def body():
        found = {}
        for name, strategy in strategies.items():
            for kind, memory in {"none": Memory(), **KINDS}.items():
                found[name, kind, "dropout"] = train(config(2, strategy=strategy, memory=memory), gpt(dropout=0.3), token_loss, batches)
                for model in ("conv", "scalars", "routed"):
                    found[name, kind, model] = train(config(strategy=strategy, memory=memory), *zoo(3)[model])
        return found

    found = run(body, 2)[0]
    expected = {model: by_hand(*zoo(3)[model]) for model in ("conv", "scalars", "routed")}
    for (name, kind, model), result in found.items():
        if model == "dropout":
            assert difference(result, found[name, "none", model]) < TOLERANCE, (name, kind)
        else:
            assert difference(result, expected[model]) < TOLERANCE, (name, kind, model)
    assert difference(found["fsdp", "full", "dropout"], by_hand(gpt(), token_loss, batches)) > 1e-3, "dropout does something"


def test_recomputed_activations_are_not_kept():
    """Bytes that autograd keeps between forward and backward; selective keeps the results of matrix products."""

    def kept(memory):
        engine = setup(seeded(lambda: gpt()()), token_loss, config(strategy=Single(), memory=memory))
        inputs, _ = token_batches(1, 64, False)[0]
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
        ):
            engine(inputs)
        return sum(sizes.values())

    none, full, every_second = kept(Memory()), kept(KINDS["full"]), kept(KINDS["every second"])
    assert full < 0.4 * none
    assert full < every_second < none


def test_recomputation_leaves_evaluation_and_names_alone():
    engine = setup(gpt(), token_loss, config(strategy=Single(), memory=KINDS["full"]))
    plain = setup(gpt(), token_loss, config(strategy=Single()))
    batch = engine.local(token_batches(1, 4, True)[0])
    assert engine.eval_step(batch).loss == plain.eval_step(batch).loss
    assert engine.model.state_dict().keys() == plain.model.state_dict().keys()
    assert [name for name, _ in engine.model.named_modules()] == [name for name, _ in plain.model.named_modules()]


def test_compiled_blocks_train_the_same():
    """Traced by Dynamo and AOTAutograd, without a code generator, which the slow test adds."""
    batches = token_batches(2, 8, True)
    cases = {
        (type(strategy).__name__, memory.recompute): {"strategy": strategy, "memory": memory, "compile": "aot_eager"}
        for strategy, memory in ((DDP(), Memory()), (FSDP(), Memory()), (Zero2(), KINDS["full"]), (FSDP(), KINDS["selective"]))
    }

    def body():
        return {case: train(config(2, **sections), gpt(), token_loss, batches) for case, sections in cases.items()}

    for case, result in run(body, 2)[0].items():
        assert difference(result, by_hand(gpt(), token_loss, batches)) < TOLERANCE, case


def test_blocks_of_a_class_are_compiled_once():
    graphs = []

    @torch._dynamo.register_backend(name="counting")
    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    build = seeded(lambda: GPT(VOCAB, LENGTH, layers=12, dim=16, heads=2))
    for memory in (Memory(), KINDS["full"]):
        engine = setup(build, token_loss, config(strategy=Single(), compile="counting", memory=memory))
        for batch in token_batches(2, 4, False):
            engine.train_step(batch)
    assert len(graphs) == 2


@pytest.mark.slow
def test_inductor_trains_the_same():
    batches = token_batches(2, 8, True)

    def body():
        return [train(config(2, strategy=strategy, compile=True), gpt(), token_loss, batches) for strategy in (DDP(), FSDP())]

    for result in run(body, 2, timeout=600)[0]:
        assert difference(result, by_hand(gpt(), token_loss, batches)) < TOLERANCE


def test_compile_failures_name_the_block():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x)

    def build():
        return nn.Sequential(Untraceable(), Untraceable())

    @torch._dynamo.register_backend
    def refuses(graph, inputs):
        raise RuntimeError("this backend knows no linear")

    engine = setup(build, squares, config(strategy=Single(), compile="refuses"))
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"block '0' cannot be compiled.*compile=false"):
        engine.train_step((x, x))
    with pytest.raises(UserError, match="compile=nonsense: no such backend"):
        setup(build, squares, config(strategy=Single(), compile="nonsense"))


def test_a_block_that_the_compiler_skips_is_said_to_be_not_compiled(caplog):
    """It gives up on some functions without an error, and runs them as they are."""

    class Skipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            if any(map(lambda value: isinstance(value, list | dict), (x, x))):
                return x
            return self.linear(x)

    def build():
        return nn.Sequential(Skipped(), Skipped())

    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"block '0' cannot be compiled.*compile_fallback=true"):
        setup(build, squares, config(strategy=Single(), compile="aot_eager")).train_step((x, x))
    torch._dynamo.reset()
    with caplog.at_level("WARNING"):
        setup(build, squares, config(strategy=Single(), compile="aot_eager", compile_fallback=True)).train_step((x, x))
    assert any("block '0' cannot be compiled and runs as it is" in record.message for record in caplog.records)

"""What is traded for memory: the same steps with activations or states elsewhere, or forgotten as far as a budget asks."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss
from sharding_zoo import float_batches, gpt, seeded, squares, zoo
from test_sharding import by_hand, difference, train
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from paratrain.api import setup
from paratrain.config import DDP, FSDP, Memory, Optimizer, Single, Zero1, check
from paratrain.errors import ConfigError, UserError
from paratrain.parallel.activations import Budget, measure
from paratrain.spawn import RankError, run

TOLERANCE = 1e-10
STRATEGIES = {"ddp": DDP(), "fsdp": FSDP(), "zero1": Zero1()}
OFFLOAD = Memory(activations="offload")
MIB = 2**-10  # in GiB


def test_activations_in_host_memory_are_the_same_steps():
    """With dropout, running statistics, frozen and shared weights, compiled blocks; of recomputed blocks it is the inputs."""
    batches = token_batches(3, 8, True)

    def body():
        found = {}
        for name, strategy in STRATEGIES.items():
            for kind, memory in {"keep": Memory(), "offload": OFFLOAD, "inputs": replace(OFFLOAD, recompute="full")}.items():
                found[name, kind, "dropout"] = train(config(2, strategy=strategy, memory=memory), gpt(dropout=0.3), token_loss, batches)
                for model in ("conv", "scalars", "routed"):
                    found[name, kind, model] = train(config(strategy=strategy, memory=memory), *zoo(3)[model])
        found["fsdp", "offload", "compiled"] = train(
            config(2, strategy=FSDP(), memory=OFFLOAD, compile="aot_eager"), gpt(), token_loss, batches
        )
        return found

    found = run(body, 2)[0]
    assert difference(found.pop(("fsdp", "offload", "compiled")), by_hand(gpt(), token_loss, batches)) < TOLERANCE
    for name, kind, model in found:
        if kind != "keep":
            assert difference(found[name, kind, model], found[name, "keep", model]) < TOLERANCE, (name, model)


class Stack(nn.Module):
    """Blocks of one matrix and a tanh: of x [B, D] each keeps its input and the output of the tanh."""

    def __init__(self, layers: int = 4, dim: int = 64):
        super().__init__()
        self.embed = nn.Linear(dim, dim, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim, bias=False), nn.Tanh()) for _ in range(layers))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_activations_leave_the_device_and_weights_do_not():
    """What waits is a copy, which a change of the original in place does not reach; the weight is the very one."""
    engine = setup(seeded(Stack), squares, config(strategy=Single(), memory=OFFLOAD))
    block = engine.model.layers[0]
    x = torch.randn(8, 64, dtype=torch.float64, requires_grad=True).clone()
    expected = torch.autograd.grad(block(x).sum(), block[0].weight)[0]
    out = block(x)
    with torch.no_grad():
        x.zero_()
    assert torch.equal(torch.autograd.grad(out.sum(), block[0].weight, retain_graph=True)[0], expected)
    with torch.no_grad():
        block[0].weight.zero_()
    (through,) = torch.autograd.grad(out.sum(), x)
    assert not through.any()


def test_measured_bytes_of_a_block():
    x = torch.randn(8, 64, dtype=torch.float64)
    block = Stack().double().layers[0]
    state = torch.get_rng_state()
    assert measure(block, block, [x]) == x.numel() * 8
    dropout = nn.Sequential(block, nn.Dropout())
    assert measure(dropout, dropout, [x]) > x.numel() * 8
    assert torch.equal(torch.get_rng_state(), state)


def test_fewest_blocks_that_keep_within_the_budget():
    def fewest(mib: float) -> list[bool]:
        budget = Budget(mib * MIB, ["a", "b", "c", "d"])
        for name in "abcd":
            budget.note(name, torch.empty(2**20, dtype=torch.uint8), 4 * 2**20)
        return [budget.recomputes(name) for name in "abcd"]

    assert fewest(20) == [False] * 4
    assert fewest(19) == [True, False, False, False]  # 4 inputs, and 3 * 4
    assert fewest(12) == [True, True, False, False]
    assert fewest(11) == [True, True, True, False]  # 4 + 4, and 3 + 4 when the third is recomputed
    assert fewest(7.5) == [True] * 4  # 4 + 4 when the fourth is recomputed: too much, and all that can be done


@pytest.mark.parametrize(("mib", "recomputed"), [(1e6, 0), (0.1875, 2), (1e-6, 4)])
def test_recompute_auto_keeps_within_its_budget(mib, recomputed):
    """The first step measures, and recomputes every block; from the second on only as many as have to be."""
    cfg = config(strategy=Single(), memory=Memory(recompute="auto", budget_gib=mib * MIB))
    batches = float_batches(3, (64, 64), (64, 64))  # an activation has 32 KiB, and a block keeps two
    engine = setup(seeded(Stack), squares, cfg)
    calls, kept = ctypes.c_long(), []  # a count that is no state of Python's: a second forward gives that back

    def count(*_):
        calls.value += 1

    for layer in engine.model.layers:
        layer[0].register_forward_hook(count)
    for number, batch in enumerate(batches):
        calls.value = 0
        kept.clear()
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            engine.train_step(batch)
        if number:
            assert calls.value == 4 + recomputed
            weights = {param.data_ptr() for param in engine.model.parameters()}
            size = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.data_ptr() not in weights}
            outside = 2 * 2**15  # what the embedding and the loss keep
            assert sum(size.values()) <= max(mib * 2**20, 4 * 2**15) + outside
        else:
            assert calls.value == 4 * 3  # measured, forward, recomputed


def test_recompute_auto_is_the_same_step():
    """Ranks may decide differently: micro-batches differ, and batches grow."""
    batches = token_batches(2, 6, True) + token_batches(2, 10, True)

    def body():
        return {
            (name, kind): train(config(4, strategy=strategy, memory=memory), gpt(dropout=0.3), token_loss, batches)
            for name, strategy in STRATEGIES.items()
            for kind, memory in {
                "none": Memory(),
                "all": Memory(recompute="auto", budget_gib=1e-9),
                "some": Memory(recompute="auto", budget_gib=0.06 * MIB),
            }.items()
        }

    found = run(body, 2)[0]
    for name, kind in found:
        assert difference(found[name, kind], found[name, "none"]) < TOLERANCE, (name, kind)


OPTIMIZERS = {
    "adamw": Optimizer(lr=1e-2),
    "sgd": Optimizer("torch.optim.SGD", lr=1e-2, args={"momentum": 0.9}),
    "adafactor": Optimizer("torch.optim.Adafactor", lr=1e-2),
    "muon": Optimizer("paratrain.optim.Muon", lr=1e-2),
    "8 bits": Optimizer("paratrain.optim.LowBitAdamW", lr=1e-2),
}


def test_states_in_host_memory_are_the_same_steps(tmp_path):
    """Every optimizer under every layout; saved under one and resumed under the other, with and without."""
    batches = token_batches(4, 8, True)

    def body():
        found = {}
        for name, strategy in STRATEGIES.items():
            for title, optimizer in OPTIMIZERS.items():
                for offload in ("none", "optimizer"):
                    cfg = config(2, strategy=strategy, optimizer=optimizer, memory=Memory(offload=offload))
                    engine = setup(gpt(), token_loss, cfg)
                    losses = [engine.train_step(engine.local(batch)).loss for batch in batches[:2]]
                    engine.save(tmp_path / f"{name} {title} {offload}")
                    other = setup(gpt(), token_loss, replace(cfg, memory=Memory(offload="optimizer" if offload == "none" else "none")))
                    other.load(tmp_path / f"{name} {title} {offload}")
                    for going in (engine, other):
                        steps = [going.train_step(going.local(batch)) for batch in batches[2:]]
                        streamed = [type(o).__name__.startswith("Streamed") for o in going.optimizers]
                        assert all(streamed) if going.cfg.memory.offload == "optimizer" else not any(streamed)
                        states = [v for o in going.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                        assert states
                        assert all(value.device.type == "cpu" for value in states)
                        found[name, title, offload, going is engine] = (
                            losses + [s.loss for s in steps],
                            [s.grad_norm for s in steps],
                            going.full_state_dict(),
                        )
        return found

    found = run(body, 2)[0]
    for name, title, offload, same in found:
        assert difference(found[name, title, offload, same], found[name, title, "none", True]) < TOLERANCE, (name, title, offload, same)


def test_states_stay_sharded():
    def body():
        engine = setup(gpt(tied=False), token_loss, config(strategy=Zero1(), memory=Memory(offload="optimizer")))
        engine.train_step(engine.local(token_batches(1, 8, False)[0]))
        return sum(
            s["exp_avg"].to_local().numel() for o in engine.optimizers for s in o.state.values() if isinstance(s["exp_avg"], DTensor)
        )

    total = sum(p.numel() for p in gpt(tied=False)().parameters())
    for held in run(body, 2):
        assert abs(held - total / 2) < 0.02 * total


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.sin(self.linear(x))


def test_blocks_that_cannot_be_compiled_run_as_they_are_only_if_asked(caplog):
    def build():
        return nn.ModuleList([nn.Sequential(nn.Linear(3, 3)), Untraceable(), Untraceable(), nn.Sequential(nn.Linear(3, 3))])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = build()

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    compiled = []

    @torch._dynamo.register_backend(name="no_sine")
    def no_sine(graph, inputs):
        if "sin" in graph.code:
            raise RuntimeError("this backend knows no sine")
        compiled.append(graph)
        return graph.forward

    batches = float_batches(3, (4, 3), (4, 3))
    cfg = config(strategy=Single(), compile="no_sine")
    with pytest.raises(UserError, match=r"block 'layers\.1' cannot be compiled.*compile_fallback=true"):
        setup(seeded(Model), squares, cfg).train_step(batches[0])
    with caplog.at_level("WARNING"):
        result = train(replace(cfg, compile_fallback=True), seeded(Model), squares, batches)
    assert difference(result, by_hand(seeded(Model), squares, batches)) < TOLERANCE
    told = [record.message for record in caplog.records if "cannot be compiled and runs as it is" in record.message]
    assert [name in message for name, message in zip(("layers.1", "layers.2"), told, strict=True)] == [True, True]
    assert compiled


class Rotating(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex128))

    def forward(self, x):
        return (self.mix(x) * self.phase).real


def test_refused(tmp_path):
    def mixed(strategy):
        engine = setup(seeded(lambda: nn.Sequential(Rotating(), Rotating())), squares, config(strategy=strategy))
        engine.train_step(engine.local(float_batches(1, (4, 4), (4, 4))[0]))

    with pytest.raises(RankError, match=r"gradients of 1 as one buffer.*phase \(complex128\), mix\.bias \(float64\).*strategy=ddp"):
        run(mixed, 2, FSDP())
    run(mixed, 2, DDP())
    twice = config(strategy=Single(), optimizer=Optimizer("paratrain.optim.OffloadedAdamW"), memory=Memory(offload="optimizer"))
    with pytest.raises(UserError, match=r"OffloadedAdamW keeps its states in host memory already"):
        setup(gpt(), token_loss, twice)
    for sections, message in (
        ({"memory": Memory(recompute="auto")}, "memory.budget_gib: required"),
        ({"memory": Memory(budget_gib=1.0)}, "memory.budget_gib: is read by"),
        ({"memory": Memory(recompute="auto", budget_gib=1.0, recompute_every=2)}, "memory.recompute_every: auto decides"),
        ({"memory": Memory(recompute="selective", activations="offload")}, "memory.activations: offload, but"),
        ({"compile_fallback": True}, "compile_fallback: nothing is compiled"),
        ({"memory": Memory(recompute="auto", budget_gib=1.0), "compile": True}, "memory.recompute: auto changes its mind"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(config(**sections))

"""First weights: the same under every layout, and never whole on more ranks than one."""

from __future__ import annotations

import json
import logging
import random
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import LENGTH, VOCAB, config, token_batches, token_loss
from safetensors.torch import save_file
from sharding_zoo import Scalars, gpt, squares, zoo
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Memory, Parallel, Precision, Single, Zero1
from paratrain.errors import UserError
from paratrain.models.gpt import GPT
from paratrain.spawn import RankError, run

LAYOUTS = {"ddp": {"strategy": DDP()}, "fsdp": {"strategy": FSDP()}, "zero1": {"strategy": Zero1()}}


def plain_gpt():
    return GPT(VOCAB, LENGTH, layers=2, dim=16, heads=2, tied=True)


def weights(build, loss_fn=token_loss, **sections):
    return setup(build, loss_fn, config(**sections)).full_state_dict()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_constructor_values_are_those_of_one_process():
    """model_fn draws from torch's generator and knows no seed of its own; every rank but 0 builds on meta."""
    builds = {"gpt": plain_gpt, "scalars": Scalars, "lstm": lambda: nn.LSTM(3, 5), "conv": zoo()["conv"][0]}

    def body():
        torch.manual_seed(torch.distributed.get_rank())  # the ranks' own generators differ
        return {(name, layout): weights(build, **sections) for name, build in builds.items() for layout, sections in LAYOUTS.items()}

    found = run(body, 3)[0]
    for name, build in builds.items():
        expected = weights(build, strategy=Single())
        for layout in LAYOUTS:
            assert_equal(found[name, layout], expected)


def test_a_module_of_the_caller_counts_on_rank_0():
    def body():
        torch.manual_seed(torch.distributed.get_rank())
        model = gpt()() if torch.distributed.get_rank() == 0 else plain_gpt_of_three_layers()
        return weights(model, strategy=FSDP())

    def plain_gpt_of_three_layers():
        return GPT(VOCAB, LENGTH, layers=3, dim=16, heads=2, tied=True)

    assert_equal(run(body, 2)[0], gpt()().double().state_dict())


def test_meta_values_depend_on_seed_and_name_alone():
    sections = LAYOUTS | {"hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2)}}
    meta = {"memory": Memory(init="meta")}

    class Styled(nn.Module):
        """Initialised as Hugging Face models are: by the module around it."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2))
            self.token = nn.Parameter(torch.empty(1, 5))
            self.register_buffer("steps", torch.zeros(3))

        def reset_parameters(self):
            nn.init.normal_(self.token)
            self.steps.zero_()

        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x + self.token

    def body():
        return {(b, name): weights(build, **s, **meta) for name, s in sections.items() for b, build in (("gpt", plain_gpt), ("hf", Styled))}

    found = run(body, 4)[0]
    for name, build in (("gpt", plain_gpt), ("hf", Styled)):
        expected = weights(build, strategy=Single(), **meta)
        for layout in sections:
            assert_equal(found[name, layout], expected)
    styled = found["hf", "fsdp"]
    assert 0.01 < styled["layers.0.0.weight"].std() < 0.03
    assert not torch.equal(styled["layers.0.0.weight"], styled["layers.1.0.weight"])
    assert torch.equal(styled["layers.0.1.weight"], torch.ones(5, dtype=torch.float64))
    other = weights(plain_gpt, strategy=Single(), **meta, seed=4)
    assert not torch.equal(other["embed.weight"], found["gpt", "fsdp"]["embed.weight"])


def test_what_was_not_initialised_is_named():
    class Forgotten(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(3, 3), nn.Parameter(torch.empty(4, 4))

        def forward(self, x):
            return self.good(x)

    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("table", torch.arange(3.0))

        def forward(self, x):
            return self.layer(x + self.table)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(3, 3), torch.arange(3.0)

        def forward(self, x):
            return self.layer(x + self.table)

    meta = Memory(init="meta")
    for sections in ({}, {"memory": meta}):
        with pytest.raises(UserError, match="bad"):
            setup(Forgotten, token_loss, config(**sections))
    with pytest.raises(RankError, match="1 parameters are NaN or were never given values: bad"):
        run(lambda: setup(Forgotten, token_loss, config(strategy=FSDP())), 2)
    with pytest.raises(UserError, match=r"table has no values: Buffered has no reset_parameters\(\)"):
        setup(Buffered, token_loss, config(memory=meta))
    with pytest.raises(UserError, match="table is a tensor that is neither a parameter nor a buffer"):
        setup(Hidden, token_loss, config(memory=meta))
    with pytest.raises(UserError, match="model_fn is a module"):
        setup(nn.Linear(2, 2), token_loss, config(memory=meta))
    with pytest.raises(UserError, match="Lazy"):
        setup(lambda: nn.LazyLinear(3), token_loss, config())
    assert not torch.are_deterministic_algorithms_enabled()


def test_constructors_that_need_real_tensors():
    """What reads values in its constructor is built for real everywhere; the values are rank 0's all the same."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scale = float(self.linear.weight.detach().abs().max())

        def forward(self, x):
            return self.linear(x) / self.scale

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.table = nn.Linear(4, 4), torch.arange(4.0).double()

        def forward(self, x):
            return self.linear(x + self.table)

    def body():
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logging.getLogger("paratrain").addHandler(handler)
        found = []
        for build in (Reads, Keeps):
            engine = setup(build, lambda o, t: (o.sum(), len(o)), config(strategy=FSDP()))
            loss = engine.train_step(engine.local((torch.ones(4, 4), None))).loss
            found.append((loss, getattr(engine.model, "scale", None)))
        return found, records

    ours, theirs = run(body, 2)
    assert ours[0] == theirs[0]
    assert ours[1] == []
    assert len(theirs[1]) == 2
    assert "each rank builds the whole model" in theirs[1][0]
    assert "table is a tensor" in theirs[1][1]


def test_host_memory_of_every_rank_but_one_stays_near_its_shard():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(1500, 1500, bias=False)) for _ in range(40))  # 343 MB in float32

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def body(strategy, init):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        engine = setup(Wide, token_loss, config(strategy=strategy, memory=Memory(init=init), precision=Precision("32-true")))
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() * 4 for p in engine.model.parameters())
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, held / 2**20

    for init in ("constructor", "meta"):
        for rank, (peak, held) in enumerate(run(body, 4, FSDP(), init)):
            assert held == pytest.approx(86, abs=1)
            if rank or init == "meta":
                assert peak < 86 + 90, "its shard, one tensor and what torch itself loads"


@pytest.mark.parametrize("files", ["one", "several"])
def test_pretrained(tmp_path, files):
    start = gpt()().state_dict()
    saved = {name: value.contiguous() for name, value in start.items() if name != "head.weight"}  # tied, so files hold it once
    if files == "one":
        save_file(saved, tmp_path / "model.safetensors")
    else:
        names = list(saved)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: saved[name] for name in part}, tmp_path / file)
        index = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    def other():
        torch.manual_seed(99)
        return GPT(VOCAB, LENGTH, layers=3, dim=16, heads=2, tied=True)

    def body():
        return [
            weights(other, strategy=strategy, memory=Memory(pretrained=str(tmp_path), init=init))
            for strategy in (FSDP(), DDP())
            for init in ("constructor", "meta")
        ]

    for found in run(body, 3)[0]:
        assert_equal(found, {name: value.double() for name, value in start.items()})
    if files == "one":
        wrong = {name.replace("blocks.0", "block.0"): value for name, value in saved.items()}
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"blocks\.0\.attention_norm\.weight.*block\.0"):
            setup(other, token_loss, config(memory=Memory(pretrained=str(tmp_path))))
        with pytest.raises(UserError, match=r"expected a \.safetensors file"):
            setup(other, token_loss, config(memory=Memory(pretrained=str(tmp_path / "nothing"))))
        save_file(saved | {"embed.weight": torch.zeros(VOCAB, 8)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"embed\.weight has shape \(17, 8\), the model wants \(17, 16\)"):
            setup(other, token_loss, config(memory=Memory(pretrained=str(tmp_path))))
    else:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
        with pytest.raises(UserError, match="points outside"):
            setup(other, token_loss, config(memory=Memory(pretrained=str(tmp_path))))


def test_training_after_either_init_follows_one_process():
    batches = token_batches(3, 8, True)

    def train(init, **sections):
        engine = setup(plain_gpt, token_loss, replace(config(2, **sections), memory=Memory(init=init)))
        return [engine.train_step(engine.local(batch)).loss for batch in batches], engine.full_state_dict()

    def body():
        return {init: train(init, strategy=FSDP()) for init in ("constructor", "meta")}

    for init, (losses, found) in run(body, 3)[0].items():
        expected, values = train(init, strategy=Single())
        assert losses == pytest.approx(expected, abs=1e-10)
        assert all(float((found[name] - value).abs().max()) < 1e-10 for name, value in values.items())


def test_what_new_parameters_would_lose_is_refused():
    """Hooks on gradients and second references to parameters know nothing of the sharded ones; under ddp both work."""

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.linear.weight.register_hook(lambda grad: grad * 0.5)

        def forward(self, x):
            return self.linear(x)

    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.shared = {"weights": [self.linear.weight]}

        def forward(self, x):
            return self.linear(x) @ self.shared["weights"][0]

    def body():
        messages = []
        for model in (Hooked, Aliased):
            setup(model, squares, config())
            for sections in ({"strategy": Zero1()}, {"strategy": Zero1(), "memory": Memory(init="meta")}):
                with pytest.raises(UserError) as caught:
                    setup(model, squares, config(**sections))
                messages.append(str(caught.value))
        return messages

    hooked, hooked_meta, aliased, aliased_meta = run(body, 2)[0]
    assert "linear.weight has a hook on its gradient" in hooked
    assert hooked == hooked_meta
    assert "shared holds the parameter linear.weight" in aliased
    assert aliased == aliased_meta


def test_values_from_other_generators_are_a_function_of_the_seed_too():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(np.random.randn(4, 4)) * random.random())

        def forward(self, x):
            return x @ self.weight

    def body(cfg):
        np.random.seed(torch.distributed.get_rank() + 10)
        before = np.random.get_state()[1].tolist()
        weights = setup(Drawn, squares, cfg).full_state_dict()
        assert np.random.get_state()[1].tolist() == before
        return weights

    first, second = (run(body, 2, config(strategy=strategy))[0]["weight"] for strategy in (DDP(), Zero1()))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(body, 1, replace(config(), seed=4))[0]["weight"])
    assert torch.equal(first, run(body, 1, config())[0]["weight"])

"""What a program changes between steps is noticed in the very next one, however it is done."""

from __future__ import annotations

import pytest
import torch
from practice import configured
from torch import nn

import paratrain as pt
from paratrain.errors import UserError


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.act, self.out = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.out(self.act(self.inner(x))) * self.scale


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


BATCH = torch.ones(4, 6, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)


def double(thing):
    return nn.Parameter(thing.detach().double()) if isinstance(thing, nn.Parameter) else thing.double()


def equal_scale(model):
    model.scale = double(nn.Parameter(torch.ones(1)))  # of the value that it has, with a rate of 0


def equal_weight(model):
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())


def by_the_table(model):
    model._modules["out"] = double(nn.Linear(8, 1))


def into_an_empty_module(model):
    model.act.shift = double(nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize("change", [equal_scale, equal_weight, by_the_table, into_an_empty_module])
@pytest.mark.parametrize("steps", [1, 5])
def test_parameters_that_no_optimizer_updates_are_named(change, steps):
    engine = pt.setup(Scaled, square, configured(("strategy=single", "optimizer.lr=0")))
    for _ in range(steps):
        engine.train_step(BATCH)
    change(engine.model)
    with pytest.raises(UserError, match="was added after set-up, and no optimizer updates it"):
        engine.train_step(BATCH)


@pytest.mark.parametrize("steps", [1, 5])
def test_hooks_freezing_and_dtypes(steps):
    engine = pt.setup(Scaled, square, configured(("strategy=single",)))
    for _ in range(steps):
        engine.train_step(BATCH)
    seen = []
    engine.model.inner.weight.register_hook(lambda grad: seen.append(grad) or grad * 0)
    before = engine.model.inner.weight.detach().clone()
    state = engine.optimizers[0].state[engine.model.inner.weight]["exp_avg"]
    state.zero_()
    engine.train_step(BATCH)
    assert len(seen) == 1
    assert torch.equal(engine.model.inner.weight, before)
    engine.model.out.weight.requires_grad_(False)
    kept = engine.model.out.weight.detach().clone()
    engine.train_step(BATCH)
    assert torch.equal(engine.model.out.weight, kept)
    engine.model.out.weight.requires_grad_(True)
    engine.train_step(BATCH)
    assert not torch.equal(engine.model.out.weight, kept)
    engine.model.out.bfloat16()
    with pytest.raises(UserError, match=r"out.weight is bfloat16 since the last step"):
        engine.train_step(BATCH)


def the_bias_alone(model):
    model.out.bias.data = model.out.bias.data.float()


def a_module_within(model):
    model.out.half()


def an_entry_of_the_table(model):
    model._parameters["scale"].data = model.scale.data.to(torch.bfloat16)


@pytest.mark.parametrize("change", [the_bias_alone, a_module_within, an_entry_of_the_table])
@pytest.mark.parametrize("own_loop", [False, True])
def test_a_weight_of_another_dtype_is_named_whichever_of_its_module_it_is(change, own_loop):
    engine = pt.setup(Scaled, square, configured(("strategy=single", "optimizer=sgd")))
    engine.train_step(BATCH)
    change(engine.model)
    begin = engine if own_loop else lambda inputs: engine.train_step((inputs, BATCH[1]))
    with pytest.raises(UserError, match=r"is (float32|float16|bfloat16) since the last step and was float64.*write precision="):
        begin(BATCH[0])

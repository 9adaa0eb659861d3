"""What a constructor draws or keeps outside of parameters and buffers: the same on every rank, or refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.practice import assert_exact, assert_refused


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    block = Block

    def __init__(self):
        super().__init__()
        self.inner, self.blocks, self.out = nn.Linear(6, 8), nn.ModuleList(self.block() for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


def rows(sizes=(8, 6)):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=g, dtype=torch.float64), torch.randn(n, 1, generator=g, dtype=torch.float64)) for n in sizes]


class Drawn(Net):
    """After layers whose values meta does not draw: torch on the host by name, numpy and random."""

    def __init__(self):
        super().__init__()
        self.mix = torch.randn(6, 6, dtype=torch.float64, device="cpu")
        self.scale = torch.from_numpy(np.random.randn(6))
        self.shift = random.random()

    def forward(self, x):
        return super().forward(torch.sin(x @ self.mix) * self.scale + self.shift)


class Table:
    def __init__(self):
        self.rows = {"first": [torch.randn(6, 6, dtype=torch.float64)]}


class Kept(Net):
    """A tensor in a list in a dict in an object, a frozen module in a plain list, and a tensor in the closure of a hook."""

    def __init__(self):
        super().__init__()
        self.table = Table()
        self.teacher = [nn.Linear(6, 1).double().requires_grad_(False)]
        offset = torch.randn(1, dtype=torch.float64)
        self.register_forward_hook(lambda module, args, out: out + offset)

    def forward(self, x):
        return super().forward(x @ self.table.rows["first"][0]) - self.teacher[0](x)


class Orthogonal(Net):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.orthogonal(block.up)


class Empty(Net):
    """Parameters without elements, as of an adapter that is switched off."""

    def __init__(self):
        super().__init__()
        self.prompt, self.bias = nn.Parameter(torch.empty(0, 8)), nn.Parameter(torch.empty(0))

    def forward(self, x):
        return super().forward(x) + self.prompt.sum() + self.bias.sum()


@pytest.mark.parametrize("model", [Drawn, Kept, Orthogonal])
def test_what_a_constructor_draws_is_rank_0s(model):
    assert_exact(model, rows(), square, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Drawn, Kept, Orthogonal, Empty])
def test_what_a_constructor_draws_is_rank_0s_in_every_layout(model):
    assert_exact(model, rows(), square, "ddp", "z1m", "fsdp", "hsdp", "pp", "rc")
    assert_exact(model, rows(), square, "tp", more=["parallel.tp_plan={}"] if model in (Kept, Orthogonal) else [])


def test_parameters_without_elements():
    assert_exact(Empty, rows(), square, "ddp", "z1m", "fsdp", "tp", "pp")


def _wider():
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4 + dist.get_rank(), 8) if dist.is_initialized() else nn.Linear(4, 8)

    return Wider()


def _renamed():
    model = Net()
    if dist.is_initialized() and dist.get_rank():
        model.blocks.append(Block())
    return model


def _unseeded():
    model = Net()
    model.factor = float(np.random.default_rng().random())
    return model


def _fails():
    if dist.is_initialized() and dist.get_rank():
        raise OSError("no such file: vocabulary.txt")
    return Net()


@pytest.mark.parametrize(
    ("model_fn", "says"),
    [(_wider, "extra.weight"), (_renamed, "blocks.2"), (_unseeded, "factor is")],
)
def test_constructors_that_differ_between_ranks_are_refused(model_fn, says):
    assert_refused(model_fn, rows(), square, "ddp", says=says)
    assert_refused(model_fn, rows(), square, "fsdp", says="rank 1 built another model than rank 0")


def test_what_ranks_may_have_of_their_own():
    def named():
        model = Net()
        model.rank = dist.get_rank() if dist.is_initialized() else 0
        model.is_main, model.directory, model.factor = model.rank == 0, f"/tmp/{model.rank}", float(np.random.default_rng().random())
        return model

    assert_exact(named, rows(), square, "ddp", more=("trainer.forward_state={factor: local}",))


def test_a_constructor_that_fails_on_one_rank_is_named_on_the_others():
    from paratrain.spawn import run
    from tests.practice import LAYOUTS, ours

    def body():
        try:
            ours(_fails, rows(), square, LAYOUTS["fsdp"])
        except Exception as error:
            return type(error).__name__, str(error)

    first, second = run(body, 2)
    assert first[0] == "UserError"
    assert "failed on rank 1: OSError: no such file" in first[1]
    assert second[0] == "OSError"

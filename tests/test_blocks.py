"""What counts as a block, in modules of every shape."""

from __future__ import annotations

import re

import pytest
import torch
from sharding_zoo import Conv, Recurrent, Router, Scalars, gpt
from torch import nn

from paratrain.__main__ import main
from paratrain.errors import UserError
from paratrain.parallel import blocks


class Block(nn.Module):
    def __init__(self, dim: int = 4, inner: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        return self.down(self.up(x))


class Mixture(nn.Module):
    def __init__(self, experts: int = 4):
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(experts))

    def forward(self, x):
        return x


class Stage(nn.Module):
    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.reduce = nn.Linear(dim, 2 * dim)

    def forward(self, x):
        return x


class Parts(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def stack(*modules):
    return nn.ModuleList(modules)


def tied():
    """Blocks 1 and 2 share a matrix, and the last one shares with the embedding."""
    model = Parts(embed=nn.Embedding(8, 4), layers=stack(Block(), Block(), Block(), Block()))
    model.layers[1].up.weight = model.layers[2].up.weight
    model.layers[3].up.weight = model.embed.weight
    return model


def normalised():
    """Weight norm gives each module that has it a class of its own."""
    block = Block()
    block.up = nn.utils.parametrizations.weight_norm(block.up)
    return block


CASES = {
    "gpt": (gpt(), ["blocks.0", "blocks.1", "blocks.2"]),
    "one giant embedding": (lambda: Parts(embed=nn.Embedding(10_000, 4), layers=stack(Block(), Block())), ["layers.0", "layers.1"]),
    "encoder and decoder": (
        lambda: Parts(encoder=Parts(layers=stack(Block(), Block())), decoder=Parts(layers=stack(Block(4, 6), Block(4, 6)))),
        ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"],
    ),
    "torch's transformer": (
        lambda: nn.Transformer(8, 2, 2, 1, 16),
        ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"],
    ),
    "experts inside layers": (lambda: Parts(layers=stack(Mixture(), Mixture())), ["layers.0", "layers.1"]),
    "experts alone": (lambda: Parts(moe=Mixture(), shared_experts=stack(Block(), Block())), []),
    "experts of their own depth": (
        lambda: Parts(layers=stack(Block(), Block()), experts=stack(Stage(4, 2), Stage(4, 2))),
        ["layers.0", "layers.1"],
    ),
    "heads to choose from": (lambda: Parts(heads=nn.ModuleDict({"a": Block(), "b": Block()})), []),
    "a stack in a dict": (lambda: Parts(parts=nn.ModuleDict({"h": stack(Block(), Block())})), ["parts.h.0", "parts.h.1"]),
    "a first layer of its own": (lambda: Parts(layers=stack(Block(4, 16), Block(), Block())), ["layers.0", "layers.1", "layers.2"]),
    "alternating layers": (
        lambda: Parts(layers=stack(Block(), Mixture(), Block(), Mixture())),
        ["layers.0", "layers.1", "layers.2", "layers.3"],
    ),
    "stages of blocks": (
        lambda: Parts(stages=stack(Stage(4, 2), Stage(8, 3))),
        ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1", "stages.1.blocks.2"],
    ),
    "U-Net, in lists": (
        lambda: Parts(down=stack(Block(4), Block(8), Block(16)), middle=Block(32), up=stack(Block(16), Block(8))),
        ["down.0", "down.1", "down.2", "up.0", "up.1"],
    ),
    "U-Net, by attributes": (
        lambda: Parts(down1=Block(4), down2=Block(8), up1=Block(8, 4), head=nn.Linear(4, 2)),
        ["down1", "down2", "up1"],
    ),
    "ResNet": (Conv, ["stage1.0", "stage1.1", "stage2.0", "stage2.1"]),
    "two towers": (
        lambda: Parts(online=Parts(layers=stack(Block(), Block())), target=Parts(layers=stack(Block(), Block()))),
        ["online.layers.0", "online.layers.1", "target.layers.0", "target.layers.1"],
    ),
    "declared by the model": (Router, ["layers.0", "layers.1"]),
    "tied across blocks": (tied, ["layers.0"]),
    "one block called again and again": (lambda: (lambda block: Parts(layers=stack(block, block), last=block))(Block()), []),
    "a plain stack of layers": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)), ["0", "2", "3"]),
    "picked by key": (lambda: Parts(heads=nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})), []),
    "weight norm inside blocks": (lambda: Parts(layers=stack(normalised(), normalised())), ["layers.0", "layers.1"]),
    "weight norm of a stack of layers": (
        lambda: Parts(layers=stack(*(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)))),
        ["layers.0", "layers.1"],
    ),
    "no parameters": (nn.Identity, []),
    "scalars": (Scalars, ["blocks.0", "blocks.1", "blocks.2"]),
    "recurrent": (Recurrent, []),
}


@pytest.mark.parametrize("case", CASES)
def test_found_from_the_structure(case):
    build, expected = CASES[case]
    with torch.device("meta"):
        model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    found = blocks.find(model)
    assert [name for name, _ in found] == expected
    assert all(model.get_submodule(name) is module for name, module in found)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_named_by_the_user():
    model = Parts(embed=nn.Embedding(8, 4), layers=stack(Mixture(), Mixture()), head=nn.Linear(4, 8))
    assert [name for name, _ in blocks.find(model, ["layers.?", "embed"])] == ["embed", "layers.0", "layers.1"]
    assert [name for name, _ in blocks.find(model, ["Block"])] == [f"layers.{i}.experts.{j}" for i in range(2) for j in range(4)]
    assert blocks.find(model, []) == []
    assert [name for name, _ in blocks.find(model, ["layers.*", "*.up"])] == [
        name for i in range(2) for name in (f"layers.{i}", *(f"layers.{i}.experts.{j}.up" for j in range(4)))
    ]
    assert [name for name, _ in blocks.find(tied(), ["layers.*"])] == ["layers.0"]
    with pytest.raises(UserError, match=r"memory\.blocks: 'layer\.\*' matches no module.*Mixture"):
        blocks.find(model, ["layer.*"])
    with pytest.raises(UserError, match="without a forward"):
        blocks.find(model, ["layers"])


def test_inspect_shows_the_blocks_of_a_configured_model(capsys):
    assert main(["inspect", "model=gpt", "model.layers=3", "freeze=['embed*']"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 blocks" in said
    assert "blocks.0 ... blocks.2 3 x Block" in said
    assert re.search(r"the rest embed, norm, head [\d,]+ parameters \(32,768 frozen\)", said)
    assert main(["inspect", "model=gtp"]) == 2
    assert "did you mean 'gpt'" in capsys.readouterr().err


def test_describe_names_what_is_shared_and_splits_unlike_runs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(4), Block(4), Block(6)])
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return x

    lines = [" ".join(line.split()) for line in blocks.describe(Tied()).splitlines()]
    assert lines[2:] == [
        "layers.0 ... layers.1 2 x Block 76 parameters each",
        "layers.2 1 x Block 110 parameters",
        "the rest embed 20 parameters",
        "shared: embed.weight = head.weight",
    ]
    assert "nothing 0 parameters" in " ".join(blocks.describe(nn.Sequential(Block(), Block())).split())

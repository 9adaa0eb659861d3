"""What a program reads of split weights, and does on one rank alone: refused by name before anything is sent; what it cannot get is said."""

from __future__ import annotations

import copy
import logging
import time

import pytest
import torch
from torch import nn

import paratrain as pt
from paratrain.errors import UserError
from paratrain.spawn import run
from tests.practice import LAYOUTS, configured, rows
from tests.test_truth_constructors import square


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.blocks, self.out = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 1)

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


BATCHES = rows((8, 8))
ALONE = {
    "norm": lambda engine: float(engine.model.blocks[0].up.weight.norm()),
    "row": lambda engine: engine.model.blocks[0].up.weight[0].zero_(),
    "whole": lambda engine: engine.model.blocks[0].up.weight.full_tensor(),
    "copy": lambda engine: copy.deepcopy(engine.model),
    "engine": lambda engine: engine(BATCHES[0][0]),
}


def refused(layout, act):
    """What each rank says where rank 0 alone does something between steps, and after how long."""

    def body():
        engine = pt.setup(Net, square, configured(LAYOUTS[layout]))
        began = time.monotonic()
        try:
            for batch in BATCHES:
                engine.train_step(engine.local(batch))
                if engine.is_main_process:
                    with torch.no_grad():
                        act(engine)
        except UserError as error:
            return str(error), time.monotonic() - began
        return "", 0.0

    return run(body, 2)


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        ("fsdp", "norm"),
        ("tp", "norm"),
        ("pp", "engine"),
        *(pytest.param("fsdp", what, marks=pytest.mark.slow) for what in ("row", "whole", "copy", "engine")),
        *(pytest.param("tp", what, marks=pytest.mark.slow) for what in ("copy", "engine")),
    ],
)
def test_what_needs_all_ranks_is_refused_on_one_before_it_communicates(layout, what):
    for text, seconds in refused(layout, ALONE[what]):
        called = "engine()" if what == "engine" else "for the whole of a split weight"
        assert f"rank 0 called {called} (" in text
        assert "where rank 1 called engine.train_step() (" in text
        assert seconds < 20


def test_all_ranks_may_read_and_evaluate():
    def body():
        engine = pt.setup(Net, square, configured(LAYOUTS["fsdp"]))
        seen = []
        for batch in BATCHES:
            engine.train_step(engine.local(batch))
            with torch.no_grad():
                seen.append(float(engine(batch[0]).sum()))
            seen += [float(param.norm()) for param in engine.model.parameters()]
        return seen

    first, second = run(body, 2)
    assert first == second


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.mark.parametrize("asks", ["torch", *(pytest.param(asks, marks=pytest.mark.slow) for asks in ("model", "part"))])
def test_lists_of_parameters_that_are_those_of_some_stages_say_so_once(asks):
    def body():
        heard = Heard()
        logging.getLogger("paratrain").addHandler(heard)
        engine = pt.setup(Net, square, configured(LAYOUTS["pp"]))
        engine.train_step(engine.local(BATCHES[0]))
        before = [text for text in heard.texts if "parameters()" in text]
        for _ in range(2):
            if asks == "model":
                sum(float(param.detach().norm()) for param in engine.model.parameters())
            elif asks == "part":
                dict(engine.model.blocks.named_parameters())
            else:
                nn.utils.parameters_to_vector(engine.model.parameters())
            engine.train_step(engine.local(BATCHES[1]))
        engine.full_state_dict()
        return before, [text for text in heard.texts if "parameters()" in text]

    (before, texts), _ = run(body, 2)
    assert not before, "the library's own questions are no concern of the program"
    assert len(texts) == 1
    assert "parallel.pp: parameters() at " in texts[0]
    assert "gives the 10 weights of this rank's stages, and not the 10 that other ranks hold" in texts[0]
    assert "engine.ema_state_dict()" in texts[0]

"""What a program asks of `engine.model` beside its steps, and batches that its ranks disagree about: exact, or refused by name on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paratrain as pt
from paratrain.errors import UserError
from paratrain.spawn import run
from tests.practice import LAYOUTS, Trained, assert_exact, assert_refused, assert_same, configured, ours, plain, rows

D = torch.float64


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x) * self.scale)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.blocks, self.out = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 1)

    def encode(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        return h

    def forward(self, x):
        return self.out(self.encode(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.out = nn.ModuleList(Attention() for _ in range(2)), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def sequences(steps: int = 2, length: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(8, length, 8, generator=g, dtype=D), torch.randn(8, length, 8, generator=g, dtype=D)) for _ in range(steps)]


def whole(value: Any) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


# ---------------------------------------------------------------- the whole state, where ranks hold stages


def _states(overrides: tuple[str, ...]) -> tuple[Trained, dict[str, torch.Tensor], list[str]]:
    engine = pt.setup(Net, square, configured(overrides))
    steps = [engine.train_step(engine.local(batch)) for batch in rows()]
    got = Trained([s.loss for s in steps], [s.grad_norm for s in steps], {k: whole(v) for k, v in engine.model.state_dict().items()})
    block = {k: whole(v) for k, v in engine.model.blocks[1].state_dict().items()}
    return got, block, list(engine.model.state_dict())


@pytest.mark.parametrize(
    "more", [(), pytest.param(("parallel.tp=2",), marks=pytest.mark.slow), pytest.param(("strategy=fsdp",), marks=pytest.mark.slow)]
)
def test_the_state_of_a_pipelined_model_is_whole_on_every_rank(more):
    expected = plain(Net, rows(), square)
    for got, block, names in run(_states, 4 if more else 2, (*LAYOUTS["pp"], *more)):
        assert names == list(expected.state)
        assert_same(got, expected)
        assert block.keys() == Block().state_dict().keys()
        torch.testing.assert_close(block["up.weight"], expected.state["blocks.1.up.weight"], rtol=0, atol=1e-10)


def refusals(made: Callable, layout: str, program: Callable) -> list[str]:
    """What each of two ranks is told when `program` is run with its engine; "" where it is told nothing."""

    def body() -> str:
        engine = pt.setup(made, square, configured(LAYOUTS[layout]))
        try:
            program(engine)
        except UserError as error:
            return str(error)
        return ""

    return run(body, 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda engine: engine.model.state_dict(), "rank 0 called state_dict() of the engine's model"),
        (lambda engine: engine.full_state_dict(), "rank 0 called engine.full_state_dict()"),
        (lambda engine: _predict(engine), "rank 0 called the forward of the engine's model"),
    ],
)
def test_what_all_stages_must_do_is_refused_on_one_rank(call, says):
    def program(engine):
        for batch in rows():
            engine.train_step(engine.local(batch))
            if engine.is_main_process:
                call(engine)

    for text in refusals(Net, "pp", program):
        assert says in text
        assert "where rank 1 called engine.train_step()" in text


@torch.no_grad()
def _predict(engine):
    return engine.model(rows()[0][0])


def test_a_method_beside_forward_has_the_weights_of_its_stages_alone():
    def program(engine):
        engine.train_step(engine.local(rows()[0]))
        with torch.no_grad():
            float(engine.model.encode(rows()[0][0]).sum())

    for text in refusals(Net, "pp", program):
        assert "is held by another stage" in text
        assert "engine.full_state_dict()" in text


# ---------------------------------------------------------------- forwards of whole sequences, where ranks share them


def test_a_program_calls_a_model_whose_sequences_are_shared():
    """In each step with as many positions as a rank has of a batch, with others, and on one rank alone."""

    def after(model, step):
        with torch.no_grad():
            for length in (2, 3, 4):
                found.append(float(model(sequences(1, length)[0][0]).square().sum()))
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                model(sequences()[0][0])

    found: list[float] = []
    expected, wanted = plain(Sequences, sequences(), square, after=after), found.copy()

    def body() -> tuple[Trained, list[float]]:
        found.clear()
        return ours(Sequences, sequences(), square, LAYOUTS["cp"], after=after), found

    for trained, got in run(body, 2):
        if trained.state:
            assert_same(trained, expected)
        assert got == pytest.approx(wanted, rel=1e-10)


def test_own_loops_do_not_share_sequences_in_silence():
    def program(engine):
        part = engine.local(sequences()[0])
        engine.backward(square(engine(part.inputs), part.targets))

    for text in refusals(Sequences, "cp", program):
        assert "parallel.cp=2" in text
        assert "write engine.train_step(batch)" in text


class Scored(Sequences):
    """Computes its loss itself, as models of Hugging Face do where labels are among their inputs."""

    def forward(self, x, labels):
        out = super().forward(x)
        return out, ((out - labels) ** 2).mean()


def test_outputs_without_a_sequence_are_refused_by_every_rank():
    data = [((x, y), y) for x, y in sequences()]
    assert_refused(Scored, data, lambda out, target: square(out[0], target), "cp", says="an output of shape ()")


# ---------------------------------------------------------------- other samples on ranks that work on the same


@pytest.mark.parametrize("layout", ["tp", "pp", "cp"])
@pytest.mark.parametrize("sizes", [(5, 3), (4, 4)])
def test_ranks_of_one_sample_bring_the_same_batch(layout, sizes):
    made, data = (Sequences, sequences()) if layout == "cp" else (Net, rows((8, 8)))

    def program(engine):
        first = sum(sizes[: torch.distributed.get_rank()])
        for x, y in data:
            engine.train_step((x[first : first + sizes[0]], y[first : first + sizes[0]]))

    for text in refusals(made, layout, program):
        assert "ranks 0 and 1 were given different batches" in text
        assert "engine.local(batch)" in text


# ---------------------------------------------------------------- forwards that differentiate, recomputed


class Force(Net):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = super().forward(x)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, slope


class CountingBlock(Block):
    """Moves something, so that what the second forward begins from must be put back."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) / (1 + 0.1 * self.calls)


class CountingForce(Force):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(CountingBlock() for _ in range(2))


def force_loss(out, target):
    return ((out[0] - target) ** 2).sum() + (out[1] ** 2).sum(), len(target)


@pytest.mark.parametrize("made", [Force, CountingForce])
def test_blocks_are_recomputed_for_each_derivative(made):
    assert_exact(made, rows(), force_loss, "rc")


def test_selective_recomputation_of_second_derivatives_is_refused():
    assert_refused(Force, rows(), force_loss, "ddp", says="memory.recompute=full or none", more=("memory.recompute=selective",))


# ---------------------------------------------------------------- weights that forward hands out


class Temperature(Net):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return super().forward(x), self.t


def test_a_weight_among_the_outputs_is_on_the_last_stage():
    assert_exact(Temperature, rows(), lambda out, target: square(out[0] * out[1].exp(), target), "pp")


# ---------------------------------------------------------------- weights lent for one forward, draws, queues


class Scaled(Net):
    """Runs its blocks with functions of their weights."""

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = torch.func.functional_call(block, {name: param * 0.9 for name, param in block.named_parameters()}, (h,))
        return self.out(h)


def test_blocks_are_recomputed_with_the_weights_they_were_lent():
    assert_exact(Scaled, rows(), square, "rc")


class Depth(Net):
    """Leaves out blocks by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.g = torch.Generator().manual_seed(5)

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            if not self.training or float(torch.rand((), generator=self.g)) > 0.4:
                h = block(h)
        return self.out(h)


def test_own_generators_draw_once_a_micro_batch():
    assert_exact(Depth, rows(), square, "ddp", "rc")
    assert_refused(Depth, rows(), square, "z1m", says="forward draws from a generator of its own, g, once a micro-batch")
    assert_exact(Depth, rows(), square, "z1m", more=("trainer.forward_state={g: step}",))


class Queue(Net):
    """Remembers features of samples; by chance they have as many numbers as a rank has samples."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 4)
        self.register_buffer("queue", torch.randn(16, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        q = self.out(self.encode(x))
        scores = q @ self.queue.clone().T
        if self.training:
            with torch.no_grad():
                start = int(self.at)
                self.queue[start : start + len(q)] = q.detach()[: 16 - start]
                self.at[0] = (start + len(q)) % 16
        return scores


def test_a_queue_is_not_taken_for_something_of_each_sample():
    data = [(x, y.expand(-1, 16)) for x, y in rows((8, 8))]
    assert_refused(Queue, data, square, "fsdp", says="forward moves queue by the samples that it sees")


def test_every_rank_evaluates_between_the_steps_of_a_pipeline():
    def before(model, step):
        model.eval()
        with torch.no_grad():
            model(rows()[0][0][: 2 + step])
        model.train()

    assert_exact(Net, rows(), square, "pp", before=before)


# ---------------------------------------------------------------- a loss that differentiates


class Open(Net):
    """Hands its input out, by which the loss differentiates."""

    def forward(self, x):
        x = x.detach().requires_grad_(torch.is_grad_enabled())
        return super().forward(x), x


def penalty(out, target):
    total = ((out[0] - target) ** 2).sum()
    if torch.is_grad_enabled() and out[1].requires_grad:
        (slope,) = torch.autograd.grad(out[0].sum(), out[1], create_graph=True)
        total = total + (slope.norm(dim=-1) - 1).square().sum()
    return total, len(target)


def test_a_loss_that_differentiates_by_an_output():
    assert_exact(Open, rows(), penalty, "z1")
    assert_refused(Open, rows(), penalty, "ddp", says="take the derivative inside of forward")

"""Weights used in ways that the hooks of sharding do not see, derivatives of derivatives, and blocks with side effects."""

import functools
import logging

import pytest
import torch
from practice import assert_exact, assert_refused, ours, plain
from torch import nn

import paratrain as pt
from paratrain.spawn import run

D = torch.float64
SHARDED = ("z1m", "fsdp")


def rows(sizes=(8, 5), width=6):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, width, generator=g, dtype=D), torch.randn(n, 1, generator=g, dtype=D)) for n in sizes]


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


def with_extra(out, target):
    return ((out[0] - target) ** 2).sum() + 0.1 * out[1].sum(), len(target)


class Block(nn.Module):
    def __init__(self, d=8, h=12):
        super().__init__()
        self.norm, self.up, self.down, self.side = nn.LayerNorm(d), nn.Linear(d, h), nn.Linear(h, d), nn.Linear(h, 3)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    block = Block

    def __init__(self, n=3):
        super().__init__()
        self.inner, self.blocks, self.out = nn.Linear(6, 8), nn.ModuleList(self.block() for _ in range(n)), nn.Linear(8, 1)

    def body(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        return h

    def forward(self, x):
        return self.out(self.body(x))


# ---------------------------------------------------------------- what blocks leave behind


class Listed(Block):
    def forward(self, x, seen):
        h = torch.tanh(self.up(self.norm(x)))
        seen.append(self.side(h).square().sum(-1))  # hangs on a weight on which the output does not
        return x + self.down(h)


class InList(Net):
    block = Listed

    def forward(self, x):
        h, seen = self.inner(x), []
        for block in self.blocks:
            h = block(h, seen)
        return self.out(h), sum(seen)


class InDict(Net):
    """The state of a model is a dict that blocks read and write, and nothing is returned."""

    class block(Block):
        def forward(self, state):
            h = torch.tanh(self.up(self.norm(state["x"])))
            state["x"] = state["x"] + self.down(h)
            state["extra"] = state["extra"] * torch.sigmoid(self.side(h).sum(-1))

    def forward(self, x):
        state = {"x": self.inner(x), "extra": x.sum(-1)}
        for block in self.blocks:
            block(state)
        return self.out(state["x"]), state["extra"]


class InAttribute(Net):
    class block(Block):
        def forward(self, x):
            h = torch.tanh(self.up(self.norm(x)))
            self.left = self.side(h).square().sum(-1)
            return x + self.down(h)

    def forward(self, x):
        return self.out(self.body(x)), sum(block.left for block in self.blocks)


class Memory(Net):
    """Blocks that read what all blocks before left in a list, as dense connections do."""

    class block(Block):
        def forward(self, x, past=None):
            past.append(x)
            return super().forward(torch.stack(past).mean(0))

    def forward(self, x):
        h, past = self.inner(x), []
        for block in self.blocks:
            h = block(h, past=past)
        return self.out(h)


class Later(Block):
    def forward(self, x):
        return lambda y: y + self.down(torch.tanh(self.up(self.norm(y))))


class Functions(Net):
    """Each block returns a function that uses its weights when the loss calls it."""

    block = Later

    def forward(self, x):
        steps = [block(x) for block in self.blocks]

        def density(y):
            return self.out(functools.reduce(lambda h, step: step(h), steps, self.inner(y)))

        return lambda target: density(x + target)


def called(out, target):
    return (out(target) ** 2).sum(), len(target)


@pytest.mark.parametrize("model", [InList, InDict, InAttribute, Memory])
def test_what_blocks_write_is_seen(model):
    assert_exact(model, rows(), square if model is Memory else with_extra, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [InList, InDict, InAttribute, Memory])
def test_what_blocks_write_is_seen_whatever_is_sharded(model):
    assert_exact(model, rows(), square if model is Memory else with_extra, "z1m", "z2m", "hsdp", "fsdpm")


def test_what_recomputed_blocks_write_is_seen_once():
    assert_exact(InDict, rows(), with_extra, "rc")
    assert_exact(InDict, rows(), with_extra, "fsdp", more=("memory.recompute=full",))


@pytest.mark.slow
@pytest.mark.parametrize("model", [InList, InAttribute])
def test_what_recomputed_and_sharded_blocks_write_is_seen(model):
    assert_exact(model, rows(), with_extra, "fsdp", more=("memory.recompute=full",))


def test_blocks_that_return_functions():
    assert_exact(Functions, rows((8, 6)), called, "z1", "fsdp")


# ---------------------------------------------------------------- derivatives of derivatives


class Forces(Net):
    """Energies, and forces as their derivative by the positions."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_(True)
            energy = super().forward(x)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, slope.square()


class Penalty(Net):
    """A gradient penalty at a point between two halves of the features, beside the output (WGAN-GP)."""

    def forward(self, x):
        mixed = (0.3 * x + 0.7 * x.flip(-1)).requires_grad_(True)
        (slope,) = torch.autograd.grad(super().forward(mixed).sum(), mixed, create_graph=True)
        return super().forward(x), (slope.norm(dim=-1) - 1).square()


class Adapted(Net):
    """One step of gradient descent on an inner loss, through which the outer loss is differentiated (MAML)."""

    def forward(self, x):
        names, weights = zip(*self.blocks[0].named_parameters(), strict=True)
        inner = self.blocks[0](self.inner(x.new_ones(1, 6))).square().mean()  # of a batch, it would depend on the layout
        grads = torch.autograd.grad(inner, weights, create_graph=True, allow_unused=True)
        fast = {name: weight if grad is None else weight - 0.1 * grad for name, weight, grad in zip(names, weights, grads, strict=True)}
        h = torch.func.functional_call(self.blocks[0], fast, (self.inner(x),))
        for block in self.blocks[1:]:
            h = block(h)
        return self.out(h), h.new_zeros(len(x))


class Vjp(Net):
    """Derivatives by torch.func, as score matching takes them."""

    def forward(self, x):
        slope = torch.func.grad(lambda x: torch.tanh(super(Vjp, self).forward(x)).sum())(x)
        return super().forward(x), slope.square()


def test_derivatives_of_derivatives():
    assert_exact(Forces, rows(), with_extra, "fsdp", "tp")
    assert_exact(Penalty, rows((8,)), with_extra, "tp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Forces, Penalty])
def test_derivatives_of_derivatives_whatever_is_sharded(model):
    assert_exact(model, rows(), with_extra, "z1m", "z2m", "hsdp", "fsdpm")


def test_derivatives_of_derivatives_in_sequence_parallelism():
    class Tokens(Forces):
        def forward(self, x):
            energy, slope = super().forward(x.unsqueeze(1).expand(-1, 4, -1) * torch.arange(1, 5, dtype=D)[:, None])
            return energy.mean(1), slope.sum(1)

    assert_exact(Tokens, rows((8,)), with_extra, "sp")


def test_derivatives_of_derivatives_are_evaluated():
    batches = rows((8,))

    def body():
        engine = pt.setup(Forces, with_extra, pt.load_config(["precision=fp64", "trainer.device=cpu", "strategy=fsdp", "seed=3"]))
        return [engine.eval_step(engine.local(batches[0])).loss for _ in range(2)]

    torch.manual_seed(3)
    total, count = with_extra(Forces().double()(batches[0][0]), batches[0][1])
    for losses in run(body, 2):
        assert losses == pytest.approx([float(total / count)] * 2, rel=1e-12)


def test_derivatives_across_stages_are_refused():
    assert_refused(Forces, rows((8,)), with_extra, "pp", says="forward differentiates")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Adapted, Vjp])
def test_inner_optimisation_and_functional_derivatives(model):
    assert_exact(model, rows((8,)), with_extra, "z1m", "fsdp")


# ---------------------------------------------------------------- weights used elsewhere


class Detached(Net):
    """Part of the forward runs with detached copies of the weights."""

    def forward(self, x):
        h = self.inner(x)
        fixed = {name: value.detach() for name, value in self.blocks[0].named_parameters()}
        return self.out(self.blocks[0](h) + torch.func.functional_call(self.blocks[0], fixed, (h * 0.5,)) + self.body(x))


class Generated(Net):
    """A network makes the weights of a block, whose own are a start that it adds to."""

    def forward(self, x):
        h = self.inner(x)
        made = {name: value * (1 + self.out.bias.tanh()) for name, value in self.blocks[1].up.named_parameters(prefix="up")}
        return self.out(torch.func.functional_call(self.blocks[1], made, (self.blocks[0](h),)) + self.blocks[2](h))


class Penalised(Net):
    def forward(self, x):
        return self.out(self.body(x)), 0.1 * sum(p.abs().sum() for p in self.parameters()).expand(len(x))


class Early(Net):
    """Weights are used before their block is called, so that their gradients come after its own."""

    def forward(self, x):
        size = sum(block.up.weight.square().sum() + block.norm.weight.sum() for block in self.blocks)
        return self.out(self.body(x)), size.expand(len(x))


class Borrowed(Net):
    """The head reuses layers of a block, past its forward."""

    def forward(self, x):
        h = self.body(x)
        return self.out(h + self.blocks[0].down(self.blocks[0].up(h)))


class Temperature(Net):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x), {"scale": self.scale, "shift": self.shift}


def tempered(out, target):
    return ((out[0] * out[1]["scale"].exp() + out[1]["shift"] - target) ** 2).sum(), len(target)


@pytest.mark.parametrize("model", [Detached, Borrowed])
def test_weights_outside_of_their_block(model):
    assert_exact(model, rows(), square, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Detached, Generated, Borrowed])
def test_weights_outside_of_their_block_whatever_is_sharded(model):
    assert_exact(model, rows(), square, "z1m", "hsdp", "fsdpm")


def test_penalties_in_forward():
    assert_exact(Penalised, rows(), with_extra, "fsdp", "tp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Penalised, Early])
def test_penalties_in_forward_whatever_is_sharded(model):
    assert_exact(model, rows(), with_extra, "fsdpm", "tp", "z1m")


def test_parameters_among_the_outputs():
    assert_exact(Temperature, rows(), tempered, "ddp", "fsdp", "tp")


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_penalty_in_the_loss(layout):
    """The loss is a closure on the model that was given to the engine."""

    def penalised(model):
        return lambda out, target: (
            ((out - target) ** 2).sum() + 0.01 * len(target) * sum(p.abs().sum() for p in model.parameters()),
            len(target),
        )

    torch.manual_seed(3)
    start = Net().double().state_dict()

    def made():
        model = Net().double()
        model.load_state_dict(start)
        return model

    model = made()
    expected = plain(lambda: model, rows(), penalised(model))

    def body():
        from practice import LAYOUTS

        model = made()
        return ours(model, rows(), penalised(model), LAYOUTS[layout])

    got = run(body, 2)[0]
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    assert got.norms == pytest.approx(expected.norms, rel=1e-12)


def test_weights_that_are_kept_gathered_are_named():
    def body():
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())
        logging.getLogger("paratrain").addHandler(handler)
        ours(Borrowed, rows((8,)), square, ("strategy=fsdp",))
        ours(Net, rows((8,)), square, ("strategy=fsdp",))
        return [line for line in told if "outside of the forward" in line]

    said = run(body, 2)
    assert len(said[0]) == 1
    assert "blocks.0)" in said[0][0]
    assert said[1] == []


# ---------------------------------------------------------------- other ways into a model


class Encoder(Net):
    def encode(self, x):
        return self.body(x)


def test_other_methods_in_evaluation():
    batches = rows((8, 8))
    expected = plain(Encoder, batches, square)
    model = Encoder().double()
    model.load_state_dict(expected.state)
    want = [model.encode(batches[0][0]).detach(), model.out(model.body(batches[0][0])).detach()]

    def body():
        engine = pt.setup(
            Encoder, square, pt.load_config(["precision=fp64", "trainer.device=cpu", "strategy=fsdp", "seed=3", "optimizer.lr=1e-2"])
        )
        with torch.no_grad():
            engine.model.encode(batches[0][0])  # before the first step
        for batch in batches:
            engine.train_step(engine.local(batch))
        with torch.no_grad():
            return [engine.model.encode(batches[0][0]), engine.model.out(engine.model.body(batches[0][0]))]

    torch.manual_seed(3)
    for got in run(body, 2):
        for one, other in zip(got, want, strict=True):
            assert one.shape == other.shape


def test_a_method_gives_what_it_gives_on_one_process():
    batches = rows((8, 8))

    def encoded(engine):
        engine.train_step(engine.local(batches[0]))
        with torch.no_grad():
            early = engine.model.encode(batches[1][0])
        step = engine.train_step(engine.local(batches[1]))
        return early, step.loss, step.grad_norm

    def body(strategy):
        cfg = pt.load_config(["precision=fp64", "trainer.device=cpu", f"strategy={strategy}", "seed=3"])
        return encoded(pt.setup(Encoder, square, cfg))

    early, loss, norm = run(lambda: body("single"), 1)[0]
    for other in run(lambda: body("fsdp"), 2):
        torch.testing.assert_close(other[0], early, rtol=1e-12, atol=1e-12)
        assert other[1:] == pytest.approx((loss, norm), rel=1e-12)


# ---------------------------------------------------------------- refused


class SharedMemory(nn.Module):
    """Two parameters over one storage."""

    def __init__(self, apart=False):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8, dtype=D), nn.Linear(6, 4, dtype=D), nn.Linear(12, 1, dtype=D)
        both = torch.randn(12, 6, dtype=D)
        self.a.weight, self.b.weight = nn.Parameter(both[:8]), nn.Parameter(both[8:] if apart else both[4:8])

    def forward(self, x):
        return self.out(torch.tanh(torch.cat((self.a(x), self.b(x)), -1)))


def test_shared_memory_is_refused_where_parts_cannot_share_it():
    assert_refused(SharedMemory, rows(), square, "fsdp", "tp", says="a.weight and b.weight share memory")
    assert_exact(SharedMemory, rows((8,)), square, "ddp")
    assert_exact(functools.partial(SharedMemory, apart=True), rows((8,)), square, "fsdp")


class Slow(Net):
    """A moving average of a layer, brought on in forward."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Linear(6, 8).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.inner.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return super().forward(x) + self.slow(x).mean(-1, keepdim=True)


def test_writes_to_weights_in_forward_are_refused_where_they_would_be_lost():
    assert_refused(Slow, rows((8, 8)), square, "fsdp", "z1", says="changes slow.weight in place")


def test_compiled_models():
    assert_exact(lambda: torch.compile(Net(), backend="eager"), rows((8,)), square, "fsdp", "tp")


# ---------------------------------------------------------------- neighbours


class Empty(Net):
    """A parameter without elements, in a block and in the root."""

    class block(Block):
        def __init__(self):
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x):
            return super().forward(x) + self.none.sum()

    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return super().forward(x) + self.none.sum()


class OnHost(Net):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


class Mapped(Net):
    def forward(self, x):
        return torch.func.vmap(super().forward)(x)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Empty, OnHost, Mapped])
def test_neighbours(model):
    assert_exact(model, rows((8,)), square, "fsdp", "z1")

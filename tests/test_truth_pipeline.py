"""Programs whose blocks do more than return activations, cut into stages: the result of one process, or a refusal on every rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from practice import assert_exact, assert_refused
from torch import nn
from torch.utils.checkpoint import checkpoint

D = torch.float64


def rows(sizes=(8, 8, 8), width=6):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, width, generator=g, dtype=D) + torch.arange(n)[:, None] * 0.3, torch.randn(n, 1, generator=g, dtype=D))
        for n in sizes
    ]


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


def with_term(out, target):
    return ((out[0] - target) ** 2).sum() + 0.1 * out[1].sum(), len(target)


class Block(nn.Module):
    def __init__(self, d=8, h=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, h), nn.Linear(h, d)

    def inner(self, x):
        return torch.tanh(self.up(self.norm(x)))

    def forward(self, x):
        return x + self.down(self.inner(x))


class Net(nn.Module):
    """in, four blocks, out."""

    block = Block

    def __init__(self, i=6, d=8, o=1, n=4):
        super().__init__()
        self.first, self.blocks, self.out = nn.Linear(i, d), nn.ModuleList(self.block() for _ in range(n)), nn.Linear(d, o)

    def forward(self, x):
        h = self.first(x)
        for b in self.blocks:
            h = b(h)
        return self.out(h)


# ---------------------------------------------------------------- what blocks hand on that hangs on no weight


class MaskedBlock(Block):
    def forward(self, x, mask):
        return x + self.down(self.inner(x)) * mask, mask


class MaskPassed(Net):
    block = MaskedBlock

    def forward(self, x, mask):
        h = self.first(x)
        for b in self.blocks:
            h, mask = b(h, mask)
        return self.out(h * mask)


class MaskComputed(Net):
    """Another mask from each block."""

    class block(Block):
        def forward(self, x, mask):
            return x + self.down(self.inner(x)) * mask, (mask * 0.5 + 0.25, len(mask) * 0.01)

    def forward(self, x, mask):
        h, scale = self.first(x), 0.0
        for b in self.blocks:
            h, (mask, more) = b(h, mask)
            scale += more
        return self.out(h * mask) * (1 + 0 * scale)


def masked():
    g = torch.Generator().manual_seed(2)
    return [((x, (torch.rand(len(x), 8, generator=g) > 0.5).double()), y) for x, y in rows()]


def test_what_hangs_on_no_weight_is_of_this_batch():
    assert_exact(MaskPassed, masked(), square, "pp")
    assert_exact(MaskPassed, masked(), square, "pp", more=("pipeline.schedule=interleaved",))
    assert_exact(MaskComputed, masked(), square, "pp")


# ---------------------------------------------------------------- what blocks leave elsewhere


class Box(Net):
    """Blocks append to a list that the model empties at the start of forward."""

    class block(Block):
        def forward(self, x):
            h = self.inner(x)
            self.box[0].append(h.square().sum(-1))
            return x + self.down(h)

    def __init__(self):
        super().__init__()
        self.box = [[]]
        for b in self.blocks:
            b.box = self.box

    def forward(self, x):
        self.box[0] = []
        y = super().forward(x)
        return y, torch.stack(self.box[0]).sum(0)


class ListArgument(Net):
    class block(Block):
        def forward(self, x, seen, by_name):
            h = self.inner(x)
            by_name[f"at{len(seen)}"] = h.mean(-1)
            seen.append(h.square().sum(-1))
            if len(seen) == 4:  # the last looks at what the first has left
                h = h * torch.sigmoid(seen[0])[:, None]
            return x + self.down(h)

    def forward(self, x):
        h, seen, by_name = self.first(x), [], {}
        for b in self.blocks:
            h = b(h, seen, by_name)
        return self.out(h), sum(seen) + by_name["at1"]


class Attributes(Net):
    """Blocks leave a tensor in an attribute, and the model reads those of all."""

    class block(Block):
        def forward(self, x):
            h = self.inner(x)
            self.term = h.square().mean(-1)
            return x + self.down(h)

    def forward(self, x):
        y = super().forward(x)
        return y, sum(b.term for b in self.blocks)


class RootAttribute(Net):
    """The model leaves a tensor in an attribute of every block, as conditioning does."""

    class block(Block):
        def forward(self, x):
            return x + self.down(self.inner(x)) * self.gate

    def forward(self, x):
        h = self.first(x)
        for b in self.blocks:
            b.gate = torch.sigmoid(h)
        for b in self.blocks:
            h = b(h)
        return self.out(h)


def features():
    """A hook that collects what blocks return, for the head."""
    model = Net()
    seen = []

    def forward(x):
        seen.clear()
        return Net.forward(model, x), sum(each.square().mean(-1) for each in seen)

    for b in model.blocks[:3]:
        b.register_forward_hook(lambda module, args, out: seen.append(out))

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            seen.clear()
            y = self.net(x)
            return y, sum(each.square().mean(-1) for each in seen)

    return Features()


@pytest.mark.parametrize("model", [Box, ListArgument, Attributes, RootAttribute, features])
def test_what_blocks_leave_elsewhere_travels(model):
    loss = square if model is RootAttribute else with_term
    assert_exact(model, rows(), loss, "pp")


@pytest.mark.slow
@pytest.mark.parametrize("model", [Box, ListArgument, Attributes, RootAttribute, features])
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zbv"])
def test_what_blocks_leave_elsewhere_travels_under_every_schedule(model, schedule):
    loss = square if model is RootAttribute else with_term
    assert_exact(model, rows(), loss, "pp", more=(f"pipeline.schedule={schedule}",))


@pytest.mark.slow
@pytest.mark.parametrize("model", [Box, ListArgument, Attributes, RootAttribute])
def test_what_blocks_leave_elsewhere_travels_with_shards_and_over_four_stages(model):
    loss = square if model is RootAttribute else with_term
    assert_exact(model, rows(), loss, "pp", ranks=4, more=("strategy=fsdp",))
    assert_exact(model, rows(), loss, "pp", ranks=4, more=("parallel.pp=4",))


def read_by_loss():
    """The loss reads what blocks have left, past the outputs."""
    held = []

    class Read(Attributes):
        def __init__(self):
            super().__init__()
            held[:] = [self]

        def forward(self, x):
            return Net.forward(self, x)

    def loss(out, target):
        return ((out - target) ** 2).sum() + 0.1 * sum(b.term.sum() for b in held[0].blocks), len(target)

    return Read, loss


def test_the_loss_reads_what_blocks_leave():
    model, loss = read_by_loss()
    assert_exact(model, rows(), loss, "pp")
    assert_exact(model, rows(), loss, "pp", more=("pipeline.schedule=interleaved",))


@dataclasses.dataclass
class Hidden:
    h: torch.Tensor
    norms: tuple[torch.Tensor, ...]


class Dataclasses(Net):
    class block(Block):
        def forward(self, state):
            h = state.h + self.down(self.inner(state.h))
            return Hidden(h, (*state.norms, h.square().mean(-1)))

    def forward(self, x):
        state = Hidden(self.first(x), ())
        for b in self.blocks:
            state = b(state)
        return self.out(state.h), sum(state.norms)


class Dicts(Net):
    class block(Block):
        def forward(self, x, extra=None):
            return {"h": x + self.down(self.inner(x)), "extra": extra, "norm": (x.square().mean(-1), None)}

    def forward(self, x):
        out = {"h": self.first(x)}
        norms = []
        for b in self.blocks:
            out = b(out["h"], extra=out.get("norm"))
            norms.append(out["norm"][0])
        return self.out(out["h"]), sum(norms)


@pytest.mark.parametrize("model", [Dataclasses, Dicts])
def test_blocks_return_structures(model):
    assert_exact(model, rows(), with_term, "pp")


# ---------------------------------------------------------------- checkpoints of the user's own


class Checkpointed(Net):
    reentrant = True

    def forward(self, x):
        h = self.first(x)
        for b in self.blocks:
            h = checkpoint(b, h, use_reentrant=self.reentrant)
        return self.out(h)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x.detach())
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.function(x).backward(grad)
        return None, x.grad


class OwnCheckpoint(Net):
    def forward(self, x):
        h = self.first(x)
        for b in self.blocks:
            h = Own.apply(b, h)
        return self.out(h)


def test_reentrant_checkpoints_train():
    assert_exact(Checkpointed, rows(), square, "pp")
    assert_exact(Checkpointed, rows(), square, "pp", more=("pipeline.schedule=interleaved",))
    assert_refused(OwnCheckpoint, rows(), square, "pp", says="inside of an autograd function")

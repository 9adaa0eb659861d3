"""Programs whose blocks do more than return activations, cut into stages: the result of one process, or a refusal on every rank."""

from __future__ import annotations

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from practice import LAYOUTS, assert_same, ours, plain
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from paratrain.errors import UserError
from paratrain.spawn import run

D = torch.float64


def assert_exact(programs, *more, ranks=2):
    """Each program (model, batches, loss) trains as on one process; all in one job, for starting one takes longer than they do."""

    def body():
        return [ours(model, copy.deepcopy(batches), loss, (*LAYOUTS["pp"], *more)) for model, batches, loss in programs]

    results = run(body, ranks, timeout=400)
    for number, (model, batches, loss) in enumerate(programs):
        expected = plain(model, copy.deepcopy(batches), loss)
        assert_same(results[0][number], expected, what=f"{model.__name__} {more}")
        for other in results[1:]:
            assert other[number].losses == results[0][number].losses


def assert_refused(programs, *more):
    """Each program (model, batches, loss, text) is refused by every rank with that text, in set-up or in the first step."""

    def body():
        said = []
        for model, batches, loss, _ in programs:
            try:
                ours(model, batches, loss, (*LAYOUTS["pp"], *more))
                said.append("")
            except UserError as error:
                said.append(str(error))
        return said

    for rank, said in enumerate(run(body, 2, timeout=400)):
        for (model, *_, text), message in zip(programs, said, strict=True):
            assert text in message, f"{model.__name__}, rank {rank}: {message or 'nothing was refused'}"


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


def read_by_loss():
    """The loss reads what blocks have left, past the outputs."""
    held = []

    class ReadByLoss(Attributes):
        def __init__(self):
            super().__init__()
            held[:] = [self]

        def forward(self, x):
            return Net.forward(self, x)

    def loss(out, target):
        return ((out - target) ** 2).sum() + 0.1 * sum(b.term.sum() for b in held[0].blocks), len(target)

    return ReadByLoss, rows(), loss


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


# ---------------------------------------------------------------- lists and objects that are not the model's own

COLLECTED: list[torch.Tensor] = []


class GlobalList(Net):
    class block(Block):
        def forward(self, x):
            h = self.inner(x)
            COLLECTED.append(h.square().sum(-1))
            return x + self.down(h)

    def forward(self, x):
        COLLECTED.clear()
        return super().forward(x), sum(COLLECTED)


class Context:
    def __init__(self):
        self.terms, self.last = {}, None


class ObjectArgument(Net):
    class block(Block):
        def forward(self, x, context):
            h = self.inner(x)
            context.terms[len(context.terms)] = h.square().sum(-1)
            context.last = h.mean(-1)
            return x + self.down(h)

    def forward(self, x):
        context, h = Context(), self.first(x)
        for b in self.blocks:
            h = b(h, context)
        return self.out(h), sum(context.terms.values()) + context.last


class Distributions(Net):
    class block(Block):
        def forward(self, x):
            h = x + self.down(self.inner(x))
            return h, torch.distributions.Normal(h, torch.ones_like(h))

    def forward(self, x):
        h, terms = self.first(x), 0.0
        for b in self.blocks:
            h, posterior = b(h)
            terms = terms + posterior.mean.square().mean(-1)
        return self.out(h), terms


# ---------------------------------------------------------------- weights used outside of their block


class Reused(Net):
    """After its blocks, forward uses layers of the first again."""

    def forward(self, x):
        h = self.first(x)
        for b in self.blocks:
            h = b(h)
        return self.out(h + self.blocks[0].down(self.blocks[0].up(h)))


class Penalty(Net):
    """A penalty on all weights, before the blocks and after them."""

    def forward(self, x):
        before = sum(p.abs().sum() for p in self.parameters())
        return super().forward(x), before + torch.stack([p.square().sum() for p in self.blocks.parameters()]).sum()


def penalised(out, target):
    return ((out[0] - target) ** 2).sum() + 0.01 * len(target) * out[1], len(target)


def penalty_in_loss():
    held = []

    class PenaltyInLoss(Net):
        def __init__(self):
            super().__init__()
            held[:] = [self]

    def loss(out, target):
        return ((out - target) ** 2).sum() + 0.01 * len(target) * sum(p.square().sum() for p in held[0].parameters()), len(target)

    return PenaltyInLoss, rows(), loss


# ---------------------------------------------------------------- what forward does by its inputs


class WritesIntoInputs(Net):
    def forward(self, x):
        x.mul_(0.5)
        x -= 0.1
        return super().forward(x)


class RootHooks(Net):
    """Hooks on what the model is given and returns; what the first stage returns is a message, and none of theirs."""

    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: tree_map(lambda x: x * 0.5, args))
        self.register_forward_hook(lambda module, args, out: tree_map(lambda x: x * 2 + 1, out))


class Heads(Net):
    """Each block has a head, whose output goes into a list: its weights are used by nothing that the block returns."""

    class block(Block):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 1)

        def forward(self, x, seen):
            seen.append(self.head(x)[:, 0])
            return x + self.down(self.inner(x))

    def forward(self, x):
        h, seen = self.first(x), []
        for b in self.blocks:
            h = b(h, seen)
        return self.out(h), sum(seen)


class HandsOn(Net):
    """Some blocks return what they are given."""

    class block(Block):
        def forward(self, x, on):
            return x + self.down(self.inner(x)) if on else x

    def forward(self, x):
        h = self.first(x)
        for number, b in enumerate(self.blocks):
            h = b(h, number % 2 == 1)
        return self.out(h)


class ReturnsNumber(Net):
    class block(Block):
        def forward(self, x, scale):
            return x + self.down(self.inner(x)) * (1 + 0.1 * scale), float(x.abs().max())

    def forward(self, x):
        h, scale = self.first(x), 0.0
        for b in self.blocks:
            h, scale = b(h, scale)
        return self.out(h)


class WritesIntoArgument(Net):
    class block(Block):
        def forward(self, x, total):
            h = self.inner(x)
            total += h.detach().mean(-1, keepdim=True)
            return x + self.down(h)

    def forward(self, x):
        h, total = self.first(x), x.new_zeros(len(x), 1)
        for b in self.blocks:
            h = b(h, total)
        return self.out(h) * (1 + total)


class CountsInArgument(Net):
    class block(Block):
        def forward(self, x, count):
            count += 1
            return x + self.down(self.inner(x)) * count

    def forward(self, x):
        h, count = self.first(x), torch.zeros((), dtype=D)
        for b in self.blocks:
            h = b(h, count)
        return self.out(h)


class LeavesOut(Net):
    def forward(self, x):
        h = self.first(x)
        for number, b in enumerate(self.blocks):
            h = h if number == 1 else b(h)
        return self.out(h)


class Twice(Net):
    def forward(self, x):
        h = self.first(x)
        for b in self.blocks:
            h = b(b(h))
        return self.out(h)


class Lazy(Net):
    class block(Block):
        def forward(self, x):
            return lambda y: y + self.down(self.inner(y))

    def forward(self, x):
        h = self.first(x)
        for step in [b(h) for b in self.blocks]:
            h = step(h)
        return self.out(h)


class Forces(Net):
    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_()
            energy = super().forward(x)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, slope.square().sum(-1)


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.blocks[0] = torch.compile(self.blocks[0], backend="eager")


ELSEWHERE = [(model, rows(), with_term) for model in (Box, ListArgument, Heads, Attributes, features, GlobalList, ObjectArgument)]
HANDED = [(MaskPassed, masked(), square), (MaskComputed, masked(), square), (RootAttribute, rows(), square)]
SHAPES = [(model, rows(), with_term) for model in (Dataclasses, Dicts, Distributions)]
WEIGHTS = [(Reused, rows(), square), (Penalty, rows(), penalised)]
OTHERS = [(model, rows(), square) for model in (Checkpointed, WritesIntoInputs, RootHooks, HandsOn, Compiled)]


def test_programs_whose_blocks_do_more_are_exact():
    assert_exact([*ELSEWHERE, *HANDED, *SHAPES, *WEIGHTS, *OTHERS, read_by_loss()])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zbv"])
def test_under_every_schedule(schedule):
    assert_exact([*ELSEWHERE, *HANDED, *SHAPES, *WEIGHTS, *OTHERS, read_by_loss()], f"pipeline.schedule={schedule}")


@pytest.mark.slow
def test_over_three_stages():
    assert_exact([*ELSEWHERE, *HANDED, *SHAPES, *WEIGHTS, *OTHERS, read_by_loss()], "parallel.pp=3", ranks=3)


@pytest.mark.slow
def test_with_shards():
    assert_exact([*ELSEWHERE, *HANDED, *SHAPES, *OTHERS], "strategy=fsdp", ranks=4)


def test_what_stages_cannot_follow_is_refused_by_every_rank():
    assert_refused(
        [
            (ReturnsNumber, rows(), square, "a block returns a number that it computes from its tensors"),
            (WritesIntoArgument, rows(), square, "writes into a tensor that it is given"),
            (CountsInArgument, rows(), square, "writes into a tensor that it is given"),
            (LeavesOut, rows(), square, "forward calls block 'blocks.2' where 'blocks.1' was expected"),
            (Twice, rows(), square, "forward calls block 'blocks.0' where 'blocks.1' was expected"),
            (Lazy, rows(), square, "block 'blocks.0' returns a function"),
            (Forces, rows(), with_term, "through what several stages compute"),
            (OwnCheckpoint, rows(), square, "inside of an autograd function"),
        ]
    )


def test_a_loss_that_reads_weights_of_other_stages_says_where_they_must_be():
    model, batches, loss = penalty_in_loss()

    def body():
        try:
            ours(model, batches, loss, LAYOUTS["pp"])
        except Exception as error:  # what the first stage sees of it is the affair of who watches over the ranks
            return type(error), str(error)
        raise AssertionError("nothing was refused")

    kind, text = run(body, 2)[1]
    assert issubclass(kind, UserError), text
    assert "the loss function reads 'first.weight'" in text
    assert_exact([(model, batches, loss)], "pipeline.place={*: [0, -1]}")


class MasksByChance(Net):
    """What is hidden is drawn in forward, hidden before the blocks and compared after them, as masked autoencoders do."""

    def forward(self, x):
        hidden = (torch.rand(len(x), 1) < 0.5).double()
        shift = random.random() + float(np.random.rand())
        h = self.first(x * (1 - hidden))
        for b in self.blocks:
            h = b(h)
        return self.out(h), hidden, shift, x[:, :1] * (1 - hidden)


def test_all_stages_draw_alike_outside_of_blocks():
    """What the first stage hid is what the last one counts; steps and micro-batches differ."""
    seen = []

    class Reports(MasksByChance):
        class block(Block):
            def forward(self, x):
                return x  # hands the input of the blocks on

        def __init__(self):
            super().__init__()
            self.first.weight.data.copy_(torch.eye(8, 6))
            self.first.bias.data.zero_()
            self.out = nn.Linear(8, 8)
            self.out.weight.data.copy_(torch.eye(8))
            self.out.bias.data.zero_()

        def forward(self, x):
            y, hidden, shift, expected = super().forward(x)
            seen.append((y.detach()[:, :1], expected, hidden, shift))
            return y

    def body():
        ours(Reports, rows((8,)), loss, LAYOUTS["pp"], before=lambda model, step: seen.clear())
        return seen

    def loss(out, target):
        return (out[:, :1] - target).square().sum(), len(target)

    last = run(body, 2)[1]
    found = [entry for entry in last if type(entry[0]) is torch.Tensor]
    assert len(found) == 4, "micro-batches"
    for y, expected, *_ in found:
        assert torch.equal(y, expected)
    assert len({entry[3] for entry in found}) == 4
    assert len({tuple(entry[2].flatten().tolist()) for entry in found}) > 1


def test_requires_grad_may_be_switched_and_hooks_registered():
    """On weights that other stages hold, too."""

    def before(model, step):
        if step == 0:
            model.blocks[3].up.weight.register_hook(lambda grad: grad * 0.5)
            model.blocks[0].up.weight.register_hook(lambda grad: grad * 0.5)
        model.first.requires_grad_(step != 1)
        model.blocks[0].requires_grad_(step == 1)

    def body():
        return ours(Net, rows(), square, LAYOUTS["pp"], before=before)

    assert_same(run(body, 2)[0], plain(Net, rows(), square, before=before))

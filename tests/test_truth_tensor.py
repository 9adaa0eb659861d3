"""Tensor plans of programs as people write them: the same training as of one process, parts of what can be split, and a word about the rest."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from practice import BASE, LAYOUTS, assert_refused, assert_same, plain, rows
from torch import nn

import paratrain as pt
from paratrain.errors import UserError
from paratrain.parallel import tensor, uncompile
from paratrain.spawn import run


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


def assert_exact_parts(programs, *overrides, data=None, tolerance=1e-10):
    """Each of name -> (model_fn, the most that a rank may hold of the weights) trains as one process does; in one start of the ranks."""
    from practice import Trained

    data = data or rows()

    def body():
        found = {}
        for name, (model_fn, _) in programs.items():
            engine = pt.setup(model_fn, square, pt.load_config([*BASE, *LAYOUTS["tp"], *overrides]))
            params = list(engine.model.parameters())
            share = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in params) / sum(p.numel() for p in params)
            steps = [engine.train_step(engine.local(batch)) for batch in data]
            found[name] = Trained([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()), share
        return found

    first, second = run(body, 2, timeout=400)
    for name, (model_fn, most) in programs.items():
        assert_same(first[name][0], plain(model_fn, data, square), tolerance, name)
        assert max(first[name][1], second[name][1]) <= most, f"{name}: a rank holds {first[name][1]:.2f} of the weights"


# ---------------------------------------------------------------- weights that are functions of parameters


def pair(make):
    """Two matrices that follow each other, made by `make(in, out)`."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = make(6, 16), make(16, 1)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    return Net


class Masked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", (torch.rand(self.weight.shape) > 0.4).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Turned(Masked):
    def forward(self, x):
        return x @ (self.weight * self.mask).t() + self.bias


class Scaled(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.rows, self.all = nn.Parameter(torch.ones(self.out_features, 1)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return F.linear(x, self.weight * self.rows * self.all, self.bias)


class Scored(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scores = nn.Parameter(torch.randn(self.weight.shape))

    def forward(self, x):
        return F.linear(x, self.weight * torch.sigmoid(self.scores), self.bias)


class Columns(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(before, after) / 4)

    def forward(self, x):
        return F.linear(x, self.weight.t())


def pruned(before, after):
    return nn.utils.prune.l1_unstructured(nn.Linear(before, after), "weight", 0.5)


def test_functions_of_parameters_are_split_as_they_are():
    utils = nn.utils
    assert_exact_parts(
        {
            "weight norm": (pair(lambda a, b: utils.parametrizations.weight_norm(nn.Linear(a, b))), 0.6),
            "weight norm by a hook": (pair(lambda a, b: utils.weight_norm(nn.Linear(a, b))), 0.6),
            "spectral norm": (pair(lambda a, b: utils.parametrizations.spectral_norm(nn.Linear(a, b))), 0.6),
            "pruned": (pair(pruned), 0.6),
            "masked": (pair(Masked), 0.6),
            "masked and turned": (pair(Turned), 0.65),
            "scaled": (pair(Scaled), 0.6),
            "learned mask": (pair(Scored), 0.6),
            "columns": (pair(Columns), 0.6),
        }
    )


# ---------------------------------------------------------------- convolutions


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8)
        self.a = nn.ModuleList(nn.Conv2d(8, 16, 3, padding=1, bias=False) for _ in range(2))
        self.n = nn.ModuleList(norm(16) for _ in range(2))
        self.b = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.first(self.stem(x.view(-1, 1, 2, 3).repeat(1, 1, 2, 2)))), 2)
        for a, n, b in zip(self.a, self.n, self.b, strict=True):
            h = h + b(F.relu(n(a(h))))
        return self.out(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Separable(nn.Module):
    """A depthwise and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.d, self.b = nn.Conv1d(6, 16, 1), nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.Conv1d(16, 6, 1)
        self.u, self.v, self.out = nn.ConvTranspose1d(6, 12, 2, stride=2), nn.ConvTranspose1d(12, 6, 2), nn.Linear(6, 1)

    def forward(self, x):
        h = x[..., None].repeat(1, 1, 3) if x.ndim == 2 else x
        h = h + self.b(F.silu(self.d(self.a(h))))
        return self.out(self.v(F.relu(self.u(h))).mean(-1))


def normalised():
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


def test_convolutions_are_split_by_their_channels():
    assert_exact_parts(
        {
            "plain": (lambda: Residual(lambda c: nn.Identity()), 0.55),
            "group norm": (lambda: Residual(lambda c: nn.GroupNorm(4, c)), 0.55),
            "batch norm": (lambda: Residual(nn.BatchNorm2d), 0.55),
            "instance norm": (lambda: Residual(lambda c: nn.InstanceNorm2d(c, affine=True)), 0.55),
            "separable": (Separable, 0.6),
            "batch norm of features": (normalised, 0.7),
        }
    )


@pytest.mark.slow
def test_split_norms_take_the_statistics_of_all_data_ranks():
    def body():
        engine = pt.setup(normalised, square, pt.load_config([*BASE, *LAYOUTS["tp"]]))
        steps = [engine.train_step(engine.local(batch)) for batch in rows()]
        return [s.loss for s in steps], engine.full_state_dict()

    losses, state = run(body, 4)[0]
    expected = plain(normalised, rows(), square)
    assert losses == pytest.approx(expected.losses, abs=1e-10)
    assert all((state[name] - value).abs().max() < 1e-10 for name, value in expected.state.items())


# ---------------------------------------------------------------- what is split, and what is said


class Attend(nn.Module):
    def __init__(self, width, heads, out):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, out)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


def test_matrices_of_one_name_and_several_widths():
    g = torch.Generator().manual_seed(4)
    data = [tuple(torch.randn(8, 5, 8, generator=g, dtype=torch.float64) for _ in range(2)) for _ in range(3)]
    assert_exact_parts({"two widths": (lambda: nn.Sequential(Attend(8, 2, 16), Attend(16, 4, 8)), 0.55)}, data=data, tolerance=1e-9)


class Block(nn.Module):
    """Attention of heads that two ranks do not divide, and an MLP that they do."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads, self.one, self.two = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        b, t, d = x.shape
        y = self.one(x)
        q, k, v = (m(y).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.two(x))))


class Decoder(nn.Module):
    def __init__(self, vocab=32):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(vocab, 12), nn.ModuleList(Block() for _ in range(2)), nn.Linear(12, vocab)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def configuration(*overrides):
    return pt.load_config([*BASE, *LAYOUTS["tp"], *overrides])


def on_meta(model_fn):
    with torch.device("meta"):
        return model_fn()


def test_attention_that_cannot_be_split_leaves_the_mlp_beside_it_split():
    plan = tensor.planned(on_meta(Decoder), configuration())
    assert {name for name in plan.placements if "blocks.1" in name} == {"blocks.1.up.weight", "blocks.1.up.bias", "blocks.1.down.weight"}
    assert "3, 4), of which no dim can be split over 2 ranks" in plan.reasons["blocks.*.q.weight"]


class Orthogonal(nn.Module):
    """All that could be split is a matrix function of a parameter."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 6) / 4), nn.Linear(6, 1)

    def forward(self, x):
        return self.down(torch.tanh(x @ torch.matrix_exp(self.up - self.up.T)))


def test_a_plan_that_splits_nothing_is_refused_and_what_the_error_shows_can_be_pasted():
    with pytest.raises(UserError, match=r"parallel\.tp=2: no weight of the model can be split.*up: no rule splits sub") as caught:
        tensor.planned(on_meta(Orthogonal), configuration())
    shown = str(caught.value).split("'")[1::2]
    assert "parallel.tp_plan={}" in shown
    for override in (text for text in shown if text.startswith("parallel.")):
        assert tensor.planned(on_meta(Orthogonal), configuration(override)) is not None

    class Unguessable(Decoder):
        def forward(self, tokens):
            raise ValueError("never")

    with pytest.raises(UserError, match="the model ran on none of the inputs") as caught:
        tensor.planned(on_meta(Unguessable), configuration())
    (shown,) = [text for text in str(caught.value).split("'") if text.startswith("parallel.tp_plan={")]
    assert len(tensor.planned(on_meta(Unguessable), configuration(shown)).placements) == 6
    assert_exact_parts({"nothing": (Orthogonal, 1.0)}, "parallel.tp_plan={}")


def test_what_every_rank_holds_is_named(caplog):
    def body():
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logging.getLogger("paratrain").addHandler(handler)
        pt.setup(Mostly, square, configuration())
        return records

    text = "\n".join(run(body, 2)[0])
    assert "every rank holds" in text
    assert "table.weight" in text


class Mostly(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Linear(6, 600), nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) + torch.cumsum(self.table(x), -1).unfold(-1, 2, 2).sum((1, 2))[:, None] * 1e-3


# ---------------------------------------------------------------- writes, transforms and hooks


def between(change):
    """`change(model, h)` between two matrices."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 1)

        def forward(self, x):
            h = self.inner(x)
            return self.out(h + self.down(change(self, torch.tanh(self.up(h)) * 1)))

    return Net


def write_view(model, h):
    h.view(-1, 4, 4)[:, 1:][..., 0].mul_(2)
    return h


def write_selected(model, h):
    h.unflatten(-1, (2, 8)).select(1, 1).add_(1)
    return h


def write_rows(model, h):
    h[:, ::3].zero_()
    h[:, 3] = 0.5
    return h


def write_out(model, h):
    with torch.no_grad():
        kept = torch.zeros(h.shape, dtype=h.dtype, device=h.device)
        torch.mul(h, 2, out=kept)
    return h + kept


def mapped(model, h):
    return torch.func.vmap(torch.func.grad(lambda row: (row**3).sum()))(h)


def saved(model, h):
    with torch.autograd.graph.save_on_cpu():
        return torch.sin(torch.exp(h))


def test_writes_transforms_and_hooks_between_matrices():
    assert_exact_parts({f.__name__: (between(f), 1.0) for f in (write_view, write_selected, write_rows, write_out, mapped, saved)})


def test_writes_under_a_plan_of_the_users_own_are_refused():
    asked = "parallel.tp_plan={up: colwise, down: rowwise}"
    for change, says in (
        (write_view, "writes into what"),
        (write_selected, "writes into what select gives"),
        (write_out, "mul writes into a tensor"),
    ):
        assert_refused(between(change), rows(), square, "tp", says=says, more=[asked])


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 1)

    def row(self, x):
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return torch.func.vmap(self.row)(x)


def test_weights_that_are_read_inside_of_a_transform_are_refused_by_name():
    assert_refused(Mapped, rows(), square, "tp", says="parallel.tp=2: no weight of the model can be split")
    assert_refused(
        Mapped, rows(), square, "tp", says="up.weight is read inside of a function that torch.func transforms", more=["parallel.tp_plan={}"]
    )


# ---------------------------------------------------------------- compiled models


def compiled():
    return torch.compile(between(lambda model, h: h)(), backend="eager")


def test_a_compiled_model_keeps_its_names_and_is_split():
    wrapped, names = uncompile.unwrapped(compiled(), configuration())
    assert type(wrapped).__name__ == "Net"
    assert wrapped._compiled_call_impl is None
    assert names["up.weight"] == "_orig_mod.up.weight"
    whole, _ = uncompile.unwrapped(nn.Sequential(compiled(), nn.Tanh()), pt.load_config([*BASE, "strategy=ddp"]))
    assert [name for name, _ in whole.named_parameters()][:2] == ["0.inner.weight", "0.inner.bias"]
    assert whole[0]._compiled_call_impl is not None
    assert_exact_parts({"compiled": (compiled, 0.6)})

"""Programs as users write them, trained by a plain loop of one process and by paratrain: the same result, or refused by name.

assert_exact(Net, batches, square, "ddp", "fsdp", "tp")       # losses, norms and weights of the plain loop, in float64
assert_refused(Net, batches, square, "pp", says="parallel.pp")  # a UserError on every rank, whose text says so
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import paratrain as pt
from paratrain import rng
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.spawn import run

TOLERANCE = 1e-10  # float64, the same sums in another order
BASE = ("precision=fp64", "trainer.device=cpu", "optimizer=adamw", "optimizer.lr=1e-2", "optimizer.weight_decay=0", "seed=3")
LAYOUTS = {
    "single": ("strategy=single",),
    "ddp": ("strategy=ddp",),
    "ddpm": ("strategy=ddp", "data.micro_batch_size=2"),
    "z1": ("strategy=zero1",),
    "z1m": ("strategy=zero1", "data.micro_batch_size=2"),
    "z2m": ("strategy=zero2", "data.micro_batch_size=2"),
    "fsdp": ("strategy=fsdp",),
    "fsdpm": ("strategy=fsdp", "data.micro_batch_size=2"),
    "hsdp": ("strategy=hsdp",),
    "tp": ("strategy=ddp", "parallel.tp=2"),
    "sp": ("strategy=ddp", "parallel.tp=2", "parallel.sp=true"),
    "pp": ("strategy=ddp", "parallel.pp=2"),
    "cp": ("strategy=ddp", "parallel.cp=2"),
    "rc": ("strategy=ddp", "memory.recompute=full"),
}


@dataclass(frozen=True)
class Trained:
    """What a training ended in: the loss and gradient norm of each step, and the weights and buffers (none but on rank 0)."""

    losses: list[float]
    norms: list[float]
    state: dict[str, torch.Tensor]


def rows(sizes=(8, 8, 7), width=6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (inputs, targets) whose samples differ more than noise does, so that an exchange of samples shows."""
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, width, generator=g, dtype=torch.float64) + torch.arange(n)[:, None] * 0.3,
            torch.randn(n, 1, generator=g, dtype=torch.float64),
        )
        for n in sizes
    ]


@functools.cache
def configured(overrides: tuple[str, ...]) -> Config:
    """Composed once in the test's own process, and handed to the ranks: composing takes longer than training does here."""
    return pt.load_config([*BASE, *overrides])


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def plain(model_fn: Callable, batches: Sequence, loss_fn: Callable, *, mean: Callable | None = None, before=None, after=None) -> Trained:
    """A loop of one process that sees whole batches and shares nothing with the engine.

    Args:
        mean: `mean(model, inputs, targets)`, where the loss of one process is not that of `loss_fn` on the whole batch.
        before: `before(model, step)` in front of each step; `after` behind it.
    """
    rng.seed_all(3)
    model = model_fn().double()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0, foreach=False)
    losses, norms = [], []
    for step, (inputs, targets) in enumerate(batches):
        if before is not None:
            before(model, step)
        optimizer.zero_grad()
        value = loss_fn(call(model, inputs), targets) if mean is None else mean(model, inputs, targets)
        value = value[0] / value[1] if isinstance(value, tuple) else value
        value.backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])))
        optimizer.step()
        losses.append(float(value))
        if after is not None:
            after(model, step)
    return Trained(losses, norms, {name: value.detach().clone() for name, value in model.state_dict().items()})


def ours(
    model_fn: Callable, batches: Sequence, loss_fn: Callable, overrides: Sequence[str] | Config, *, before=None, after=None
) -> Trained:
    """The same on a rank of paratrain; `before` and `after` are given the engine's model."""
    engine = pt.setup(model_fn, loss_fn, overrides if isinstance(overrides, Config) else configured(tuple(overrides)))
    steps = []
    for step, batch in enumerate(batches):
        if before is not None:
            before(engine.model, step)
        steps.append(engine.train_step(engine.local(batch)))
        if after is not None:
            after(engine.model, step)
    return Trained([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict())


def assert_same(got: Trained, expected: Trained, tolerance: float = TOLERANCE, what: str = "") -> None:
    """Losses and norms relative, weights and buffers absolute."""
    for name, ours_, theirs in (("loss", got.losses, expected.losses), ("norm", got.norms, expected.norms)):
        assert len(ours_) == len(theirs)
        for step, (a, b) in enumerate(zip(ours_, theirs, strict=True)):
            assert abs(a - b) <= tolerance * max(1.0, abs(b)), f"{what}: {name} of step {step}: {a} where the plain loop has {b}"
    assert got.state.keys() == expected.state.keys(), f"{what}: names {sorted(got.state.keys() ^ expected.state.keys())}"
    for name, value in expected.state.items():
        assert got.state[name].shape == value.shape, f"{what}: {name}"
        if value.numel():
            off = float((got.state[name].to(torch.float64) - value.to(torch.float64)).abs().max())
            assert off <= tolerance, f"{what}: {name} is {off:.1e} off"


def assert_exact(
    model_fn: Callable, batches: Sequence, loss_fn: Callable, *layouts: str, ranks: int = 2, more: Sequence[str] = (), **kw: Any
) -> None:
    """Under each layout (a name in `LAYOUTS`) training is that of the plain loop.

    Args:
        more: further overrides.
        kw: `mean`, `before` and `after` of `plain`; the last two are also called with the engine's model.
    """
    mean = kw.pop("mean", None)
    expected = plain(model_fn, batches, loss_fn, mean=mean, **kw)
    for layout in layouts:
        cfg = configured((*LAYOUTS[layout], *more))
        results = run(lambda cfg=cfg: ours(model_fn, batches, loss_fn, cfg, **kw), 1 if layout == "single" else ranks)
        assert_same(results[0], expected, what=layout)
        for other in results[1:]:
            assert (other.losses, other.norms) == (results[0].losses, results[0].norms), f"{layout}: every rank reports the same numbers"


def assert_refused(
    model_fn: Callable, batches: Sequence, loss_fn: Callable, *layouts: str, says: str, ranks: int = 2, more: Sequence[str] = (), **kw: Any
) -> None:
    """Under each layout every rank refuses, with a `UserError` whose text has `says`."""

    def body(layout: str) -> str:
        try:
            ours(model_fn, batches, loss_fn, (*LAYOUTS[layout], *more), **kw)
        except UserError as error:
            return str(error)
        return ""

    for layout in layouts:
        for rank, text in enumerate(run(lambda layout=layout: body(layout), 1 if layout == "single" else ranks)):
            assert says in text, f"{layout}: rank {rank} {'refused with: ' + text if text else 'refused nothing'}"

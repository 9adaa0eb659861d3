"""Loops as users write them around an engine: what they do between steps means what it means on one process, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import paratrain as pt
from paratrain.errors import UserError
from paratrain.spawn import run
from tests.practice import BASE, LAYOUTS, TOLERANCE

D = torch.float64
SGD = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0", "trainer.clip_norm=null")


def rows(steps: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=g, dtype=D) + torch.arange(8)[:, None] * 0.3, torch.randn(8, 1, generator=g, dtype=D))
        for _ in range(steps)
    ]


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.blocks, self.out = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


class Qkv(nn.Module):
    """A fused qkv, whose rows tensor parallelism keeps in another order."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (z.view(*z.shape[:2], 2, 4).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.blocks, self.out = nn.Linear(6, 24), nn.ModuleList(Qkv() for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x):
        h = self.inner(x).unflatten(-1, (3, 8))  # three tokens
        for block in self.blocks:
            h = block(h)
        return self.out(h).mean(1)


class Plain:
    """The engine's interface over a plain loop: one process, no part of the engine."""

    def __init__(self, model_fn: Callable, sgd: bool = False, trained: Callable | None = None):
        torch.manual_seed(3)
        self.model = model_fn().double()
        chosen = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(chosen, 0.1) if sgd else torch.optim.AdamW(chosen, 1e-2, weight_decay=0.0, foreach=False)
        self.optimizers = [self.optimizer]
        self.losses: list[float] = []

    def __call__(self, x):
        return self.model(x)

    def local(self, batch):
        return batch

    def backward(self, loss):
        (loss[0] / loss[1]).backward()
        self.losses.append(float(loss[0] / loss[1]))

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train_step(self, batch):
        self.backward(square(self(batch[0]), batch[1]))
        self.step()


class Ours:
    """An engine whose losses are noted."""

    def __init__(self, model_fn: Callable, cfg: pt.Config):
        self.engine = pt.setup(model_fn, square, cfg)
        self.losses: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, x):
        return self.engine(x)

    def local(self, batch):
        part = self.engine.local(batch)
        return part.inputs, part.targets

    def step(self):
        self.losses.append(self.engine.step().loss)

    def train_step(self, batch):
        self.losses.append(self.engine.train_step(self.engine.local(batch)).loss)


# ---------------------------------------------------------------- programs: what happens between steps; e is an engine or a plain loop


def steps(between: Callable[[Any, int], None], after: bool = False) -> Callable[[Any], None]:
    def program(e: Any) -> None:
        for number, batch in enumerate(rows()):
            if not after:
                between(e, number)
            e.train_step(batch)
            if after:
                between(e, number)

    return program


def unfreeze(e, step):
    if step == 0:
        e.model.blocks.requires_grad_(False)
    if step == 1:
        e.model.blocks[1].requires_grad_(True)
    if step == 2:
        e.model.blocks[0].requires_grad_(True)
        e.model.out.requires_grad_(False)


def hooks(e, step):
    weight = e.model.blocks[0].up.weight
    if step == 0:
        weight.register_hook(lambda g: g * (torch.arange(16) % 3).to(g)[:, None])
        e.handle = weight.register_hook(lambda g: g / (1 + g.norm()))  # of the whole gradient
        e.model.inner.weight.register_post_accumulate_grad_hook(lambda p: [p.grad.clamp_(-0.05, 0.05)].clear())
    if step == 2:
        e.handle.remove()


@torch.no_grad()
def writes(e, step):
    up, down = e.model.blocks[0].up.weight, e.model.blocks[0].down.weight
    up[0].zero_()
    up.data[3, 1:4] = 0.25
    down.data = down.data.clamp(-0.2, 0.2)
    down.div_(down.norm(dim=1, keepdim=True))
    e.model.out.weight.copy_(torch.linspace(-1, 1, 8, dtype=D)[None] * float(up.norm()))
    nn.init.constant_(e.model.inner.bias, 0.1)
    for param in e.model.blocks[1].parameters():
        param.clamp_(-0.3, 0.3)
    row = e.model.inner.weight.view(-1)[7:9]
    e.model.inner.weight.mul_(0.5)
    row.add_(1.0)  # a view that was taken before


def load(e, step):
    if step == 1:
        torch.manual_seed(11)
        e.model.load_state_dict(Net().double().state_dict())
    if step == 2:
        e.model.load_state_dict(e.kept)
    e.kept = copy.deepcopy(e.model.state_dict())


def evaluates(e, step):
    with torch.inference_mode():
        e.model(rows()[0][0])
    with torch.no_grad():
        e.model.inner(rows()[0][0])


def schedules(e, step):
    if step == 0:
        e.scheduler = torch.optim.lr_scheduler.StepLR(e.optimizers[0], 1, 0.1)
        for group in e.optimizers[0].param_groups:
            group["lr"] *= 2
    else:
        e.scheduler.step()


def grow(e, step):
    if step == 1:
        torch.manual_seed(11)
        e.model.blocks.append(Block().double())
        e.optimizers[0].add_param_group({"params": list(e.model.blocks[-1].parameters())})
    if step == 2:
        e.model.act = nn.Tanh()  # nothing that is trained


def own(between: Callable[[Any, int], None]) -> Callable[[Any], None]:
    def program(e: Any) -> None:
        for number, batch in enumerate(rows()):
            x, y = e.local(batch)
            e.backward(square(e(x), y))
            between(e, number)
            e.step()

    return program


def clips(e, step):
    nn.utils.clip_grad_norm_(e.model.parameters(), 0.5)


@torch.no_grad()
def decays(e, step):
    for param in e.model.parameters():
        param.grad.add_(param, alpha=0.1)
        param.grad.div_(param.grad.norm() + 1e-3)
    e.model.blocks[0].up.weight.grad[2].zero_()


def sam(e: Any) -> None:
    for batch in rows():
        x, y = e.local(batch)
        e.backward(square(e(x), y))
        with torch.no_grad():
            norm = torch.stack([param.grad.norm() for param in e.model.parameters()]).norm()
            moved = [param.grad * (0.05 / norm) for param in e.model.parameters()]
            for param, by in zip(e.model.parameters(), moved, strict=True):
                param.add_(by)
        e.optimizers[0].zero_grad()
        e.backward(square(e(x), y))
        with torch.no_grad():
            for param, by in zip(e.model.parameters(), moved, strict=True):
                param.sub_(by)
        e.losses = e.losses[: len(e.losses) // 2 * 2] if isinstance(e, Plain) else e.losses
        e.step()
    if isinstance(e, Plain):
        e.losses = e.losses[1::2]


def penalty(e: Any) -> None:
    """Weights in the loss, outside of forward."""
    for batch in rows():
        x, y = e.local(batch)
        total, count = square(e(x), y)
        e.backward((total + 0.01 * count * sum(param.square().sum() for param in e.model.parameters()), count))
        e.step()


def bare(e: Any) -> None:
    """The forward by the model itself."""
    for batch in rows():
        x, y = e.local(batch)
        e.backward(square(e.model(x), y))
        e.step()


def own_optimizer(e: Any) -> None:
    """An optimizer of the program's own over the engine's parameters."""
    mine = torch.optim.SGD(e.model.parameters(), 0.05, momentum=0.5)
    for batch in rows():
        x, y = e.local(batch)
        mine.zero_grad()
        e.backward(square(e(x), y))
        mine.step()


def averages(e: Any) -> None:
    average = None
    for batch in rows():
        e.train_step(batch)
        average = average or AveragedModel(e.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        average.update_parameters(e.model)
        mean = [param.detach().clone() for param in e.model.parameters()]
        for kept, param in zip(mean, e.model.parameters(), strict=True):
            kept.lerp_(param.detach(), 0.5)
    e.losses += [float(value.norm()) for value in average.module.state_dict().values()]
    e.losses.append(float(average.module(rows()[0][0]).sum()))


PROGRAMS: dict[str, tuple[Callable, Callable, bool]] = {  # name -> (program, model, whether under SGD)
    "unfreeze": (steps(unfreeze), Net, False),
    "hooks": (steps(hooks), Net, True),
    "writes": (steps(writes, after=True), Net, True),
    "load": (steps(load), Net, False),
    "evaluates": (steps(evaluates), Net, False),
    "schedules": (steps(schedules), Net, True),
}
OWN: dict[str, tuple[Callable, Callable, bool]] = {  # which pipelines do not have
    "grow": (steps(grow), Net, False),
    "clips": (own(clips), Net, True),
    "decays": (own(decays), Net, True),
    "sam": (sam, Net, True),
    "penalty": (penalty, Net, True),
    "bare": (bare, Net, False),
    "own optimizer": (own_optimizer, Net, True),
    "averages": (averages, Net, False),
    "fused": (steps(lambda e, step: fused_rows(e)), Attending, True),
}


@torch.no_grad()
def fused_rows(e):
    weight = e.model.blocks[0].qkv.weight
    weight[8:10].mul_(0.5)  # rows of k
    weight.add_(torch.arange(24)[:, None].to(weight.dtype) * 1e-3)


def trained(configs: tuple[pt.Config, pt.Config], names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        program, model_fn, sgd = {**PROGRAMS, **OWN}[name]
        try:
            e = Ours(model_fn, configs[sgd])
            program(e)
            whole = {key: _whole(value) for key, value in e.model.state_dict().items()}
            found[name] = e.losses, e.full_state_dict(), whole
        except Exception as error:
            error.add_note(f"program {name}")
            raise
    return found


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp", "tp", pytest.param("z1m", marks=pytest.mark.slow), "pp"])
def test_what_a_program_does_between_steps(layout):
    names = [name for name in PROGRAMS if name != "writes"] if layout == "pp" else [*PROGRAMS, *OWN]
    configs = tuple(pt.load_config([*BASE, *LAYOUTS[layout], *more]) for more in ((), SGD))
    results = run(lambda: trained(configs, names), 1 if layout == "single" else 2)
    for name in names:
        program, model_fn, sgd = {**PROGRAMS, **OWN}[name]
        reference = Plain(model_fn, sgd)
        program(reference)
        expected = {key: value.detach() for key, value in reference.model.state_dict().items()}
        losses, state, own_state = results[0][name]
        if name != "own optimizer":
            assert len(losses) == len(reference.losses), name
            assert all(abs(a - b) <= TOLERANCE * max(1, abs(b)) for a, b in zip(losses, reference.losses, strict=True)), (
                f"{name} under {layout}: {losses} where one process has {reference.losses}"
            )
        assert state.keys() == expected.keys(), name
        for key, value in expected.items():
            assert torch.allclose(state[key], value, rtol=0, atol=TOLERANCE), f"{name} under {layout}: {key}"
            if layout != "pp":
                assert torch.allclose(own_state[key], value, rtol=0, atol=TOLERANCE), f"{name} under {layout}: state_dict()[{key}]"


# ---------------------------------------------------------------- refused


def _own_step(e):
    e.backward(square(e(rows()[0][0]), rows()[0][1]))
    e.optimizers[0].step()


def _half(e):
    e.model.half()
    e.train_step(rows()[0])


def _replaced(e):
    e.model.out.weight = nn.Parameter(torch.zeros(1, 8, dtype=D))
    e.train_step(rows()[0])


def _never_trained(e):
    e.model.extra = nn.Linear(8, 8, dtype=D)
    e.train_step(rows()[0])


def _stray(e):
    e.model(rows()[0][0]).sum().backward()
    e.backward(square(e(rows()[0][0]), rows()[0][1]))


def _one_rate(e):
    e.optimizers[0].param_groups[0]["lr"] = 0.5
    e.train_step(rows()[0])


def _foreign_weight(e):
    e.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=D))]})
    e.train_step(rows()[0])


def _after_clipping(e):
    e.backward(square(e(rows()[0][0]), rows()[0][1]))
    e.clip_grad_norm_(1.0)
    e.backward(square(e(rows()[0][0]), rows()[0][1]))


def _pickled(e):
    copy.copy(e.model.inner.weight).__reduce_ex__(2)


REFUSED = {
    _own_step: "write engine.step() in its place",
    _half: "write precision=",
    _replaced: "out.weight was",
    _never_trained: "extra.weight was added after set-up, and no optimizer updates it",
    _stray: "has a gradient already",
    _one_rate: "norms and biases are a group of their own",
    _foreign_weight: "none of the model's",
    _after_clipping: "clipped already",
    _pickled: "engine.full_state_dict()",
}


def refusals(cfg: pt.Config, programs: list[Callable]) -> list[str]:
    said = []
    for program in programs:
        try:
            program(Ours(Net, cfg))
            said.append("nothing")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_what_cannot_be_followed_is_refused_on_every_rank(layout):
    programs = [program for program in REFUSED if layout == "fsdp" or program not in (_replaced, _pickled)]
    cfg = pt.load_config([*BASE, *LAYOUTS[layout]])
    for said in run(lambda: refusals(cfg, programs), 2):
        for program, text in zip(programs, said, strict=True):
            assert REFUSED[program] in text, f"{program.__name__} under {layout}: {text}"


def test_a_rate_set_by_hand_is_not_overwritten_by_a_schedule_in_silence():
    cfg = pt.load_config([*BASE, "strategy=single", "scheduler=cosine", "scheduler.total_steps=9"])

    def body():
        e = Ours(Net, cfg)
        for group in e.optimizers[0].param_groups:
            group["lr"] = 0.5
        return refusals_of(e)

    def refusals_of(e):
        try:
            e.train_step(rows()[0])
        except UserError as error:
            return str(error)
        return "nothing"

    assert "scheduler=cosine: the learning rate of group 0 was set to 0.5 by hand" in run(body, 1)[0]


# ---------------------------------------------------------------- two engines, and what is saved


def adversaries(make: Callable[[Callable], Any]) -> tuple[list[float], list[float]]:
    def judge() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    generator, critic = make(Net), make(judge)
    for batch in rows():
        x, y = generator.local(batch)
        fake = generator(x)
        critic.optimizers[0].zero_grad()
        critic.backward(square(critic(torch.cat((y, fake.detach()))), torch.cat((torch.ones_like(y), torch.zeros_like(y)))))
        critic.step()
        generator.backward(square(critic(fake), torch.ones_like(y)))  # through the critic, whose gradients nobody wants
        generator.step()
    return generator.losses, critic.losses


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_the_backward_of_one_engine_leaves_nothing_in_another(layout):
    cfg = pt.load_config([*BASE, *LAYOUTS[layout], *SGD])
    got = run(lambda: adversaries(lambda model_fn: Ours(model_fn, cfg)), 2)[0]
    expected = adversaries(lambda model_fn: Plain(model_fn, sgd=True))
    for mine, theirs in zip(got, expected, strict=True):
        assert all(abs(a - b) <= TOLERANCE * max(1, abs(b)) for a, b in zip(mine, theirs, strict=True)), (layout, mine, theirs)


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_whole_weights_of_rank_0_are_loaded_under_any_layout(layout):
    cfg = pt.load_config([*BASE, *LAYOUTS[layout]])
    torch.manual_seed(11)
    state = Attending().double().state_dict()

    def body():
        e = Ours(Attending, cfg)
        e.load_full_state_dict(state if e.is_main_process else {})
        return e.full_state_dict()

    got = run(body, 2)[0]
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], value) for name, value in state.items())

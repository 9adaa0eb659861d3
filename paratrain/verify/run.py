"""What the processes of a verification do: train on one process, train under the layout, save and resume."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paratrain import batch as batches
from paratrain import data, optim
from paratrain.api import setup
from paratrain.batch import LocalBatch
from paratrain.config import Config, DeepSpeed, Precision
from paratrain.engine import Engine
from paratrain.errors import UserError
from paratrain.loss import as_sum_and_count
from paratrain.verify import plain
from paratrain.verify.draws import Draws, comparable
from paratrain.verify.evidence import Solo, solo
from paratrain.verify.record import Recorder, state_digests, state_events
from paratrain.verify.trace import Key, Trace


@dataclass(frozen=True)
class Job:
    """What is verified.

    Attributes:
        batches: global batches, taken in turn; a map-style data set, read through the loader; or a callable that returns one of these.
        cfg: as the user gave it, on the CPU.
        steps: to compare.
        ranks: of the layout.
        total: updates in training, for the schedule; None: as the configuration says.
        activations: compare what modules return, too.
        cpu_seconds: that each process may use before it is ended; None: any number.
    """

    model_fn: Callable[[], nn.Module] | nn.Module
    loss_fn: Callable[[Any, Any], Any]
    batches: Any
    cfg: Config
    steps: int
    ranks: int
    total: int | None = None
    activations: bool = True
    cpu_seconds: float | None = None


class UsersMistake(Exception):
    """A UserError in a rank, on its way to the user; other exceptions go as they are, so that `spawn` ends the ranks that wait."""


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, without the warnings that C++ code prints for every rank and run."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for limit in (arg.cpu_seconds for arg in args if isinstance(arg, Job) and arg.cpu_seconds is not None):
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        return function(*args)
    except UserError as error:
        raise UsersMistake(str(error)) from None


def exact(cfg: Config) -> Config:
    """The same training in float64, where a difference is an error and not rounding; in float32 where the engine has nothing wider."""
    return dataclasses.replace(cfg, precision=Precision("32-true" if isinstance(cfg.strategy, DeepSpeed) else "64-true"))


def accepted(cfg: Config) -> list[str]:
    """Globs of the state that depends on the layout because the configuration says so."""
    return [glob for glob, rule in cfg.trainer.forward_state.items() if rule in ("local", "rank0")]


def reference(job: Job, jitter: bool, zoom: frozenset[Key] = frozenset(), key: Key | None = None) -> Trace:
    """Train on one process, by the plain loop.

    Args:
        jitter: move every weight by its last bit before the first step: what rounding alone does to this model.
        zoom: keep these tensors whole.
        key: take its step apart into what each rank would have contributed.
    """
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    began = time.monotonic()
    plain.alone()
    model, loss_fn, cfg = plain.build(job.model_fn, job.cfg), job.loss_fn, job.cfg
    if isinstance(loss_fn, nn.Module):
        plain.to_dtype(loss_fn, plain.DTYPES[cfg.precision.name][0])
    optimizers = optim.build(cfg.optimizer, model)
    given: Iterable[tuple[Any, Any]] = list(_whole(job))  # read before draws are replaced, which data sets make too
    with comparable(model) as draws:
        watch = plain.Observer(model, loss_fn, cfg, draws, zoom, job.activations)
        if jitter:
            _move_by_last_bit(model)
        measured = plain.measured(draws.of_loss(loss_fn), cfg)
        if key is not None:
            given = _taken_apart(job, watch, measured, given, key)
        plain.train(model, measured, given, optimizers, cfg, job.total, watch)
        watch.trace.extra["draws"] = marks(draws)
        if not jitter and key is None:
            watch.find_memoryless()
    watch.trace.extra["generators"] = own_generators(model, loss_fn)
    watch.trace.seconds = time.monotonic() - began
    return watch.trace


def _move_by_last_bit(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point() and param.requires_grad:
                unit = torch.finfo(param.dtype).eps * (torch.randint(0, 2, param.shape, generator=generator) - 0.5)
                param.add_(param * unit.to(param.dtype))


def layout(job: Job, zoom: frozenset[Key] = frozenset()) -> Trace:
    """Train under the layout, dropout switched off and other draws comparable."""
    began = time.monotonic()
    engine = setup(job.model_fn, job.loss_fn, job.cfg)
    engine.plan_updates(job.total)
    loss_fn, shares = engine._loss_fn, list(itertools.islice(feed(job, engine), job.steps))
    with comparable(engine.model) as draws:
        engine._loss_fn = draws.of_loss(loss_fn)
        recorder = Recorder(engine, zoom, activations=job.activations, loss_fn=loss_fn)
        for step, share in enumerate(shares):
            draws.step = step
            recorder.step(share)
        recorder.trace.extra["draws"] = marks(draws)
    recorder.trace.extra["left"] = engine._moved.left()
    recorder.trace.seconds = time.monotonic() - began
    return recorder.trace


def marks(draws: Draws) -> dict[tuple[int, str], list[str]]:
    """What was drawn in ways that may depend on the samples at hand."""
    return {place: sorted(found) for place, found in draws.marks.items()}


def own_generators(model: nn.Module, loss_fn: Any) -> list[str]:
    """Attributes that are generators of random numbers, whose state nothing here controls."""
    owners = [*model.named_modules(), ("(loss)", loss_fn)]
    kinds = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
    return [
        f"{path}.{name}" for path, owner in owners for name, value in getattr(owner, "__dict__", {}).items() if isinstance(value, kinds)
    ]


def life(job: Job, directory: str) -> Trace:
    """Train with dropout, save, take one more step; then resume and take that step again."""
    began = time.monotonic()
    engine = setup(job.model_fn, job.loss_fn, job.cfg)
    engine.plan_updates(job.total)
    recorder = Recorder(engine, randomness=True)
    shares = feed(job, engine)
    for _ in range(max(job.steps - 1, 1)):
        recorder.step(next(shares))
    path = Path(directory) / "checkpoint"
    engine.save(path)
    trace, extra = recorder.trace, recorder.trace.extra
    extra |= {"saved step": engine.global_step, "saved": state_digests(engine)}
    extra["loss"] = recorder.step(next(shares)).loss
    extra |= {"after": state_digests(engine), "after events": state_events(engine)}
    resumed = setup(job.model_fn, job.loss_fn, job.cfg)
    resumed.plan_updates(job.total)
    resumed.load(path)
    extra |= {"resumed step": resumed.global_step, "loaded": state_digests(resumed)}
    again = Recorder(resumed, randomness=True)
    extra["resumed loss"] = again.step(next(feed(job, resumed))).loss
    extra |= {"resumed": state_digests(resumed), "resumed events": state_events(resumed)}
    extra |= {"resumed draws": again.trace.draws, "resumed samples": again.trace.samples}
    trace.seconds = time.monotonic() - began
    return trace


def feed(job: Job, engine: Engine) -> Iterator[LocalBatch]:
    """This rank's part of every global batch from the step on at which `engine` is."""
    source = job.batches() if callable(job.batches) else job.batches
    mesh = engine.mesh.data
    if isinstance(source, list):
        for step in range(engine.global_step, engine.global_step + job.steps + 2):
            yield engine.local(source[step % len(source)])
        return
    order = data.Order(len(source), job.cfg.data.global_batch, job.cfg.seed, job.cfg.data.shuffle)
    stream = data.loader(source, order, engine.global_step, mesh.get_local_rank(), mesh.size(), seed=job.cfg.seed)
    for _, share in stream:
        yield share


def _whole(job: Job) -> Iterator[tuple[Any, Any]]:
    """The global batches, each at once, as the data gave them."""
    source = job.batches() if callable(job.batches) else job.batches
    if isinstance(source, list):
        for step in range(job.steps):
            yield batches.pair(source[step % len(source)])
        return
    order = data.Order(len(source), job.cfg.data.global_batch, job.cfg.seed, job.cfg.data.shuffle)
    for _, share in data.loader(source, order, 0, 0, 1, seed=job.cfg.seed, stop_step=job.steps):
        yield share.inputs, share.targets


def _taken_apart(
    job: Job, watch: plain.Observer, loss_fn: Callable, given: Iterable[tuple[Any, Any]], key: Key
) -> Iterator[tuple[Any, Any]]:
    """`given`; before the step of `key`, each rank's part of it is looked at by itself."""
    for step, batch in enumerate(given):
        if step == max(key.step, 0):
            watch.in_backward = True  # nothing is written down
            watch.trace.extra["solo"] = _investigate(job, watch.model, loss_fn, plain.in_precision(batch, job.cfg), key)
            watch.in_backward = False
        yield batch


def _investigate(job: Job, model: nn.Module, loss_fn: Callable, batch: tuple[Any, Any], key: Key) -> Solo | str:
    def measure(inputs: Any, targets: Any, real: int) -> tuple[torch.Tensor, Any]:
        with plain.autocast(job.cfg):
            loss = loss_fn(plain.call(model, inputs), targets)
        if job.cfg.trainer.loss_weights:
            value, count = plain.mean(loss, job.cfg.trainer.loss_weights)
            count = batches.count(targets, real, job.cfg.trainer.loss_count) if count is None else count
            return value * count, count
        mean = isinstance(loss, torch.Tensor)
        return as_sum_and_count(loss, batches.count(targets, real, job.cfg.trainer.loss_count) if mean else None)

    try:
        size = job.cfg.data.micro_batch_size
        sharing = math.prod(getattr(job.cfg.parallel, axis) for axis in ("tp", "cp", "pp"))  # ranks with the same samples
        return solo(model, measure, batch, job.ranks // sharing, None if size == "auto" else size, key)
    except Exception as error:  # evidence for an explanation is welcome, not needed
        return f"{type(error).__name__}: {error}"

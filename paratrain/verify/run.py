"""What the processes of a verification do: train on one process, train under the layout, save and resume."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paratrain import batch as batches
from paratrain import data
from paratrain.api import setup
from paratrain.batch import LocalBatch
from paratrain.config import Config, DeepSpeed, Memory, Parallel, Precision, Single
from paratrain.engine import Engine
from paratrain.errors import UserError
from paratrain.verify.evidence import Solo, solo
from paratrain.verify.record import Key, Recorder, Trace, state_digests, state_events, without_dropout


@dataclass(frozen=True)
class Job:
    """What is verified.

    Attributes:
        batches: global batches, taken in turn; a map-style data set, read through the loader; or a callable that returns one of these.
        cfg: as the user gave it, on the CPU.
        steps: to compare.
        ranks: of the layout.
    """

    model_fn: Callable[[], nn.Module] | nn.Module
    loss_fn: Callable[[Any, Any], Any]
    batches: Any
    cfg: Config
    steps: int
    ranks: int


class UsersMistake(Exception):
    """A UserError in a rank, on its way to the user; other exceptions go as they are, so that `spawn` ends the ranks that wait."""


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, without the warnings that C++ code prints for every rank and run."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        return function(*args)
    except UserError as error:
        raise UsersMistake(str(error)) from None


def single(cfg: Config) -> Config:
    """The same training on one process, each global batch at once."""
    return dataclasses.replace(
        cfg,
        strategy=Single(),
        parallel=Parallel(),
        memory=Memory(),
        compile=False,
        data=dataclasses.replace(cfg.data, micro_batch_size=None),
    )


def exact(cfg: Config) -> Config:
    """The same training in float64, where a difference is an error and not rounding; in float32 where the engine has nothing wider."""
    return dataclasses.replace(cfg, precision=Precision("32-true" if isinstance(cfg.strategy, DeepSpeed) else "64-true"))


def reference(job: Job, permute: bool, zoom: frozenset[Key] = frozenset(), key: Key | None = None) -> Trace:
    """Train on one process.

    Args:
        permute: shuffle the samples of every batch, and put what comes out in the original order.
        zoom: keep these tensors whole.
        key: take its step apart into what each rank would have contributed.
    """
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    began = time.monotonic()
    engine = setup(job.model_fn, job.loss_fn, single(job.cfg))
    with without_dropout(engine.model):
        recorder = Recorder(engine, zoom)
        for step, share in zip(range(job.steps), feed(job, engine), strict=False):
            if key is not None and step == max(key.step, 0):
                recorder.trace.extra["solo"] = _investigate(job, engine, share, key)
            order = torch.randperm(share.size, generator=torch.Generator().manual_seed(step)) if permute else None
            recorder.step(share if order is None else _reordered(share, order))
            if order is not None:
                _restore_order(recorder.trace, step, order)
    recorder.trace.seconds = time.monotonic() - began
    return recorder.trace


def layout(job: Job, zoom: frozenset[Key] = frozenset()) -> Trace:
    """Train under the layout, dropout switched off."""
    began = time.monotonic()
    engine = setup(job.model_fn, job.loss_fn, job.cfg)
    with without_dropout(engine.model):
        recorder = Recorder(engine, zoom)
        for _, share in zip(range(job.steps), feed(job, engine), strict=False):
            recorder.step(share)
    recorder.trace.seconds = time.monotonic() - began
    return recorder.trace


def life(job: Job, directory: str) -> Trace:
    """Train with dropout, save, take one more step; then resume and take that step again."""
    began = time.monotonic()
    engine = setup(job.model_fn, job.loss_fn, job.cfg)
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


def _reordered(share: LocalBatch, order: torch.Tensor) -> LocalBatch:
    inputs, targets = batches.map_tensors(lambda x: x[order] if x.ndim > 0 else x, (share.inputs, share.targets))
    return share._replace(inputs=inputs, targets=targets)


def _restore_order(trace: Trace, step: int, order: torch.Tensor) -> None:
    inverse = torch.argsort(order)
    for key, event in trace.events.items():
        if key.step == step and event.per_sample and len(event.value) == len(order):
            event.value = event.value[inverse]


def _investigate(job: Job, engine: Engine, share: LocalBatch, key: Key) -> Solo | str:
    try:
        size = job.cfg.data.micro_batch_size
        sharing = math.prod(getattr(job.cfg.parallel, axis) for axis in ("tp", "cp", "pp"))  # ranks with the same samples
        return solo(engine, share, job.ranks // sharing, None if size == "auto" else size, key)
    except Exception as error:  # evidence for an explanation is welcome, not needed
        return f"{type(error).__name__}: {error}"

"""`python -m paratrain.verify.worker DIRECTORY`: prove the job that another process left there."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from paratrain import spawn
from paratrain.config import Config, Precision
from paratrain.errors import UserError
from paratrain.verify import smaller
from paratrain.verify.core import DoesNotTrain, examine, last_line
from paratrain.verify.report import Report
from paratrain.verify.run import Job
from paratrain.verify.verdict import STEPS, Verdict, not_proven, of_report

_PR_SET_PDEATHSIG = 1
_FLOPS = 4e9  # a second, of one core in float64


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker is told.

    Attributes:
        payload: (model_fn, loss_fn), pickled; `batches` likewise.
        small: what to prove.
        total: updates in the training, for its schedule.
        elements: of the model's parameters.
        budget: CPU seconds that the proof may take.
        patience: seconds that each of its runs may take.
        nice: added to the priority, 19 being the lowest.
        path, directory: sys.path and the working directory of the job.
    """

    payload: bytes
    batches: bytes
    small: smaller.Smaller
    total: int | None
    elements: int
    budget: float
    patience: float
    nice: int
    path: list[str]
    directory: str


def prove(task: Task) -> Verdict:
    """The verdict on `task`."""
    import cloudpickle

    try:
        model_fn, loss_fn = cloudpickle.loads(task.payload)
        batches = cloudpickle.loads(task.batches)
    except Exception as error:  # whatever importing and making the user's objects raises
        return not_proven(f"the model or the loss cannot be made in another process ({type(error).__name__}: {error})")
    small, left_out, cfg, elements = task.small, list(task.small.left_out), task.small.cfg, task.elements
    too_much = _too_much(elements, batches, small.ranks, task.budget)
    if too_much:
        made = _fewer_blocks(model_fn, cfg, elements)
        if made is None:
            return not_proven(too_much, lasting="CPU" in too_much)
        model_fn, cfg, elements, blocks = made
        left_out.append(f"all but {blocks} of each run of repeated blocks")
        if too_much := _too_much(elements, batches, small.ranks, task.budget):
            return not_proven(f"{too_much}, even with {blocks} of each run of its blocks", lasting="CPU" in too_much)
    job = Job(
        model_fn,
        loss_fn,
        batches,
        cfg,
        STEPS,
        small.ranks,
        task.total,
        activations=False,
        cpu_seconds=max(10.0, task.budget / (small.ranks + 2)),
    )
    try:
        try:
            report = examine(job, task.patience, with_life=False)
        except DoesNotTrain as error:
            if (narrower := _in_float32(job, task.patience)) is None:
                raise
            report = narrower
            left_out.append(f"float64, in which the model does not train ({last_line(str(error))}): proven in float32")
    except UserError as error:
        limited = "SIGXCPU" in str(error)
        first, more = str(error).strip().partition("\n")[::2]
        reason = f"{first.rstrip(':')}: {last_line(str(error))}" if more else first
        return not_proven(_out_of_time(task.budget) if limited else reason, lasting=limited)
    if report.first_difference is not None and "SIGXCPU" in report.explanation:
        return not_proven(_out_of_time(task.budget), lasting=True)
    return of_report(report, small.ranks, left_out)


def _in_float32(job: Job, patience: float) -> Report | None:
    """A model may know float32 alone: the report on that; None where it does not train in it either."""
    if job.cfg.precision.name != "64-true":
        return None
    try:
        return examine(
            dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, precision=Precision("32-true"))), patience, with_life=False
        )
    except DoesNotTrain:
        return None


def _out_of_time(budget: float) -> str:
    return f"it takes more than {budget:.0f} s of CPU; prove it by itself: python -m paratrain verify, or pt.verify(...)"


def _too_much(elements: int, batches: Any, ranks: int, budget: float) -> str:
    """Why a model of so many elements cannot be proven here; "" where it can."""
    need, there = smaller.memory_of(elements, ranks), smaller.available_memory()
    if need > 0.5 * there:
        return f"it would take up to {need / 2**30:.1f} GiB of host memory, of which {there / 2**30:.1f} GiB are free"
    positions = max([1, *(leaf.numel() for leaf in tree_leaves(batches[0]) if hasattr(leaf, "numel"))])
    seconds = 6.0 * elements * positions * STEPS * 3 / _FLOPS
    if seconds > 3 * budget:
        return f"it would take about {seconds:.0f} s of CPU, and may take {budget:.0f}"
    return ""


def _fewer_blocks(model_fn: Any, cfg: Config, elements: int) -> tuple[Any, Config, int, int] | None:
    """(model_fn, configuration, elements, blocks kept of each run) of a model of less depth; None where it has no repeated blocks."""
    stages = cfg.parallel.pp * (cfg.pipeline.stages_per_rank or 1)
    keep = max(2, 2 * stages if cfg.parallel.pp > 1 else 2)
    if isinstance(model_fn, nn.Module):
        if not smaller.cut_blocks(model_fn, keep):
            return None
        return model_fn, cfg, smaller.elements_of(model_fn), keep
    shallow = smaller.Shallow(model_fn, keep)
    try:
        built = smaller.elements_of(smaller.build_on_meta(shallow))
    except Exception:  # a constructor that needs values
        return None
    if built >= elements:
        return None
    if 4.0 * elements > 0.1 * smaller.available_memory():  # too large to build first and cut then
        cfg = dataclasses.replace(cfg, memory=smaller.on_meta(cfg.memory))
    else:
        cfg = dataclasses.replace(cfg, memory=dataclasses.replace(cfg.memory, pretrained=None))
    return shallow, cfg, built, keep


def main(directory: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    place = Path(directory)
    task: Task = pickle.loads((place / "task").read_bytes())
    os.nice(task.nice)
    sys.path[:] = task.path
    os.chdir(task.directory)
    verdict = prove(task)
    spawn.close()  # its ranks count as this process' children once it has been waited for
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    verdict = dataclasses.replace(verdict, seconds=sum(usage.ru_utime + usage.ru_stime for usage in used))
    part = place / "verdict.part"
    part.write_bytes(pickle.dumps(verdict))
    part.rename(place / "verdict")


if __name__ == "__main__":
    main(sys.argv[1])

"""`verify`: is this layout, for this model, the same function as one process?"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paratrain import spawn
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.mesh import AXES
from paratrain.reach import matches
from paratrain.verify import explain, life, run
from paratrain.verify.case import Evidence, Explanation
from paratrain.verify.compare import Comparison, Difference, compare
from paratrain.verify.doubt import doubts, unreached_weights
from paratrain.verify.plain import DTYPES
from paratrain.verify.report import Report
from paratrain.verify.run import Job
from paratrain.verify.trace import Key, Trace


class DoesNotTrain(UserError):
    """The model does not train on one process as it is asked to here."""


def verify(
    model_fn: Callable[[], nn.Module] | nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    batch: Any,
    cfg: Config,
    ranks: int | None = None,
) -> Report:
    """Train a few steps on one process and under `cfg`'s layout on local CPU processes, and compare everything.

    Compared are, in the order of execution: which samples reach which rank, what every module returns, the count, the loss, every
    gradient before and after clipping, the gradient norm, every weight, buffer and optimizer state. Dropout is switched off for that,
    since its masks differ between layouts by right, and then looked at by itself: other masks on ranks with other samples, the same
    again in recomputation and after a resume. Last, the step after saving and resuming must be, bit for bit, the step without.

    Args:
        model_fn, loss_fn: as for `setup`; sent to the processes by `cloudpickle`.
        batch: a global batch (inputs, targets) with samples along dim 0; a list of them, taken in turn; an iterator, of which as many
            as there are steps are read; a map-style data set, read through the loader with `cfg.data`; or a callable that returns a
            batch, a list or a data set, called in each process.
        cfg: of the layout. `cfg.verify` says how many steps and ranks and in which dtype; `verify.dtype=float64` replaces the precision.
        ranks: processes; None: `cfg.verify.ranks`.

    Returns:
        A `Report`: `ok`, `first_difference`, `explanation`, `text()`, `to_json()`, `to_html()`.

    Raises:
        UserError: the model, batch or configuration cannot be run, on one process or under the layout.
    """
    began = time.monotonic()
    options = cfg.verify
    if options.layers is not None:
        raise UserError(
            f"verify.layers={options.layers} cuts the depth of a model that the configuration builds (python -m paratrain verify ...); "
            "here model_fn decides: let it build fewer layers"
        )
    cfg = dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, device="cpu", loss_check=False))
    if cfg.data.micro_batch_size == "auto":  # what fits here says nothing
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, micro_batch_size=None))
    if options.dtype == "float64":
        cfg = run.exact(cfg)
    batches = (
        [batch] if isinstance(batch, tuple) else list(itertools.islice(batch, options.steps)) if isinstance(batch, Iterator) else batch
    )
    total = cfg.scheduler.total_steps or cfg.trainer.max_steps
    job = Job(model_fn, loss_fn, batches, cfg, options.steps, options.ranks if ranks is None else ranks, total)
    report = examine(job, 60 * options.timeout_minutes, with_life=True)
    return dataclasses.replace(report, seconds=time.monotonic() - began)


def examine(job: Job, timeout: float, with_life: bool) -> Report:
    """Run `job` on one process and under its layout, and compare.

    Args:
        timeout: seconds that each run may take.
        with_life: look at dropout, and at a save and a resume, too.
    """
    cfg, setup = job.cfg, _describe(job)
    reference, noise = _single(job, timeout)
    traces = _layout(run.layout, job, timeout)
    if isinstance(traces, Report):
        return dataclasses.replace(traces, setup=setup)
    autocast = DTYPES[cfg.precision.name]
    result = compare(reference, noise, traces, autocast[1] or autocast[0], run.accepted(cfg))
    split = [axis for axis in ("tp", "pp", "cp", "ep") if getattr(cfg.parallel, axis) > 1 and traces[0].extra.get("split")]
    notes = _notes(result, traces, split, job)
    differences, explanation = result.differences, ""
    unproven = doubts(result, reference, traces)
    if unproven:
        differences = []
    elif differences and not job.activations:
        fuller = dataclasses.replace(job, activations=True, cpu_seconds=None)  # a difference is worth its explanation, and a second look
        report = examine(fuller, timeout, with_life=False)
        return report if not report.ok else dataclasses.replace(report, unproven="two runs of it disagree about whether anything differs")
    elif differences:
        explanation = _explain(job, differences[0], reference, traces, timeout, notes) + _as_asked(job, differences)
        state = next((other for other in differences if other.key.kind == "attribute"), None)
        if state is not None and differences[0].error == "unknown":  # what no simple relation explains, this does
            explanation, differences[0].error = str(explain.moved(state)), "state"
    elif not split and with_life:
        found = _life(job, result, timeout)
        if isinstance(found, Report):
            return dataclasses.replace(found, setup=setup)
        differences = [difference for difference, _ in found]
        explanation = str(found[0][1]) if found else ""
        notes += life.notes(result)
    first = differences[0] if differences else None
    left_out = [f"what forward writes and does not read ({_listed(result.written)})"] if result.written else []
    left_out += [unreached] if not unproven and (unreached := unreached_weights(result, reference)) else []
    return Report(first, explanation, differences, list(result.lines.values()), setup, notes, unproven=unproven, left_out=left_out)


def check(
    model_fn: Callable[[], nn.Module] | nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    batch: Any,
    config: Config,
    ranks: int | None = None,
) -> Report:
    """`verify` for tests.

    Raises:
        AssertionError: the layout is not the same function; its message is the report.
        UserError: as `verify`.
    """
    report = verify(model_fn, loss_fn, batch, config, ranks)
    if not report.ok:
        raise AssertionError(report.text())
    return report


# ---------------------------------------------------------------------- processes


def _on_one(job: Job) -> Any:
    """Two independent single processes side by side: rank 0 the reference, rank 1 with weights moved by their last bit."""
    return run.reference(job, os.environ["RANK"] == "1")


def _single(job: Job, timeout: float) -> list[Trace]:
    try:
        return spawn.run(run.quietly, 2, _on_one, job, timeout=timeout, init=False)
    except spawn.RankError as error:
        if mistake := _users_mistake(error):
            raise UserError(mistake) from None
        raise DoesNotTrain(f"the model does not train on one process, before any layout is applied:\n{_first(error)}") from None


def _layout(body: Callable[..., Trace], job: Job, timeout: float, *args: Any) -> list[Trace] | Report:
    """What every rank recorded, or a report of those that failed."""
    try:
        return spawn.run(run.quietly, job.ranks, body, job, *args, timeout=timeout)
    except spawn.RankError as error:
        if mistake := _users_mistake(error):
            raise UserError(mistake) from None
        raised = [rank for rank, text in error.failures.items() if not text.startswith("stopped")]
        hung = all(text.startswith("hung") for text in error.failures.values())
        text = str(error)
        detail = "the ranks wait for each other" if hung else last_line(_first(error))
    cause = (
        "ranks that do not call the same collectives in the same order"
        if hung
        else "what one process can do, the layout cannot: see the traceback"
    )
    difference = Difference(Key(0, "execution", body.__name__), raised, 1.0, 0.0, error="hang" if hung else "exception", detail=detail)
    found = f"{detail}: ranks {', '.join(map(str, raised))} failed where one process did not. Usual cause: {cause}.\n{text}"
    return Report(difference, found, [difference], [], {})


def last_line(text: str) -> str:
    """What was raised, of a traceback: its last line but for notes of where that was."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return next((line for line in reversed(lines) if not line.startswith("(in ")), lines[-1])


def _first(error: spawn.RankError) -> str:
    return next(iter(error.failures.values()), str(error))


def _users_mistake(error: spawn.RankError) -> str | None:
    """The message of the UserError that a rank raised, if that is what happened."""
    for text in error.failures.values():
        _, found, message = text.partition(f"{run.UsersMistake.__module__}.{run.UsersMistake.__name__}: ")
        if found:
            return message.rstrip()
    return None


def _life(job: Job, result: Comparison, timeout: float) -> list[life.Finding] | Report:
    directory = tempfile.mkdtemp(prefix="paratrain-verify-")
    try:
        traces = _layout(run.life, job, timeout, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return traces if isinstance(traces, Report) else life.findings(traces, result)


# ---------------------------------------------------------------------- the first difference


def _explain(job: Job, first: Difference, reference: Trace, traces: list[Trace], timeout: float, notes: list[str]) -> str:
    """Run again, keep the first tensor that differs, and say what happened to it."""
    found: Explanation
    if first.error == "missing":
        found = explain.missing(first.key, first.ranks)
    elif first.error == "shape":
        found = explain.shape(first.key, first.detail)
    elif first.key.kind == "data":
        found = _explain_data(first)
    elif first.key.kind == "attribute":
        found = explain.moved(first)
    else:
        evidence = _evidence(job, first, reference, traces, timeout, notes)
        first.largest = max(
            (float((evidence.y[rank] - evidence.expected(rank)).abs().max()) for rank in first.ranks if evidence.y[rank].numel()),
            default=0.0,
        )
        found = explain.explain(evidence)
    first.error = found.error
    return str(found)


def _as_asked(job: Job, differences: list[Difference]) -> str:
    """A state that differs is what the configuration makes of it."""
    rules = job.cfg.trainer.forward_state
    for difference in differences:
        if (glob := matches(difference.name.replace("(loss)", "loss"), rules)) is not None:
            return f" What {difference.name} becomes is said by trainer.forward_state={{{glob}: {rules[glob]}}}; local accepts that it depends on the layout."
    return ""


def _explain_data(first: Difference) -> Explanation:
    if first.error == "permuted rows":
        return Explanation("permuted rows", first.detail, "samples dealt to other ranks than the layout says", "engine.local, data")
    return Explanation(
        first.error or "wrong samples",
        first.detail,
        "every rank reads the data by itself, or with the rank of another axis: a sampler that does not know the data ranks",
        "engine.local or the loader, with the rank among the data ranks (engine.mesh.data)",
    )


def _evidence(job: Job, first: Difference, reference: Trace, traces: list[Trace], timeout: float, notes: list[str]) -> Evidence:
    key = first.key
    before = _before(key)
    zoom = frozenset({key, before}) if before is not None else frozenset({key})
    (single,) = spawn.run(run.quietly, 1, run.reference, job, False, zoom, key, timeout=timeout, init=False)
    layouts = spawn.run(run.quietly, job.ranks, run.layout, job, frozenset({key}), timeout=timeout)
    x = single.full[key].double()
    ys = {rank: trace.full[key].double() for rank, trace in enumerate(layouts) if key in trace.full}
    rows: dict[int, Tensor] = {}
    if reference.events[key].per_sample:
        per_sample = reference.events[key].per_sample
        start = dict.fromkeys({trace.place[1] for trace in traces}, 0)
        for rank in sorted(range(len(traces)), key=lambda rank: traces[rank].place):
            group, count = traces[rank].place[1], len(traces[rank].samples[key.step]) * per_sample
            rows[rank] = x[start[group] : start[group] + count]
            start[group] += count
    solo = single.extra.get("solo")
    if isinstance(solo, str):
        notes.append(f"the step could not be taken apart by ranks ({solo}), so the explanation knows less")
    numbers = {"loss scale": traces[0].extra["loss scale"]} | {
        name: float(single.events[Key(key.step, name, "")].value)
        for name in ("gradient norm", "learning rate")
        if Key(key.step, name, "") in single.events
    }
    numbers["samples"] = float(len(reference.samples.get(key.step, ())))
    return Evidence(
        key=key,
        x=x,
        y=ys,
        wrong=first.ranks,
        tolerance=first.tolerance * max(float(x.norm()), 1e-300),
        ranks=len({trace.place[0] for trace in traces}),
        cfg=job.cfg,
        rows=rows,
        before=single.full[before].double() if before in single.full else None,
        solo=None if isinstance(solo, str) else solo,
        numbers=numbers,
    )


def _before(key: Key) -> Key | None:
    if key.step > 0:
        return key._replace(step=key.step - 1)
    if key.step == 0 and key.kind in ("weight", "buffer"):
        return Key(-1, f"initial {key.kind}", key.name)
    return None


# ---------------------------------------------------------------------- words


def _describe(job: Job) -> dict[str, Any]:
    cfg = job.cfg
    asked = {axis: getattr(cfg.parallel, axis, None) for axis in AXES}
    degrees = [f"{axis}={degree}" for axis, degree in asked.items() if degree not in (None, 1)]
    layout = " ".join([f"strategy={cfg.strategy.name}", *degrees, f"on {job.ranks} ranks"])
    return {
        "layout": layout,
        "ranks": job.ranks,
        "strategy": cfg.strategy.name,
        "micro_batch_size": cfg.data.micro_batch_size,
        "steps": job.steps,
        "dtype": "float64" if cfg.precision.name == "64-true" else cfg.precision.name,
        "torch": torch.__version__,
    }


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _notes(result: Comparison, traces: list[Trace], split: list[str], job: Job) -> list[str]:
    notes = []
    if result.skipped:
        names = list(dict.fromkeys(result.skipped))
        notes.append(f"{len(names)} outputs are not compared, because their dim 0 does not count samples: {_listed(names)}")
    if result.passing:
        names = list(dict.fromkeys(result.passing))
        notes.append(
            f"{len(names)} attributes or buffers are not compared, because they say only what the last forward was given: {_listed(names)}"
        )
    if result.once:
        notes.append(
            "the loss counts 1 whatever is in a batch, so step.count is the number of its parts; with parts of unequal size training stops"
        )
    if result.accepted:
        notes.append(f"trainer.forward_state leaves {_listed(result.accepted)} to each rank: not compared")
    if result.written:
        notes.append(f"forward writes {_listed(result.written)} and does not read it: each rank has its own, which is not compared")
    if split:
        parts = "optimizer states" if split == ["tp"] else "activations and optimizer states"
        notes.append(
            f"under {', '.join(split)} a rank holds parts of tensors: {parts} are not compared; dropout and the step after a resume are not looked at"
        )
    if "gradient" in traces[0].extra["hidden"]:
        why = "trainer.update_in_backward" if job.cfg.trainer.update_in_backward else f"strategy={job.cfg.strategy.name}"
        notes.append(f"{why} does not show every rank's gradients: what it does not show is compared by the norm and the updates")
    if any(any(found) for found in traces[0].extra["draws"].values()):
        notes.append("the model draws random numbers beside dropout: each draw was replaced by one number, the same for every sample")
    return notes

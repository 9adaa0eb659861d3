"""Where metrics go. A sink is told of the start, of every logged step and of the end; one that fails never stops training."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from paratrain import notes
from paratrain.config import Logger
from paratrain.distributed import is_main_process
from paratrain.errors import UserError
from paratrain.metrics.console import Console
from paratrain.metrics.env import git_commit
from paratrain.redact import redact, redact_overrides

log = logging.getLogger(__name__)

ROWS = ("metrics.jsonl", "metrics.csv")  # files that grow by a row each time

Metrics = Mapping[str, float]

_PACKAGE = {"wandb": "wandb", "tensorboard": "tensorboard"}


class Sink(Protocol):
    def start(self, run: Mapping[str, Any]) -> None:
        """Called once, with what `run_info` returns."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Numbers by name (`train/loss`, `eval/loss`, `tokens`, ...) after `step` optimizer steps."""

    def finish(self, exit_code: int) -> None:
        """Called once; nothing is logged after it."""


def build(options: Logger, run_dir: str | Path, resume: bool) -> list[_Guarded]:
    """The sinks of `logger.sinks` on rank 0, none on the others.

    Args:
        run_dir: the output directory, which exists.
        resume: go on with the files and the W&B run found there, without what was logged after the step `start` is told;
            otherwise begin them anew.

    Raises:
        UserError: on every rank, where a package that a sink needs is not installed.
    """
    missing = [name for name in options.sinks if name in _PACKAGE and importlib.util.find_spec(_PACKAGE[name]) is None]
    if missing:
        raise UserError(
            f"logger.sinks={options.sinks}: {', '.join(missing)} is not installed; "
            f"pip install 'paratrain[{','.join(missing)}]', or leave it out of logger.sinks"
        )
    if not is_main_process():
        return []
    return [_Guarded(name, _sink(name, options, Path(run_dir), resume)) for name in dict.fromkeys(options.sinks)]


def _sink(name: str, options: Logger, run_dir: Path, resume: bool) -> Sink:
    if name == "wandb":
        from paratrain.metrics.weights_biases import WeightsAndBiases

        return WeightsAndBiases(options.wandb, run_dir, resume)
    if name == "console":
        return Console()
    if name == "tensorboard":
        return TensorBoard(run_dir / "tensorboard", resume)
    return Jsonl(run_dir / ROWS[0], resume) if name == "jsonl" else Csv(run_dir / ROWS[1], resume)


def run_info(
    config: Mapping[str, Any], run_dir: str | Path, world_size: int, step: int = 0, max_steps: int | None = None
) -> dict[str, Any]:
    """What sinks are told of a run.

    Args:
        config: the configuration as a dictionary; sinks get it with secrets replaced.
        step: the step training goes on from; 0 for a new run.
        max_steps: the last step, where it is known.
    """
    return {
        "config": dict(config),
        "git_commit": git_commit(Path.cwd()),
        "run_dir": str(run_dir),
        "world_size": world_size,
        "step": step,
        "max_steps": max_steps,
        "secret_arguments": redact_overrides(sys.argv[1:]) != sys.argv[1:],
    }


class _Guarded:
    """Says once that a sink failed, and goes on. Failing to start a file is the user's business: the directory is not writable."""

    def __init__(self, name: str, sink: Sink):
        self.name, self.sink, self.failed = name, sink, False

    def start(self, run: Mapping[str, Any]) -> None:
        try:
            self.sink.start({**run, "config": redact(run["config"])})
        except OSError as error:
            raise UserError(
                f"output_dir={run['run_dir']}: the {self.name} log cannot be written there ({error.strerror or error}); "
                "choose a directory that you may write to"
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        """What is no number (a histogram, a text) is for W&B alone; elsewhere it would take the row with it."""
        if self.name != "wandb":
            metrics = {name: number for name, value in metrics.items() if (number := _number(value)) is not None}
        self._try(lambda: self.sink.log(step, metrics), f"at step {step}")

    def note(self, name: str, text: str) -> None:
        """A fact of the run that becomes known as it goes; for sinks that have a place for it (`note`)."""
        if hasattr(self.sink, "note"):
            self._try(lambda: self.sink.note(name, text), f"at the note {name}")

    def finish(self, exit_code: int) -> None:
        self._try(lambda: self.sink.finish(exit_code), "at the end")

    def _try(self, call: Any, when: str) -> None:
        try:
            call()
        except Exception as error:
            if not self.failed:
                log.warning("the %s sink failed %s (%s: %s); training goes on", self.name, when, type(error).__name__, error)
            self.failed = True


def _number(value: Any) -> float | None:
    if isinstance(value, int | float):
        return value
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


class Jsonl:
    """metrics.jsonl: an object a line, complete after every call. A value that is not finite is null, as JSON has no other word."""

    def __init__(self, path: Path, resume: bool):
        self.path, self.resume = path, resume
        self.file: TextIO | None = None

    def start(self, run: Mapping[str, Any]) -> None:
        kept: list[str] = []
        superseded: list[str] = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            (kept if self.resume and _is_until(_row(line), run["step"]) else superseded).append(line + "\n")
        _append(_superseded(self.path), "".join(superseded))
        notes.replace(self.path, "".join(kept), sync=bool(kept or superseded))
        self.file = self.path.open("a", buffering=1)

    def log(self, step: int, metrics: Metrics) -> None:
        assert self.file, "start comes first"
        numbers = {name: float(value) if not isinstance(value, int) else value for name, value in metrics.items()}
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}
        self.file.write(json.dumps(row) + "\n")

    def finish(self, exit_code: int) -> None:
        if self.file:
            self.file.close()


class Csv:
    """metrics.csv: a column a metric, empty where a row has none. A metric seen for the first time rewrites the file once."""

    def __init__(self, path: Path, resume: bool):
        self.path, self.resume = path, resume
        self.columns = ["step"]

    def start(self, run: Mapping[str, Any]) -> None:
        rows = self._rows() if self.path.exists() else []
        kept = [row for row in rows if self.resume and _is_until(row, run["step"])]
        if superseded := [row for row in rows if row not in kept]:
            _append(_superseded(self.path), _table(list(rows[0]), superseded))
        self.columns = list(kept[0]) if kept else ["step"]
        self._write(kept)

    def log(self, step: int, metrics: Metrics) -> None:
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._rows()
            self.columns += new
            self._write([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def finish(self, exit_code: int) -> None:
        pass

    def _rows(self) -> list[dict[str, Any]]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        notes.replace(self.path, _table(self.columns, rows))


class TensorBoard:
    """Scalars by step in `<run_dir>/tensorboard`."""

    def __init__(self, directory: Path, resume: bool):
        self.directory, self.resume = directory, resume
        self.writer: Any = None

    def start(self, run: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not self.resume:
            for old in self.directory.glob("events.out.tfevents.*"):
                _superseded(self.directory).mkdir(exist_ok=True)
                old.rename(_superseded(self.directory) / old.name)
        self.writer = SummaryWriter(str(self.directory), purge_step=run["step"] + 1 if self.resume else None)
        facts = {name: run[name] for name in ("git_commit", "world_size", "config")}
        self.writer.add_text("run", f"```json\n{json.dumps(facts, indent=2, default=str)}\n```", run["step"])

    def note(self, name: str, text: str) -> None:
        self.writer.add_text(name, text)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, exit_code: int) -> None:
        if self.writer:
            self.writer.close()


def _superseded(path: Path) -> Path:
    """Where rows of an earlier attempt go that this one logs again: metrics.superseded.jsonl for metrics.jsonl."""
    return path.with_name(f"{path.stem}.superseded{path.suffix}")


def _append(path: Path, text: str) -> None:
    if text:
        with path.open("a", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the file that these rows come from is replaced


def _table(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the line a killed process was writing
        return None


def _is_until(row: Any, step: int) -> bool:
    """Whether a row is of a step up to `step`: later ones will be logged again. A row without a readable step was cut off."""
    try:
        return int(row["step"]) <= step
    except (KeyError, TypeError, ValueError):
        return False

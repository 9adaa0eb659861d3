"""A line a logged step, the same in a terminal, a file and under torchrun; a progress bar below it where a person is looking."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

_UNSEEN = ("throughput/", "time/", "memory/", "goodput/")
_UNSEEN_NAMES = {
    "tokens",
    "epoch",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/loss_scale",
    "train/loss_scale_changes",
    "train/skipped_steps",
}


class Console:
    """Args: stream: where lines go; null: stdout as it is at `start`. A bar appears if that is a terminal and `rich` is there."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream
        self.max_steps: int | None = None
        self.bar: Any = None

    def start(self, run: Mapping[str, Any]) -> None:
        self.stream = self.stream or sys.stdout
        self.max_steps = run["max_steps"]
        if self.stream.isatty() and importlib.util.find_spec("rich"):
            self.bar = _bar(self.stream, run["step"], self.max_steps)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self.stream, "start comes first"
        line = format_line(step, metrics, self.max_steps)
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self.bar.update(self.bar.task_ids[0], completed=step)
        else:
            print(line, file=self.stream, flush=True)

    def finish(self, exit_code: int) -> None:
        if self.bar:
            self.bar.stop()


def format_line(step: int, metrics: Mapping[str, float], max_steps: int | None = None) -> str:
    """`step   20/1000  loss 2.3456  lr 3.00e-04  norm 1.23  12.3k tok/s  45.0 ms/step  mfu 41.2%  eta 0:12:30`."""
    total = f"/{max_steps}" if max_steps else ""
    parts = [f"step {step:>{len(total) - 1}}{total}" if total else f"step {step}"]
    known = {
        "train/loss": lambda v: f"loss {v:.4f}",
        "train/lr": lambda v: f"lr {v:.2e}",
        "train/grad_norm": lambda v: f"norm {v:.3g}",
        "throughput/tokens_per_sec": lambda v: f"{_short(v)} tok/s",
        "throughput/samples_per_sec": lambda v: f"{_short(v)} samples/s" if "throughput/tokens_per_sec" not in metrics else "",
        "time/step": lambda v: f"{v * 1e3:.1f} ms/step" if v < 1 else f"{v:.2f} s/step",
        "throughput/device/mfu": lambda v: f"mfu {v:.1%}",
        "train/skipped_steps": lambda v: f"skipped {v:.0f}" if v else "",
    }
    parts += [form(metrics[name]) for name, form in known.items() if name in metrics]
    parts += [f"{name.replace('/', ' ')} {value:.4g}" for name, value in metrics.items() if _shown(name)]
    if "epoch" in metrics:
        parts.append(f"epoch {metrics['epoch']:.2f}")
    if max_steps and "time/step" in metrics:
        parts.append(f"eta {timedelta(seconds=round(max(0, max_steps - step) * metrics['time/step']))}")
    return "  ".join(part for part in parts if part)


def _shown(name: str) -> bool:
    return name not in _UNSEEN_NAMES and not name.startswith(_UNSEEN)


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.1f}"


def _bar(stream: TextIO, step: int, max_steps: int | None) -> Any:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = [BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, console=Terminal(file=stream), transient=True, refresh_per_second=2)
    bar.add_task("training", completed=step, total=max_steps)
    bar.start()
    return bar

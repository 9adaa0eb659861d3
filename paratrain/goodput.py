"""Goodput: the fraction of the job's wall time, over all its restarts, that went into steps which counted.

    steps        training steps that are in the weights at the end
    startup      from process start to the first step, of the first attempt
    restart      between the last sign of life of an attempt and the first step of the next
    recomputed   steps that were lost with the attempt and done again
    data         waiting for batches
    evaluation   evaluations
    checkpoint   what saves make training wait

The causes add up to the time that passed. Within a process it is read from the monotonic clock; between processes from the time since
the machine's boot, and only where another machine, or the same one booted again, goes on, from the wall clock, whose jumps back count as
no time. Kept in <output_dir>/goodput.json by rank 0.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paratrain import notes

FILE_NAME = "goodput.json"
CAUSES = ("startup", "restart", "recomputed", "data", "evaluation", "checkpoint")
_WRITE_EVERY = 1.0


class Goodput:
    """Accounts of one job. Time runs from construction, for `startup` until the first `during`.

    Args:
        path: file that keeps the accounts between attempts; None keeps none.
        began: seconds before now at which the process started.
    """

    def __init__(self, path: Path | None, began: float = 0.0):
        self.path = path
        self.seconds = dict.fromkeys(("steps", *CAUSES), 0.0)
        self._cause = "startup"
        self._since = time.monotonic() - began
        self._written = -math.inf
        kept = _read(path) if path else None
        if kept:
            self._cause = "restart"
            self.seconds |= kept["seconds"]
            self.seconds["restart"] += max(0.0, _since(kept) - began)

    def resumed(self, at_save: Any) -> None:
        """Training goes on from a checkpoint.

        Args:
            at_save: what `state` returned when it was saved: later steps are done again.
        """
        kept = at_save.get("steps") if isinstance(at_save, dict) else None
        if isinstance(kept, int | float) and 0 <= kept < self.seconds["steps"]:
            self.seconds["recomputed"] += self.seconds["steps"] - kept
            self.seconds["steps"] = float(kept)

    def start(self) -> None:
        """The first step comes next."""
        self._switch("steps")

    def restarting(self) -> None:
        """A rollback begins; it ends with the next `start`."""
        self._switch("restart")

    @contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """Time that is no training step."""
        before = self._switch(cause)
        try:
            yield
        finally:
            self._switch(before)

    def state(self) -> dict[str, float]:
        self._switch(self._cause)
        return dict(self.seconds)

    @property
    def ratio(self) -> float:
        """Fraction of the wall time so far; NaN before any has passed."""
        seconds = self.state()
        total = sum(seconds.values())
        return seconds["steps"] / total if total else math.nan

    def write(self, now: bool = False) -> None:
        """Keep the accounts, at most once a second unless `now`."""
        if self.path is None or (not now and time.monotonic() - self._written < _WRITE_EVERY):
            return
        self._written = time.monotonic()
        kept, path = json.dumps({**_now(), "seconds": self.state()}), self.path
        notes.attempt(f"{path} was not written", lambda: notes.replace(path, kept))

    def summary(self) -> str:
        seconds = self.state()
        total = sum(seconds.values()) or 1.0
        parts = ", ".join(f"{cause} {100 * seconds[cause] / total:.1f} %" for cause in CAUSES if seconds[cause] >= 5e-4 * total)
        return f"goodput {100 * seconds['steps'] / total:.1f} % of {total:.1f} s" + (f"; lost to {parts}" if parts else "")

    def _switch(self, cause: str) -> str:
        now = time.monotonic()
        self.seconds[self._cause] += now - self._since
        self._since, before, self._cause = now, self._cause, cause
        return before


def _now() -> dict[str, Any]:
    """This moment by the wall clock, and by the one that nobody sets: seconds since a boot, and which boot that was."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"time": time.time(), "boot": boot, "uptime": time.clock_gettime(time.CLOCK_BOOTTIME)}
    except (OSError, AttributeError):
        return {"time": time.time(), "boot": None, "uptime": 0.0}


def _since(kept: dict[str, Any]) -> float:
    now = _now()
    clock = "uptime" if now["boot"] is not None and now["boot"] == kept["boot"] else "time"
    return now[clock] - kept[clock]


def since_process_start() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text())
        seconds = {name: float(kept["seconds"][name]) for name in ("steps", *CAUSES)}
        if all(math.isfinite(value) and value >= 0 for value in seconds.values()):
            return {"time": float(kept["time"]), "boot": kept.get("boot"), "uptime": float(kept.get("uptime", 0.0)), "seconds": seconds}
    except (OSError, ValueError, TypeError, LookupError):
        pass
    return None

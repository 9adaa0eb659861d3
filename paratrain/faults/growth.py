"""Memory of the host that grows step by step: named, with its rate and its end, before the kernel kills the process for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from paratrain import notes
from paratrain.distributed import rank

log = logging.getLogger(__name__)

_SAMPLES = 32
"""Readings that are kept, even in number; when there are more, every second one goes, so that they span the whole run."""
_FEWEST = 16
_LEAST = 32 << 20
"""Bytes of growth below which it may be anything."""
_CGROUPS = Path("/sys/fs/cgroup")
_FIRST, _SECOND = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
"""Files of a control group of either version: its limit, and what it uses."""


class Growth:
    """Watches the memory of this process and its data workers; `note` costs some ten microseconds.

    Growth counts that goes on: the least of each quarter of the readings is above that of the one before, and the later ones add as much as
    the sooner ones did.

    Args:
        used: bytes that are this process's own; None where the system does not tell.
        room: bytes that are left before the kernel kills; None likewise.
    """

    def __init__(self, used: Callable[[], int | None] | None = None, room: Callable[[], int | None] | None = None):
        self._used, self._room = used or own_bytes, room or bytes_left
        self._readings: list[tuple[int, int]] = []
        self._apart = 1  # steps between readings that are kept, at least
        self._warned_at: float | None = None

    def note(self, step: int, last: int | None) -> None:
        """After `step`: warn when the limit would be reached before step `last`, and again whenever half of the way there is gone."""
        if (self._readings and step < self._readings[-1][0] + self._apart) or (used := self._used()) is None:
            return
        if self._readings and step <= self._readings[-1][0]:  # training went back
            self._readings.clear()
        self._readings.append((step, used))
        if len(self._readings) > _SAMPLES:
            self._readings = self._readings[::2]
            self._apart = 2 * max(1, self._apart)
        rate = self._rate()
        if rate is None or (room := self._room()) is None:
            return
        steps = room / rate
        if (last is not None and step + steps >= last) or (self._warned_at is not None and steps > self._warned_at / 2):
            return
        self._warned_at = steps
        (began, before), (_, now) = self._readings[len(self._readings) // 2], self._readings[-1]
        log.warning(
            "rank %d: the memory of this process grows by %s a step (from %s after step %d to %s after step %d) and does not stop; %s are left, so "
            "the kernel will kill it in about %s steps. What grows is kept from step to step: losses or outputs in a list (keep loss.item()), a "
            "cache without a bound, a data set that fills up as it is read",
            rank(), notes.size(rate), notes.size(before), began, notes.size(now), step, notes.size(room), f"{steps:,.0f}",
        )  # fmt: skip

    def _rate(self) -> float | None:
        """Bytes a step, where the memory has grown all the time; None where it has not."""
        if len(self._readings) < _FEWEST:
            return None
        count = len(self._readings)
        parts = [self._readings[count * part // 4 : count * (part + 1) // 4] for part in range(4)]
        (_, first), (middle, second), (_, third), (end, fourth) = [(part[0][0], min(used for _, used in part)) for part in parts]
        if not second < third < fourth or fourth - second < max(_LEAST, 0.9 * (third - first)):
            return None
        return (fourth - second) / (end - middle)


def own_bytes() -> int | None:
    """Resident memory of this process and its children that no file backs."""
    try:
        pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        own = _anonymous("self")
    except (OSError, ValueError, IndexError):
        return None
    for pid in pids:
        try:
            own += _anonymous(pid)
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    return own


def _anonymous(pid: str) -> int:
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def bytes_left() -> int | None:
    """What this process can still take: of the machine, and of each control group that it is in."""
    found: list[int | None] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                root, files = (_CGROUPS, _SECOND) if not controllers else (_CGROUPS / "memory", _FIRST)
                place = root / group.strip("/")
                found += [_left(each, *files) for each in (place, *place.parents) if each.is_relative_to(root)]
    except (OSError, ValueError, IndexError):
        pass
    return min((left for left in found if left is not None), default=None)


def _left(group: Path, limit: str, usage: str) -> int | None:
    """Bytes below the limit of a control group, with the file pages that the kernel would give back; None where there is no limit."""
    try:
        most = int((group / limit).read_text())
        pages = [int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.split()[0] == "inactive_file"]
        return max(0, most - int((group / usage).read_text()) + sum(pages))
    except (OSError, ValueError, IndexError):
        return None

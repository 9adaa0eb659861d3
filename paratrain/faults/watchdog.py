"""Notices that training stands still, writes where, and ends the process so that the launcher restarts the job.

A step needs every rank, so when one hangs all of them miss the deadline at about the same time and each writes its own stack.
A second deadline in C ends a process whose interpreter itself is stuck, where no Python thread can run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from paratrain import agreement, compat, notes
from paratrain.distributed import rank, world_size
from paratrain.faults import HUNG

log = logging.getLogger(__name__)

_GRACE = 3.0
"""Seconds that peers have to write their stacks: the launcher ends them once one has exited."""


class Watchdog:
    """A context manager: while it is open, `beat` must be called once in `seconds` after the first beat.

    Args:
        seconds: the deadline; None watches nothing.
        directory: gets hang/rank<N>.txt.
    """

    def __init__(self, seconds: float | None, directory: Path, leave: Callable[[int], None] = os._exit):
        self.seconds, self.path = seconds, directory / "hang" / f"rank{rank()}.txt"
        self._last: tuple[float, str] | None = None
        self._ended = threading.Event()
        self._leave = leave

    def beat(self, doing: str) -> None:
        """Training moved on.

        Args:
            doing: what comes next.
        """
        self._last = time.monotonic(), doing

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            threading.Thread(target=self._watch, name="paratrain-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        assert self.seconds is not None
        every = min(1.0, self.seconds / 4)
        stuck = self.path.with_suffix(".stuck.txt")
        with _writable(stuck) as file:
            try:
                while not self._ended.wait(every):
                    faulthandler.dump_traceback_later(self.seconds + 4 * every, file=file, exit=True)
                    if self._last is not None and time.monotonic() - self._last[0] > self.seconds:
                        self._give_up(*self._last)
                        return
            finally:
                faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # a file system that has become read-only
            stuck.unlink(missing_ok=True)

    def _give_up(self, since: float, doing: str) -> None:
        waited = time.monotonic() - since
        others = agreement.survey()
        title = f"rank {rank()} of {world_size()}, process {os.getpid()}: no progress for {waited:.0f} s while {doing}"

        def write() -> None:
            with open(self.path, "w") as file:
                file.write("\n".join([f"{title} (trainer.step_timeout)", *others, "", _collectives(), ""]))
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

        if not notes.attempt(f"{self.path} was not written", write):  # a full disk must not keep what hangs alive
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        text = f"{title}; stacks and collectives of all ranks are in {self.path.parent}; a restart goes on from the last checkpoint"
        if others:
            text += "".join(f"\n  {line}" for line in others)
        log.error(text)
        print(f"error: {text}", file=sys.stderr, flush=True)
        notes.for_launcher(text)
        time.sleep(_GRACE)
        self._leave(HUNG)


def _writable(path: Path) -> TextIO:
    """A new file, or stderr where the disk takes none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w")
    except OSError as error:
        log.warning("%s cannot be written (%s): a hang would be told on stderr", path, error.strerror)
        return open(os.dup(sys.stderr.fileno()), "w")


def _collectives() -> str:
    """The last collectives this rank entered, newest last, from torch's flight recorder; empty where it recorded nothing."""
    lines = []
    for entry in compat.recent_collectives()[-8:]:
        group = entry.get("process_group") or ["", ""]
        shapes = json.dumps(entry.get("input_sizes"))
        lines.append(
            f"collective {entry.get('collective_seq_id')} {entry.get('profiling_name')} {shapes} in group {group[1]!r}: {entry.get('state')}"
        )
    return "\n".join(lines)

"""SIGTERM, SIGUSR1 and SIGINT ask for the end of training; the trainer answers at a step boundary, on all ranks at the same one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TO_TELL = 10.0  # seconds that a rank has to tell of its error once the launcher wants it to end
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """Whether this process was asked to end: true from the first signal on."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.by is not None


@contextmanager
def listening(asked: Asked) -> Iterator[None]:
    """Note signals instead of dying of them; a second SIGINT does not wait for the step. Without effect outside the main thread."""

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.by = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in HANDLED}
    try:
        yield
    except BaseException:
        if before[signal.SIGTERM] is signal.SIG_DFL:
            before[signal.SIGTERM] = _after_its_error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _after_its_error(number: int, frame: Any) -> None:
    """Die of a signal, but tell of an error first that is on its way out: the launcher ends a rank because another one has ended."""
    if sys.exc_info()[0] is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    else:
        later = threading.Timer(_TO_TELL, os._exit, (128 + number,))
        later.daemon = True
        later.start()


def how_to_go_on(resume: str) -> str:
    """What to tell the user of an interrupted job that was started with this `resume`."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or resume == "none":
        return f"start the same command again{' with resume=auto' if resume == 'none' else ''} to go on from there"
    return f"to go on from there: scontrol requeue {job} (or submit with #SBATCH --requeue --signal=TERM@120 and let the queue do it)"

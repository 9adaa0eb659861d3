"""Restart loops: a job that dies again and again at the same place burns its queue time without a step to show for it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from paratrain import distributed, notes
from paratrain.errors import UserError

FILE_NAME = "attempts.json"


def began_here(directory: Path) -> bool:
    """Whether an earlier attempt of this very launch trained in `directory`, so that torchrun restarted it; on rank 0."""
    launch = distributed.launch_id()
    return launch is not None and any(attempt.get("launch") == launch for attempt in _read(directory / FILE_NAME))


def note_attempt(directory: Path, step: int, most: int) -> None:
    """Keep a record of a start; on rank 0, once it is known from which step it goes on.

    Starts by hand or by the queue begin a new count, restarts by torchrun add to it.

    Raises:
        UserError: this is the start number `most` + 1 in a row from the same step.
    """
    path = directory / FILE_NAME
    automatic = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    before = _read(path) if automatic else []
    attempts = [*before, {"step": step, "time": time.time(), "launch": distributed.launch_id()}]
    notes.attempt(f"{path} was not written", lambda: notes.replace(path, json.dumps(attempts[-100:])))
    stuck = 0
    for attempt in reversed(attempts):
        if attempt["step"] != step:
            break
        stuck += 1
    if stuck > most:
        raise UserError(
            f"started {stuck} times in a row from step {step} without reaching another checkpoint (trainer.max_stuck_restarts={most}); "
            "the errors of the attempts before are above and in rank<N>.log. Remove their cause, or save more often (checkpoint.every)"
        )


def _read(path: Path) -> list[dict]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [item for item in found if isinstance(item, dict) and "step" in item] if isinstance(found, list) else []

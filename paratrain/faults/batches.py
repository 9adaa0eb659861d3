"""Batches that harm training: which they were, and when a loss counts as a spike."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from paratrain import notes
from paratrain.config import Spike

FILE_NAME = "bad_batches.jsonl"
MOST_SKIPPED_IN_A_ROW = 10
"""Steps skipped one after the other until it is the model and not a batch that is at fault."""
MOST_ROLLBACKS = 3
"""Rollbacks without a new checkpoint between them until training stops."""


def record(directory: Path, step: int, reason: str, samples: list[int], **numbers: float) -> None:
    """Append a batch to bad_batches.jsonl.

    Args:
        step: its number in the data order, from 0.
        samples: indices of its samples in the data set.
    """
    line = {
        "step": step,
        "reason": reason,
        **{name: repr(value) for name, value in numbers.items()},
        "samples": samples,
        "time": time.time(),
    }
    text = json.dumps(line)

    def append() -> None:
        with open(directory / FILE_NAME, "a") as file:
            file.write(text + "\n")

    notes.attempt(f"{directory / FILE_NAME} did not take {text}", append)


class SpikeDetector:
    """Says whether a loss lies far above those before it: `sigmas` robust standard deviations above the median of a window.

    The median absolute deviation times 1.4826 estimates a standard deviation that outliers do not move. Deviations below one
    thousandth of the median are taken as that, so that a flat loss is no trap.
    """

    def __init__(self, options: Spike | None):
        self.options = options
        self.losses: deque[float] = deque(maxlen=options.window if options else 1)

    def is_spike(self, loss: float) -> bool:
        """Judge a loss; one that is no spike joins the window."""
        if self.options is None:
            return False
        if len(self.losses) >= self.options.min_steps:
            middle = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in self.losses)
            if not loss <= middle + self.options.sigmas * max(spread, 1e-3 * abs(middle)):
                return True
        self.losses.append(loss)
        return False

    def state_dict(self) -> list[float]:
        return list(self.losses)

    def load_state_dict(self, state: Any) -> None:
        self.losses.clear()
        self.losses.extend(float(value) for value in state)

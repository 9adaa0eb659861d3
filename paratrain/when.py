"""When something is due: periods of training, and its end."""

from __future__ import annotations

import math
from collections.abc import Callable

from paratrain.config import Trainer
from paratrain.durations import Duration, parse_duration
from paratrain.errors import ConfigError, UserError

Position = Callable[[str], float]
"""How far training is, in `steps`, `epochs`, `tokens` or `seconds`; equal on every rank."""


class Periodic:
    """Says, asked once a step, whether another period (`500`, `1ep`, `10Mtok`, `30min`) is over."""

    def __init__(self, key: str, text: str | None, position: Position):
        self.duration: Duration | None = _duration(key, text) if text else None
        self.position = position
        self.restart()

    def restart(self) -> None:
        """Count from where training is now."""
        if self.duration:
            periods = math.floor(self.position(self.duration.unit) / self.duration.value + 1e-9)
            self.next = (periods + 1) * self.duration.value

    def __call__(self) -> bool:
        if self.duration is None or self.position(self.duration.unit) < self.next - 1e-9:
            return False
        self.restart()
        return True


def last_step(trainer: Trainer, steps_per_epoch: int) -> int | None:
    """The step at which training ends, where it can be told beforehand.

    Raises:
        ConfigError: nothing says when to stop.
    """
    ends = [trainer.max_steps] if trainer.max_steps is not None else []
    if trainer.max_epochs is not None:
        ends.append(math.ceil(trainer.max_epochs * steps_per_epoch))
    if not ends and trainer.max_tokens is None and trainer.max_time is None:
        raise ConfigError(["trainer: nothing says when to stop; write trainer.max_steps=1000 (or max_epochs, max_tokens, max_time)"])
    return min(ends, default=None)


def is_over(trainer: Trainer, last: int | None, position: Position) -> bool:
    """Whether training has reached one of its ends."""
    return (
        (last is not None and position("steps") >= last)
        or (trainer.max_tokens is not None and position("tokens") >= trainer.max_tokens)
        or (trainer.max_time is not None and position("seconds") >= parse_duration(trainer.max_time).value)
    )


def seconds(text: str | None) -> float | None:
    """A span of time of the configuration in seconds."""
    return None if text is None else parse_duration(text).value


def _duration(key: str, text: str) -> Duration:
    try:
        return parse_duration(str(text))
    except UserError as error:
        raise ConfigError([f"{key}: {error}"]) from None

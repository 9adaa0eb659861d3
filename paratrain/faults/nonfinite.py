"""A loss or gradient that is not finite, told so that one can act on it."""

from __future__ import annotations

import math

from paratrain.errors import UserError
from paratrain.result import StepResult


class NonFiniteError(UserError):
    """A loss or gradient is not finite.

    Attributes:
        step: number of its batch in the data order, from 0.
    """

    step = 0


def check(result: StepResult, step: int, late: bool, updated: bool, half: bool = False) -> None:
    """Raise unless a step was finite, or counted nothing.

    Args:
        step: steps taken when it is noticed.
        late: it is noticed in the step after.
        updated: the weights have been updated with it.
        half: activations are float16, which they may have left.

    Raises:
        NonFiniteError: it was not.
    """
    loss, norm = result.loss, result.grad_norm
    if math.isfinite(norm) and (math.isfinite(loss) or not result.count):
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    weights = "have been updated with it" if updated else "are those before this step"
    instead = "move what overflows to float32 (precision.fallback.policy=module), write precision=bf16, or " if half else ""
    error = NonFiniteError(
        f"step {step}: the {what}, so training cannot go on (trainer.nonfinite=raise); the weights {weights}. "
        f"{instead.capitalize()}{'lower' if half else 'Lower'} optimizer.lr, clip (trainer.clip_norm=1.0), add warmup (scheduler.warmup_steps), or look for a division by zero or log(0) in the model or the data"
    )
    error.step = step - int(late)
    raise error

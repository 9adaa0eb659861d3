"""Loss scaling: one scale, one decision and one update a step, for any number of optimizers and ranks."""

from __future__ import annotations

from paratrain.config import LossScale
from paratrain.errors import UserError


class LossScaler:
    """Multiplies the loss so that float16 gradients neither vanish nor overflow (Micikevicius et al., 2018, section 3.2).

    The engine unscales once, decides once from a norm that all ranks share, and calls `update` once a step, so the scale
    is the same number everywhere. Without a configuration (`None`) the scale is 1 and nothing is ever skipped.

    Attributes:
        floor: the least scale: `min`, or more where the fallback has raised it.
        skipped: overflows so far.
        changes: how often the scale has changed.
    """

    def __init__(self, options: LossScale | None):
        self.options = options
        self.scale = options.init if options else 1.0
        self.floor = options.min if options else 1.0
        self.good_steps = 0
        self.overflows = 0  # since the scale last changed
        self.skipped = 0
        self.changes = 0

    @property
    def enabled(self) -> bool:
        return self.options is not None

    @property
    def at_floor(self) -> bool:
        """Whether the scale can shrink no more."""
        return self.options is not None and (self.scale <= self.floor or not self.options.dynamic)

    def update(self, overflow: bool, relieved: bool = False) -> None:
        """Grow after `growth_interval` good steps in a row, back off after `hysteresis` overflows; a static scale stays.

        Args:
            relieved: the overflow has been taken care of by other means, so the scale keeps its value.

        Raises:
            UserError: on an overflow at the floor: the gradients themselves are not finite, whatever the scale.
        """
        options = self.options
        if options is None:
            return
        if not overflow:
            self.good_steps += 1
            if options.dynamic and self.good_steps == options.growth_interval:
                self._set(min(self.scale * options.growth_factor, options.max))
            return
        self.skipped += 1
        self.good_steps = 0
        if relieved or not options.dynamic:
            return
        self.overflows += 1
        if self.overflows < options.hysteresis:
            return
        if self.at_floor:
            raise UserError(
                f"the gradients overflow at the floor of the loss scale ({self.floor:g}; precision.loss_scale.min={options.min:g}): the loss or the "
                "activations themselves leave the range of float16; lower optimizer.lr, clip (trainer.clip_norm=1.0), move what overflows to "
                "float32 (precision.fallback.policy=module) or write precision=bf16"
            )
        self._set(max(self.scale * options.backoff_factor, self.floor))

    def raise_floor(self) -> bool:
        """Let the scale grow now and not fall below that again; False where it is at its largest or static."""
        options = self.options
        if options is None or not options.dynamic or self.scale >= options.max:
            return False
        self._set(min(self.scale * options.growth_factor, options.max))
        self.floor = self.scale
        return True

    def _set(self, scale: float) -> None:
        self.changes += scale != self.scale
        self.scale, self.good_steps, self.overflows = scale, 0, 0

    def state_dict(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in ("scale", "floor", "good_steps", "overflows", "skipped", "changes")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for key, value in state.items():
            setattr(self, key, type(getattr(self, key))(value))

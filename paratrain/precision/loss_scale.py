"""Dynamic loss scaling: one scale, one decision and one update a step, for any number of optimizers and ranks."""

from __future__ import annotations

from paratrain.config import LossScale
from paratrain.errors import UserError


class LossScaler:
    """Multiplies the loss so that float16 gradients neither vanish nor overflow (Micikevicius et al., 2018, section 3.2).

    The engine unscales once, decides once from a norm that all ranks share, and calls `update` once a step, so the scale
    is the same number everywhere. Without a configuration (`None`) the scale is 1 and nothing is ever skipped.
    """

    def __init__(self, options: LossScale | None):
        self.options = options
        self.scale = options.init if options else 1.0
        self.good_steps = 0
        self.skipped = 0

    @property
    def enabled(self) -> bool:
        return self.options is not None

    def update(self, overflow: bool) -> None:
        """Grow after `growth_interval` good steps in a row, back off after an overflow.

        Raises:
            UserError: on an overflow at the floor: the gradients themselves are not finite, whatever the scale.
        """
        options = self.options
        if options is None:
            return
        if not overflow:
            self.good_steps += 1
            if self.good_steps == options.growth_interval:
                self.scale = min(self.scale * options.growth_factor, options.max)
                self.good_steps = 0
            return
        if self.scale <= options.min:
            raise UserError(
                f"the gradients overflow at the floor of the loss scale (precision.loss_scale.min={options.min:g}): the loss or the "
                "activations themselves leave the range of float16; lower optimizer.lr, clip (trainer.clip_norm=1.0) or write precision=bf16"
            )
        self.scale = max(self.scale * options.backoff_factor, options.min)
        self.good_steps = 0
        self.skipped += 1

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = float(state["scale"])
        self.good_steps = int(state["good_steps"])
        self.skipped = int(state["skipped"])

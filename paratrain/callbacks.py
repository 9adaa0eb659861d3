"""What may happen while the trainer runs: a few events, and the callbacks that come with paratrain."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paratrain.errors import UserError
from paratrain.suggest import did_you_mean

if TYPE_CHECKING:
    from paratrain.result import StepResult
    from paratrain.trainer import Trainer


class Callback:
    """Override the events you want. Every rank calls every event at the same point, so a callback may use collectives.

    A callback with something to resume gives it as JSON values in `state_dict`, and gets it back in `load_state_dict`.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Everything is built and resumed; the first step comes next."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """A step is done; `result` waits for the device only when it is read."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """`metrics` are about to be logged; add to them on every rank (rank 0's are logged)."""

    def on_eval_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """An evaluation is done."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """The checkpoint `path` is complete."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Training ended or was interrupted; the last checkpoint is saved."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Training failed; not every rank may get here, so use no collectives."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


def checked(callbacks: Iterable[Any]) -> list[Any]:
    """The callbacks, whose events must exist: a misspelt event would never be called.

    Raises:
        UserError: for an `on_...` method that is no event.
    """
    callbacks = list(callbacks)
    for callback in callbacks:
        for name in dir(callback):
            if name.startswith("on_") and name not in EVENTS:
                raise UserError(f"{type(callback).__name__}.{name} is no event{did_you_mean(name, EVENTS)} (events: {', '.join(EVENTS)})")
    return callbacks


class SampleText(Callback):
    """Print text that the model continues, at the end of training.

    Args:
        prompt: what to continue.
        tokens: how many tokens to add.
        temperature: of the sampling; lower is more certain.
    """

    def __init__(self, prompt: str = "def ", tokens: int = 200, temperature: float = 0.8):
        self.prompt, self.tokens, self.temperature = prompt, tokens, temperature
        self.tokenizer: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Say at the start what could not be done at the end."""
        from paratrain import data

        self.tokenizer = data.tokenizer(trainer.cfg.data)
        if self.tokenizer is None:
            raise UserError(f"callbacks: SampleText needs text, but data.source={trainer.cfg.data.source} has no tokenizer; leave it out")

    def on_fit_end(self, trainer: Trainer) -> None:
        from paratrain.models.gpt import generate

        tokenizer = self.tokenizer
        assert tokenizer is not None, "on_fit_start comes first"
        device = trainer.engine.device
        start = torch.tensor([tokenizer.encode(self.prompt)], device=device)
        generator = torch.Generator(device).manual_seed(trainer.cfg.seed)
        written = generate(trainer.engine.model, start, self.tokens, self.temperature, generator=generator)
        if trainer.engine.is_main_process:
            print(f"--- sample\n{tokenizer.decode(written[0].tolist())}\n---", flush=True)

"""paratrain: train any PyTorch module on one process or thousands; the layout never changes the loss.

    engine = paratrain.setup(model_fn, loss_fn, paratrain.load_config(["strategy=ddp"]))
    result = engine.train_step(engine.local((inputs, targets)))

Names are imported when they are first used, so that `import paratrain` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paratrain._hydra import load_config, main
    from paratrain.api import setup
    from paratrain.callbacks import Callback
    from paratrain.config import Config
    from paratrain.deal import Shared
    from paratrain.engine import Engine
    from paratrain.errors import ConfigError, UserError
    from paratrain.loss import cross_entropy, huggingface_loss
    from paratrain.result import StepResult
    from paratrain.trainer import Trainer

__version__ = "0.1.0"

_HOME = {
    "Callback": "callbacks",
    "Config": "config",
    "ConfigError": "errors",
    "Engine": "engine",
    "Shared": "deal",
    "StepResult": "result",
    "Trainer": "trainer",
    "UserError": "errors",
    "cross_entropy": "loss",
    "huggingface_loss": "loss",
    "load_config": "_hydra",
    "main": "_hydra",
    "setup": "api",
}

__all__ = [
    "Callback",
    "Config",
    "ConfigError",
    "Engine",
    "Shared",
    "StepResult",
    "Trainer",
    "UserError",
    "__version__",
    "cross_entropy",
    "huggingface_loss",
    "load_config",
    "main",
    "setup",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "verify":  # a package that can be called
        return importlib.import_module("paratrain.verify")
    if name not in _HOME:
        raise AttributeError(f"module 'paratrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"paratrain.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

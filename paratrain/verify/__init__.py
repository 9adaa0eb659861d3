"""Prove, on the user's own model, that a layout trains as one process does.

report = paratrain.verify(model_fn, loss_fn, batch, cfg, ranks=4)     # the package itself can be called
paratrain.verify.check(model_fn, loss_fn, batch, cfg)                 # in a test
python -m paratrain verify strategy=ddp model=gpt data=synthetic      # exit code 0 the same, 1 different, 2 the user's mistake
callbacks: [paratrain.verify.ReplicaCheck(every=100)]                 # in training: are the replicas still the same?
"""

from __future__ import annotations

import sys
import types
from typing import Any

from paratrain.verify.callback import ReplicaCheck
from paratrain.verify.compare import Difference
from paratrain.verify.core import check, verify
from paratrain.verify.report import Report

__all__ = ["Difference", "ReplicaCheck", "Report", "check", "verify"]


class _Callable(types.ModuleType):
    """`import paratrain.verify` puts the package where `paratrain.verify(...)` looks, so the package answers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return verify(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

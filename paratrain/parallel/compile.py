"""`torch.compile` block by block: blocks of one class share the compiled code, and collectives stay between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from paratrain.compat import compile_breaks, compile_counts
from paratrain.config import Config
from paratrain.errors import UserError

log = logging.getLogger(__name__)


def apply(blocks: Sequence[tuple[str, nn.Module]], model: nn.Module, cfg: Config) -> None:
    """Compile the forward of every block in place, or of the whole `model` where it has none.

    Hooks, such as those that gather weights, run outside of the compiled code.
    """
    if cfg.compile is False:
        return
    backend = "inductor" if cfg.compile is True else cfg.compile
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise UserError(f"compile={backend}: no such backend (known: {', '.join(torch.compiler.list_backends(exclude_tags=()))})")
    made: dict[type, type] = {}
    for name, block in blocks or [("model", model)]:
        cls = type(block)
        if cls not in made:
            compiled = staticmethod(torch.compile(cls.forward, backend=backend))
            made[cls] = type(f"Compiled{cls.__name__}", (_Compiled, cls), {"_compiled": compiled, "_may_fall_back": cfg.compile_fallback})
        block.__class__ = made[cls]
        block.__dict__["_compiled_name"] = name


def compiled(model: nn.Module) -> list[str]:
    """Names of the modules whose forward `apply` has compiled."""
    return [name for name, module in model.named_modules() if isinstance(module, _Compiled)]


class _Compiled(nn.Module):
    _compiled: Any
    _compiled_name: str
    _may_fall_back: bool
    _captured = False
    _gave_up = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._gave_up:
            return super().forward(*args, **kwargs)
        if self._captured:
            return self._compiled(self, *args, **kwargs)
        tried, graphs = compile_counts()
        try:
            found = self._compiled(self, *args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.BackendCompilerFailed) as error:
            self._give_up(str(error))
            return super().forward(*args, **kwargs)
        now_tried, now_graphs = compile_counts()
        if now_tried > tried and now_graphs == graphs:  # the compiler gave up without an error, and ran it as it is
            self._give_up(compile_breaks())
        else:
            self._captured = True
        return found

    def _give_up(self, reason: str) -> None:
        if not self._may_fall_back:
            raise UserError(
                f"compile: block {self._compiled_name!r} cannot be compiled; write compile=false, or compile_fallback=true to run such "
                f"blocks as they are\n{reason}"
            )
        log.warning(
            "compile: block %r cannot be compiled and runs as it is (compile_fallback=true): %s",
            self._compiled_name,
            " ".join(reason.strip().splitlines()[:2]),
        )
        self._gave_up = True

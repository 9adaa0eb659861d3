"""`torch.compile` block by block: blocks of one class share the compiled code, and collectives stay between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from paratrain.config import Config
from paratrain.errors import UserError


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
            made[cls] = type(
                f"Compiled{cls.__name__}", (_Compiled, cls), {"_compiled": staticmethod(torch.compile(cls.forward, backend=backend))}
            )
        block.__class__ = made[cls]
        block.__dict__["_compiled_name"] = name


class _Compiled(nn.Module):
    _compiled: Any
    _compiled_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(self, *args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.BackendCompilerFailed) as error:
            raise UserError(f"compile: block {self._compiled_name!r} cannot be compiled; write compile=false\n{error}") from error

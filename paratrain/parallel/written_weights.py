"""Trained weights that forward writes to, such as a matrix brought to norm 1 each time.

Every rank and every micro-batch writes, which is right where all write the same, and writing once more changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from paratrain import reach
from paratrain.errors import UserError

_SAME = 1e4  # roundings of their dtype by which weights may move once they are where forward wants them


class WrittenWeights:
    """Notices writes to the trained weights of `model` in forward. Those that are sharded are not looked at: see `shard_uses.py`."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        self._versions: dict[str, int] = {}
        self._first: dict[str, torch.Tensor] = {}
        self._last: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Before the first forward of a step."""
        self._first, self._last = {}, {}
        self._versions = {} if self._sharded else {name: param._version for name, param in self._trained()}

    def after(self) -> None:
        """After a forward."""
        for name, param in self._trained() if self._versions else ():
            if param._version != self._versions[name]:
                self._versions[name] = param._version
                self._first.setdefault(name, param.detach().clone())
                self._last[name] = param.detach()

    def end(self) -> dict[str, str]:
        """Name -> a digest of each weight that was written to; "" where each forward moved it on."""
        written: dict[str, str] = {}
        for name, first in self._first.items():
            slack = _SAME * torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
            moved_on = not torch.allclose(first, self._last[name], rtol=slack, atol=slack)
            written[name] = "" if moved_on else reach.digest(first)
        self._versions, self._first, self._last = {}, {}, {}
        return written

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, param) for name, param in self._model.named_parameters() if param.requires_grad and type(param) is nn.Parameter)


def refuse(told: list[dict[str, str]]) -> None:
    """Refuse writes that would depend on the layout, given what each rank saw.

    Raises:
        UserError: names the weight, and what to write.
    """
    for here in told:
        for name, text in here.items():
            after = "write it once a step, after engine.train_step (a moving average: ema={decay: 0.999})"
            if not text or any(other.get(name, text) != text for other in told):
                how = "other values on each rank" if text else "other values in each micro-batch"
                raise UserError(
                    f"model: forward writes to the trained weight {name}, {how}, so the result would depend on the layout; {after}, or "
                    "write data.micro_batch_size=null and compute it from what every rank has"
                )

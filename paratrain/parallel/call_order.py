"""Whether the ranks that shard a model run the same blocks in the same order.

FSDP pairs the gathers of different ranks by their order alone. A rank that leaves out a block (stochastic depth, an expert without a token)
would gather half of one block and half of the next, or wait for ever: wrong without a word, or hung.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paratrain.errors import UserError

_COMPARED = 3
"""Forwards in which every call is compared before its weights are gathered; of later ones only a digest is, with the loss of the step."""
_DIGESTS = 1 << 20  # so few that the squares of several thousand of them add up without rounding in float64
_END = -1


class CallOrder:
    """The order in which this rank calls blocks. Made after `fully_shard`, so that its hooks run before those that gather.

    Attributes:
        paused: nothing is compared, because other ranks do not take part in what runs.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], group: dist.ProcessGroup):
        self.names = [name for name, _ in blocks]
        self.group = group
        self.paused = False
        self._left = _COMPARED
        self._digest = 0
        for number, (_, block) in enumerate(blocks):
            block.register_forward_pre_hook(self._hook(number), prepend=True)
        model.register_forward_hook(self._finished)

    def digest(self) -> int:
        """A number below 2^20 that is a function of the calls since it was last read; 0 without any."""
        digest, self._digest = self._digest, 0
        return digest

    def check(self, total: float, total_of_squares: float) -> None:
        """Compare the ranks by their digests, summed.

        Raises:
            UserError: they are not all equal.
        """
        if int(total_of_squares) * self.group.size() != int(total) ** 2:
            raise UserError(f"the ranks ran different blocks in this step, so what they gathered is mixed up; {self._advice()}")

    def _hook(self, number: int) -> Any:
        def called(module: nn.Module, args: Any) -> None:
            if self.paused:
                return
            self._digest = (self._digest * 1_000_003 + number + 1) % _DIGESTS
            if self._left:
                self._compare(number, next(module.parameters()).device)

        return called

    def _finished(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._left and not self.paused:
            self._compare(_END, next(module.parameters()).device)
            self._left -= 1

    def _compare(self, number: int, device: torch.device) -> None:
        if dist.get_backend(self.group) == "gloo":
            device = torch.device("cpu")
        numbers = torch.zeros(self.group.size(), dtype=torch.int64, device=device)
        numbers[self.group.rank()] = number
        dist.all_reduce(numbers, group=self.group)
        calls = numbers.tolist()
        if len(set(calls)) > 1:
            said = [f"rank {rank}: {'no block' if call == _END else self.names[call]}" for rank, call in enumerate(calls)]
            raise UserError(f"the ranks run different blocks at the same time ({', '.join(said[:8])}); {self._advice()}")

    def _advice(self) -> str:
        parents = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in self.names} - {""})
        example = f"such as {parents[0]!r}, " if parents else ""
        return (
            "sharding needs every rank to call every block, in one order. Where a model chooses by its data or by chance (experts, stochastic "
            f"depth), name modules that are always called with memory.blocks=[...] ({example}or [] for none), or write strategy=ddp"
        )

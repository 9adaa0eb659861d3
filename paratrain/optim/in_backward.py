"""Updates while backward runs: each gradient is used and freed as soon as it is there, so that all of them never exist (Lv et al., 2023)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from paratrain import gradients
from paratrain.errors import UserError


class UpdateInBackward:
    """Runs the optimizers one parameter at a time, from within backward.

    Of sharded parameters, `fully_shard` hands over the gradient once it is reduced. What it leaves whole keeps its gradient, for the
    optimizers' own step.

    Raises:
        UserError: for an optimizer that has to see all parameters, or whose step depends on more than their gradients.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self._squares: dict[tuple[Any, ...], torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
        self._sharded = any(isinstance(param, DTensor) for param in params)
        for optimizer in optimizers:
            if hasattr(optimizer, "eval"):
                raise UserError(
                    f"trainer.update_in_backward: {type(optimizer).__name__} counts its steps for all parameters together; write optimizer=adamw"
                )
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if isinstance(param, DTensor) or not self._sharded:
                        hook = partial(self._update, optimizer, group)
                        hook.__module__ = __name__  # type: ignore[attr-defined]
                        param.register_post_accumulate_grad_hook(hook)

    def _update(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor) -> None:
        assert param.grad is not None
        layout = gradients.layout_of(param.grad)
        square = torch.nn.utils.get_total_norm(gradients.local([param.grad])).double().square()
        self._squares[layout] = self._squares[layout].to(square.device) + square
        groups = optimizer.param_groups
        optimizer.param_groups = [{**{key: value for key, value in group.items() if key != "param_names"}, "params": [param]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        param.grad = None

    def norm(self, rest: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """2-norm of the gradients since the last call, and of those in `rest`; equal on every rank. A 0-dim float64 tensor."""
        squares = dict(self._squares)
        self._squares.clear()
        total = gradients.combined(squares, device)
        return total if not rest else (total.square() + gradients.total_norm(rest, device).square()).sqrt()

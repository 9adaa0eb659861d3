"""Gradients of weights computed later than those of inputs, for the schedules that fill the bubble of a pipeline with them.

Only `nn.Linear`, which is nearly all of the work, puts its weight's gradient off: the rest is computed with the gradients of the inputs.
`torch.distributed.pipelining` cuts the graph between inputs and weights instead, and is wrong where weights share a part of it, as the
relative positions that all layers of a T5 use.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor


class Deferred:
    """The gradients that are put off. While `queue` is None, nothing is."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    @staticmethod
    def compute(queue: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Add what was put off to the `.grad` of the weights."""
        with torch.no_grad():
            while queue:
                weight, inputs, grad = queue.pop(0)
                part = _weight_grad(weight, inputs, grad)
                weight.grad = part if weight.grad is None else weight.grad.add_(part)


def defer(model: nn.Module) -> Deferred:
    """Let every `nn.Linear` in `model` put off the gradient of its weight, in place, while the queue of the result is a list."""
    deferred = Deferred()
    for module in model.modules():
        cls = type(module)
        if cls.forward is nn.Linear.forward:
            module.__class__ = type(cls.__name__, (_Linear, cls), {"_deferred": deferred, "__module__": cls.__module__})
    return deferred


class _Linear(nn.Module):
    _deferred: Deferred

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        bias: Any = self.bias
        if not (torch.is_grad_enabled() and weight.is_leaf and weight.requires_grad) or isinstance(weight, DTensor):
            return F.linear(input, weight, bias)
        return _Apart.apply(input, weight, bias, self._deferred)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, deferred: Deferred) -> torch.Tensor:
        ctx.save_for_backward(input)
        ctx.weight, ctx.deferred = weight, deferred  # recomputation would hand back a copy of a saved weight, whose .grad nobody reads
        return F.linear(input, weight, bias)  # under autocast, as ever

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (inputs,), weight = ctx.saved_tensors, ctx.weight
        of_inputs = (grad @ weight.to(grad.dtype)).to(inputs.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        if ctx.deferred.queue is None:
            return of_inputs, _weight_grad(weight, inputs, grad), of_bias, None
        ctx.deferred.queue.append((weight, inputs.detach(), grad))
        return of_inputs, None, of_bias, None


def _weight_grad(weight: torch.Tensor, inputs: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    rows = grad.reshape(-1, grad.shape[-1])
    return (rows.t() @ inputs.reshape(-1, inputs.shape[-1]).to(grad.dtype)).to(weight.dtype)

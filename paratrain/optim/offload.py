"""States in host memory, for models on a device: of any optimizer (`streamed`), or of AdamW, computed there too (ZeRO-Offload)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from paratrain.errors import UserError
from paratrain.optim.one_by_one import States, one_by_one


def stream_states(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Keep the states of each optimizer in host memory, in place: they visit the device one parameter at a time.

    Raises:
        UserError: for a class that uses its states outside of its step, or keeps them on the host already.
    """
    for optimizer in optimizers:
        cls: Any = type(optimizer)
        name = cls.__name__
        if isinstance(optimizer, OffloadedAdamW) or hasattr(optimizer, "eval"):
            why = "keeps its states in host memory already" if isinstance(optimizer, OffloadedAdamW) else "evaluates with its states"
            raise UserError(f"memory.offload=optimizer: {name} {why}; write memory.offload=none, or optimizer=adamw")
        optimizer.__class__ = streamed(cls)


@cache
def streamed(cls: Any) -> type:
    """The optimizer `cls`, updating one parameter at a time, with its states in host memory between."""

    def lend(param: torch.Tensor, kept: States, group: dict[str, Any]) -> tuple[torch.Tensor, States]:
        return param, {key: _visiting(value, param, group) for key, value in kept.items()}

    def take_back(param: torch.Tensor, lent: torch.Tensor, kept: States, states: States) -> States:
        return {key: _at_home(value, kept.get(key)) for key, value in states.items()}

    return one_by_one(cls, f"Streamed{cls.__name__}", streamed.__doc__, lend, take_back)


def _visiting(value: Any, param: torch.Tensor, group: dict[str, Any]) -> Any:
    """A state beside its parameter; step counts stay on the host unless a kernel reads them."""
    if not isinstance(value, torch.Tensor) or (value.ndim == 0 and not group.get("fused") and not group.get("capturable")):
        return value
    return value.to(param.device, non_blocking=True)


def _at_home(value: Any, kept: Any) -> Any:
    """A state in host memory, in that of `kept` where it fits."""
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return value
    fits = isinstance(kept, torch.Tensor) and (kept.shape, kept.dtype, kept.device.type) == (value.shape, value.dtype, "cpu")
    return kept.copy_(value) if fits else value.to("cpu")


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW computed by the CPU: gradients are copied to the host, weights back to their device, states never leave the host.

    Args:
        lr: learning rate.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Raises:
        ValueError: for sharded weights, which `memory.offload` moves to the host together with their states.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(isinstance(param, DTensor) for param in group["params"]):
                raise ValueError(
                    "the weights are sharded (precision.accumulate_dtype=fp32 keeps replicas so, too); write optimizer=adamw memory.offload=params, which keeps them on the host"
                )

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros(())
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.zeros_like(param, dtype=_wide(param), device="cpu")
                if "master" not in state and (param.dtype != _wide(param) or param.device.type != "cpu"):
                    state["master"] = param.detach().to("cpu", _wide(param), copy=True)
            states = [self.state[param] for param in params]
            weights = [state.get("master", param.detach()) for state, param in zip(states, params, strict=True)]
            adamw(
                weights,
                [param.grad.to(weight) for param, weight in zip(params, weights, strict=True) if param.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for param, weight in zip(params, weights, strict=True):
                if weight.data_ptr() != param.data_ptr():
                    param.copy_(weight, non_blocking=True)
        return loss


def _wide(param: torch.Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)

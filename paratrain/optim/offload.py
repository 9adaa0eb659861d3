"""AdamW whose moments and float32 weights live in host memory (Ren et al. 2021, ZeRO-Offload), for models on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


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
                raise ValueError("the weights are sharded; write optimizer=adamw memory.offload=params, which keeps them on the host")

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

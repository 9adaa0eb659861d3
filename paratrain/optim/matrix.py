"""Optimizers of matrices: Muon, Shampoo and SOAP, right for weights that are sharded.

What they compute needs a whole matrix. Under sharding each gathers the gradients (Muon: the momenta) of one matrix at a time, every
rank computes the same update from them, and keeps its own part. A tensor of more than two dims is a matrix of (dim 0, the rest).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

_QUINTIC = (3.4445, -4.7750, 2.0315)  # maximal slope at zero; Jordan et al. 2024


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, wherever its parts are. A collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank holds whole, laid out as `like` is. No communication."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(placements=like.placements)


def orthogonalise(matrix: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """U S V^T -> about U V^T, by the Newton-Schulz iteration of Jordan et al. 2024 (Muon): singular values end between 0.7 and 1.2.

    In bfloat16 as there, in float64 for a float64 matrix, so that layouts can be compared.
    """
    a, b, c = _QUINTIC
    x = matrix if matrix.dtype is torch.float64 else matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class _MatrixOptimizer(torch.optim.Optimizer):
    matrices_only = True  # `build` gives other parameters to `optimizer.others`

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name, param in zip(group.get("param_names", group["params"]), group["params"], strict=True):
                if param.ndim < 2:
                    shape = tuple(param.shape)
                    raise ValueError(f"{name} has shape {shape}, and {type(self).__name__} updates matrices; leave it to optimizer.others")

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    update = self._update(param, param.grad, self.state[param], group)
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update.to(param.dtype), alpha=-group["lr"])
        return loss

    def _update(self, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError


class Muon(_MatrixOptimizer):
    """Momentum, orthogonalised (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982). One state a parameter: its momentum.

    Args:
        lr: learning rate.
        weight_decay: decoupled.
        momentum: of the exponential average of gradients, as in `torch.optim.Muon`.
        nesterov: look ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: factor on the learning rate of a matrix with A rows and B columns: `match_rms_adamw` 0.2 sqrt(max(A, B)), so that rates
            and decays tuned for AdamW fit; `original` sqrt(max(1, A / B)).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: str = "match_rms_adamw",
    ):
        if adjust_lr not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust_lr={adjust_lr!r}: expected match_rms_adamw or original")
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "adjust_lr": adjust_lr,
            },
        )

    def _update(self, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        direction = whole(grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        matrix = direction.flatten(1)
        rows, columns = matrix.shape
        factor = 0.2 * max(rows, columns) ** 0.5 if group["adjust_lr"] == "match_rms_adamw" else max(1, rows / columns) ** 0.5
        return part((orthogonalise(matrix, group["ns_steps"]) * factor).to(param.dtype).view(direction.shape), param)


class _Kronecker(_MatrixOptimizer):
    """What Shampoo and SOAP share: exponential averages of G G^T and G^T G, and Adam's two moments."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, betas: Any, eps: float, frequency: int, max_dim: int):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "frequency": frequency, "max_dim": max_dim}
        super().__init__(params, defaults)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        gradient = whole(grad)
        shape, matrix = gradient.shape, gradient.flatten(1)
        matrix = matrix if matrix.dtype is torch.float64 else matrix.float()
        sides = [side for side, size in (("left", matrix.shape[0]), ("right", matrix.shape[1])) if size <= group["max_dim"]]
        step = int(state.get("step", 0)) + 1
        beta = group["betas"][1]
        for side in sides:
            gram = matrix @ matrix.T if side == "left" else matrix.T @ matrix
            state[side] = whole(state[side]).lerp(gram, 1 - beta) if step > 1 else gram * (1 - beta)
        if step == 1:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param, dtype=matrix.dtype), torch.zeros_like(param, dtype=matrix.dtype)
        moments = [whole(state[key]).view_as(matrix) for key in ("exp_avg", "exp_avg_sq")]
        update, moments = self._direction(matrix, moments, state, sides, step, group)
        state["exp_avg"], state["exp_avg_sq"] = (part(moment.view(shape), param) for moment in moments)
        state["step"] = step
        return part(update.view(shape).to(param.dtype), param)

    def _direction(
        self, matrix: torch.Tensor, moments: list[torch.Tensor], state: dict[str, Any], sides: list[str], step: int, group: dict[str, Any]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        raise NotImplementedError


class SOAP(_Kronecker):
    """Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024, arXiv 2409.11321). The first step only fills the statistics.

    Args:
        lr: learning rate.
        weight_decay: decoupled.
        betas: of the first moment; of the second moment and of the statistics.
        eps: added to the root of the second moment.
        frequency: steps between two updates of the basis, by one step of power iteration and a QR decomposition.
        max_dim: a side of a matrix larger than this keeps its own basis.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        betas: Any = (0.95, 0.95),
        eps: float = 1e-8,
        frequency: int = 10,
        max_dim: int = 10000,
    ):
        super().__init__(params, lr, weight_decay, betas, eps, frequency, max_dim)

    def _direction(self, matrix, moments, state, sides, step, group):
        first, second = moments
        if step == 1:  # its own eigenbasis would make the gradient diagonal, and Adam's second moment of the rest nothing
            state.update({f"{side}_basis": torch.linalg.eigh(_distinct(state[side]))[1].flip(1) for side in sides})
            return torch.zeros_like(matrix), moments
        for side in sides:
            key = f"{side}_basis"
            if step % group["frequency"] == 0:
                state[key], second = _refresh(state[side], whole(state[key]), second, 0 if side == "left" else 1)
        bases = [whole(state[f"{side}_basis"]) if side in sides else None for side in ("left", "right")]
        beta1, beta2 = group["betas"]
        first = first.lerp(matrix, 1 - beta1)
        second = second.lerp(_rotate(matrix, bases).square(), 1 - beta2)
        scaled = _rotate(first, bases) / (1 - beta1 ** (step - 1)) / ((second / (1 - beta2 ** (step - 1))).sqrt() + group["eps"])
        return _rotate(scaled, [None if basis is None else basis.T for basis in bases]), [first, second]


class Shampoo(_Kronecker):
    """L^-1/4 G R^-1/4 (Gupta et al. 2018), with the norm of Adam's update (grafting, Anil et al. 2020).

    Args:
        lr: learning rate.
        weight_decay: decoupled.
        betas: of the first moment; of the second moment and of the statistics.
        eps: added to the root of the second moment, and, relative to the largest, to the eigenvalues of the statistics.
        frequency: steps between two computations of the roots.
        max_dim: a side of a matrix larger than this is left as it is.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: Any = (0.9, 0.99),
        eps: float = 1e-8,
        frequency: int = 10,
        max_dim: int = 8192,
    ):
        super().__init__(params, lr, weight_decay, betas, eps, frequency, max_dim)

    def _direction(self, matrix, moments, state, sides, step, group):
        beta1, beta2 = group["betas"]
        first, second = moments[0].lerp(matrix, 1 - beta1), moments[1].lerp(matrix.square(), 1 - beta2)
        adam = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])
        for side in sides:
            if step == 1 or step % group["frequency"] == 0:
                state[f"{side}_root"] = _inverse_fourth_root(state[side] / (1 - beta2**step), max(group["eps"], 1e-6))
        update = first / (1 - beta1**step)
        if "left" in sides:
            update = whole(state["left_root"]) @ update
        if "right" in sides:
            update = update @ whole(state["right_root"])
        return update * (adam.norm() / update.norm().clamp(min=torch.finfo(update.dtype).tiny)), [first, second]


def _rotate(matrix: torch.Tensor, bases: list[torch.Tensor | None]) -> torch.Tensor:
    left, right = bases
    matrix = matrix if left is None else left.T @ matrix
    return matrix if right is None else matrix @ right


def _refresh(statistic: torch.Tensor, basis: torch.Tensor, second: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of power iteration on the basis, largest eigenvalue first, and the second moments in the same order."""
    statistic = _distinct(statistic)
    order = (basis * (statistic @ basis)).sum(0).argsort(descending=True)
    return torch.linalg.qr(statistic @ basis[:, order])[0], second.index_select(dim, order)


def _distinct(statistic: torch.Tensor) -> torch.Tensor:
    """With a ramp of a millionth on the diagonal: gradients of low rank leave eigenvectors undetermined, and rounding, which differs
    between layouts, must not choose them."""
    size = statistic.shape[0]
    ramp = torch.linspace(1, 1 / size, size, dtype=statistic.dtype, device=statistic.device)
    return statistic + torch.diag(ramp * statistic.diagonal().max() * 1e-6)


def _inverse_fourth_root(statistic: torch.Tensor, eps: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(statistic)
    floor = (values[-1] * eps).clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors * values.clamp(min=floor).pow(-0.25)) @ vectors.T

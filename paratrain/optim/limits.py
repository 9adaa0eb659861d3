"""Limits on gradients beside their global norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(params: Sequence[torch.Tensor], value: float | None, adaptive: float | None) -> None:
    """Clip gradients in place, wherever their parts are: each row to a fraction of its weights' norm, then each element.

    Args:
        value: largest absolute value of an element; None for no limit.
        adaptive: largest norm of a row's gradient over the norm of its weights, which counts as at least 1e-3 (Brock et al. 2021, adaptive
            gradient clipping). A row is what one index of dim 0 holds; vectors and scalars are one row. None for no limit.
    """
    for param in params:
        if param.grad is None:
            continue
        if adaptive is not None:
            limit = adaptive * _row_norms(param).clamp(min=1e-3)
            factor = (limit / _row_norms(param.grad).clamp(min=1e-6)).clamp(max=1.0)
            param.grad.mul_(factor.view(-1, *[1] * (param.ndim - 1)) if param.ndim > 1 else factor)
        if value is not None:
            param.grad.clamp_(-value, value)


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    norms = tensor.detach().flatten(1).norm(dim=1) if tensor.ndim > 1 else tensor.detach().norm()
    return norms.full_tensor() if isinstance(norms, DTensor) and tensor.ndim <= 1 else norms

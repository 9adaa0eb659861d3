"""Losses as a sum and a count, from which the engine forms the exact mean over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from paratrain.errors import UserError


def cross_entropy(outputs: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of class targets.

    Args:
        outputs: logits [..., classes].
        targets: int64 [...].
        ignore_index: target that counts for nothing.

    Returns:
        The sum, in nats, computed in float32 or wider, and the number of targets that count.

    Raises:
        UserError: the shapes do not match.
    """
    if outputs.shape[:-1] != targets.shape:
        raise UserError(
            f"cross_entropy: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: outputs need the shape of targets "
            "and the classes as last dim"
        )
    logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total, (targets != ignore_index).sum()


def mse(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Squared error.

    Args:
        outputs: any shape.
        targets: the same shape.

    Returns:
        The sum, computed in float32 or wider, and the number of elements.

    Raises:
        UserError: the shapes differ, which broadcasting would hide.
    """
    if outputs.shape != targets.shape:
        raise UserError(f"mse: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: give both the same shape")
    dtype = torch.promote_types(torch.promote_types(outputs.dtype, targets.dtype), torch.float32)
    return F.mse_loss(outputs.to(dtype), targets.to(dtype), reduction="sum"), targets.numel()

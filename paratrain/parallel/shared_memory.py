"""Parameters that are parts of each other's memory without being one parameter."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import nn

from paratrain.compat import storage_id
from paratrain.errors import UserError


def refuse(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse a trained parameter that is a part of another, or of a buffer: what one learns would be seen by the other on one process.

    Args:
        named: parameters and buffers.

    Raises:
        UserError: names both.
    """
    known: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in named:
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.numel():
            known.setdefault(storage_id(tensor), []).append((name, tensor))
    for sharing in known.values():
        for (one, a), (other, b) in combinations(sharing, 2):
            if (a.requires_grad or b.requires_grad) and _overlap(a, b):
                raise UserError(
                    f"model: {one} and {other} share memory but are not one parameter, so an update of one changes the other, which parts of "
                    f"weights on several ranks cannot; share the parameter itself (self.weight = other.weight) and slice it in forward, "
                    "give each its own values (.clone()), or write strategy=ddp"
                )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors in one storage have elements in common."""
    if a.dtype != b.dtype:
        return True
    ends = [t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 for t in (a, b)]
    if ends[0] <= b.storage_offset() or ends[1] <= a.storage_offset():
        return False
    marks = torch.zeros(max(ends), dtype=torch.bool, device="cpu")
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())

"""Gradients of plain and sharded parameters together: what of them is here, and their global norm."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

_BUCKET = 32 << 20  # bytes of gradients reduced at once


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every rank that shares it; every such rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    torch_log = logging.getLogger("torch.distributed.tensor._redistribute")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)  # it warns that what is sharded over two axes is gathered in two steps
    try:
        return tensor.full_tensor()
    finally:
        torch_log.setLevel(level)


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank holds of each tensor, without empty parts; writing to it writes to the tensor."""
    parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [part for part in parts if part.numel()]


def scale(tensors: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply every tensor by `factor` in place, wherever each is."""
    parts = local(tensors)
    if not parts:  # this rank may hold nothing of them
        return
    if not isinstance(factor, torch.Tensor):
        torch._foreach_mul_(parts, factor)
        return
    by_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for part in parts:
        by_device[part.device].append(part)
    for device, members in by_device.items():
        torch._foreach_mul_(members, factor.to(device))


def reduce(params: Iterable[torch.Tensor], group: dist.ProcessGroup, average: bool, everywhere: bool = False) -> None:
    """Sum the gradients of whole parameters over `group`, or average them; one that no rank has stays None. Every rank must call it.

    In fp32 at least, in buckets.

    Args:
        everywhere: every rank has all of them, so that there is nothing to ask and to wait for.
    """
    for bucket in _buckets(params):
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(wide) for p in bucket]
        used = torch.tensor([p.grad is not None for p in bucket], dtype=wide, device=parts[0].device)
        flat = torch.cat([*parts, used])
        dist.all_reduce(flat, group=group)
        *sums, users = flat.split([*(p.numel() for p in bucket), len(bucket)])
        counts = [1.0] * len(bucket) if everywhere else users.tolist()
        for param, total, count in zip(bucket, sums, counts, strict=True):
            total = total.div_(group.size()) if average else total
            param.grad = total.view_as(param).to(param.grad_dtype) if count else None


def _buckets(params: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for param in sorted(params, key=lambda p: str(p.dtype)):
        if bucket and (param.dtype != bucket[0].dtype or sum(p.numel() * p.element_size() for p in bucket) > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(param)
    if bucket:
        yield bucket


def total_norm(grads: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """2-norm over all gradients, each counted once whatever the mesh it is sharded over; equal on every rank. A 0-dim float64 tensor."""
    if not any(isinstance(grad, DTensor) for grad in grads):
        return nn.utils.get_total_norm(grads).double()
    groups: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
    for grad in grads:
        groups[layout_of(grad)].append(grad)
    return combined({layout: nn.utils.get_total_norm(local(members)).double().square() for layout, members in groups.items()}, device)


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tensors have in common whose parts are on the same ranks: (mesh, placements), or ()."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


def combined(squares: Mapping[tuple[Any, ...], torch.Tensor], device: torch.device) -> torch.Tensor:
    """The norm over all ranks from the sum of squares that this rank holds of each layout, see `layout_of`."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for layout, own in squares.items():
        square = own.to(device, torch.float64, copy=True)
        if layout:
            mesh, placements = layout
            assert not any(placement.is_partial() for placement in placements), "a gradient that is not reduced"
            for dim, placement in enumerate(placements):
                if not placement.is_replicate():  # a shard of a shard does not call itself one
                    dist.all_reduce(square, group=mesh.get_group(dim))
        total += square
    return total.sqrt()

"""Small linear fingerprints of large tensors, so that two runs can be compared without keeping either.

A sketch adds up the elements of a tensor in a fixed number of buckets, each element with a random sign (Charikar, Chen and
Farach-Colton, "Finding frequent items in data streams", 2002). It is linear, so the sketch of a difference is the difference of the
sketches, and its squared norm has the squared norm of the difference as expectation. Tensors no larger than the sketch are kept whole.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WIDTH = 4096  # numbers kept of a parameter-sized tensor
SAMPLE_WIDTH = 128  # numbers kept of one sample of an activation


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; collective for a DTensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sketch(tensor: Tensor, rows: int = 1, width: int = WIDTH) -> Tensor:
    """float64 [rows, at most `width`]: a sketch of each of `rows` equal runs of `tensor`. Elements that are not finite count as 0."""
    flat = tensor.detach().reshape(rows, -1).to(torch.float64)
    flat = torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
    size = flat.shape[1]
    if size <= width:
        return flat.clone()
    flat = flat * _signs(size)
    return torch.nn.functional.pad(flat, (0, -size % width)).view(rows, -1, width).sum(1)


@lru_cache(maxsize=32)
def _signs(size: int) -> Tensor:
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size), dtype=torch.int8) * 2 - 1

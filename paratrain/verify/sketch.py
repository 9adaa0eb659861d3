"""Small linear fingerprints of large tensors, so that two runs can be compared without keeping either.

A sketch cuts a tensor into runs of a fixed width and adds these up with random signs, as in Alon, Matias and Szegedy, "The space
complexity of approximating the frequency moments" (1996). It is linear, so the sketch of a difference is the difference of the sketches,
and its squared norm has the squared norm of the difference as expectation. Tensors no larger than the sketch are kept whole.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from paratrain.parallel.tp_split import Split, gather

WIDTH = 4096  # numbers kept of a parameter-sized tensor
SAMPLE_WIDTH = 128  # numbers kept of one sample of an activation


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, or of one that tensor parallelism has split; collective for these."""
    if isinstance(tensor, Split):
        with torch.no_grad():
            return gather(tensor)
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sketch(tensor: Tensor, rows: int = 1, width: int = WIDTH) -> Tensor:
    """float64 [rows, at most `width`]: a sketch of each of `rows` equal runs of `tensor`. Elements that are not finite count as 0."""
    flat = tensor.detach().reshape(rows, -1).to(torch.float64)
    if not bool(torch.isfinite(flat.sum())):
        flat = torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
    runs, rest = divmod(flat.shape[1], width)
    if runs + bool(rest) <= 1:
        return flat.clone()
    signs = _signs(runs + 1)
    total = signs[:runs] @ flat[:, : runs * width].reshape(rows, runs, width)
    total[:, :rest] += signs[runs] * flat[:, runs * width :]
    return total


@lru_cache(maxsize=64)
def _signs(count: int) -> Tensor:
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(count)).double() * 2 - 1

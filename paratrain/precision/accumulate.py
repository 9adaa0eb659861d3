"""Gradients of 16-bit weights in float32: summed over micro-batches and ranks without rounding, and rounded once, for the update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from paratrain.config import Config


def dtype_of(cfg: Config) -> torch.dtype | None:
    """The dtype in which gradients of narrower weights are kept; None: in that of the weights."""
    return torch.float32 if cfg.precision.accumulate_dtype == "fp32" else None


def widen(params: Iterable[torch.Tensor], dtype: torch.dtype | None) -> None:
    """Let backward add to gradients of `dtype` where weights have fewer bits."""
    for param in params:
        if dtype is not None and param.requires_grad and param.is_floating_point() and param.dtype.itemsize < dtype.itemsize:
            param.grad_dtype = dtype


@contextmanager
def rounded(params: Sequence[torch.Tensor]) -> Iterator[None]:
    """Gradients in the dtype of their weights, as optimizers want them; wide ones are gone afterwards."""
    wide = {param: param.grad.dtype for param in params if param.grad is not None and param.grad.dtype != param.dtype}
    for param in wide:
        grad, param.grad = param.grad, None
        assert grad is not None
        param.grad_dtype = param.dtype
        param.grad = grad.to(param.dtype)
    try:
        yield
    finally:
        for param, dtype in wide.items():
            param.grad = None
            param.grad_dtype = dtype

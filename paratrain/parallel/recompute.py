"""Activation recomputation: forget a block's activations after its forward, compute them again in backward.

Randomness is replayed and buffers are left alone the second time, so the step is the same function with and without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from paratrain.config import Config

_ATEN = torch.ops.aten
_EXPENSIVE = {  # compute grows faster than the result: keep these, recompute the rest (Korthikanti et al., 2022, section 5)
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply(blocks: Sequence[tuple[str, nn.Module]], cfg: Config) -> None:
    """Make every `memory.recompute_every`-th block recompute, in place; names of parameters stay."""
    if cfg.memory.recompute == "none":
        return
    for _, block in blocks[:: cfg.memory.recompute_every]:
        cls = type(block)
        block.__class__ = type(f"Recomputed{cls.__name__}", (_Recomputed, cls), {"selective": cfg.memory.recompute == "selective"})


class _Recomputed(nn.Module):
    selective: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        run = partial(super().forward, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True, context_fn=partial(_contexts, self, self.selective))


def _contexts(block: nn.Module, selective: bool) -> tuple[Any, Any]:
    forward, again = create_selective_checkpoint_contexts(_policy) if selective else (nullcontext(), nullcontext())
    return forward, _both(again, _scratch_buffers(block)) if any(True for _ in block.buffers()) else again


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


@contextmanager
def _scratch_buffers(block: nn.Module) -> Iterator[None]:
    """Let the second forward update copies of the buffers: running statistics have seen this batch already."""
    kept = [(module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items() if buffer is not None]
    for module, name, buffer in kept:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer

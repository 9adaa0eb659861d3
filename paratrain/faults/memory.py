"""Out of memory, told so that one can act on it: who holds how much, and what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from paratrain.errors import UserError

if TYPE_CHECKING:
    from paratrain.engine import Engine


class OutOfMemory(UserError):
    """Not enough memory for a step; the message says what holds it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def report(engine: Engine, error: BaseException) -> OutOfMemory:
    """The error to raise instead of torch's."""
    cfg, device = engine.cfg, engine.device
    weights = _bytes(list(engine.model.parameters()))
    gradients = _bytes([param.grad for param in engine.model.parameters() if param.grad is not None])
    states = _bytes(
        [value for o in engine.optimizers for state in o.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    )
    rows = {"weights": weights, "gradients now": gradients, "optimizer states": states}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        rows |= {
            "activations and the rest at the peak": max(0, torch.cuda.max_memory_allocated(device) - weights - gradients - states),
            "reserved and unused (fragments)": reserved - allocated,
            "other processes on this device": total - free - reserved,
            "the device": total,
        }
    table = "\n".join(f"  {name:38}{size / 2**30:9.3f} GiB" for name, size in rows.items())
    micro = engine.micro_batch_size
    smaller = f"data.micro_batch_size={max(1, (micro or 2) // 2)}" if micro != 1 else "shorter samples"
    sharded = (
        "" if cfg.strategy.name in ("fsdp", "hsdp", "zero3") else ", strategy=fsdp to divide weights and optimizer states over the ranks"
    )
    return OutOfMemory(
        f"step {engine.global_step}: out of memory on {device} ({str(error).splitlines()[0] if str(error) else type(error).__name__})\n{table}\n"
        f"write {smaller} (it is {micro or 'the whole part of a rank'}; the result does not change), memory.recompute=full{sharded}, or precision=bf16"
    )


def _bytes(tensors: list[torch.Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)

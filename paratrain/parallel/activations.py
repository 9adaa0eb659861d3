"""What backward needs of each block: kept in host memory until then, or measured, to decide what is recomputed instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from paratrain import notes, rng
from paratrain.config import Config

log = logging.getLogger(__name__)


def apply(blocks: Sequence[tuple[str, nn.Module]], cfg: Config) -> None:
    """Make every block keep its activations in host memory between forward and backward, in place; weights stay where they are."""
    if cfg.memory.activations != "offload":
        return
    made: dict[type, type] = {}
    for _, block in blocks:
        cls = type(block)
        if cls not in made:
            made[cls] = type(f"Offloaded{cls.__name__}", (_Offloaded, cls), {})
        block.__class__ = made[cls]


class _Offloaded(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)

        def to_host(tensor: torch.Tensor) -> Any:
            # not once for the block: the weights of modules inside that are sharded apart are gathered while it runs
            if type(tensor) not in (torch.Tensor, nn.Parameter) or _storage(tensor) in _memory(self):
                return tensor
            host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
            return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)

        def to_device(kept: Any) -> torch.Tensor:
            return kept if isinstance(kept, torch.Tensor) else kept[1].to(kept[0], non_blocking=True)

        with saved_tensors_hooks(to_host, to_device):
            return super().forward(*args, **kwargs)


def measure(block: nn.Module, run: Callable, args: Sequence[Any]) -> int:
    """Bytes that `run(*args)`, the forward of `block`, keeps for backward beside weights and inputs; computed once, and forgotten."""
    here = _memory(block) | {_storage(leaf) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    found, alive = dict[int, int](), list[torch.Tensor]()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if (address := _storage(tensor)) not in here:
            found[address] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # or its address would be another's next
        return tensor

    device = next((leaf.device for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
    with rng.preserved(device), saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = run(*args)
    del outputs
    return sum(found.values())


class Budget:
    """How many blocks, from the first on, are recomputed so that what all of them keep fits.

    The first and not the last, because by the time backward recomputes them, what the others keep is free again.

    Args:
        gib: the budget of this rank.
        names: the blocks in the order in which they run.
    """

    def __init__(self, gib: float, names: Sequence[str]):
        self.bytes = int(gib * 2**30)
        self.names = list(names)
        self._kept: dict[str, int] = {}
        self._inputs: dict[str, int] = {}
        self._recomputed: int | None = None

    def knows(self, name: str, inputs: Any) -> bool:
        """Whether this block has been measured with inputs as large as these."""
        return _bytes(inputs) <= self._inputs.get(name, -1)

    def note(self, name: str, inputs: Any, kept: int) -> None:
        """A block keeps `kept` bytes beside its `inputs`."""
        self._inputs[name], self._kept[name] = _bytes(inputs), kept
        self._recomputed = None

    def recomputes(self, name: str) -> bool:
        """Whether this block, once measured, is recomputed."""
        if self._recomputed is None:
            self._recomputed = self._fewest()
        return self.names.index(name) < self._recomputed

    def _fewest(self) -> int:
        kept = [self._kept.get(name, 0) for name in self.names]
        inputs = [self._inputs.get(name, 0) for name in self.names]
        for count in range(len(self.names) + 1):
            total = sum(inputs) + sum(kept[count:])
            peak = max([total, *(sum(inputs[: i + 1]) + kept[i] for i in range(count))])
            if peak <= self.bytes:
                break
        log.info("memory.recompute=auto: %d of %d blocks, activations %s of %s", count, len(kept), notes.size(peak), notes.size(self.bytes))
        if peak > self.bytes:
            log.warning("memory.budget_gib: activations take %s although every block is recomputed", notes.size(peak))
        return count


def _storage(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().data_ptr()


def _memory(block: nn.Module) -> set[int]:
    """What holds the weights of a block as its forward sees them."""
    return {_storage(tensor) for tensor in (*block.parameters(), *block.buffers())}


def _bytes(inputs: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))

"""What ranks send each other: collectives and their bytes, by mesh axis.

    with Communication(engine.mesh) as seen:
        engine.train_step(batch)
    print(seen)

It counts operations where torch dispatches them, whoever calls them: DistributedDataParallel, `fully_shard`, DTensor, this library, the model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from paratrain.callbacks import Callback
from paratrain.compat import collective
from paratrain.errors import UserError
from paratrain.mesh import Mesh

if TYPE_CHECKING:
    from paratrain.result import StepResult
    from paratrain.trainer import Trainer


@dataclass
class Amount:
    """Operations of one kind over one axis, on one rank.

    Attributes:
        count: how many.
        bytes: their data, as the whole that the ranks make together: the tensor that is reduced, the result of an all_gather, what goes into
            a reduce_scatter or, on one rank, into an all_to_all; a message that is sent or received.
    """

    count: int = 0
    bytes: int = 0


class Communication(TorchDispatchMode):
    """Counts while it is entered, on this rank alone. Groups of one rank send nothing and are left out; so are barriers.

    Code compiled before it was entered is not seen: measure with `compile=false`.

    Attributes:
        amounts: (axis, operation) -> amount. An axis is that of the mesh along which the ranks of a group differ; several are joined, as in
            "dp_replicate x cp". Operations: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, gather, scatter, send, recv.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.amounts: dict[tuple[str, str], Amount] = defaultdict(Amount)
        self._mesh = mesh.root
        self._axes: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = collective(func, args, result) if "c10d" in func.namespace else None
        if found is not None:
            operation, tensors, group = found
            if group.size() > 1:
                amount = self.amounts[self._axis(group), operation]
                amount.count += 1
                amount.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result

    def sent(self, axis: str, operation: str) -> float:
        """Bytes that this rank sends for it where collectives are rings (Thakur et al., 2005; `busbw` of nccl-tests); the mean over ranks
        where they differ in that."""
        size = 1
        for name in axis.split(" x "):
            size *= self._mesh[name].size()
        whole = {"send": 1.0, "recv": 0.0, "all_reduce": 2 * (size - 1) / size}.get(operation, (size - 1) / size)
        return whole * self.amounts[axis, operation].bytes

    def __str__(self) -> str:
        rows = [("axis", "operation", "count", "MiB", "MiB sent")]
        for (axis, operation), amount in sorted(self.amounts.items()):
            rows.append((axis, operation, str(amount.count), f"{amount.bytes / 2**20:.3f}", f"{self.sent(axis, operation) / 2**20:.3f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _axis(self, group: dist.ProcessGroup) -> str:
        if group.group_name not in self._axes:
            ranks = self._mesh.mesh
            names = self._mesh.mesh_dim_names
            assert names is not None
            members = torch.isin(ranks, torch.tensor(dist.get_process_group_ranks(group))).nonzero()
            axes = [name for name, places in zip(names, members.unbind(1), strict=True) if len(places.unique()) > 1]
            self._axes[group.group_name] = " x ".join(axes)
        return self._axes[group.group_name]


class CommunicationReport(Callback):
    """Print on rank 0 what it communicates in one step of training.

    Args:
        step: which one; the first of a run also agrees on much that later ones do not.
    """

    def __init__(self, step: int = 3):
        if step < 1:
            raise UserError(f"CommunicationReport(step={step}): the first step is 1")
        self.step = step
        self.seen: Communication | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        self._watch(trainer)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if self.seen is not None:
            self.seen.__exit__(None, None, None)
            if trainer.engine.is_main_process:
                print(f"communication of rank 0 in step {self.step}:\n{self.seen}", flush=True)
            self.seen = None
        self._watch(trainer)

    def _watch(self, trainer: Trainer) -> None:
        if trainer.engine.global_step + 1 == self.step:
            self.seen = Communication(trainer.engine.mesh)
            self.seen.__enter__()

"""A cheap form of verify in training: are what should be replicas still the same, bit for bit?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from paratrain.callbacks import Callback
from paratrain.errors import UserError

if TYPE_CHECKING:
    from paratrain.engine import Engine
    from paratrain.result import StepResult
    from paratrain.trainer import Trainer

_CHUNK = 1 << 22
_ABSENT = -1
"""In place of the number of a shard, where a rank does not hold the tensor."""
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio in 64 bits (Knuth), as a signed number


class ReplicaCheck(Callback):
    """Compare the bits of every parameter, and of every gradient that is there, over the ranks that hold replicas of it.

    It costs one pass over the local weights and one collective of 8 bytes a parameter.

    Args:
        every: steps between checks.

    Raises:
        UserError: in `on_step_end`, on every rank: names the parameter and the ranks that differ.
    """

    def __init__(self, every: int = 100):
        if every < 1:
            raise UserError(f"ReplicaCheck(every={every}): must be at least 1 step")
        self.every = every

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.engine.global_step % self.every == 0:
            check_replicas(trainer.engine)


def check_replicas(engine: Engine) -> None:
    """Raise a `UserError` if ranks that should hold the same weights do not; every rank must call it."""
    named = dict(engine.model.named_parameters())
    experts = engine._layout.experts
    found_here: dict[str, Tensor] = {}
    for kind in ("parameter", "gradient of"):
        for name, param in named.items():
            tensor = param if kind == "parameter" else param.grad
            if tensor is not None:
                shard = torch.tensor(_shard(tensor) * experts.ranks + experts.owners.get(name, 0), device=engine.device)
                found_here[f"{kind} {name}"] = torch.stack([fingerprint(_local(tensor)).to(engine.device), shard])
    names = _names(list(found_here), engine)
    absent = torch.tensor([0, _ABSENT], device=engine.device)
    mine = torch.stack([found_here.get(name, absent) for name in names])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    table = torch.stack(every).cpu()
    if bool((table == table[0]).all()):
        return
    found = [problem for index, name in enumerate(names) if (problem := _desync(name, table[:, index]))]
    if found:
        more = f" (and {len(found) - 1} more tensors)" if len(found) > 1 else ""
        raise UserError(
            f"step {engine.global_step}: replicas differ: {found[0]}{more}. Ranks that should hold the same weights have trained apart: resume from the last "
            "checkpoint, and find the cause with `python -m paratrain verify` (a parameter changed on one rank, an update that was skipped "
            "there, a faulty device)"
        )


def _names(mine: list[str], engine: Engine) -> list[str]:
    """The names of all ranks in one order: those of a pipeline hold different ones."""
    if engine.mesh.root["pp"].size() == 1:
        return mine
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    return list(dict.fromkeys(name for names in every for name in names))


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 []: a weighted sum of the bits of `tensor`, modulo 2^64. A change of one element always shows: weights are odd."""
    flat = tensor.detach().contiguous().reshape(-1)
    words = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        positions = torch.arange(start, start + len(part), device=flat.device)
        mixed = positions * _ODD
        total += (part * ((mixed ^ (mixed >> 29)) * 2 + 1)).sum()
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(tensor: Tensor) -> int:
    """Which shard this rank holds: ranks with the same number hold replicas of it."""
    number = 0
    if isinstance(tensor, DTensor):
        coordinates = tensor.device_mesh.get_coordinate()
        assert coordinates is not None
        for size, place, coordinate in zip(tensor.device_mesh.shape, tensor.placements, coordinates, strict=True):
            number = number * size + (0 if isinstance(place, Replicate) else coordinate)
    return number


def _desync(name: str, column: Tensor) -> str | None:
    """What is wrong with one tensor, from [rank, (fingerprint, shard)]."""
    for shard in sorted(set(column[:, 1].tolist()) - {_ABSENT}):
        holders = [rank for rank in range(len(column)) if int(column[rank, 1]) == shard]
        values = [int(column[rank, 0]) for rank in holders]
        if len(set(values)) > 1:
            common = max(set(values), key=values.count)
            odd = [rank for rank, value in zip(holders, values, strict=True) if value != common]
            if 2 * len(odd) < len(holders):
                return f"{name} on rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} is not that of the other {len(holders) - len(odd)} ranks"
            return f"{name} differs between ranks {', '.join(map(str, holders))}"
    return None

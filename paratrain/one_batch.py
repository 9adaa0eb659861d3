"""Whether ranks that compute one output together were given one batch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from paratrain import batch as batches
from paratrain import reach
from paratrain.errors import UserError

_AXES = ("pp", "cp", "tp")
_STEPS = 4


class OneBatch:
    """Compares what the ranks of these axes were given, in the first steps: with other samples they would exchange parts that do not belong together.

    Args:
        root: the mesh with every axis.
    """

    def __init__(self, root: DeviceMesh):
        self._groups = [(axis, root[axis].get_group()) for axis in _AXES if root[axis].size() > 1]
        self._left = _STEPS if self._groups else 0

    def check(self, batch: Any) -> None:
        """Every rank must call it for every step; raises `UserError` on all where they differ."""
        if not self._left:
            return
        self._left -= 1
        inputs, targets = batches.as_local(batch)[:2]
        shapes = [tuple(leaf.shape) for leaf in batches.tensors((inputs, targets))]
        mine = dist.get_rank(), shapes, reach.digest((inputs, targets))
        for axis, group in self._groups:
            given: list[Any] = [mine] * group.size()
            dist.all_gather_object(given, mine, group=group)
            other = next((each for each in given if each[2] != given[0][2]), None)
            if other is not None:
                raise UserError(
                    f"parallel.{axis}={group.size()}: ranks {given[0][0]} and {other[0]} were given different batches (tensors of {_text(given[0][1])}, and of "
                    f"{_text(other[1])}), though the ranks of pp, cp and tp work on the same samples; give every rank the global batch and write "
                    "engine.train_step(engine.local(batch)), or choose a rank's own part by engine.mesh.data.get_local_rank() of engine.mesh.data.size()"
                )


def _text(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes[:4]) or "no shape"

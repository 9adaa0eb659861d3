"""Degrees of parallelism -> one named DeviceMesh.

Every axis is always there. An axis of degree 1 has a group of one rank, so no code asks whether an axis exists.
"""

from __future__ import annotations

import atexit
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paratrain.compat import beside, flatten_mesh
from paratrain.errors import UserError

if TYPE_CHECKING:
    from paratrain.config import Config

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")  # outermost first: tp peers are neighbours, inside a node
DATA = ("dp_replicate", "dp_shard", "ep")  # axes whose ranks see different samples
_MADE: dict[tuple[Any, tuple], Mesh] = {}  # (default process group, (device type, *degrees)) -> its mesh


def degrees(cfg: Config, ranks: int) -> dict[str, int]:
    """The degree of every axis in `AXES`, `-1` filled in.

    Raises:
        UserError: when the degrees do not multiply to `ranks`; shows the arithmetic.
    """
    asked = {axis: getattr(cfg.parallel, axis) for axis in AXES}
    if cfg.strategy.name == "single" and ranks > 1:
        raise UserError(
            f"strategy=single runs one process, but {ranks} were started; write strategy=ddp, or start one process without torchrun"
        )
    fills = "dp_replicate" if cfg.strategy.name in ("single", "ddp") or (cfg.strategy.name == "hsdp" and asked["dp_shard"]) else "dp_shard"
    if cfg.strategy.name == "hsdp" and asked["dp_replicate"] is asked["dp_shard"] is None:
        inside = math.prod(asked[axis] for axis in ("ep", "cp", "tp"))  # what a node holds of these leaves fewer of its ranks to shard over
        node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) // inside
        asked |= {"dp_replicate": -1, "dp_shard": math.gcd(ranks // (inside * asked["pp"]), node) or 1}
    for axis in ("dp_replicate", "dp_shard"):
        if asked[axis] is None:
            asked[axis] = -1 if axis == fills and -1 not in asked.values() else 1
    free = [axis for axis, degree in asked.items() if degree == -1]
    fixed = math.prod(degree for degree in asked.values() if degree != -1)
    arithmetic = " x ".join(f"{axis}={degree}" for axis, degree in asked.items() if degree != 1) or "1"
    if len(free) > 1:
        raise UserError(f"parallel: only one degree may be -1, got {' and '.join(free)}")
    if free:
        if ranks % fixed:
            raise UserError(
                f"parallel: {arithmetic}: the fixed degrees multiply to {fixed}, which does not divide the {ranks} processes "
                f"started, so parallel.{free[0]}=-1 cannot fill; start a multiple of {fixed} processes or change a degree"
            )
        asked[free[0]] = ranks // fixed
    elif fixed != ranks:
        raise UserError(
            f"parallel: {arithmetic} = {fixed}, but {ranks} process{'es were' if ranks != 1 else ' was'} started; "
            f"start {fixed} (torchrun --nproc_per_node={fixed}), or write parallel.{fills}=-1 to fill"
        )
    return asked


@dataclass(frozen=True)
class Mesh:
    """The named axes of a job.

    Attributes:
        root: every axis of `AXES`, outermost first.
        data: dp_replicate x dp_shard x ep flattened: the ranks that see different samples.
        weights: data x cp flattened: the ranks whose gradients of the same weights are added.
        loss: pp x data x cp flattened: the ranks that hold parts of the loss of a step.
        shard: what `fully_shard` shards over: dp_shard x ep x cp, or dp_replicate x (dp_shard x ep x cp) where there are replicas.
        expert_shard: likewise for the weights of experts, of which the ranks of ep hold different ones: without ep.
    """

    root: DeviceMesh
    data: DeviceMesh
    weights: DeviceMesh
    loss: DeviceMesh
    shard: DeviceMesh
    expert_shard: DeviceMesh


def build(cfg: Config, device_type: str) -> Mesh:
    """The mesh of this job. Needs the default process group, for which each mesh is made once: gloo keeps threads for every group."""
    shape = degrees(cfg, dist.get_world_size())
    world, wanted = dist.group.WORLD, (device_type, *shape.values())
    if not _MADE:
        atexit.register(_MADE.clear)  # before the process group is given up, whose threads would outlive the interpreter
    if any(group is not world for group, _ in _MADE):
        _MADE.clear()
    if (world, wanted) not in _MADE:
        _MADE[world, wanted] = _build(shape, device_type)
    return _MADE[world, wanted]


def _build(shape: dict[str, int], device_type: str) -> Mesh:
    root = init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=AXES)
    weights = data = flatten_mesh(root[DATA], "dp")
    if shape["cp"] > 1:
        weights = flatten_mesh(root[(*DATA, "cp")], "weights")
    loss = flatten_mesh(root[("pp", *DATA, "cp")], "loss") if shape["pp"] > 1 else weights

    def shard(*inside: str) -> DeviceMesh:
        axes = ("dp_shard", *(axis for axis in inside if shape[axis] > 1))
        sharded = flatten_mesh(root[axes], "_".join(axes)) if len(axes) > 1 else root["dp_shard"]
        assert sharded.mesh_dim_names is not None
        return beside(root, "dp_replicate", sharded.mesh_dim_names[0]) if shape["dp_replicate"] > 1 else sharded

    return Mesh(root, data, weights, loss, shard("ep", "cp"), shard("cp"))

"""The only place that touches private torch names, or names that differ between the supported versions (2.11 and later)."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """All axes of `mesh` as the one axis `name`. `DeviceMesh._flatten` has no public twin yet."""
    return mesh._flatten(name)


def sync_buffers_in_forward(wanted: bool) -> dict[str, Any]:
    """Arguments of DistributedDataParallel: 2.13 renames `broadcast_buffers`."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": wanted}


def dcp_save(tensors: dict[str, Any], writer: Any, planner: Any, group: Any) -> None:
    """`torch.distributed.checkpoint.save` without its warning that there is no process group and without its log of every error."""
    from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

    _save_state_dict(tensors, writer, group, no_dist=not dist.is_initialized(), planner=planner)


def dcp_load(tensors: dict[str, Any], reader: Any, planner: Any, group: Any) -> None:
    """`torch.distributed.checkpoint.load`, quiet as `dcp_save`."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    _load_state_dict(tensors, reader, group, no_dist=not dist.is_initialized(), planner=planner)

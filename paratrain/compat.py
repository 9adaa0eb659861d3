"""The only place that touches private torch names, or names that differ between the supported versions (2.11 and later)."""

from __future__ import annotations

import inspect
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """All axes of `mesh` as the one axis `name`. `DeviceMesh._flatten` has no public twin yet."""
    return mesh._flatten(name)


def sync_buffers_in_forward(wanted: bool) -> dict[str, Any]:
    """Arguments of DistributedDataParallel: 2.13 renames `broadcast_buffers`."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": wanted}

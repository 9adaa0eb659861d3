"""The only place that touches private torch names, or names that differ between the supported versions (2.11 and later)."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """All axes of `mesh` as the one axis `name`. `DeviceMesh._flatten` has no public twin yet."""
    return mesh._flatten(name)

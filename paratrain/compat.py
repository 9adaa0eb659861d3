"""The only place that touches private torch names, or names that differ between the supported versions (2.11 and later)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
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


def local_box(shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes, offsets) of the part of a tensor of `shape` that this rank holds as a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(sizes), tuple(offsets)


def track_gradients(module: Any, used: set[torch.Tensor]) -> None:
    """Make the parameter group of a `fully_shard` module reduce a zero for each gathered parameter that has no gradient on this rank.

    Ranks that disagree about which parameters have gradients would otherwise reduce buffers of different layouts into each other.
    2.13 has `set_reduce_scatter_unused_params`, which does not tell which they were.

    Args:
        used: gets the sharded parameters that had a gradient here.
    """
    for group in _param_groups(module):
        group.post_backward = functools.partial(_fill_and_reduce, group, group.post_backward, used)


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _fill_and_reduce(group: Any, post_backward: Callable, used: set[torch.Tensor], *args: Any) -> None:
    gathered = [p for p in group.fsdp_params if p.sharded_param.requires_grad and hasattr(p, "_unsharded_param")]
    empty = []
    for param in gathered:
        if param._unsharded_param.grad is not None or param.unsharded_accumulated_grad is not None:
            used.add(param.sharded_param)
        else:
            empty.append(param)
    if group.reduce_grads and (group.is_unsharded or len(empty) < len(gathered)):
        for param in empty:
            param._unsharded_param.grad = torch.zeros(param._unsharded_param.shape, dtype=param._unsharded_param.dtype, device=group.device)
    post_backward(*args)

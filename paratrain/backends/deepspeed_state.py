"""The state of a ZeRO optimizer by the parameters' names, and back.

ZeRO keeps a flat float32 piece of each group a rank. A checkpoint of ours names parameters, so each is gathered, one at a time, and
every rank keeps its rows in host memory: a DTensor sharded along dim 0, which is saved and loaded under any other layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from paratrain.checkpoint import CheckpointError
from paratrain.compat import local_box

_STEP = "step"


def model_tensors(engine: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of the user's state_dict, whole, with the float32 master of each trained parameter. Collective."""
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            yield name, _whole(engine, value)


def tensors(engine: Any, model: nn.Module, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """`model/<name>` and `optimizer/<parameter>/<key>`. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(engine)
    found = {f"model/{name}": _part(value, mesh) for name, value in model_tensors(engine, model)}
    for name, param in _trained(model):
        flat = _flat(engine, param)
        for key, value in engine.optimizer.optimizer.state.get(flat, {}).items():
            full = f"optimizer/{name}/{key}"
            if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and not value.ndim):  # a step count, or the like
                found[full] = torch.tensor(float(value), dtype=torch.float32)
            elif isinstance(value, torch.Tensor) and value.shape == flat.shape:
                found[full] = _part(safe_get_full_optimizer_state(param, key), mesh)
            else:
                raise CheckpointError(f"{full}: a {type(value).__name__} that belongs to no element of the parameter cannot be saved")
    return found


def prepare(
    engine: Any, model: nn.Module, mesh: DeviceMesh, saved: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """Room for what the checkpoint has, and the function that hands it to ZeRO once it is filled. Collective, as that is.

    Raises:
        CheckpointError: another optimizer wrote it, or one that counted steps by parameter.
    """
    entries = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    room = {f"model/{name}": _room(_shape(value), _dtype(value), mesh) for name, value in entries.items()}
    states: dict[str, dict[str, str]] = {}  # parameter -> key -> the checkpoint's name
    for name, param in _trained(model):
        prefix = f"optimizer/{name}/"
        states[name] = {
            full.removeprefix(prefix).partition("#")[0]: full
            for full in saved
            if full.startswith(prefix) and "/" not in full[len(prefix) :]
        }
        for key, full in states[name].items():
            shape, dtype = saved[full]
            if not _is_number(key, shape, param) and tuple(shape) != tuple(_shape(param)):
                raise CheckpointError(
                    f"{full!r} has shape {tuple(shape)}, its parameter {tuple(_shape(param))}: another optimizer wrote it"
                )
            number = _is_number(key, shape, param)
            room[full] = torch.zeros(tuple(shape), dtype=dtype) if number else _room(_shape(param), torch.float32, mesh)
    wanted = set().union(*(keys for keys in states.values()), set())
    uneven = [name for name, keys in states.items() if set(keys) != wanted and keys]
    if uneven:
        raise CheckpointError(f"the states of {uneven[0]!r} are not those of the other parameters: different optimizers wrote them")

    def finish() -> None:
        _allocate(engine, model, states, room)
        for name, value in entries.items():
            whole = _full(room[f"model/{name}"])
            if isinstance(value, nn.Parameter) and value.requires_grad:
                _set_trained(engine, value, whole)
            else:
                _set(value, whole)
        for name, param in _trained(model):
            for key, full in states[name].items():
                if not _is_number(key, saved[full][0], param):
                    _set_trained(engine, param, _full(room[full]), key)
        _publish(engine)

    return room, finish


def _allocate(engine: Any, model: nn.Module, states: dict[str, dict[str, str]], room: dict[str, torch.Tensor]) -> None:
    """Give each flat piece the states that the checkpoint has for its parameters."""
    optimizer = engine.optimizer.optimizer
    numbers: dict[tuple[int, str], dict[float, str]] = {}
    for name, param in _trained(model):
        flat = _flat(engine, param)
        current = optimizer.state[flat]
        if not states[name]:
            continue
        for key, full in states[name].items():
            if _is_number(key, room[full].shape, param):
                seen = numbers.setdefault((id(flat), key), {})
                seen.setdefault(float(room[full]), name)
                if len(seen) > 1:
                    raise CheckpointError(
                        f"parameters were updated different numbers of times ({key} of {', '.join(f'{n}: {s:g}' for s, n in seen.items())}), and "
                        "DeepSpeed counts one for all of a group; go on under the strategy that wrote the checkpoint"
                    )
                current[key] = _number_like(optimizer, flat, key, float(room[full]))
            elif not isinstance(current.get(key), torch.Tensor):
                current[key] = torch.zeros_like(flat)
    _link(engine)


def _link(engine: Any) -> None:
    """Tell the parameters of stages 1 and 2 where their states are: DeepSpeed does so after the first group's first step alone."""
    zero = engine.optimizer
    if not _is_zero3(zero) and any(zero.optimizer.state.values()):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _is_number(key: str, shape: Any, param: torch.Tensor) -> bool:
    """Whether a state is one number for the parameter, and not one an element."""
    return key == _STEP or (not tuple(shape) and bool(_shape(param)))


def _number_like(optimizer: Any, flat: torch.Tensor, key: str, value: float) -> Any:
    """A number of the kind that the optimizer keeps: a tensor in torch's, a plain one in DeepSpeed's and Apex's own."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(value) if key == _STEP else value
    group = next(group for group in optimizer.param_groups if group.get("lr") is not None)
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(value, dtype=torch.float32, device=flat.device if on_device else "cpu")


def _publish(engine: Any) -> None:
    """Copy the float32 masters to the weights that the model computes with, on every rank."""
    zero = engine.optimizer
    if _is_zero3(zero):
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero._post_step(set())
    else:
        zero.update_lp_params()
        for number in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(number)


def _flat(engine: Any, param: nn.Parameter) -> torch.Tensor:
    """The flat float32 piece on this rank of the group that `param` is in."""
    zero = engine.optimizer
    if _is_zero3(zero):
        return zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(param)][0]]
    number = next(i for i, group in enumerate(zero.bit16_groups) if any(param is member for member in group))
    return zero.single_partition_of_fp32_groups[number]


def _is_zero3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)


def _shape(value: torch.Tensor) -> torch.Size:
    return torch.Size(getattr(value, "ds_shape", value.shape))


def _dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float32 if isinstance(value, nn.Parameter) and value.requires_grad else value.dtype


def _whole(engine: Any, value: torch.Tensor) -> torch.Tensor:
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if isinstance(value, nn.Parameter) and value.requires_grad:
        return safe_get_full_fp32_param(value)
    if hasattr(value, "ds_id"):
        with zero.GatheredParameters([value]):
            return value.detach().clone()
    return value.detach()


def _set_trained(engine: Any, param: Any, whole: torch.Tensor, key: str | None = None) -> None:
    """Give the float32 master of a parameter, or its state `key`, its value.

    Under stage 3 this rank's piece is cut here: DeepSpeed's own function reads past the end where the ranks do not divide a parameter.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = whole.to(engine.device)
    if _is_zero3(engine.optimizer):
        size, place = param.ds_tensor.numel(), dist.get_rank(param.ds_process_group)
        piece = torch.zeros(size, dtype=value.dtype, device=value.device)
        own = value.flatten()[place * size : (place + 1) * size]
        piece[: own.numel()] = own
        if key is None:
            safe_set_local_fp32_param(param, piece)
        else:
            safe_set_local_optimizer_state(param, piece, key)
    elif key is None:
        safe_set_full_fp32_param(param, value)
    else:
        safe_set_full_optimizer_state(param, value, key)


def _set(value: torch.Tensor, whole: torch.Tensor) -> None:
    """Give a buffer or frozen parameter its value."""
    from deepspeed import zero

    gathered = zero.GatheredParameters([value], modifier_rank=0) if hasattr(value, "ds_id") else None
    with torch.no_grad():
        if gathered is None:
            value.copy_(whole)
            return
        with gathered:
            value.copy_(whole)


def _part(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's rows of `value` in host memory."""
    value = value.detach()
    if value.ndim == 0 or not value.numel():
        return value.cpu().clone()
    sizes, offsets = local_box(value.shape, mesh, [Shard(0)])
    rows = value[offsets[0] : offsets[0] + sizes[0]].cpu().clone() if sizes[0] else value[:0].cpu()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.contiguous().stride())


def _room(shape: torch.Size, dtype: torch.dtype, mesh: DeviceMesh) -> torch.Tensor:
    if not shape or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype)
    sizes, _ = local_box(shape, mesh, [Shard(0)])
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(torch.zeros(sizes, dtype=dtype), mesh, [Shard(0)], run_check=False, shape=shape, stride=strides)


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value

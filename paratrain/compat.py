"""The only place that touches private torch names, or names that differ between the supported versions (2.11 and later)."""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """All axes of `mesh` as the one axis `name`. `DeviceMesh._flatten` has no public twin yet."""
    return mesh._flatten(name)


def beside(root: DeviceMesh, axis: str, flattened: str) -> DeviceMesh:
    """The mesh of an axis of `root` and one that `flatten_mesh` made. torch warns that such slices will end, and knows no other way yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return root[(axis, flattened)]


def sync_buffers_in_forward(wanted: bool) -> dict[str, Any]:
    """Arguments of DistributedDataParallel: 2.13 renames `broadcast_buffers`."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": wanted}


def spend_warning_of_unused(group: dist.ProcessGroup, device: torch.device) -> None:
    """Have torch's warning that nothing was unused, which it gives once a process from C++ past every filter, where nobody reads it.

    Every rank of `group` must call it. A model of one weight runs forward with stderr closed; the user's own is not touched.
    """
    weight = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1, device=device)  # draws no random numbers
    probe = DistributedDataParallel(weight, process_group=group, find_unused_parameters=True)
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        probe(torch.zeros(1, 1, device=device))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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


def has_gradient_hooks(param: torch.Tensor) -> bool:
    """Whether `register_hook` or `register_post_accumulate_grad_hook` was called on it; nothing public tells."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def hooks_made() -> int:
    """How many hooks on tensors and modules this process has registered so far."""
    return RemovableHandle.next_id


def take_hooks(param: torch.Tensor) -> list[tuple[dict[int, Any], bool]]:
    """Take from a parameter the hooks on its gradient that were not registered by this package: tables, which the handles of those who registered them
    still remove from, and for each whether they are called after the gradient is there. torch calls them no more."""
    found = []
    for name, after in (("_backward_hooks", False), ("_post_accumulate_grad_hooks", True)):
        table = getattr(param, name)
        ours = {
            key: hook
            for key, hook in (table or {}).items()
            if (getattr(hook, "__module__", None) or "").startswith(("paratrain.", "torch.distributed."))
        }
        if table and len(ours) < len(table):
            setattr(param, name, type(table)(ours))  # torch goes on calling hooks whose table is replaced by None
            for key in ours:
                del table[key]
            found.append((table, after))
    return found


def has_spectral_norm(module: torch.nn.Module) -> bool:
    """Whether it estimates the largest singular value of a weight, a step of the power method in each forward; no public class tells."""
    classes = [type(part) for part in (module, *module._forward_pre_hooks.values())]
    return any(cls.__name__.lstrip("_") == "SpectralNorm" and cls.__module__.startswith("torch.nn.utils.") for cls in classes)


def normalise_over_ranks(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    eps: float,
    momentum: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The kernels of `torch.nn.SyncBatchNorm` on CUDA tensors, without the module."""
    from torch.nn.modules._functions import SyncBatchNorm

    return SyncBatchNorm.apply(input, weight, bias, running_mean, running_var, eps, momentum, group, dist.get_world_size(group))


def compiled_module(module: torch.nn.Module) -> tuple[torch.nn.Module, Callable] | None:
    """(the module that `torch.compile` was called on, what compiles a function as it was told to); None: it is no wrapper of torch.compile's."""
    cls = type(module)
    if cls.__name__ != "OptimizedModule" or not cls.__module__.startswith("torch._dynamo"):
        return None
    return module._orig_mod, module.dynamo_ctx  # type: ignore[return-value]


def is_view(tensor: torch.Tensor) -> bool:
    """Whether it shares its memory with a tensor that autograd knows; changing one in place changes both."""
    with torch._C.DisableTorchFunctionSubclass():  # a question, not an operation that a subclass would compute
        return tensor._is_view()


def is_view_of(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing into one changes the other, as autograd knows it."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor is not other and tensor._is_view() and (tensor._base is other or (other._is_view() and tensor._base is other._base))


def gather_before_backward(module: Any, outputs: Sequence[torch.Tensor]) -> None:
    """Do for `outputs` of a `fully_shard` module what it does for those that it finds: gather its weights before their backward."""
    if outputs:
        module._get_fsdp_state()._register_pre_backward_hook(list(outputs))


def replace_local(tensor: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `change` of what this rank holds of a DTensor in its place: a subclass that says how `fully_shard` is to gather it."""
    tensor._local_tensor = change(tensor._local_tensor)


def track_gradients(module: Any, used: set[torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Make the parameter group of a `fully_shard` module reduce a zero for each gathered parameter that has no gradient on this rank.

    Ranks that disagree about which parameters have gradients would otherwise reduce buffers of different layouts into each other.
    2.13 has `set_reduce_scatter_unused_params`, which does not tell which they were.

    Args:
        used: gets the sharded parameters that had a gradient here.
        dtype: of reduced gradients, to which those of later micro-batches are added; None: that of the weights.
    """
    for group in _param_groups(module):
        group.post_backward = functools.partial(_fill_and_reduce, group, group.post_backward, used, dtype)


@contextmanager
def without_communication(model: Any) -> Iterator[None]:
    """A context in which `fully_shard` modules of the root `model` talk to no other rank, allocating as if they did.

    A gather repeats this rank's part and a reduction returns its own; what runs inside may end anywhere by an exception. Gradients
    are gone afterwards.
    """
    groups = [group for module in model.modules() if hasattr(module, "_get_fsdp_state") for group in _param_groups(module)]
    before = [(group._all_gather_comm, group._reduce_scatter_comm, group.all_reduce_grads) for group in groups]
    for group in groups:
        group._all_gather_comm, group._reduce_scatter_comm, group.all_reduce_grads = _Repeat(), _KeepOwn(), False
    try:
        yield
    finally:
        for group, (gather, scatter, reduces) in zip(groups, before, strict=True):
            group._all_gather_comm, group._reduce_scatter_comm, group.all_reduce_grads = gather, scatter, reduces
            for param in group.fsdp_params:
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None
        _reset(model, groups)


def _reset(model: Any, groups: Sequence[Any]) -> None:
    """Make modules that an exception left between forward and backward ready for a forward; public from 2.13 on."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        return
    state = model._get_fsdp_state()
    state._comm_ctx.all_gather_state = state._comm_ctx.reduce_scatter_state = None
    state._comm_ctx.post_forward_order.clear()
    for member in state._state_ctx.all_states:
        member._training_state = type(member._training_state).IDLE
        getattr(member, "_modules_to_run_forward", set()).clear()
    for group in groups:
        group._all_gather_result = group._post_reduce_event = group._reshard_after_forward_event = None
        group._partial_reduce_output = group._all_reduce_state = None
        group._post_forward_indices.clear()
        group._training_state = type(group._training_state).IDLE
        group._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


class _Alone:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Repeat(_Alone):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> None:
        own = input_tensor.clone()  # it is a part of the output
        output_tensor.view(group.size(), -1).copy_(own.view(1, -1).expand(group.size(), -1))


class _KeepOwn(_Alone):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        output_tensor.view(-1).copy_(input_tensor.view(group.size(), -1)[group.rank()])


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _fill_and_reduce(group: Any, post_backward: Callable, used: set[torch.Tensor], dtype: torch.dtype | None, *args: Any) -> None:
    if dtype is not None:
        group._orig_dtype = dtype  # known from its first forward on; nothing but the reduction reads it afterwards
    if not any(hasattr(p, "_unsharded_param") for p in group.fsdp_params):
        return  # never called: torch would look for its gradients in vain
    gathered = [p for p in group.fsdp_params if p.sharded_param.requires_grad and hasattr(p, "_unsharded_param")]
    empty = []
    for param in gathered:
        if param._unsharded_param.grad is not None or param.unsharded_accumulated_grad is not None:
            used.add(param.sharded_param)
        else:
            empty.append(param)
    if group.reduce_grads and (group.is_unsharded or len(empty) < len(gathered)):
        for param in empty:
            param._unsharded_param.grad = torch.zeros_like(param._unsharded_param)  # a DTensor where tp splits it
        if any(param.unsharded_accumulated_grad is not None for param in gathered):  # of the reduce dtype, which all must have then
            for param in gathered:
                if param.unsharded_accumulated_grad is None:
                    param.to_accumulated_grad_if_needed()
    post_backward(*args)


class WeightGroup:
    """What a `fully_shard` module gathers and reduces at once, with control over when.

    Attributes:
        held: it stays gathered from its first gather on until `finish`, which also is what reduces its gradients.
        name: of its module.
    """

    def __init__(self, module: Any, group: Any, name: str):
        self._group, self._finish = group, group.post_backward
        self._register = group._register_post_backward_hook
        self.module, self.name = module, name
        self.held = False
        self._again = group.post_forward_mesh_info
        self._versions: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def intercept(self, post_backward: Callable[[], bool], arguments: Callable[[Callable, Any, Any], Any]) -> None:
        """Ask `post_backward` whether hooks may finish the group now, and `arguments` to mark the inputs of its module."""

        def finish(*args: Any) -> None:
            if post_backward() and not self.held:
                self._finish(*args)

        def register(args: Any, kwargs: Any) -> Any:
            return arguments(self._register, args, kwargs)

        self._group.post_backward = finish
        self._group._register_post_backward_hook = register

    @property
    def params(self) -> list[torch.Tensor]:
        """Its parameters as they are while sharded."""
        return [param.sharded_param for param in self._group.fsdp_params]

    @property
    def plain(self) -> bool:
        """Whether its gathered weights are plain tensors; those that tensor parallelism splits stay DTensors."""
        return not any(param.is_dtensor for param in self._group.fsdp_params)

    @property
    def gathered(self) -> bool:
        return self._group.is_unsharded

    def gather(self) -> None:
        """Gather its weights now; every rank must."""
        self._group.unshard()
        self._group.wait_for_unshard()

    def hold(self, held: bool = True) -> None:
        self.held = held
        self._group.post_forward_mesh_info = None if held else self._again

    def whole(self, sharded: torch.Tensor) -> torch.Tensor:
        """The gathered parameter of a sharded one."""
        return next(param._unsharded_param for param in self._group.fsdp_params if param.sharded_param is sharded)

    def storages(self) -> set[int]:
        """Identities of the memory of the gathered weights, which stay the same while it is freed and allocated again."""
        outputs = (tensor for param in self._group.fsdp_params for tensor in (*param.all_gather_outputs, *param._unsharded_inner_tensors))
        return {storage_id(tensor) for tensor in outputs}

    def exchanged(self) -> list[tuple[Any, str, Any]]:
        """(module, name, tensor) where something else has taken the place of a weight, as `functional_call` does."""
        found = []
        for param in self._group.fsdp_params:
            info = param._module_info
            own = (param.sharded_param, getattr(param, "_unsharded_param", None), getattr(param, "_sharded_post_forward_param", None))
            for module, name in ((info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)):
                now = module._parameters.get(name)
                if now is not None and not any(now is known for known in own):
                    found.append((module, name, now))
        return found

    def note_versions(self) -> None:
        """Remember how the gathered weights are, for `written`."""
        for param in self._group.fsdp_params:
            if hasattr(param, "_unsharded_param") and not hasattr(param._sharded_local_tensor, "fsdp_post_all_gather"):
                self._versions.append((param.sharded_param, param._unsharded_param, param._unsharded_param._version))

    def written(self) -> torch.Tensor | None:
        """A parameter of which the gathered copy was changed in place, which changes no shard; gathering does not count."""
        return next((sharded for sharded, whole, version in self._versions if whole._version != version), None)

    def unfinished(self) -> bool:
        """Whether backward has left something to reduce or to free that hooks would have by now."""
        group = self._group
        if self.held or (group.is_unsharded and group.reshard_after_backward):
            return True
        return group.reduce_grads and any(
            param.unsharded_accumulated_grad is not None or (hasattr(param, "_unsharded_param") and param._unsharded_param.grad is not None)
            for param in group.fsdp_params
        )

    def drop_gradients(self) -> list[torch.Tensor]:
        """Drop the gradients of its gathered weights that are not reduced; returns the parameters whose they were."""
        found = []
        for param in self._group.fsdp_params:
            whole = getattr(param, "_unsharded_param", None)
            if param.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                found.append(param.sharded_param)
                param.unsharded_accumulated_grad = None
                if whole is not None:
                    whole.grad = None
        return found

    def finish(self) -> None:
        """Reduce what there is and free the gathered weights, as hooks do in the course of backward."""
        self._finish()
        self._group._training_state = type(self._group._training_state).IDLE


def weight_groups(model: Any) -> list[WeightGroup]:
    """Those of the root `model` and of the modules inside it, the innermost and last first."""
    named = [(name, module) for name, module in model.named_modules() if hasattr(module, "_get_fsdp_state")]
    return [WeightGroup(module, group, name or "the root") for name, module in reversed(named) for group in _param_groups(module)]


def guard_backward(module: Any, allowed: Callable[[], bool]) -> None:
    """Ask `allowed` before backward's arrival at the outputs of a `fully_shard` module gathers and sets up what finishes backward."""
    state = module._get_fsdp_state()
    arrived = state._pre_backward

    def pre_backward(grad: torch.Tensor) -> torch.Tensor:
        return arrived(grad) if allowed() else grad

    state._pre_backward = pre_backward


def make_root(module: Any) -> None:
    """Tell a `fully_shard` module that it is the root; torch takes the first that is called to be one."""
    module._get_fsdp_state()._lazy_init()


def end_forward(module: Any) -> None:
    """Let a `fully_shard` module know that its forward is over, which one that ended by an exception has not told it."""
    state = module._get_fsdp_state()
    for each in (state, *_param_groups(module)):
        if each._training_state.name == "FORWARD":
            each._training_state = type(each._training_state).IDLE
    if hasattr(state, "_state_ctx"):  # there is none before the first forward
        state._state_ctx.iter_forward_root = None


def wait_for_reductions(module: Any) -> None:
    """End the backward of the root `module`, when its groups have been finished by hand."""
    module._get_fsdp_state()._root_post_backward_final_callback()


def storage_id(tensor: torch.Tensor) -> int:
    """What tensors have in common that share memory, whether or not any is allocated."""
    return tensor.untyped_storage()._cdata


def saved_by(node: Any) -> list[torch.Tensor]:
    """The tensors that a node of the autograd graph has saved for its backward as they are; not those that hooks have packed."""
    found: list[torch.Tensor] = []
    for name in _saved_names(cast(Any, type(node))):
        saved = getattr(node, name, None)
        for each in saved if isinstance(saved, tuple | list) else (saved,):
            data = getattr(each, "data", None)  # what it holds, without asking hooks to unpack it
            if isinstance(data, torch.Tensor):
                found.append(data)
    return found


@functools.cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def recent_collectives() -> list[dict[str, Any]]:
    """What torch's flight recorder holds of this process, oldest first: empty unless TORCH_FR_BUFFER_SIZE was set before the group was made."""
    import json

    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

        return json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False)).get("entries", [])
    except (ImportError, RuntimeError, TypeError, ValueError):
        return []


@contextmanager
def no_reentrant_checkpoints() -> Iterator[None]:
    """Let `torch.utils.checkpoint` work without its reentrant autograd function inside, which builds no graph that others could extend."""
    module: Any = torch.utils.checkpoint
    reentrant = module.CheckpointFunction
    module.CheckpointFunction = _Checkpoint
    try:
        yield
    finally:
        module.CheckpointFunction = reentrant


class _Checkpoint:
    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def plain_functions() -> Any:
    """A context in which tensor subclasses are plain tensors to `__torch_function__`."""
    return torch._C.DisableTorchFunctionSubclass()


def pipeline_orders(schedule: str, ranks: int, stages: int, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """What each rank computes in a step under a schedule of torch.distributed.pipelining: (F, B, I or W, stage, micro-batch), in order.

    The schedules keep it in `pipeline_order`, which has no public twin.
    """
    from types import SimpleNamespace

    from torch.distributed.pipelining import schedules

    # Only the numbers of a stage are looked at before a step runs.
    held = [SimpleNamespace(num_stages=stages, group_size=ranks, group_rank=0, stage_index=i, submod=None) for i in range(stages // ranks)]
    made = schedules.get_schedule_class(schedule)(held, micro_batches, loss_fn=len)
    rows = []
    for rank in range(ranks):
        actions = [part for action in made.pipeline_order[rank] if action is not None for part in action.sub_actions or (action,)]
        computed = [action for action in actions if action.computation_type.value in ("F", "B", "I", "W")]
        rows.append([(str(a.computation_type.value), a.stage_index, int(a.microbatch_index or 0)) for a in computed])
    return rows


def with_transfers(orders: Sequence[Sequence[tuple[str, int, int]]], rank_of: Sequence[int]) -> list[list[tuple[str, int, int]]]:
    """`orders` with SEND_F, RECV_F, SEND_B and RECV_B put in where no two ranks can wait for each other."""
    from torch.distributed.pipelining import schedules

    kind = schedules._ComputationType
    actions = {rank: [schedules._Action(stage, kind(name), micro) for name, stage, micro in row] for rank, row in enumerate(orders)}
    lowered = schedules._add_send_recv({rank: row for rank, row in actions.items() if row}, lambda stage: rank_of[stage], len(rank_of))
    return [
        [(str(a.computation_type.value), a.stage_index, int(a.microbatch_index or 0)) for a in lowered.get(rank, [])] for rank in actions
    ]


def finish_backward(module: Any) -> None:
    """Reduce the gradients that the parameter groups of a `fully_shard` module have kept from reduction, and free the gathered weights.

    torch's own pipeline stages do the same (`perform_reduce_grad`).
    """
    state = module._get_fsdp_state()
    for member in state._state_ctx.all_states:
        for group in member._fsdp_param_groups if hasattr(member, "_fsdp_param_groups") else filter(None, [member._fsdp_param_group]):
            group.post_backward()
    state._root_post_backward_final_callback()


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows[start:end] @ matrices[i] for each run of rows, which ends where `ends` says; in one kernel where torch has one.

    Args:
        rows: [rows, in].
        matrices: [runs, in, out].
        ends: int64 [runs].

    Returns:
        [rows, out].
    """
    if rows.is_meta or hasattr(rows, "meta"):  # without values, on meta or as a ghost of a pipeline stage: shapes and FLOPs are right
        return rows @ matrices[0]
    dtype = matrices.dtype
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
    rows, matrices = rows.to(dtype), matrices.to(dtype)
    aligned = all(size * matrices.element_size() % 16 == 0 for size in matrices.shape[1:])
    kernel = getattr(torch.nn.functional, "grouped_mm", None)
    if kernel is not None and aligned and dtype in (torch.bfloat16, torch.float16, torch.float32) and len(rows):
        return kernel(rows, matrices, offs=ends.to(torch.int32))
    bounds = [0, *ends.tolist()]
    return torch.cat([rows[start:end] @ matrix for start, end, matrix in zip(bounds, bounds[1:], matrices, strict=False)])


def compile_counts() -> tuple[int, int]:
    """(functions that torch.compile has tried to capture, graphs that it has captured) in this process."""
    counters = torch._dynamo.utils.counters
    return counters["frames"]["total"], counters["stats"]["unique_graphs"]


def compile_breaks() -> str:
    """Why torch.compile captured less than it was given, the latest reason last."""
    counters = torch._dynamo.utils.counters
    return "\n".join(map(str, [*counters["graph_break"], *counters["unimplemented"]]))


def is_compiled(module: Any) -> bool:
    """Whether its user compiled a module, by `torch.compile(module)` or `module.compile()`."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # slow to import; without it nothing can be compiled
    return (dynamo is not None and isinstance(module, dynamo.OptimizedModule)) or getattr(module, "_compiled_call_impl", None) is not None


def whole_store() -> Any:
    """The store behind the default process group, without the prefixes of it; None without a process group."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        store: Any = _get_default_store()
    except ValueError:  # no process group
        return None
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def store_port() -> int | None:
    """The port of the store behind the default process group; None for a store without one."""
    return getattr(whole_store(), "port", None)


def abort_nccl() -> None:
    """Let every wait on a collective of NCCL in this process end, in whichever thread and on the device."""
    from torch.distributed.distributed_c10d import _world

    for group in list(_world.pg_map):
        try:
            backend = group._get_backend(torch.device("cuda"))
        except (RuntimeError, ValueError):  # it has none for that device
            continue
        if "nccl" in type(backend).__name__.lower():
            backend.abort()


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


# operator of torch.distributed -> (what it does, number of the argument with its data; -1: its result)
_COLLECTIVES = {
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_", "all_reduce_coalesced"), ("all_reduce", 0)),
    "all_reduce_coalesced_": ("all_reduce", 0),
    **dict.fromkeys(("allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"), ("all_gather", 0)),
    **dict.fromkeys(("all_gather_into_tensor", "all_gather_into_tensor_coalesced", "all_gather_into_tensor_out"), ("all_gather", -1)),
    **dict.fromkeys(("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"), ("reduce_scatter", 1)),
    **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced", "reduce_scatter_tensor_out"), ("reduce_scatter", 0)),
    **dict.fromkeys(("alltoall_", "alltoall_base_"), ("all_to_all", 1)),
    "all_to_all_single": ("all_to_all", 0),
    **dict.fromkeys(("broadcast_", "broadcast"), ("broadcast", 0)),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    **dict.fromkeys(("send", "isend"), ("send", 0)),
    **dict.fromkeys(("recv_", "recv_any_source_", "irecv"), ("recv", 0)),
}


def collective(func: Any, args: Sequence[Any], result: Any) -> tuple[str, list[torch.Tensor], dist.ProcessGroup] | None:
    """(operation, tensors with its data, group) of a dispatched operator of torch.distributed; None for one that carries no data."""
    known = _COLLECTIVES.get(func._schema.name.partition("::")[2])
    if known is None:
        return None
    operation, number = known
    data = [leaf for leaf in tree_leaves(result if number < 0 else args[number]) if isinstance(leaf, torch.Tensor)]
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    if "process_group" in named:
        return operation, data, dist.ProcessGroup.unbox(named["process_group"])
    name = named["group_name"]
    return operation, data, _resolve_process_group(cast(Any, name)) if isinstance(name, str) else name


def collectives_started(but: Sequence[dist.ProcessGroup] = ()) -> int:
    """How many collectives this process has started in all its groups, those of `but` left out."""
    known: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in known if group not in but)


def own_class(module: torch.nn.Module) -> type:
    """The class that a module had before `fully_shard` and others replaced it by one that they derived from it."""

    def is_made(cls: type) -> bool:
        return cls.__module__.startswith(("torch.distributed.", "paratrain.parallel.")) or (
            "FSDP" in cls.__name__ and any(base.__module__.startswith("torch.distributed.") for base in cls.__bases__)
        )

    return next(cls for cls in type(module).__mro__ if not is_made(cls))


_TERMINATE = ctypes.CFUNCTYPE(None)


class _ExceptionPointer(ctypes.Structure):
    """`std::exception_ptr`, made large enough to be returned in memory, as what has a destructor is."""

    _fields_: ClassVar = [("error", ctypes.c_void_p), ("unused", ctypes.c_char * 16)]


def on_terminate(report: Callable[[str], None]) -> Callable[[], None]:
    """Have `report` called when a C++ exception that nobody catches is about to abort this process, in its thread; returns what undoes it.

    It is given the message of the exception, or the name of its class where that is not one that is known to have a message. Where the
    C++ library is not GNU's, nothing is done.
    """
    try:
        cpp = ctypes.CDLL("libstdc++.so.6")
        replace = cpp._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return lambda: None
    replace.restype, replace.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before: int | None = None

    @_TERMINATE
    def ends() -> None:
        replace(before)
        try:
            report(_uncaught(cpp))
        except Exception:
            traceback.print_exc()
        finally:
            _TERMINATE(before or 0)()  # which shows the exception and aborts

    before = replace(ctypes.cast(ends, ctypes.c_void_p))
    kept = [ends]  # for as long as C++ may call it

    def undo() -> None:
        if kept:
            replace(before)
            kept.clear()

    return undo


def _uncaught(cpp: ctypes.CDLL) -> str:
    """What the exception that terminates this process says."""
    kind, thrown = cpp.__cxa_current_exception_type, cpp._ZSt17current_exceptionv
    kind.restype, thrown.restype = ctypes.c_void_p, _ExceptionPointer
    if not (info := kind()):
        return "std::terminate"
    name = ctypes.cast(ctypes.cast(info, ctypes.POINTER(ctypes.c_char_p))[1], ctypes.c_char_p).value or b""
    if not name.startswith((b"N4gloo", b"N3c10", b"St13runtime_error")) or not (error := thrown().error):
        return name.decode(errors="replace")
    table = ctypes.cast(error, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
    what = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(table[2])  # type: ignore[arg-type]  # after the two destructors, as in std::exception
    return (what(error) or b"").decode(errors="replace")

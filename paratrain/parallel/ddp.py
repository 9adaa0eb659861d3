"""Replicated data parallelism: torch's DistributedDataParallel, told what the config asks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from paratrain import gradients
from paratrain.batch import map_tensors, tensors
from paratrain.compat import spend_warning_of_unused, sync_buffers_in_forward
from paratrain.config import DDP, Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh


def replicate(model: nn.Module, mesh: Mesh, cfg: Config) -> DistributedDataParallel:
    """Wrap `model`: rank 0's weights everywhere, gradients averaged over `mesh.weights` in buckets while backward runs.

    Raises:
        UserError: for a communication hook that the backend of this mesh cannot run, or updates inside the backward.
    """
    options = cfg.strategy
    assert isinstance(options, DDP)
    if cfg.trainer.update_in_backward:
        raise UserError(
            "trainer.update_in_backward=true: strategy=ddp reduces gradients in buckets after they are complete; write "
            "strategy=zero1, or trainer.update_in_backward=false"
        )
    group = mesh.weights.get_group()
    model.register_forward_hook(_no_parameters)
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        bucket_cap_mb=options.bucket_cap_mb,
        **sync_buffers_in_forward(options.broadcast_buffers),
        find_unused_parameters=options.find_unused_parameters and not options.static_graph,
        static_graph=options.static_graph,
        gradient_as_bucket_view=not options.static_graph,  # torch asserts on no_sync with static_graph and views together
    )
    if options.find_unused_parameters and not options.static_graph:
        _check_outputs_once(model)
        spend_warning_of_unused(group, next(model.parameters()).device)
    low_precision = any(param.dtype.itemsize < 4 and param.requires_grad for param in model.parameters())
    if options.comm_hook == "none":
        if low_precision and cfg.precision.reduce_dtype == "fp32":
            wrapped.register_comm_hook(group, _reduce_in_fp32)
    elif options.comm_hook == "bf16":
        if dist.get_backend(group) == "gloo":
            raise UserError(
                "strategy.comm_hook=bf16: gloo has no bfloat16 all-reduce; write strategy.comm_hook=fp16 or none, or run on GPUs with NCCL"
            )
        wrapped.register_comm_hook(group, default_hooks.bf16_compress_hook)
    elif options.comm_hook == "fp16":
        wrapped.register_comm_hook(group, default_hooks.fp16_compress_hook)
    else:
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=options.powersgd_rank, start_powerSGD_iter=options.powersgd_start_step
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return wrapped


def _no_parameters(module: torch.nn.Module, args: Any, output: Any) -> Any:
    """Outputs that are parameters as views of them: a parameter has no history, so DistributedDataParallel would take it to be unused."""

    def view(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor) if tensor.is_leaf and tensor.requires_grad else tensor

    if isinstance(output, torch.Tensor):
        return view(output)
    if torch.is_grad_enabled() and any(leaf.is_leaf and leaf.requires_grad for leaf in tensors(output)):
        return map_tensors(view, output)
    return None


class Replicas:
    """A replicated model, and which of its gradients are not averaged yet.

    DistributedDataParallel averages in the backward of its own forward, outside of `no_sync`, the gradients of what was trained when it
    was made. All else is averaged by `reduce`: after a forward of the bare module, a last micro-batch under `no_sync`, and for
    parameters that are trained since later.
    """

    def __init__(self, wrapped: DistributedDataParallel, group: dist.ProcessGroup):
        self.wrapped, self.group = wrapped, group
        self.no_sync = wrapped.no_sync
        self._known = {param for param in wrapped.module.parameters() if param.requires_grad}
        self._late: tuple[int, list[torch.Tensor]] = (0, [])  # of how many parameters those that came later were sought
        self._averages = False  # the backward to come
        self._left = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._averages = torch.is_grad_enabled() and self.wrapped.require_backward_grad_sync
        return _run(self.wrapped, *args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        _backward(loss)
        self._left, self._averages = not self._averages, False

    def reduce(self, params: Sequence[torch.Tensor]) -> None:
        """Average what is not. Every rank must call it."""
        if len(params) != self._late[0]:
            self._late = len(params), [param for param in params if param not in self._known]
        late = params if self._left else self._late[1]
        self._left = False
        if late:
            gradients.reduce(late, self.group, average=True)


def _run(wrapped: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    """Its forward, where torch may notice that the step before left parameters without a gradient."""
    try:
        return wrapped(*args, **kwargs)
    except RuntimeError as error:
        if "Expected to have finished reduction in the prior iteration" not in str(error):
            raise
        raise UserError(
            "strategy.find_unused_parameters=false: a step left parameters without a gradient on some rank, so the gradients of that step "
            "are not those of one process; write strategy.find_unused_parameters=true, or freeze what is never used\n"
            + str(error).splitlines()[-1]
        ) from error


def _backward(loss: torch.Tensor) -> None:
    """The backward of a loss, where torch may notice that a gradient comes a second time."""
    try:
        loss.backward()
    except RuntimeError as error:
        if "mark a variable ready only once" not in str(error):
            raise
        raise UserError(
            "strategy=ddp: the loss uses parameters in a way that DistributedDataParallel did not see in the model's outputs, as with reentrant "
            "checkpointing (write use_reentrant=False, or memory.recompute=full in its place) or with tensors inside objects of the outputs "
            "(return them in a tuple, dict or dataclass); if every step uses every parameter, strategy.find_unused_parameters=false does, too\n"
            + str(error).splitlines()[-1]
        ) from error


def _check_outputs_once(model: nn.Module) -> None:
    """Refuse outputs in which DistributedDataParallel would not find the tensors, and take every parameter to be unused."""

    def check(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) or dataclasses.is_dataclass(leaf)]
        if any(tensor.requires_grad for tensor in tensors(output)) and not any(tensor.requires_grad for tensor in tensors(found)):
            raise UserError(
                f"the model returns a {type(output).__name__}, in which DistributedDataParallel cannot find the tensors; return a tensor, "
                "tuple, dict or dataclass, or write strategy.find_unused_parameters=false if every step uses every parameter"
            )

    handle = model.register_forward_hook(check)


def _reduce_in_fp32(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of 16-bit gradients without rounding every partial sum to 16 bits."""
    wide = bucket.buffer().float().div_(group.size())
    future = dist.all_reduce(wide, group=group, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))

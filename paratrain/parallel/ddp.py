"""Replicated data parallelism: torch's DistributedDataParallel, told what the config asks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from paratrain.compat import sync_buffers_in_forward
from paratrain.config import DDP, Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh


def replicate(model: nn.Module, mesh: Mesh, cfg: Config) -> DistributedDataParallel:
    """Wrap `model`: rank 0's weights everywhere, gradients averaged over `mesh.weights` in buckets while backward runs.

    Raises:
        UserError: for a communication hook that the backend of this mesh cannot run.
    """
    options = cfg.strategy
    assert isinstance(options, DDP)
    group = mesh.weights.get_group()
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        bucket_cap_mb=options.bucket_cap_mb,
        **sync_buffers_in_forward(options.broadcast_buffers),
        find_unused_parameters=options.find_unused_parameters and not options.static_graph,
        static_graph=options.static_graph,
        gradient_as_bucket_view=not options.static_graph,  # torch asserts on no_sync with static_graph and views together
    )
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


def _reduce_in_fp32(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of 16-bit gradients without rounding every partial sum to 16 bits."""
    wide = bucket.buffer().float().div_(group.size())
    future = dist.all_reduce(wide, group=group, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))

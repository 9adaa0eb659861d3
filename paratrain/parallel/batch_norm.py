"""BatchNorm over all data ranks, so that its statistics are those of one process.

On CUDA this is torch's SyncBatchNorm. It refuses CPU tensors, and counts every rank's samples, so on CPU, and for a batch of fewer samples
than there are ranks, the same mathematics runs on differentiable collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from paratrain.batch import LocalBatch
from paratrain.compat import has_spectral_norm
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh


def refuse_accumulation(model: nn.Module, mesh: Mesh, cfg: Config) -> None:
    """Refuse what no collective can mend: statistics over one of several micro-batches, or estimates that each of them moves on.

    Raises:
        UserError: when BatchNorm would see less than the global batch, or spectral norm more than one step, and nobody said that this is wanted.
    """
    if cfg.trainer.batch_norm == "local":
        return
    share = -(-cfg.data.global_batch // mesh.data.size())
    size = 1 if cfg.data.micro_batch_size == "auto" else cfg.data.micro_batch_size
    several = size is not None and size < share
    asked = f"data.micro_batch_size={cfg.data.micro_batch_size}"
    mend = f"data.micro_batch_size=null (a rank's share, {share})"
    if cfg.parallel.pp > 1:  # stages work on one micro-batch after another, whatever their size
        several, asked, mend = True, f"parallel.pp={cfg.parallel.pp}", "parallel.pp=1"
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if names and several:
        raise UserError(
            f"{asked}: the model has BatchNorm ({names[0]}), whose statistics would be those of a micro-batch and not of the global batch, so the "
            f"loss would depend on the layout; write {mend}, use GroupNorm, or accept it with trainer.batch_norm=local"
        )
    iterating = [name for name, module in model.named_modules() if has_spectral_norm(module)]
    if iterating and several:
        raise UserError(
            f"{asked}: the model has spectral norm ({iterating[0]}), which improves its estimate once a micro-batch, so the loss would depend on "
            f"their number; write {mend}, or accept it with trainer.batch_norm=local"
        )


def synchronise(model: nn.Module, mesh: Mesh, cfg: Config) -> None:
    """Make every BatchNorm of `model` use the statistics of all data ranks, in place; parameter names stay."""
    if cfg.trainer.batch_norm == "local":
        return
    group = mesh.weights.get_group()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm) or isinstance(child, nn.SyncBatchNorm):
                continue
            if mesh.root.device_type == "cuda":  # the weights themselves may still be on the host, or on meta
                child = nn.SyncBatchNorm.convert_sync_batchnorm(child, group)
                setattr(parent, name, child)
            child.__class__ = type(f"Synchronised{type(child).__name__}", (_Synchronised, type(child)), {"group": group})


def synchronised(model: nn.Module) -> list[_Synchronised]:
    """What `synchronise` made of the BatchNorms of `model`."""
    return [module for module in model.modules() if isinstance(module, _Synchronised)]


def weigh(norms: Sequence[_Synchronised], share: LocalBatch | None = None) -> None:
    """Before a forward: leave the filler sample of a rank without samples out of the statistics. None: every rank has samples."""
    few = share is not None and share.largest == 1
    for norm in norms:
        norm.weight_here = float(share.real) if few and share is not None else None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients: every rank's result depends on every rank's argument."""

    @staticmethod
    def forward(ctx, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumOverRanks.apply(grad.contiguous(), ctx.group), None


class _Synchronised(_BatchNorm):
    group: dist.ProcessGroup
    weight_here: float | None = None  # of this rank's samples, 0 or 1; None: 1 on every rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (self.training or self.running_mean is None) or (isinstance(self, nn.SyncBatchNorm) and self.weight_here is None):
            return super().forward(input)
        self._check_input_dim(input)
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        wide = input if input.dtype is torch.float64 else input.float()
        weight = 1.0 if self.weight_here is None else self.weight_here
        count = self._total(torch.tensor([weight * wide.numel() / wide.shape[1]], dtype=wide.dtype, device=wide.device))
        if count <= 1:
            raise UserError(
                "the model: BatchNorm has a single value per channel in this batch, so it has no variance; choose data.global_batch so that no "
                "batch has a single sample"
            )
        mean = self._total(wide.sum(dims) * weight) / count
        centred = wide - mean.view(shape)
        var = self._total(centred.square().sum(dims) * weight) / count
        if self.training and self.track_running_stats:
            self._track(mean.detach(), var.detach() * count / (count - 1))
        out = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _total(self, local: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.apply(local, self.group)

    def _track(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)

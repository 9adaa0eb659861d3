"""BatchNorm over all data ranks, so that its statistics are those of one process.

A BatchNorm keeps its own forward, whatever else that does, and the function in it that takes statistics from a batch is answered with those
of all ranks. On CUDA the kernels of torch's SyncBatchNorm compute them. These refuse CPU tensors, and count every rank's samples, so on CPU,
and for a batch of fewer samples than there are ranks, the same mathematics runs on differentiable collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import rng
from paratrain.batch import LocalBatch
from paratrain.compat import has_spectral_norm, normalise_over_ranks
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel.recompute import scratch_buffers
from paratrain.parallel.tp_rules import of_channels
from paratrain.parallel.tp_split import Split, part_of, plain


def refuse_parts(model: nn.Module, mesh: Mesh, cfg: Config) -> None:
    """Refuse what no collective can mend: statistics over one of several micro-batches, or estimates that each of them moves on.

    BatchNorm in evaluation mode takes no statistics.

    Raises:
        UserError: when BatchNorm would see less than the global batch, or spectral norm more than one step, and nobody said that this is wanted.
    """
    parts = _parts(mesh, cfg)
    if parts is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and _takes_statistics(module):
            raise UserError(_refusal(name, parts))
        if has_spectral_norm(module) and module.training:
            raise UserError(
                f"{parts[0]}: the model has spectral norm ({name}), which improves its estimate once a micro-batch, so the loss would depend on "
                f"their number; write {parts[1]}, or accept it with trainer.batch_norm=local"
            )


def synchronise(model: nn.Module, mesh: Mesh, cfg: Config) -> None:
    """Make every BatchNorm of `model` use the statistics of all data ranks, in place; parameter names stay.

    One that is in evaluation mode goes on with its running averages, and may be put into training mode later: it is refused then where a
    rank's samples come in several parts.
    """
    parts = _parts(mesh, cfg)
    if cfg.trainer.batch_norm == "local" or (parts is None and mesh.weights.size() == 1):
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            _replace_class(module, name, mesh.weights.get_group(), parts and _refusal(name, parts))


def watched(run: Callable, mesh: Mesh, cfg: Config) -> Callable:
    """`run`, the forward of the model, which notices in its first training forwards whether statistics of a batch are taken outside of any
    BatchNorm module."""
    if cfg.trainer.batch_norm == "local" or cfg.compile is not False or (_parts(mesh, cfg) is None and mesh.weights.size() == 1):
        return run
    left = _WATCHED

    def watching(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left == 0 or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        left -= 1
        with _Loose():
            return run(*args, **kwargs)

    return watching


def alone(cfg: Config) -> AbstractContextManager:
    """A stage of a pipeline runs, whose micro-batches no BatchNorm module sees: functions that take statistics are refused."""
    return nullcontext() if cfg.trainer.batch_norm == "local" else _Loose()


def _parts(mesh: Mesh, cfg: Config) -> tuple[str, str] | None:
    """(what makes a rank's share of a batch come in several parts, what to write instead); None: it comes as a whole, or may come in parts."""
    if cfg.trainer.batch_norm == "local":
        return None
    if cfg.parallel.pp > 1:  # stages work on one micro-batch after another, whatever their size
        return f"parallel.pp={cfg.parallel.pp}", "parallel.pp=1"
    share = -(-cfg.data.global_batch // mesh.data.size())
    size = 1 if cfg.data.micro_batch_size == "auto" else cfg.data.micro_batch_size
    if size is None or size >= share:
        return None
    return f"data.micro_batch_size={cfg.data.micro_batch_size}", f"data.micro_batch_size=null (a rank's share, {share})"


def _refusal(name: str, parts: tuple[str, str]) -> str:
    return (
        f"{parts[0]}: the model has BatchNorm ({name}), whose statistics would be those of a micro-batch and not of the global batch, so the "
        f"loss would depend on the layout; write {parts[1]}, use GroupNorm, freeze it in evaluation mode, or accept it with trainer.batch_norm=local"
    )


def _takes_statistics(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def _replace_class(module: _BatchNorm, name: str, group: dist.ProcessGroup, refusal: str | None) -> None:
    cls = _OfAnyShape if type(module) is nn.SyncBatchNorm else type(module)
    own = cls.forward is not _BatchNorm.forward or "forward" in vars(module)
    how = {"group": group, "path": name, "refusal": refusal, "kind": cls.__name__}
    if "forward" in vars(module):
        how["own_forward"] = staticmethod(vars(module).pop("forward"))
    module.__class__ = type(f"Synchronised{cls.__name__}", (_Within if own else _Synchronised, cls), how)


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


class _OfAnyShape(_BatchNorm):
    """What takes the place of nn.SyncBatchNorm, which would choose ranks of its own, and refuse those of a CPU."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")


class _Synchronised(_BatchNorm):
    group: dist.ProcessGroup
    path: str  # in the model
    refusal: str | None  # why it must not take statistics
    weight_here: float | None = None  # of this rank's samples, 0 or 1; None: 1 on every rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _takes_statistics(self):
            return _BatchNorm.forward(self, input)
        if self.refusal is not None:
            raise UserError(self.refusal)
        self._check_input_dim(input)
        mean, var, momentum = None, None, 0.0
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            mean, var = self.running_mean, self.running_var
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        return self.normalise(input, mean, var, self.weight, self.bias, momentum, self.eps)

    def normalise(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        """What `torch.nn.functional.batch_norm` does in training, over the samples of all ranks."""
        if isinstance(input, Split) and input.split_dim == 1:
            with of_channels(input, weight, bias, (running_mean, running_var)) as (weight, bias, mean, var):
                return input.like(self.normalise(part_of(input), mean, var, weight, bias, momentum, eps))
        input, weight, bias = plain(input), plain(weight), plain(bias)
        if input.is_cuda and self.weight_here is None:
            return normalise_over_ranks(input, weight, bias, running_mean, running_var, eps, momentum, self.group)
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        wide = input if input.dtype is torch.float64 else input.float()
        here = 1.0 if self.weight_here is None else self.weight_here
        count = self._total(torch.tensor([here * wide.numel() / wide.shape[1]], dtype=wide.dtype, device=wide.device))
        if count <= 1:
            raise UserError(
                "the model: BatchNorm has a single value per channel in this batch, so it has no variance; choose data.global_batch so that no "
                "batch has a single sample"
            )
        mean = self._total(wide.sum(dims) * here) / count
        centred = wide - mean.view(shape)
        var = self._total(centred.square().sum(dims) * here) / count
        for running, of_batch in ((running_mean, mean.detach()), (running_var, var.detach() * count / (count - 1))):
            if running is not None:
                running.lerp_(of_batch.to(running.dtype), momentum)
        out = centred * torch.rsqrt(var + eps).view(shape)
        out = out if weight is None else out * weight.view(shape)
        out = out if bias is None else out + bias.view(shape)
        return out.to(input.dtype)

    def _total(self, local: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.apply(local, self.group)


class _Within(_Synchronised):
    """A BatchNorm with a forward of its own (one that adds an activation), which runs as it is but for the function that takes statistics."""

    kind: str  # name of its class
    independent = False  # of other samples, as was seen
    own_forward: Callable | None = None  # of the instance, in the place of that of its class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.own_forward or super(_Synchronised, self).forward
        if not _takes_statistics(self):
            return own(*args, **kwargs)
        answers = _Answers(self, args)
        with answers:
            result = own(*args, **kwargs)
        if not answers.calls and not self.independent:
            if not self._is_independent(own, args, kwargs):
                raise UserError(
                    f"the model: {self.path} is a {self.kind}, a BatchNorm whose forward takes statistics without "
                    "torch.nn.functional.batch_norm, so that they would be those of one rank's samples; call this function (or super().forward) "
                    "in it, or accept the statistics of a rank with trainer.batch_norm=local"
                )
            type(self).independent = True
        return result

    @torch.no_grad()
    def _is_independent(self, own: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether what it makes of some samples, and of its buffers, stays the same where others are beside them."""
        if not args or not isinstance(args[0], torch.Tensor) or isinstance(args[0], Split):
            return False
        samples = len(args[0])
        found = []
        for x in (args[0], torch.cat([args[0], args[0] * 1.5 + 1])):
            with rng.preserved(x.device), scratch_buffers(self, nullcontext()):
                leaves = [leaf for leaf in tree_leaves(own(x, *args[1:], **kwargs)) if isinstance(leaf, torch.Tensor)]
                found.append([leaf[:samples] for leaf in leaves] + list(self.buffers()))
        return len(found[0]) == len(found[1]) and all(
            a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(*found, strict=True)
        )


class _Answers(TorchFunctionMode):
    """Puts the statistics of all ranks in the place of those that one rank's samples have."""

    def __init__(self, norm: _Within, args: tuple):
        super().__init__()
        self.norm, self.calls = norm, 0
        self.samples = len(args[0]) if args and isinstance(args[0], torch.Tensor) and args[0].ndim else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = training_call(func, args, kwargs or {})
        if call is None:
            self.calls += func is nn.functional.batch_norm  # with statistics of earlier batches
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.norm.refusal is not None:
            raise UserError(self.norm.refusal)
        if len(call["input"]) < self.samples:
            raise UserError(
                f"the model: {self.norm.path} normalises some of its samples apart from the others, and which these are would depend on the layout; "
                "normalise all of them together, or accept the statistics of a rank with trainer.batch_norm=local"
            )
        names = ("input", "running_mean", "running_var", "weight", "bias", "momentum", "eps")
        return self.norm.normalise(*(call[name] for name in names))


class _Loose(TorchFunctionMode):
    """Refuses functions that take statistics outside of what `synchronise` replaced. Over one sample they are of a weight, or of each channel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = training_call(func, args, kwargs or {})
        if call is not None and len(call["input"]) > 1:
            raise UserError(
                "the model: torch.nn.functional.batch_norm(..., training=True) is called outside of any BatchNorm module, so its statistics would be "
                "those of one rank's samples; call an nn.BatchNorm1d, 2d or 3d, or accept this with trainer.batch_norm=local"
            )
        return func(*args, **(kwargs or {}))


_WATCHED = 4  # forwards: micro-batches of the first steps
_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NATIVE = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_DEFAULTS = {"running_mean": None, "running_var": None, "weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def training_call(func: Any, args: tuple, kwargs: dict) -> dict[str, Any] | None:
    """The arguments of a call that normalises by the statistics of its batch; None: it is another call."""
    if func is not nn.functional.batch_norm and func is not torch.batch_norm:
        return None
    given = _DEFAULTS | dict(zip(_FUNCTIONAL if func is nn.functional.batch_norm else _NATIVE, args, strict=False)) | kwargs
    return given if given["training"] else None

"""Sharded data parallelism by torch's `fully_shard` (FSDP2): each block is a group of its own, the root holds the rest.

ZeRO-1, ZeRO-2 and ZeRO-3 (Rajbhandari et al., 2020) differ only in how long gathered weights and whole gradients are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves

from paratrain import gradients
from paratrain.batch import map_tensors, tensors
from paratrain.compat import end_forward, gather_before_backward, is_view, make_root, track_gradients, without_communication
from paratrain.config import Config, Sharded
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel.call_order import CallOrder
from paratrain.parallel.shard_uses import Uses
from paratrain.precision import POLICIES, accumulate


@dataclass
class Kept:
    """Gradients that stay on their rank: whether those of a backward now would, and whether those of the last one did."""

    keeps: bool = False
    left: bool = False


@dataclass(frozen=True)
class ShardedModel:
    """A model that `shard` has sharded.

    Attributes:
        model: the module itself, whose parameters are DTensors; those of 0 dims or no elements are whole on every rank.
        group: all data ranks.
        options: of the strategy.
        strategy: its name.
        order: in which this rank calls the blocks; None without blocks.
        used: parameters that got a gradient from this rank since the last `reduce`.
        uses: what watches how weights are used; None until `watch`.
        kept: what of `no_sync` is going on, and whether the last backward was inside.
    """

    model: nn.Module
    group: dist.ProcessGroup
    options: Sharded
    strategy: str
    order: CallOrder | None = None
    used: set[torch.Tensor] = field(default_factory=set)
    uses: Uses | None = None
    kept: Kept = field(default_factory=Kept)

    def watch(self) -> ShardedModel:
        """This model, watched for uses of weights that `fully_shard` does not see; its weights must have their values."""
        make_root(self.model)
        return replace(self, uses=Uses(self.model, self.strategy, self.options.reshard_after_forward is not False))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.uses is not None:
            self.uses.begin()
        with self._naming():
            return self.model(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward, and whatever of the reduction FSDP's hooks have left."""
        assert self.uses is not None
        with self._naming(), self.uses.differentiating(loss):
            loss.backward()
        self.kept.left = self.kept.keeps

    def drop_gradients(self) -> list[torch.Tensor]:
        return self.uses.drop_gradients() if self.uses is not None else []

    def end_step(self) -> None:
        if self.uses is not None:
            self.uses.end_step()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """A context that says which rule a program breaks that meets parts of weights, or freed ones, where whole ones should be."""
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("mixed torch.Tensor and DTensor", "out of bounds for storage of size 0")):
                raise
            raise UserError(
                f"strategy={self.strategy}: weights were used outside the forward of the block that holds them, where they are sharded "
                f"(blocks: {self._block_names()}); write memory.blocks=[...] with modules that are called as a whole, or [] for none\n{error}"
            ) from error

    def _block_names(self) -> str:
        names = [name for name, module in self.model.named_modules() if name and isinstance(module, FSDPModule)]
        return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") or "none"

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """For every micro-batch but the last: keep what the strategy keeps, whole gradients, gathered weights or both."""
        model = self.model
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(self.options.reduce_each_micro_batch)
        model.set_reshard_after_backward(self.options.reshard_after_forward is not False)
        self.kept.keeps = True
        try:
            yield
        finally:
            self.kept.keeps = False
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """A context in which a forward and its backward need no other rank."""
        if self.order:
            self.order.paused = True
        held = self.uses.holds() if self.uses is not None else []
        try:
            with without_communication(self.model):
                yield
        finally:
            if self.order:
                self.order.paused = False
            if self.uses is not None:  # other ranks may have ended elsewhere
                self.uses.restore(held)

    def settle(self) -> None:
        """Free gathered weights that a forward without a backward has left, so that the model is its shards again."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                end_forward(module)
                module.reshard()

    def reduce(self, params: Sequence[torch.Tensor]) -> None:
        """Average the gradients of whole parameters over the data ranks, as FSDP did those of sharded ones.

        Where the last backward was under `no_sync`, too, those of sharded ones are reduced here.
        """
        if self.kept.left:
            self.kept.left = False
            assert self.uses is not None
            self.uses.reduce_kept()
        whole = [param for param in params if not isinstance(param, DTensor)]
        self.used.update(param for param in whole if param.grad is not None)
        whole = [param for param in whole if param.numel()]
        if not whole:
            return
        for param in whole:  # a zero where another rank may have one; who used it is known from `used`
            if param.grad is None:
                param.grad = torch.zeros_like(param, dtype=param.grad_dtype)
        gradients.reduce(whole, self.group, average=True, everywhere=True)


def shard(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], mesh: Mesh, cfg: Config, experts: Sequence[tuple[str, nn.Module]] = ()
) -> ShardedModel:
    """Shard `model` in place over `mesh.shard`. Parameters may be on meta; they are DTensors afterwards, on meta still.

    Gradients are averaged over the data ranks, in float32 where they are computed in less. Ranks may differ in which parameters
    of a block they use, but all must call the same blocks in the same order.

    Args:
        experts: modules of which the ranks of ep hold different parts; they are sharded over `mesh.expert_shard`, apart from their blocks.

    Raises:
        UserError: for options that do not fit these ranks or this model.
    """
    options = cfg.strategy
    assert isinstance(options, Sharded)
    _check(options, mesh.shard.size(-1), "shard ranks")
    if experts:
        _check(options, mesh.expert_shard.size(-1), "shard ranks of an expert")
    settings: dict[str, Any] = {
        "mp_policy": _dtypes(cfg),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.root.device_type == "cuda")
        if cfg.memory.offload == "params"
        else OffloadPolicy(),
        # fully_shard refuses numbers and cannot reduce what has no elements; they weigh nothing
        "ignored_params": {param for param in model.parameters() if param.ndim == 0 or param.numel() == 0},
    }
    _refuse_mixed_dtypes([*experts, *reversed(blocks), ("the root", model)])

    def apply(module: nn.Module, over: DeviceMesh, again: bool | int, **more: Any) -> None:
        module.register_forward_hook(_no_views)
        fully_shard(module, mesh=over, reshard_after_forward=again, **settings, **more)
        _gather_for_hidden_outputs(module)

    for _, module in experts:
        evenly = partial(_evenly, ranks=mesh.expert_shard.size(-1))
        apply(module, mesh.expert_shard, options.reshard_after_forward, shard_placement_fn=evenly)
    placement = partial(_placement, shards=mesh.shard.size(-1), names={param: name for name, param in model.named_parameters()})
    for _, block in reversed(blocks):  # a block inside a block first
        apply(block, mesh.shard, options.reshard_after_forward, shard_placement_fn=placement)
    apply(model, mesh.shard, False, shard_placement_fn=placement)
    group = mesh.weights.get_group()
    order = CallOrder(model, blocks, group) if blocks and group.size() > 1 else None
    sharded = ShardedModel(model, group, options, cfg.strategy.name, order)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            track_gradients(module, sharded.used, accumulate.dtype_of(cfg))
    return sharded


def _evenly(param: nn.Parameter, ranks: int) -> Shard | None:
    """The first dim that the ranks divide: a rank may hold fewer experts than there are ranks to share them."""
    sizes = (param.to_local() if isinstance(param, DTensor) else param).shape
    return next((Shard(dim) for dim, size in enumerate(sizes) if size % ranks == 0), None)


def _check(options: Sharded, ranks: int, what: str) -> None:
    over = options.reshard_after_forward
    if not isinstance(over, bool) and (over < 2 or ranks % over):
        raise UserError(f"strategy.reshard_after_forward={over}: must be true, false or a divisor of the {ranks} {what} that is at least 2")


def _placement(param: nn.Parameter, shards: int, names: Mapping[nn.Parameter, str]) -> Shard | None:
    """Which dim of a parameter is sharded; None: the first.

    Of a parameter that tensor parallelism splits along the first dim into parts of different sizes, DTensor (`_StridedShard`) may have another
    idea than `fully_shard` of who holds which row, and values come to wrong places silently.
    """
    if not isinstance(param, DTensor) or not param.placements[0].is_shard(0):
        return None
    ranks = param.device_mesh.size()
    parts = [_chunks(part, shards) for part in _chunks(param.shape[0], ranks)]
    held = [sum(sizes) for sizes in zip(*parts, strict=True)]
    if [_chunks(size, ranks) for size in held] == [list(sizes) for sizes in zip(*parts, strict=True)]:
        return None
    for dim in range(1, param.ndim):
        if param.shape[dim] % shards == 0:
            return Shard(dim)
    raise UserError(
        f"parallel.tp={ranks}: {names[param]} has {param.shape[0]} rows, which tp does not divide, and no other dim that the {shards} shard ranks divide; "
        f"write replicate for it in parallel.tp_plan, strategy=ddp, or a size that {ranks} divides"
    )


def _chunks(size: int, ranks: int) -> list[int]:
    """Sizes of the parts of a dim, by the rule of `torch.chunk`."""
    most = -(-size // ranks)
    return [max(min(most, size - most * rank), 0) for rank in range(ranks)]


def _dtypes(cfg: Config) -> MixedPrecisionPolicy:
    policy = POLICIES[cfg.precision.name]
    assert isinstance(cfg.strategy, Sharded)
    compute = policy.autocast_dtype if cfg.strategy.param_dtype == "compute" else None
    lowest = compute or policy.param_dtype
    reduce_dtype = torch.float32 if lowest.itemsize < 4 and cfg.precision.reduce_dtype == "fp32" else None
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce_dtype, cast_forward_inputs=compute is not None)


def _refuse_mixed_dtypes(groups: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse groups whose gradients cannot be reduced as one buffer; of modules inside each other, the inner comes first."""
    seen: set[torch.Tensor] = set()
    for group, module in groups:
        named = {name: param for name, param in module.named_parameters() if param.requires_grad and param.ndim and param not in seen}
        seen.update(named.values())
        by_dtype = {param.dtype: name for name, param in named.items()}
        if len(by_dtype) > 1:
            found = ", ".join(f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in by_dtype.items())
            raise UserError(
                f"model: sharding reduces the gradients of {group} as one buffer, and its parameters differ in dtype: {found}; keep complex "
                "weights as real ones with a last dim of 2 (torch.view_as_complex in forward), put them into modules of their own and name "
                "those in memory.blocks, or write strategy=ddp (and precision.accumulate_dtype=grad)"
            )


class _Alias(torch.autograd.Function):
    """The same memory as a tensor that autograd takes for no view."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _no_views(module: nn.Module, args: Any, output: Any) -> Any:
    """Outputs that the model may change in place: a view would lose the hook by which its backward gathers the weights."""
    if isinstance(output, torch.Tensor):
        return _alias(output) if is_view(output) else None
    if any(isinstance(leaf, torch.Tensor) and is_view(leaf) for leaf in tree_leaves(output)):
        return map_tensors(_alias, output)
    return None


def _alias(x: torch.Tensor) -> torch.Tensor:
    return x if not is_view(x) or not x.requires_grad or isinstance(x, DTensor) else _Alias.apply(x)


def _gather_for_hidden_outputs(module: nn.Module) -> None:
    """Let the backward of outputs inside objects gather weights, too; FSDP itself looks into containers only."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) and torch.is_grad_enabled():
            found = {id(leaf) for leaf in tree_leaves(output)}
            gather_before_backward(module, [tensor for tensor in tensors(output) if tensor.requires_grad and id(tensor) not in found])

    module.register_forward_hook(after)

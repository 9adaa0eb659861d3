"""Sharded data parallelism by torch's `fully_shard` (FSDP2): each block is a group of its own, the root holds the rest.

ZeRO-1, ZeRO-2 and ZeRO-3 (Rajbhandari et al., 2020) differ only in how long gathered weights and whole gradients are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves

from paratrain.compat import track_gradients, without_communication
from paratrain.config import Config, Sharded
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.precision import POLICIES


@dataclass(frozen=True)
class ShardedModel:
    """A model that `shard` has sharded.

    Attributes:
        model: the module itself, whose parameters are DTensors; 0-dim parameters are whole on every rank.
        group: all data ranks.
        options: of the strategy.
        strategy: its name.
        used: parameters that got a gradient from this rank since the last `reduce`.
    """

    model: nn.Module
    group: dist.ProcessGroup
    options: Sharded
    strategy: str
    used: set[torch.Tensor] = field(default_factory=set)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.model(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
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
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)

    def rehearsal(self) -> AbstractContextManager:
        """A context in which a forward and its backward need no other rank."""
        return without_communication(self.model)

    def settle(self) -> None:
        """Free gathered weights that a forward without a backward has left, so that the model is its shards again."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def reduce(self, params: Sequence[torch.Tensor]) -> None:
        """Average the gradients of whole parameters over the data ranks, as FSDP did those of sharded ones."""
        whole = [param for param in params if not isinstance(param, DTensor)]
        self.used.update(param for param in whole if param.grad is not None)
        if not whole:
            return
        flat = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in whole]).div_(self.group.size())
        dist.all_reduce(flat, group=self.group)
        for param, grad in zip(whole, flat.unbind(), strict=True):
            param.grad = grad.clone()


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
    sharded = ShardedModel(model, mesh.weights.get_group(), options, cfg.strategy.name)
    settings: dict[str, Any] = {
        "mp_policy": _dtypes(cfg),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.root.device_type == "cuda")
        if cfg.memory.offload == "params"
        else OffloadPolicy(),
        "ignored_params": {param for param in model.parameters() if param.ndim == 0},  # fully_shard refuses them, and they weigh nothing
    }
    _refuse_mixed_dtypes([*experts, *reversed(blocks), ("the root", model)])
    for _, module in experts:
        evenly = partial(_evenly, ranks=mesh.expert_shard.size(-1))
        again = options.reshard_after_forward
        fully_shard(module, mesh=mesh.expert_shard, reshard_after_forward=again, shard_placement_fn=evenly, **settings)
    placement = partial(_placement, shards=mesh.shard.size(-1), names={param: name for name, param in model.named_parameters()})
    settings |= {"mesh": mesh.shard, "shard_placement_fn": placement}
    for name, block in reversed(blocks):  # a block inside a block first
        _check_outputs_once(name, block)
        fully_shard(block, reshard_after_forward=options.reshard_after_forward, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            track_gradients(module, sharded.used)
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
                "those in memory.blocks, or write strategy=ddp"
            )


def _check_outputs_once(name: str, block: nn.Module) -> None:
    """Refuse outputs in which FSDP would not find the tensors whose backward has to gather the weights again."""

    def check(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        for leaf in tree_leaves(output):
            hidden = [value for value in tree_leaves(dict(getattr(leaf, "__dict__", {}))) if isinstance(value, torch.Tensor)]
            if not isinstance(leaf, torch.Tensor) and any(value.requires_grad for value in hidden):
                raise UserError(
                    f"block {name!r} ({type(block).__name__}) returns a {type(leaf).__name__}, in which sharding cannot find the tensors; "
                    "return a tensor, tuple, dict or dataclass registered with torch.utils._pytree.register_pytree_node, "
                    "or leave the block to the root with memory.blocks"
                )

    handle = block.register_forward_hook(check)

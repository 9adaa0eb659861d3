"""The transforms, in the one order that is right.

pipeline split -> tensor / sequence / expert / context placement -> activation checkpointing -> compile per block
-> data-parallel wrap (replicate / shard) -> materialise and initialise. A transform that does not exist yet has no line here;
its configuration keys are refused (`config.check`). DistributedDataParallel alone wants to see the values first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from paratrain import backends
from paratrain.compat import is_compiled
from paratrain.config import DDP, Config, Foreign, Sharded, Zero1
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel import activations, batch_norm, blocks, compile, context, ddp, experts, materialise, pipeline, recompute, tensor
from paratrain.parallel.call_order import CallOrder
from paratrain.parallel.context import Context
from paratrain.parallel.pipeline import Pipeline
from paratrain.parallel.shard import shard
from paratrain.parallel.shard_uses import share_arguments
from paratrain.parallel.tensor import Placed
from paratrain.parallel.tp_uses import Reading
from paratrain.precision import accumulate, fp8


@dataclass(frozen=True)
class Layout:
    """A model laid out over a mesh.

    Attributes:
        model: the user's module, under the user's own names.
        run: what computes its forward, collectives included.
        no_sync: context for the forward and backward of every micro-batch but the last.
        rehearsal: context in which forward and backward need no other rank, and may fail; their results mean nothing.
        average: factor by which gradients come out of the reduction too small, because it divides by the ranks.
        settle: makes the model its shards again after a forward that no backward follows.
        reduce: averages, once before the update, the gradients that backward does not.
        used: parameters that got a gradient from this rank since they were last cleared; None where gradients say so themselves.
        order: in which blocks are called, where ranks must agree about it.
        pipeline: runs whole steps over the stages, where there are several.
        backward: runs the backward of a scaled loss.
        end_step: called when the weights of a step are updated.
        drop_gradients: drops those that lie elsewhere than at parameters, and returns the parameters whose they were.
        placed: what tensor parallelism split.
        context: splits sequences, where several ranks share each.
        experts: whose experts the ranks of ep hold.
        renamed: name of a tensor -> that which the user's model has for it, where the two differ.
    """

    model: nn.Module
    run: Callable
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    rehearsal: Callable[[], AbstractContextManager] = field(default=nullcontext, kw_only=True)
    average: int = 1
    settle: Callable[[], None] = lambda: None
    reduce: Callable[[Sequence[torch.Tensor]], None] = lambda params: None
    used: set[torch.Tensor] | None = field(default=None)
    order: CallOrder | None = None
    pipeline: Pipeline | None = None
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    end_step: Callable[[], None] = lambda: None
    drop_gradients: Callable[[], list[torch.Tensor]] = list
    placed: Placed = field(default_factory=Placed)
    context: Context | None = None
    experts: experts.Experts = field(default_factory=experts.Experts)
    renamed: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def unordered(self) -> Iterator[None]:
        """A context for forwards beside those of a step: their calls of blocks are not compared."""
        if self.order is not None:
            self.order.paused = True
        try:
            yield
        finally:
            if self.order is not None:
                self.order.paused = False


def is_sharded(mesh: Mesh, cfg: Config) -> bool:
    """Whether data ranks hold parts of the weights. One rank alone has nothing to share, but may offload."""
    return isinstance(cfg.strategy, Sharded) and (mesh.weights.size() > 1 or cfg.memory.offload == "params")


def replicates_by_sharding(mesh: Mesh, cfg: Config) -> bool:
    """Whether strategy=ddp is to be `fully_shard` over one shard rank, which knows what DistributedDataParallel does not: gradients of
    another dtype than their weights."""
    return isinstance(cfg.strategy, DDP) and accumulate.dtype_of(cfg) is not None and mesh.weights.size() > 1 and cfg.parallel.pp == 1


def apply(planned: materialise.Plan, mesh: Mesh, cfg: Config, device: torch.device) -> Layout:
    """Lay a planned model out over `mesh`, in place, and give it its values."""
    model, ranks = planned.model, mesh.weights.size()
    _refuse_sparse_gradients(model)
    _refuse_weights_that_forward_changes(model, mesh)
    _refuse_gradients_by_frequency(model, mesh, cfg)
    _refuse_to_split_compiled(model, mesh, cfg)
    batch_norm.refuse_parts(model, mesh, cfg)
    units = blocks.find(model, cfg.memory.blocks)
    plan = tensor.planned(model, cfg)
    sequences = context.planned(model, mesh, cfg)
    found = experts.planned(model, cfg)
    stages = pipeline.cut(model, units, mesh, cfg, device) if cfg.parallel.pp > 1 else None
    units = stages.units if stages else units
    placed = tensor.place(model, mesh, cfg, plan, experts.fused_names(found))
    dealt = experts.place(model, mesh, found, planned.forms, device)
    units = dealt.outside(units)
    context.apply(sequences, units)
    batch_norm.synchronise(model, mesh, cfg)
    if ((placed.plan or found) and ranks > 1 and not isinstance(cfg.strategy, Sharded)) or replicates_by_sharding(mesh, cfg):
        cfg = replace(cfg, strategy=Zero1())  # over one shard rank: plain replication, by the machinery that knows DTensors
    recompute.apply(units, model, cfg)
    compile.apply(units, model, cfg)
    activations.apply(units, cfg)
    if isinstance(cfg.strategy, Foreign):  # its package wraps the model together with the optimizers, see `backends`
        backends.fill(planned, cfg, device)
        return Layout(model, model, pipeline=backends.pipeline(stages, mesh, cfg, device) if stages else None)
    if is_sharded(mesh, cfg):
        sharded = shard(model, units, mesh, cfg, dealt.modules)
        materialise.fill(planned, cfg, device)
        fp8.gather_in_float8(model, cfg.precision.fp8)
        accumulate.widen(model.parameters(), accumulate.dtype_of(cfg))
        placed.keep(model)
        if stages:
            share_arguments(model)
            run = Pipeline(stages, mesh, cfg, device, sharded=True)
            return Layout(
                model,
                run.forward,
                average=ranks,
                settle=sharded.settle,
                reduce=_in_turn(sharded.reduce, dealt.reduce, run.reduce),
                used=sharded.used,
                order=sharded.order,
                pipeline=run,
                placed=placed,
                context=sequences,
            )
        sharded = sharded.watch()
        return Layout(
            model,
            sharded,
            sharded.no_sync,
            ranks,
            sharded.settle,
            _in_turn(sharded.reduce, dealt.reduce),
            sharded.used,
            sharded.order,
            rehearsal=sharded.rehearsal,
            backward=sharded.backward,
            end_step=sharded.end_step,
            drop_gradients=sharded.drop_gradients,
            placed=placed,
            context=sequences,
            experts=dealt,
        )
    materialise.fill(planned, cfg, device)
    accumulate.widen(model.parameters(), accumulate.dtype_of(cfg))
    placed.keep(model)
    if stages:
        run = Pipeline(stages, mesh, cfg, device, sharded=False)
        return Layout(model, run.forward, reduce=run.reduce, pipeline=run, placed=placed, context=sequences)
    if ranks == 1:
        if placed.plan is None:
            return Layout(model, model)
        reading = Reading(model)
        return Layout(model, model, settle=reading.settle, backward=reading.backward, placed=placed)
    replicas = ddp.Replicas(ddp.replicate(model, mesh, cfg), mesh.weights.get_group())
    return Layout(
        model,
        replicas,
        replicas.no_sync,
        ranks,
        rehearsal=replicas.no_sync,
        reduce=replicas.reduce,
        context=sequences,
        backward=replicas.backward,
    )


def _in_turn(*steps: Callable[[Sequence[torch.Tensor]], None]) -> Callable[[Sequence[torch.Tensor]], None]:
    def run(params: Sequence[torch.Tensor]) -> None:
        for step in steps:
            step(params)

    return run


def _refuse_sparse_gradients(model: nn.Module) -> None:
    sparse = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse]
    if sparse:
        raise UserError(
            f"model: {sparse[0]} makes sparse gradients, which have no global norm and cannot be sharded; build it with sparse=False"
        )


def _refuse_weights_that_forward_changes(model: nn.Module, mesh: Mesh) -> None:
    changing = [
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    if changing and mesh.root.size() > 1:
        raise UserError(
            f"model: {changing[0]} rescales its weights in forward (max_norm), on each rank the rows of that rank's samples, so the ranks would "
            "train different weights; build it with max_norm=None, or train with one process"
        )


def _refuse_gradients_by_frequency(model: nn.Module, mesh: Mesh, cfg: Config) -> None:
    scaled = [
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq
    ]
    if scaled and (mesh.loss.size() > 1 or cfg.parallel.pp > 1 or cfg.data.micro_batch_size is not None):
        raise UserError(
            f"model: {scaled[0]} divides gradients by how often a row is in the batch (scale_grad_by_freq), which each rank counts in its own micro-batches; build it "
            "with scale_grad_by_freq=False, or train with one process and data.micro_batch_size=null"
        )


def _refuse_to_split_compiled(model: nn.Module, mesh: Mesh, cfg: Config) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("model: it is compiled by TorchScript as a whole; build it without torch.jit.script, and write compile=true")
    axes = [axis for axis in ("pp", "ep", "cp", "tp") if getattr(cfg.parallel, axis) > 1]
    asked = f"parallel.{axes[0]}={getattr(cfg.parallel, axes[0])}" if axes else f"strategy={cfg.strategy.name}"
    compiled = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    by_user = [name or "it" for name, module in model.named_modules() if is_compiled(module)]
    if by_user and axes:
        raise UserError(
            f"{asked}: model: {by_user[0]} is compiled by torch.compile, which cannot trace how this layout divides what is inside; build it without "
            "torch.compile (compile=true compiles blocks under the layouts that allow it), or write strategy=fsdp"
        )
    if compiled and (axes or is_sharded(mesh, cfg)):
        raise UserError(
            f"{asked}: {compiled[0]} is compiled by TorchScript, and nothing can split what is inside; build it without torch.jit.script "
            "(compile=true compiles blocks under every layout), or write strategy=ddp"
        )

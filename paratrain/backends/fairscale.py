"""FairScale under our engine: OSS and ShardedDataParallel, whose units are whole parameters.

FairScale is archived; torch and the strategies zero1, zero2 and fsdp took over what it taught. It is here so that a run that depends
on it can go on, and be moved: its checkpoints are ours. Its ShardedGradScaler is not used: the loss scale and the check for overflow
are the engine's, over all ranks (on a CPU it would switch itself off with a warning, and float16 would train without a scale).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paratrain import checkpoint, gradients
from paratrain.backends import replace_layers
from paratrain.config import DDP, Config
from paratrain.distributed import is_main_process
from paratrain.engine import Engine
from paratrain.errors import UserError
from paratrain.layout import Layout
from paratrain.loss import Loss
from paratrain.mesh import Mesh
from paratrain.parallel import ddp
from paratrain.parallel.materialise import Plan

log = logging.getLogger(__name__)
_NATIVE = {"fairscale_oss": "zero1", "fairscale_sddp": "zero2", "fairscale_fsdp": "fsdp"}


def check(cfg: Config, device: torch.device) -> None:
    """Refuse what FairScale cannot do on this device; say once that it is archived, and what to write instead.

    Raises:
        UserError: names the key, and what FairScale itself would say.
    """
    name = cfg.strategy.name
    if name == "fairscale_fsdp":
        reason = (
            "it computes on CUDA only ('AssertionError: Torch not compiled with CUDA enabled', and with compute_device=cpu \"KeyError: 'all_gather'\")"
            if device.type == "cpu"
            else "it was archived before this torch, and nobody has shown that it still computes the same on it"
        )
        raise UserError(f"strategy=fairscale_fsdp: {reason}; write strategy=fsdp, which goes on from the same checkpoint")
    if cfg.memory.offload != "none":
        raise UserError(f"memory.offload={cfg.memory.offload} with strategy={name}: write strategy=fsdp, which offloads")
    if is_main_process():
        log.warning(
            "strategy=%s: FairScale is archived; the native strategy replaces it, from the same checkpoint: strategy=%s",
            name,
            _NATIVE[name],
        )


def native_layers(model: nn.Module) -> nn.Module:
    """Put `nn.Linear` and `nn.Embedding` in the place of FairScale's Megatron-style layers, in place, with the same parameters.

    So a model that was written for them trains under every strategy, and `parallel.tp` splits it. Build it over a group of one first:
    `fairscale.nn.model_parallel.initialize.initialize_model_parallel(1)`.

    Raises:
        UserError: a layer was built over several ranks, and holds a part of its weight.
    """
    from fairscale.nn.model_parallel import layers

    def twin(layer: Any) -> nn.Module | None:
        other: nn.Linear | nn.Embedding
        if isinstance(layer, layers.ColumnParallelLinear | layers.RowParallelLinear):
            other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        elif isinstance(layer, layers.ParallelEmbedding | layers.VocabParallelEmbedding):
            options = {key: getattr(layer, key) for key in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")}
            other = nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta", **options)
        else:
            return None
        if other.weight.shape != layer.weight.shape:
            raise UserError(
                f"model: a {type(layer).__name__} holds {tuple(layer.weight.shape)} of its weight {tuple(other.weight.shape)}: it was built over several "
                "ranks; call initialize_model_parallel(1) before building, and let parallel.tp split it"
            )
        return other

    return replace_layers(model, twin)


def build(
    planned: Plan,
    laid_out: Layout,
    loss_fn: Loss,
    optimizers: list[torch.optim.Optimizer],
    mesh: Mesh,
    cfg: Config,
    device: torch.device,
    blueprint: nn.Module | None,
) -> Engine:
    """The model under FairScale; arguments as of `Engine`.

    Raises:
        UserError: for an optimizer that evaluates other weights than it trains, which OSS does not pass on.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            name = cfg.strategy.name
            raise UserError(
                f"optimizer._target_={type(optimizer).__name__}: strategy={name} would evaluate and export the weights that it trains, not their "
                f"average; write strategy={_NATIVE[name]}"
            )
    return FairScaleEngine(laid_out.model, loss_fn, [_sharded(optimizer, mesh) for optimizer in optimizers], mesh, cfg, device, blueprint)


class FairScaleEngine(Engine):
    """An `Engine` whose optimizers are OSS: each rank has the states of the parameters that it owns, updates them and broadcasts them.

    With fairscale_sddp each rank also keeps the gradients of these parameters alone.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Loss, optimizers: list[Any], mesh: Mesh, cfg: Config, device: torch.device, blueprint: Any
    ):
        ranks = mesh.data.size()
        self._owned_alone = cfg.strategy.name == "fairscale_sddp" and ranks > 1
        if self._owned_alone:
            from fairscale.nn.data_parallel import ShardedDataParallel

            # without buckets: a gradient in a bucket is never None, and a parameter that no rank used would decay
            wrapped = ShardedDataParallel(model, optimizers, process_group=mesh.data.get_group(), reduce_buffer_size=0)
            layout = Layout(model, wrapped, wrapped.no_sync, ranks)
        elif ranks > 1:
            replica = ddp.replicate(model, mesh, replace(cfg, strategy=DDP()))
            layout = Layout(model, replica, replica.no_sync, ranks)
        else:
            layout = Layout(model, model)
        super().__init__(layout, loss_fn, optimizers, mesh, cfg, device, blueprint)

    def _total_norm(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self._owned_alone:
            return gradients.total_norm(grads, self.device)
        square = (
            gradients.total_norm(grads, self.device).to(self.device).square()
            if grads
            else torch.zeros((), dtype=torch.float64, device=self.device)
        )
        dist.all_reduce(square, group=self.mesh.data.get_group())
        return square.sqrt()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._model_tensors() | checkpoint.optimizer_tensors(self._shards, self._names())

    def prepare(self, saved: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        states, finish = checkpoint.prepare_optimizer(self._shards, self._names(), saved)
        return self._model_tensors() | states, finish

    @property
    def _shards(self) -> list[torch.optim.Optimizer]:
        """The optimizers over the parameters that this rank owns."""
        oss: list[Any] = self.optimizers
        return [optimizer.optim for optimizer in oss]


def _sharded(optimizer: torch.optim.Optimizer, mesh: Mesh) -> Any:
    """`optimizer`, which has not stepped, as OSS over the data ranks."""
    from fairscale.optim import OSS

    cls = type(optimizer)
    accepted = inspect.signature(cls).parameters
    groups = [{key: value for key, value in group.items() if key == "params" or key in accepted} for group in optimizer.param_groups]
    defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    return OSS(groups, optim=cls, group=mesh.data.get_group(), **defaults)

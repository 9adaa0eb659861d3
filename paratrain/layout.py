"""The transforms, in the one order that is right.

pipeline split -> tensor / sequence / expert / context placement -> activation checkpointing -> compile per block
-> data-parallel wrap (replicate / shard) -> materialise and initialise. A transform that does not exist yet has no line here;
its configuration keys are refused (`config.check`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from paratrain.config import Config
from paratrain.mesh import Mesh
from paratrain.parallel import batch_norm, ddp


@dataclass(frozen=True)
class Layout:
    """A model laid out over a mesh.

    Attributes:
        model: the user's module, under the user's own names.
        run: what computes its forward in training, collectives included.
        no_sync: context in which a backward keeps its gradients on this rank.
        average: factor by which gradients come out of the reduction too small, because it divides by the ranks.
    """

    model: nn.Module
    run: Callable
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    average: int = 1


def apply(model: nn.Module, mesh: Mesh, cfg: Config, device: torch.device) -> Layout:
    """Lay `model` out over `mesh`, in place."""
    model = model.to(device)
    batch_norm.refuse_accumulation(model, mesh, cfg)
    if mesh.data.size() == 1:
        return Layout(model, model)
    batch_norm.synchronise(model, mesh, cfg)
    wrapped = ddp.replicate(model, mesh, cfg)
    return Layout(model, wrapped, wrapped.no_sync, average=mesh.data.size())

"""Engines of other packages behind the interface of our own: same configuration, steps, metrics, checkpoints and verification.

A backend takes a model that has been through the transforms (`layout.apply`) and the optimizers over its parameters, and returns an
`Engine` of its own kind. Its package is imported only when a strategy asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from paratrain.config import Config, DeepSpeed, DeepSpeedZero3, FairScale, Foreign
from paratrain.errors import UserError

if TYPE_CHECKING:
    from paratrain.engine import Engine
    from paratrain.layout import Layout
    from paratrain.loss import Loss
    from paratrain.mesh import Mesh
    from paratrain.parallel.materialise import Plan
    from paratrain.parallel.pipeline import Cut, Pipeline


def check(cfg: Config, device: torch.device) -> None:
    """Refuse what the backend that `cfg.strategy` asks for, if any, cannot do here, before anything is built.

    Raises:
        UserError: the package is missing, or it cannot do this on this device; says what to write instead.
    """
    if isinstance(cfg.strategy, Foreign):
        _import(cfg.strategy)
        _module(cfg.strategy).check(cfg, device)


def streams_weights(cfg: Config) -> bool:
    """Whether only rank 0 may hold the whole model, from where the backend takes it piece by piece."""
    return isinstance(cfg.strategy, DeepSpeedZero3) and dist.get_world_size() > 1


def fill(planned: Plan, cfg: Config, device: torch.device) -> None:
    """Give the parameters and buffers their memory and values, or, where weights are streamed, shapes without memory."""
    from paratrain.parallel import materialise

    if streams_weights(cfg):
        materialise.hollow(planned.model, device)
    else:
        materialise.fill(planned, cfg, device)


def pipeline(made: Cut, mesh: Mesh, cfg: Config, device: torch.device) -> Pipeline:
    """What runs the steps over the stages of a model: of DeepSpeed, which alone has one."""
    from paratrain.backends.deepspeed_pipeline import DeepSpeedPipeline

    return DeepSpeedPipeline(made, mesh, cfg, device)


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
    """The engine of `cfg.strategy`. Arguments as of `Engine`.

    Args:
        laid_out: what `layout.apply` returned: the model, and its stages.

    Raises:
        UserError: for a model or optimizers that it cannot train.
    """
    return _module(cfg.strategy).build(planned, laid_out, loss_fn, optimizers, mesh, cfg, device, blueprint)


def replace_layers(model: nn.Module, twin: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put `twin(layer)` in the place of every layer that has one, in place, with the layer's own parameters under their names."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if (other := twin(child)) is not None:
                for key, param in child._parameters.items():  # the same tensors: a tied or loaded weight stays what it is
                    other.register_parameter(key, param)
                setattr(parent, name, other.train(child.training))
    return model


def _module(strategy: Any) -> Any:
    return importlib.import_module(f"paratrain.backends.{_package(strategy)}")


def _package(strategy: Any) -> str:
    assert isinstance(strategy, DeepSpeed | FairScale)
    return "deepspeed" if isinstance(strategy, DeepSpeed) else "fairscale"


def _import(strategy: Any) -> None:
    package = _package(strategy)
    if importlib.util.find_spec(package) is None:
        raise UserError(f"strategy={strategy.name} needs {package}, which is not installed; run: pip install 'paratrain[{package}]'")

"""`setup`: a module, a loss and a config become an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
from torch import nn

from paratrain import agreement, backends, distributed, layout, mesh, optim, same_code
from paratrain.config import Config, Foreign
from paratrain.engine import Engine
from paratrain.loss import Loss, checked
from paratrain.metrics.flops import on_meta
from paratrain.parallel import batch_norm, freeze, materialise
from paratrain.precision import POLICIES
from paratrain.recipe import recipe

log = logging.getLogger(__name__)


def setup(model_fn: Callable[[], nn.Module] | nn.Module, loss_fn: Loss, cfg: Config) -> Engine:
    """Lay a model out over the processes of this job, and make everything that trains it.

    Works under torchrun and alone: creates the process group (unless there is one), the mesh, the layout, the optimizers, the
    schedule and the loss scaler.

    Args:
        model_fn: any `nn.Module`, or a callable that returns one. The callable runs under `cfg.seed`, so that the initial weights
            are the same in every layout; the generators of torch, numpy and `random` are handed back as they were.
        loss_fn: `loss_fn(outputs, targets)` -> (sum, count), or a scalar mean over what `trainer.loss_count` names.
        cfg: from `load_config`, or built in Python.

    Raises:
        UserError: when the config asks for what cannot be done here; says what to change.
    """
    kept = recipe(model_fn, loss_fn)
    device = distributed.choose_device(cfg.trainer.device)
    distributed.init(device, timedelta(minutes=cfg.trainer.timeout_minutes))
    with agreement.during("setup()", 60 * cfg.trainer.timeout_minutes):
        engine = _set_up(model_fn, loss_fn, cfg, device)
    engine.recipe = kept
    return engine


def _set_up(model_fn: Callable[[], nn.Module] | nn.Module, loss_fn: Loss, cfg: Config, device: torch.device) -> Engine:
    same_code.check()
    backends.check(cfg, device)
    loss_fn = checked(loss_fn, device, POLICIES[cfg.precision.name].param_dtype)
    if cfg.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    axes = mesh.build(cfg, device.type)
    planned = materialise.plan(
        model_fn,
        cfg,
        device,
        sharded=layout.is_sharded(axes, cfg)
        or layout.replicates_by_sharding(axes, cfg)
        or backends.streams_weights(cfg)
        or max(cfg.parallel.pp, cfg.parallel.tp, cfg.parallel.ep) > 1,
    )
    freeze.apply(planned.model, cfg.freeze)
    blueprint = _blueprint(planned.model)
    trainable = {name for name, param in planned.model.named_parameters(remove_duplicate=False) if param.requires_grad}
    laid_out = layout.apply(planned, axes, cfg, device)
    if laid_out.pipeline:
        laid_out.pipeline.split.read = loss_fn
    elsewhere = laid_out.pipeline.elsewhere if laid_out.pipeline else laid_out.experts.elsewhere
    optimizers = optim.build(cfg.optimizer, laid_out.model, trainable.intersection(elsewhere))
    if cfg.memory.offload == "optimizer":
        optim.stream_states(optimizers)
    if isinstance(cfg.strategy, Foreign):
        return backends.build(planned, laid_out, loss_fn, optimizers, axes, cfg, device, blueprint)
    laid_out = replace(laid_out, run=batch_norm.watched(laid_out.run, axes, cfg), renamed=planned.renamed)
    return Engine(laid_out, loss_fn, optimizers, axes, cfg, device, blueprint)


def _blueprint(model: nn.Module) -> nn.Module | None:
    """The model as it was before any layout, without values; None where its attributes cannot be copied."""
    try:
        return on_meta(model)
    except Exception as error:  # whatever the user's attributes raise when they are copied
        log.info("the model cannot be copied (%s: %s): its FLOPs will be estimated, not counted", type(error).__name__, error)
        return None

"""DeepSpeed ZeRO under our engine: DeepSpeed reduces, clips, updates and shards; we say by what to divide, and when.

The count that a loss is a mean over is known after the last forward, so every backward runs on a sum, as in our own engine. What
DeepSpeed knows as its loss scale, the number that its update divides gradients by, is the way in for that division: it is 1 in
backward and (loss scale x count) in the update, which makes its gradient norm and its clipping those of the true gradient.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paratrain.backends import deepspeed_state, streams_weights
from paratrain.backends.deepspeed_config import generate
from paratrain.backends.deepspeed_pipeline import DeepSpeedPipeline, spoiling_gradients
from paratrain.config import Config, DeepSpeed
from paratrain.distributed import rank
from paratrain.engine import Engine, Scalar
from paratrain.errors import UserError
from paratrain.layout import Layout
from paratrain.loss import Loss
from paratrain.mesh import Mesh
from paratrain.parallel import materialise
from paratrain.parallel.materialise import Plan
from paratrain.precision import Policy

_ELEMENTWISE = {  # classes that update an element from that element alone, so that flat pieces of parameters are as good as parameters
    "Adam", "AdamW", "SGD", "RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "Lion", "AdaBelief",
    "DeepSpeedCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad", "FusedAdam", "FusedLion", "FusedSGD", "FusedAdagrad",
}  # fmt: skip


def check(cfg: Config, device: torch.device) -> None:
    """Refuse what DeepSpeed cannot do on this device.

    Raises:
        UserError: names the key, and what DeepSpeed itself would say.
    """
    strategy = cfg.strategy
    assert isinstance(strategy, DeepSpeed)
    name = strategy.name  # type: ignore[attr-defined]
    generate(cfg, dist.get_world_size())
    if device.type != "cpu":
        return
    if cfg.precision.name == "16-mixed":
        raise UserError(
            f"precision=fp16 with strategy={name} on a CPU: DeepSpeed refuses it on most ('Type fp16 is not supported on your device.'); "
            "write precision=bf16, or strategy=zero" + name[-1]
        )
    for key, what in (("quantized_weights", "quantization kernels"), ("quantized_gradients", "quantization kernels")):
        if getattr(strategy, key, False):
            raise UserError(f"strategy.{key}=true: DeepSpeed's {what} are CUDA code; leave it out on a CPU")
    for key in ("offload_optimizer", "offload_param"):
        if getattr(strategy, key, "none") == "nvme" and not _has_libaio():
            raise UserError(
                f"strategy.{key}=nvme: DeepSpeed builds its async_io operator from libaio, which is not installed; "
                f"install libaio (apt-get install libaio-dev), or write strategy.{key}=cpu"
            )


def build(
    planned: Plan,
    laid_out: Layout,
    loss_fn: Loss,
    optimizers: list[torch.optim.Optimizer],
    mesh: Mesh,
    cfg: Config,
    device: torch.device,
    blueprint: nn.Module | None,
) -> DeepSpeedEngine:
    """The model under DeepSpeed; arguments as of `Engine`.

    Raises:
        UserError: for optimizers that ZeRO cannot run.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists, for one process without a launcher too
    optimizer = _checked(optimizers, cfg)
    config = generate(cfg, dist.get_world_size())
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)  # DeepSpeed's calls
    with _quiet(cfg) as log_file:
        import deepspeed

        if device.type == "cpu":  # it would try every operator's compiler and build one, for minutes, of which training uses nothing
            deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(_backend(device), auto_mpi_discovery=False, verbose=False)
        if streams_weights(cfg):
            for module in materialise.stream(planned, device):
                if next(module.parameters(recurse=False), None) is not None:
                    deepspeed.zero.Init(module=module, config_dict_or_path=config, zero_param_parallel_group=_secondary(cfg))
        stages = laid_out.pipeline
        assert stages is None or isinstance(stages, DeepSpeedPipeline)
        model = stages.module(optimizer) if stages else planned.model
        inner, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    ranks = mesh.data.size()
    if stages:
        stages.drive(inner)
        layout, update = Layout(planned.model, stages.forward, average=ranks, reduce=stages.reduce, pipeline=stages), stages.update
    else:
        layout, update = Layout(planned.model, inner, average=ranks, backward=partial(_backward, inner)), inner.step
    return DeepSpeedEngine(inner, update, log_file, layout, loss_fn, [inner.optimizer.optimizer], mesh, cfg, device, blueprint)


class DeepSpeedEngine(Engine):
    """An `Engine` whose reductions and updates are DeepSpeed's.

    DeepSpeed clips and updates in one call, so `clip_grad_norm_` does both, and `step` the accounts. It knows no parameter without a
    gradient: one that a step does not use gets a gradient of zero, which moments and weight decay act upon.

    Attributes:
        deepspeed: the `deepspeed.DeepSpeedEngine`.
        log_file: where DeepSpeed's output goes.

    Args:
        update: clips and updates.
        engine: what an `Engine` takes.
    """

    def __init__(self, inner: Any, update: Callable[[], None], log_file: Path, *engine: Any):
        super().__init__(*engine)
        self.deepspeed, self.log_file = inner, log_file
        self._clip_and_update = update
        self._params = [param for param in self.model.parameters() if param.requires_grad]
        if self.cfg.precision.name == "16-mixed":
            self._policy = Policy(torch.float16)  # DeepSpeed keeps float32 masters and computes with float16 weights, without autocast

    def clip_grad_norm_(self, max_norm: float | None) -> Scalar:
        if self._window is None or self._unit is None:
            raise UserError("no gradients yet: call engine.backward(loss) before clipping")
        if self._reduced is not None:
            raise UserError("clip_grad_norm_() twice in one step: the gradients are clipped already; call engine.step()")
        self._layout.reduce(self._params)
        totals, _ = self._sum_totals()
        zero = self.deepspeed.optimizer
        zero.clip_grad = max_norm or 0.0
        zero.loss_scale = self.scaler.scale * (float(totals[1]) or 1.0) / self._unit
        try:
            with _redirected(self.log_file):
                self._clip_and_update()
        finally:
            zero.loss_scale = 1.0
        norm = math.nan if zero.overflow else float(zero._global_grad_norm)
        self._reduced = (totals, norm)
        return norm

    def _update(self) -> None:
        """It is done, in `clip_grad_norm_`."""

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        state = {}
        entries = deepspeed_state.model_tensors(self.deepspeed, self.model)
        stages = self._layout.pipeline
        for name, value in entries if stages is None else stages.whole_state(entries, torch.float32):
            if self.is_main_process:
                state[name] = value.detach().cpu().clone()
        return state

    def tensors(self) -> dict[str, torch.Tensor]:
        return deepspeed_state.tensors(self.deepspeed, self.model, self.mesh.data)

    def prepare(self, saved: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        return deepspeed_state.prepare(self.deepspeed, self.model, self.mesh.data, saved)


def _backward(inner: Any, loss: torch.Tensor) -> None:
    inner.backward(spoiling_gradients(loss), scale_wrt_gas=False)


def _checked(optimizers: list[torch.optim.Optimizer], cfg: Config) -> torch.optim.Optimizer:
    strategy = cfg.strategy
    assert isinstance(strategy, DeepSpeed)
    name = strategy.name  # type: ignore[attr-defined]
    if len(optimizers) > 1:
        classes = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise UserError(f"optimizer: strategy={name} runs one optimizer, and this configuration has {classes}; write strategy=fsdp")
    (optimizer,) = optimizers
    if type(optimizer) is torch.optim.Adagrad:
        raise UserError(
            "optimizer._target_=torch.optim.Adagrad: DeepSpeed 0.19.8 builds it anew without its parameter groups, so that all parameters would get "
            f"one weight decay and learning rate; write strategy=fsdp with it, or optimizer=rmsprop with strategy={name}"
        )
    if not strategy.elementwise_optimizer and not any(cls.__name__ in _ELEMENTWISE for cls in type(optimizer).__mro__[:1]):
        raise UserError(
            f"optimizer._target_={type(optimizer).__name__}: ZeRO hands it flat pieces of parameters, which is wrong for one that looks at whole "
            f"rows, matrices or norms; write strategy=fsdp, or strategy.elementwise_optimizer=true if it treats each element by itself"
        )
    return optimizer


def _backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" or "nccl" not in dist.get_backend() else "nccl"


def _secondary(cfg: Config) -> Any:
    """The ranks that keep a second copy of the shards (ZeRO++), once the first module has made their group; each would make it anew."""
    from deepspeed.utils import groups

    return groups._get_zero_param_intra_parallel_group() if getattr(cfg.strategy, "hpz_partition_size", 1) > 1 else None


def _has_libaio() -> bool:
    import ctypes.util

    return ctypes.util.find_library("aio") is not None


@contextlib.contextmanager
def _quiet(cfg: Config) -> Iterator[Path]:
    """DeepSpeed's logger and prints go to a file from now on: <output_dir>/deepspeed/rank-00000.log."""
    directory = Path(cfg.output_dir) if cfg.output_dir else Path(tempfile.gettempdir()) / f"paratrain-{os.getuid()}"
    path = directory / "deepspeed" / f"rank-{rank():05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _redirected(path):
        yield path
        logger = logging.getLogger("DeepSpeed")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(logging.FileHandler(path))


@contextlib.contextmanager
def _redirected(path: Path) -> Iterator[None]:
    with path.open("a") as file, contextlib.redirect_stdout(file):
        yield

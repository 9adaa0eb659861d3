"""From a job to the smallest one that shows whether its layout is right: as few ranks, samples and blocks as that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from paratrain.config import DDP, Checkpoint, Config, DeepSpeed, Logger, Memory, Parallel, Pipeline, Sharded, Trainer, Verify
from paratrain.faults.growth import bytes_left
from paratrain.mesh import DATA
from paratrain.verify.run import accepted, exact

_LOSSY = "paratrain.optim.LowBitAdamW"
_DEPTH = ("layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")


@dataclasses.dataclass(frozen=True)
class Smaller:
    """A job to prove.

    Attributes:
        cfg: of its layout.
        ranks: it takes.
        samples: of a global batch that it takes.
        left_out: what of the job it does not have, in words.
    """

    cfg: Config
    ranks: int
    samples: int
    left_out: tuple[str, ...]


def smaller(cfg: Config, degrees: Mapping[str, int], global_batch: int) -> Smaller:
    """Every axis of the mesh at its least degree, a few samples a rank, several micro-batches where the job has several, in float64.

    Args:
        degrees: of every axis in the job.
    """
    cut = {axis: _cut(axis, degree) for axis, degree in degrees.items()}
    ranks = math.prod(cut.values())
    cfg, left_out = _without_what_cannot_be_compared(cfg)
    shares, shares_of_job = (math.prod(d[axis] for axis in DATA) for d in (cut, degrees))
    size, samples = _samples(cfg, global_batch, shares, shares_of_job, cut["pp"])
    parallel = dataclasses.replace(cfg.parallel, **dict[str, Any](cut))
    cfg = dataclasses.replace(
        cfg,
        parallel=parallel if ranks > 1 else Parallel(),
        pipeline=_pipeline(cfg.pipeline, degrees["pp"], cut["pp"]),
        data=dataclasses.replace(cfg.data, micro_batch_size=size, global_batch=samples, workers=0),
    )
    return Smaller(cfg, ranks, samples, tuple(left_out))


def _cut(axis: str, degree: int) -> int:
    """The least degree that shows what the axis does; heads that 3 ranks share are not always to be shared by 2."""
    if degree == 1 or axis in DATA or axis == "pp":
        return min(degree, 2)
    return next(factor for factor in range(2, degree + 1) if degree % factor == 0)


def _samples(cfg: Config, global_batch: int, ranks: int, ranks_of_job: int, pp: int) -> tuple[int | None, int]:
    """(micro-batch size, samples): as ragged as in the job."""
    size = cfg.data.micro_batch_size
    share = math.ceil(global_batch / ranks_of_job)
    if size == "auto":
        size = None
    if size is None:
        each = min(share, 4)
        samples = ranks * each
    else:
        parts = math.ceil(share / size)
        size = min(size, 2)
        samples = ranks * (size * min(parts, max(2, pp)) if parts > 1 else min(share, size))
    if samples > ranks and (global_batch % ranks_of_job or (size and size > 1 and share % size)):
        samples -= 1
    return size, max(1, min(samples, global_batch))


def _pipeline(options: Pipeline, stages: int, cut: int) -> Pipeline:
    if cut == stages:
        return options
    cuts = options.cuts
    if cuts is not None:
        each = (len(cuts) + 1) // stages
        cuts = [cuts[round(number * stages / cut) - 1] for number in range(1, cut * each)]

    def moved(place: Any) -> Any:
        return [moved(part) for part in place] if isinstance(place, list) else place * cut // stages

    micro = None if options.micro_batches is None else min(options.micro_batches, 2 * cut)
    return dataclasses.replace(options, cuts=cuts, micro_batches=micro, place={glob: moved(place) for glob, place in options.place.items()})


def _without_what_cannot_be_compared(cfg: Config) -> tuple[Config, list[str]]:
    """`cfg` on the CPU in float64, and without what changes results because it was asked to."""
    left_out = []
    if cfg.precision.name != "64-true":
        left_out.append(f"precision={cfg.precision.name}" + (" and fp8" if getattr(cfg.precision, "fp8", None) else ""))
    strategy = cfg.strategy
    if isinstance(strategy, DDP) and strategy.comm_hook != "none":
        left_out.append(f"strategy.comm_hook={strategy.comm_hook}")
        strategy = dataclasses.replace(strategy, comm_hook="none")
    if isinstance(strategy, Sharded):
        every = strategy.reshard_after_forward
        strategy = dataclasses.replace(
            strategy,
            param_dtype="master",
            **({} if isinstance(every, bool) or every <= 2 else dict[str, Any](reshard_after_forward=2)),
        )
    for name in ("quantized_weights", "quantized_gradients"):
        if isinstance(strategy, DeepSpeed) and getattr(strategy, name, False):
            left_out.append(f"strategy.{name}")
            strategy = dataclasses.replace(strategy, **dict[str, Any]({name: False}))
    memory, optimizer, trainer = cfg.memory, cfg.optimizer, cfg.trainer
    if cfg.compile is not False:
        left_out.append("compile")
    if memory.recompute == "auto":
        left_out.append("memory.recompute=auto (full was proven)")
        memory = dataclasses.replace(memory, recompute="full", budget_gib=None)
    if optimizer.target == _LOSSY:
        left_out.append("the rounding of the optimizer (AdamW was proven)")
        kept = {name: value for name, value in optimizer.args.items() if name in ("betas", "eps")}
        optimizer = dataclasses.replace(optimizer, target="torch.optim.AdamW", args=kept)
    if cfg.ema is not None:
        left_out.append("ema")
    if trainer.batch_norm == "local":
        left_out.append("trainer.batch_norm=local, which makes the result depend on the layout (sync was proven)")
    plain = Trainer()
    if own := accepted(cfg):
        left_out.append(f"what trainer.forward_state leaves to each rank ({', '.join(own)})")
    kept_keys = (
        "clip_norm",
        "clip_value",
        "clip_adaptive",
        "loss_count",
        "loss_weights",
        "update_in_backward",
        "deterministic",
        "forward_state",
    )
    trainer = dataclasses.replace(plain, device="cpu", **{name: getattr(trainer, name) for name in kept_keys})
    cfg = dataclasses.replace(
        cfg,
        strategy=strategy,
        memory=memory,
        optimizer=optimizer,
        trainer=trainer,
        compile=False,
        compile_fallback=False,
        ema=None,
        logger=Logger(),
        checkpoint=Checkpoint(),
        verify=Verify(),
        callbacks={},
        app={},
        model=None,
        loss=None,
        output_dir=None,
        resume="none",
        resume_force=[],
    )
    return exact(cfg), left_out


# ---------------------------------------------------------------------- depth


@dataclasses.dataclass(frozen=True)
class Shallow:
    """A callable that builds the model of `model_fn` with `keep` of each run of its repeated blocks."""

    model_fn: Callable[[], nn.Module]
    keep: int

    def __call__(self) -> nn.Module:
        from paratrain.build import instantiate

        told: tuple = getattr(self.model_fn, "args", ())
        if getattr(self.model_fn, "func", None) is instantiate and any(name in told[0] for name in _DEPTH):
            named = next(name for name in _DEPTH if name in told[0])
            return instantiate({**told[0], named: min(self.keep, told[0][named])}, *told[1:])
        model = self.model_fn()
        cut_blocks(model, self.keep)
        return model


def cut_blocks(model: nn.Module, keep: int) -> int:
    """Drop all but the first `keep` of every run of like blocks, in place; returns how many were dropped."""
    dropped = 0
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]:
        kinds = {type(block) for block in stack}
        shapes = {tuple((name, tuple(p.shape)) for name, p in block.named_parameters()) for block in stack}
        if len(stack) <= keep or len(kinds) > 1 or len(shapes) > 1 or not any(True for _ in stack[0].children()):
            continue
        had = len(stack)
        del stack[keep:]
        dropped += had - keep
        owners = [*model.modules(), *(owner.config for owner in model.modules() if hasattr(owner, "config"))]
        for owner in owners:
            for name in _DEPTH:
                if getattr(owner, "__dict__", {}).get(name) == had:
                    setattr(owner, name, keep)
    return dropped


def memory_of(elements: int, ranks: int) -> float:
    """Bytes that proving a model of so many elements takes at most: weights, gradients, two moments and copies, in float64."""
    return 8.0 * 6 * elements * max(ranks, 2)


def on_meta(memory: Memory) -> Memory:
    """First values drawn by each module for itself: those of a model that is too large to be built whole."""
    return dataclasses.replace(memory, init="meta", pretrained=None)


def elements_of(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def available_memory() -> float:
    """Bytes that this host, or the container it runs in, could give; 8 GiB where the system does not tell."""
    left = bytes_left()
    return 8.0 * 2**30 if left is None else float(left)


def build_on_meta(model_fn: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return model_fn()

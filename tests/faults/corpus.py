"""The corpus. A fault is sown when the model is built in a rank of a layout of several; the one process it is compared with stays sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from paratrain import engine as engines
from paratrain import gradients, layout, rng, state
from paratrain.config import DDP, Config, LossScale, Memory, Optimizer, Parallel, Precision, Scheduler, SyntheticData, Trainer, Verify
from paratrain.engine import Engine
from paratrain.forward_state import ForwardState
from paratrain.parallel.ddp import Replicas
from paratrain.parallel.experts import Experts
from paratrain.parallel.recompute import BlockState

from . import models, programs

ANY = ""
"""In place of a kind of error: found, whatever it is called."""


def config(micro: int | None = None, clip: float | None = 0.5, size: int = 10, **sections: Any) -> Config:
    base = Config(
        seed=3,
        optimizer=Optimizer(lr=1e-2, weight_decay=0.1),
        data=SyntheticData(micro_batch_size=micro, global_batch=size),
        trainer=Trainer(clip_norm=clip, device="cpu"),
        verify=Verify(steps=2),
        strategy=DDP(find_unused_parameters=False),
    )
    return replace(base, **sections)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong.
        sow: changes the process of a rank so that it is; None where the model, loss or configuration is at fault.
        error: what `first_difference.error` must be.
        says: what the explanation must contain.
        build: the model; `sown` is True in the ranks of a layout of several. `loss` likewise; `module` makes one that is a module.
    """

    name: str
    sow: Callable[[], None] | None
    error: str
    says: str
    build: Callable[[bool], nn.Module] = lambda sown: models.Tied()
    loss: Callable[[bool], Callable] | None = lambda sown: models.token_loss
    module: Callable[[], nn.Module] | None = None
    batches: list = field(default_factory=models.tokens)
    cfg: Config = field(default_factory=config)
    ranks: int = 3

    def model_fn(self) -> nn.Module:
        sown = dist.get_world_size() > 1
        if sown and self.sow is not None and not hasattr(Engine, "sown"):
            Engine.sown = True
            self.sow()
        return self.build(sown)

    def loss_fn(self, outputs: Any, targets: Any) -> Any:
        assert self.loss is not None
        return self.loss(dist.get_world_size() > 1)(outputs, targets)

    def verify(self):
        from paratrain.verify import verify

        loss_fn = self.module() if self.module is not None else self.loss_fn
        return verify(self.model_fn, loss_fn, self.batches, self.cfg, self.ranks)


def before(owner: Any, name: str, action: Callable) -> None:
    """Do `action(*args)` before every call of `owner.name`."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def after(owner: Any, name: str, action: Callable) -> None:
    """Give callers of `owner.name` what `action(result, *args)` returns."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: action(original(*args, **kwargs), *args))


def scale_gradients(engine: Engine, factor: float) -> None:
    for param in engine._params:
        if param.grad is not None:
            param.grad.mul_(factor)


def not_reduced() -> None:
    before(DistributedDataParallel, "forward", lambda self, *_: setattr(self, "require_backward_grad_sync", False))


class _Open:
    def __init__(self, wrapper: Any):
        self.wrapper = wrapper

    def __enter__(self) -> None:
        self.wrapper.require_backward_grad_sync = False

    def __exit__(self, *_: Any) -> None:
        pass


def no_sync_left_open() -> None:
    DistributedDataParallel.no_sync = lambda self: _Open(self)
    Replicas.reduce = lambda self, params: None  # which would make up for it


def state_is_not_watched() -> None:
    """What mends or refuses state that forward moves is taken out."""
    ForwardState.begin = lambda self, *_, **__: None
    BlockState.looks = lambda self: False


def averaged_twice() -> None:
    before(Engine, "clip_grad_norm_", lambda self, *_: scale_gradients(self, 1 / dist.get_world_size()))


def communication_hook(hook: Callable) -> Callable[[], None]:
    def sow() -> None:
        def hooked(wrapper: DistributedDataParallel, *_: Any) -> DistributedDataParallel:
            wrapper.register_comm_hook(None, hook)
            return wrapper

        after(layout.ddp, "replicate", hooked)

    return sow


def _sum(_, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def _in_bf16(_, bucket):
    bucket.buffer().copy_(bucket.buffer().bfloat16()).div_(dist.get_world_size())
    return _sum(_, bucket)


def mean_of_rank_means() -> None:
    original = Engine._backward

    def backward(self: Engine, total: torch.Tensor, count: Any) -> None:
        whole = torch.as_tensor(float(count))
        dist.all_reduce(whole)
        original(self, total / count * float(whole) / dist.get_world_size(), count)

    Engine._backward = backward


def unscaled_twice() -> None:
    before(Engine, "clip_grad_norm_", lambda self, *_: scale_gradients(self, 1 / self.scaler.scale))


def norm_of_own_part() -> None:
    whole = gradients.total_norm
    gradients.total_norm = lambda grads, device: whole(grads[dist.get_rank() :: dist.get_world_size()], device)


def norm_counts_replicas() -> None:
    after(gradients, "total_norm", lambda norm, *_: norm * dist.get_world_size() ** 0.5)


def same_dropout() -> None:
    original = rng.reseed
    rng.reseed = lambda device, *parts: original(device, *parts[:-1])


def state_not_loaded() -> None:
    after(state, "load", lambda extra, engine, *_: [optimizer.state.clear() for optimizer in engine.optimizers] and extra)


def data_from_the_start() -> None:
    after(Engine, "restore", lambda _, self, *__: setattr(self, "global_step", 0))


def no_broadcast() -> None:
    original = DistributedDataParallel.__init__
    DistributedDataParallel.__init__ = lambda self, *args, **kwargs: original(self, *args, **kwargs, init_sync=False)


def from_rank(sown: bool) -> nn.Module:
    if sown:
        torch.manual_seed(dist.get_rank() or torch.initial_seed())
    return models.Tied()


def another_ranks_samples() -> None:
    original = engines.batches.local
    engines.batches.local = lambda batch, rank, ranks: original(batch, 0 if rank == 1 else rank, ranks)


def decay_on_one_rank() -> None:
    def decay(self: Engine) -> None:
        if dist.get_rank() == 1:
            for param in self._params:
                param.data.mul_(1 - self.lr * 0.3)

    before(Engine, "step", decay)


def skipped_on_one_rank() -> None:
    original = Engine.step

    def step(self: Engine) -> Any:
        kept = [param.detach().clone() for param in self._params]
        result = original(self)
        if dist.get_rank() == 2 and self.global_step == 2:
            for param, value in zip(self._params, kept, strict=True):
                param.data.copy_(value)
        return result

    Engine.step = step


def partial_window() -> None:
    def scale(self: Engine, *_: Any) -> None:
        if self.global_step == 1:
            scale_gradients(self, 6 / 9)

    before(Engine, "clip_grad_norm_", scale)


def not_cleared() -> None:
    last: list[torch.Tensor] = []

    def add(self: Engine, *_: Any) -> None:
        grads = [param.grad.clone() for param in self._params]
        for param, old in zip(self._params, last, strict=False):
            param.grad.add_(old)
        last[:] = grads

    before(Engine, "clip_grad_norm_", add)


def cleared_between() -> None:
    def clear(self: Engine, *_: Any) -> None:
        for param in self._params:
            param.grad = None

    before(Engine, "_backward", clear)


def rows_moved() -> None:
    def move(self: Engine, *_: Any) -> None:
        grad = self.model.block[0].weight.grad
        grad.copy_(grad.view(3, -1, grad.shape[1]).transpose(0, 1).reshape(grad.shape))

    before(Engine, "clip_grad_norm_", move)


def schedule_by_processes() -> None:
    original = engines.schedules.factor
    engines.schedules.factor = lambda schedule, step, total: original(schedule, step * dist.get_world_size(), total)


def clipped_twice() -> None:
    def again(norm: Any, self: Engine, limit: float) -> Any:
        scale_gradients(self, min(limit / (float(norm) + 1e-6), 1.0))
        return norm

    after(Engine, "clip_grad_norm_", again)


def raise_on_one_rank() -> None:
    def fail(*_: Any) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("one rank ran out of something")

    before(Engine, "_backward", fail)


def experts_scaled_by_ep() -> None:
    Experts.reduce = lambda self, params: None


def mean_and_one(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    total, count = models.token_loss(outputs, targets)
    return total / count, 1


def counts_padding(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return models.token_loss(outputs, targets)[0], targets.numel()


def seeds_itself(sown: bool) -> nn.Module:
    model = models.Tied(dropout=0.3)
    model.block.register_forward_pre_hook(lambda *_: torch.manual_seed(1) and None)
    return model


SCALED = config(precision=Precision("16-mixed", LossScale(init=1024.0)), verify=Verify(dtype="configured"))
LOCAL_NORM = config(trainer=Trainer(batch_norm="local", device="cpu"))
EXPERTS = config(parallel=Parallel(ep=2))


def steps_in_a_block(sown: bool) -> nn.Module:
    return nn.Sequential(programs.Steps(sown))


WARMUP = config(scheduler=Scheduler("constant", warmup_steps=10))

STATEFUL = (programs.Steps, steps_in_a_block, programs.Carried, programs.Average, programs.Queue, programs.Codebook)

CORPUS = [
    Fault("gradient not reduced over the data axis", not_reduced, "not reduced", "not reduced over axis dp"),
    Fault("no_sync never left: the last micro-batch is not synchronised", no_sync_left_open, "not reduced", "no_sync", cfg=config(2)),
    Fault("gradient averaged over the ranks twice", averaged_twice, "averaged twice", "1/3 is one over the ranks"),
    Fault("gradient summed where it should be averaged", communication_hook(_sum), "summed", "number of ranks"),
    Fault("gradient with the wrong sign", lambda: before(Engine, "clip_grad_norm_", lambda e, *_: scale_gradients(e, -1)), "sign", "sign is wrong"),
    Fault("gradient divided by the micro-batches on top", lambda: before(Engine, "clip_grad_norm_", lambda e, *_: scale_gradients(e, 0.5)), "accumulation", "number of micro-batches", cfg=config(2, size=12), batches=models.tokens(12)),
    Fault("gradient cleared between micro-batches", cleared_between, "lost micro-batches", "last micro-batch", cfg=config(2)),
    Fault("gradient not cleared after the step", not_cleared, "not cleared", "this step's gradient and the last", batches=models.tokens(masked=False)),
    Fault("gradient reduced in bfloat16", communication_hook(_in_bf16), "rounding", "bfloat16"),
    Fault("gradient reduced in float16 (strategy.comm_hook=fp16)", None, "rounding", "float16", cfg=config(strategy=DDP(comm_hook="fp16"))),
    Fault("rows of a gradient in another order (fused weight, naively sharded)", rows_moved, "permuted rows", "another order"),
    Fault("loss averaged by ranks instead of tokens", mean_of_rank_means, "mean of means", "by ranks instead of by tokens"),
    Fault("loss returns a mean as if it were a sum", None, "mean of means", "mean", loss=lambda sown: mean_and_one),
    Fault("padding counted in the loss", None, "count", "padding or masked", loss=lambda sown: counts_padding if sown else models.token_loss),
    Fault("padded vocabulary leaks into the loss", None, "shape", "vocabulary", build=lambda sown: models.Tied(tied=False, classes=21 if sown else models.VOCAB)),
    Fault("last, partial accumulation window scaled as a full one", partial_window, "accumulation", "partial", batches=[*models.tokens(9, 1), *models.tokens(6, 1, seed=8)], cfg=config(size=9)),
    Fault("float16 gradients unscaled twice", unscaled_twice, "unscaled twice", "loss scale", cfg=SCALED),
    Fault("clipped by the norm of the rank's own part", norm_of_own_part, "local norm", "squares", cfg=config(clip=0.1)),
    Fault("norm counts replicas", norm_counts_replicas, "local norm", "replicated"),
    Fault("clipped twice", clipped_twice, "clipping", "clipped twice", cfg=config(clip=0.1)),
    Fault("tied weight with half its gradient", None, "half of a tied weight", "shared by", build=lambda sown: models.Tied(tied=not sown)),
    Fault("initial weights from the rank, not broadcast", no_broadcast, "replicas differ", "rank", build=from_rank),
    Fault("weight decay on one rank only", decay_on_one_rank, "weight decay", "only on rank 1"),
    Fault("update skipped on one rank", skipped_on_one_rank, "stale", "only on rank 2"),
    Fault("schedule advances once for every process", schedule_by_processes, "schedule", "3 times", cfg=WARMUP),
    Fault("a rank is given another's samples", another_ranks_samples, "repeated samples", "reach no rank"),
    Fault("running statistics not synchronised", state_is_not_watched, "own statistics", "not synchronised", build=lambda sown: models.RunningMean(), loss=lambda sown: models.square_loss, batches=models.vectors()),
    Fault("BatchNorm over each rank's samples (trainer.batch_norm=local)", None, "own statistics", "BatchNorm", build=lambda sown: models.conv_batch_norm(), loss=lambda sown: models.square_loss, batches=models.vectors(length=6), cfg=LOCAL_NORM),
    Fault("dropout the same on all data ranks", same_dropout, "same dropout", "without the data rank", build=lambda sown: models.Tied(0.3)),
    Fault("the model seeds its own dropout", None, "same dropout", "seeds it itself", build=seeds_itself),
    Fault("recomputation draws other dropout", None, "recomputation", "preserve_rng_state", build=lambda sown: models.Tied(0.3, preserve=False)),
    Fault("optimizer state not restored by a resume", state_not_loaded, "stale state", "optimizer state"),
    Fault("data repeated after a resume", data_from_the_start, "data after resume", "repeated"),
    Fault("state that no checkpoint holds", None, "stale state", "outside the checkpoint", build=lambda sown: models.Counting(), loss=lambda sown: models.square_loss, batches=models.vectors()),
    Fault("expert gradients scaled by ep", experts_scaled_by_ep, "expert scale", "degree of axis ep", build=lambda sown: models.mixture(), cfg=EXPERTS, ranks=4),
    Fault("one rank fails", raise_on_one_rank, "exception", "ran out of something"),
    # programs as users write them, each with what a layout has done to it: what would be found if the mend were taken out
    *(
        Fault(name, state_is_not_watched if build in STATEFUL else None, error, says, build=build, loss=lambda sown: models.square_loss, batches=models.vectors(), cfg=cfg, ranks=2)
        for name, build, error, says, cfg in [
            ("a BatchNorm subclass loses its own forward", programs.norm_act, "unknown", "in or before 1 ", config()),
            ("a mask that hangs on no weight is remembered from the first batch", programs.Passed, "unknown", "in or before down", config()),
            ("weights reached another way get no gradient", programs.Detached, "missing", "does not use this parameter", config(strategy=DDP())),
            ("blocks write into a copy of a list", programs.ListArgument, "unknown", "in or before down", config()),
            ("a constructor draws after parts that were built on meta", programs.Drawn, "unknown", "in or before down", config()),
            ("a tensor in a dict is never filled", programs.Garbage, "unknown", "in or before down", config()),
            ("a counter moves once a micro-batch", programs.Steps, "state", "once a micro-batch", config(2)),
            ("a counter moves again in recomputation", steps_in_a_block, "state", "once more in recomputation", config(memory=Memory(recompute="full", blocks=["0"]))),
            ("a memory carries each rank's own mean", programs.Carried, "state", "each rank moves it by its own samples", config()),
            ("an average in a buffer moves once a micro-batch", programs.Average, "own statistics", "not synchronised", config(2)),
            ("a memory holds this rank's last sample", programs.Queue, "unknown", "in or before down", config()),
            ("a codebook counts this rank's samples", programs.Codebook, "own statistics", "not synchronised", config()),
            ("writes into a weight go nowhere", programs.Padded, "unknown", "in or before up", config()),
            ("a hook sees the gradient of a part", programs.Clamped, ANY, "", config(2)),
            ("a weight switched on after set-up is not trained", programs.Frozen, "missing", "does not use this parameter", config()),
            ("two names of one weight come apart", programs.Untied, "half of a tied weight", "shared by", config()),
            ("the parts of a fused weight in the order of ranks", programs.Heads, "unknown", "in or before down", config()),
        ]
    ),
    Fault("a term left in a list is lost", None, "zero", "detached from the loss", build=programs.Appends, loss=lambda sown: programs.with_term, batches=models.vectors(), ranks=2),
    Fault("a gradient of a gradient is lost", None, "unknown", "in or before down.weight", build=programs.Penalised, loss=lambda sown: programs.with_term, batches=models.vectors(), ranks=2),
    Fault("a loss moves a state of its own", state_is_not_watched, "state", "or the loss", build=lambda sown: models.mlp(), loss=None, module=programs.StateInLoss, batches=models.vectors(), cfg=config(2), ranks=2),
    Fault("samples counted by every rank that holds a part of them", None, "count", "more targets", build=lambda sown: models.mlp(), loss=lambda sown: programs.counted_twice if sown else models.square_loss, batches=models.vectors(), ranks=2),
    Fault("a mean over tokens weighed by samples", None, "count", "targets", loss=lambda sown: programs.own_means if sown else models.token_loss, ranks=2),
    Fault("a mean over the weights of classes taken for one over targets", None, "count", "targets", loss=programs.weighed, ranks=2),
    Fault("the gradient of a count is lost", None, ANY, "", build=lambda sown: models.mlp(), loss=programs.count_with_gradient, batches=models.vectors(), ranks=2),
    Fault("a list is not sliced with its tensors", None, "unknown", "in or before the loss", build=lambda sown: models.mlp(), loss=programs.first_labels, batches=models.vectors(), ranks=2),
    Fault("a loss compares the samples of a part", None, "own samples", "compares samples with each other", build=lambda sown: models.mlp(), loss=programs.contrast, batches=models.vectors(), ranks=2),
    Fault("stochastic depth, and a loss averaged by ranks", mean_of_rank_means, "mean of means", "by ranks", build=programs.Dropped, loss=lambda sown: models.square_loss, batches=models.vectors(9), ranks=2),
]  # fmt: skip

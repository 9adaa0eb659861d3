"""One training step for every layout: scale, accumulate, reduce, unscale once, clip, step, update once.

The loss of a step is (global sum) / (global count) over micro-batches and data ranks. The count is known only after the last
forward, so every backward runs on the *sum*, scaled by constants, and the gradients are divided by the count once, together with
the loss scale and the clipping factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from paratrain import agreement, bags, deal, gradients, own_loop, rng
from paratrain import batch as batches
from paratrain.agreement import agreed
from paratrain.batch import LocalBatch
from paratrain.config import Config, Foreign
from paratrain.errors import UserError
from paratrain.faults import memory, nonfinite
from paratrain.fillers import Fillers
from paratrain.forward_state import ForwardState
from paratrain.layout import Layout
from paratrain.loss import Loss, as_sum_and_count, is_a_sum, named
from paratrain.loss_proof import LossProof, Watch
from paratrain.mesh import Mesh
from paratrain.metrics.noise_scale import NoiseScale
from paratrain.micro_batch import AutoMicroBatch
from paratrain.named_losses import NamedLosses
from paratrain.one_batch import OneBatch
from paratrain.optim import limits, schedules
from paratrain.optim.ema import EMA
from paratrain.optim.in_backward import UpdateInBackward
from paratrain.optim.state import averaged, numbers, set_numbers
from paratrain.parallel import batch_norm
from paratrain.parallel.compile import compiled
from paratrain.parallel.context import Context
from paratrain.parallel.context_loss import Targets
from paratrain.parallel.pipeline import Pipeline
from paratrain.parallel.pipeline_schedule import micro_batch_size
from paratrain.parallel.whole_view import Views
from paratrain.precision import POLICIES, Fallback, LossScaler, accumulate
from paratrain.recipe import Recipe
from paratrain.result import Scalar, StepResult
from paratrain.totals import Totals, or_one
from paratrain.watch import Changes

_LOOKED = 4  # steps
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _at_work(method: _Method) -> _Method:
    """A method during which split parameters are what they are, and not whole to whoever reads them."""

    @wraps(method)
    def run(self: Engine, *args: Any, **kwargs: Any) -> Any:
        if self._views.at_work:
            return method(self, *args, **kwargs)
        with self._views:
            try:
                return method(self, *args, **kwargs)
            except RuntimeError as error:
                own_loop.explain_derivatives(self, error)
                raise

    return cast(_Method, run)


class Engine:
    """A model, its loss and its optimizers, laid out over a mesh. Made by `paratrain.setup`.

    Attributes:
        model: the user's module under the user's own names.
        blueprint: the model on the meta device as it was before the layout, for counting; None where it cannot be copied.
        optimizers: the optimizers, already over the parameters as they are laid out.
        global_step: steps taken, skipped ones included; the position in the data.
        updates: steps that changed the weights; the position in the schedule.
        ema: moving average of the weights; None without `ema`.
        noise_scale: running averages behind `train/noise_scale`; None without `trainer.noise_scale`.
        micro_batch_size: samples a rank runs at once; None: its whole part of the global batch.
        needs_all: whether every rank must take part in a forward, and in whatever gives the whole weights.
        recipe: what `setup` was given, kept on rank 0 for `prove`.
    """

    recipe = Recipe(None, "the engine was not made by paratrain.setup")
    _running = 0  # backwards of all engines, which may run through each other's models

    def __init__(
        self,
        layout: Layout,
        loss_fn: Loss,
        optimizers: list[torch.optim.Optimizer],
        mesh: Mesh,
        cfg: Config,
        device: torch.device,
        blueprint: nn.Module | None = None,
    ):
        self.cfg, self.mesh, self.device, self.blueprint = cfg, mesh, device, blueprint
        self.model: nn.Module = layout.model
        # one rank alone would wait for ever in a forward, or for the whole weights
        self.needs_all = agreement.needs_all(layout.model) or mesh.root["pp"].size() == dist.get_world_size() > 1
        self.agreement = agreement.know(layout.model)
        self.optimizers = optimizers
        self.global_step = 0
        self.updates = 0
        self.total_updates = cfg.scheduler.total_steps or cfg.trainer.max_steps
        self.scaler = LossScaler(cfg.precision.loss_scale)
        self._layout, self._loss_fn = layout, loss_fn
        self._data_group, self._data_rank, self._data_ranks = mesh.data.get_group(), mesh.data.get_local_rank(), mesh.data.size()
        self._weights_rank = mesh.weights.get_local_rank()
        self._norms = batch_norm.synchronised(self.model)
        self._moved = ForwardState(self.model, loss_fn, cfg, mesh, device)
        self._in_loop: int | None = None  # samples of a forward in a loop of the user's own, whose step has not ended
        self._policy = POLICIES[cfg.precision.name]
        watched = cfg.precision.fallback.policy != "off"
        codes = compiled(self.model)
        self.fallback = Fallback(cfg.precision.fallback, self.model, self.scaler, device, codes) if watched else None
        self.noise_scale = NoiseScale(cfg.trainer.noise_scale, self.model, device) if cfg.trainer.noise_scale else None
        self._params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self._totals = Totals(mesh, layout, self._params, self._names(), device)
        anywhere = partial(self._totals.largest, over=mesh.data)
        own = isinstance(cfg.strategy, Foreign) or bool(layout.experts.modules)  # experts leave fillers out themselves
        self._fillers = Fillers(self._beside, self._moved, anywhere, layout.unordered, device, 1 if own else self._data_ranks)
        self._looked = 0  # steps in which the calls of forward were looked at
        over_data = partial(self._totals.over_ranks, over=mesh.weights)
        self._losses = NamedLosses(cfg.trainer.loss_weights or {}, self._totals.scalar, over_data)
        kept = loss_fn, self.model
        self._proof = LossProof(self._pairs, self._evaluated, kept, self._peers(), is_a_sum(loss_fn), self._totals, mesh.weights)
        self._watch: Watch | None = None  # of a step in which the loss is looked at
        self._base_numbers = numbers(optimizers)
        self._base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.ema = EMA(cfg.ema, {param: name for param, name in self._names().items() if param.requires_grad}) if cfg.ema else None
        self._in_backward = UpdateInBackward(optimizers) if cfg.trainer.update_in_backward else None
        size = cfg.data.micro_batch_size
        self.micro_batch_size: int | None = 1 if size == "auto" else size
        self._one_batch = OneBatch(mesh.root)
        self._auto = AutoMicroBatch(self._rehearse, anywhere, self._none_fits) if size == "auto" else None
        self._unit: float | None = None
        self._unit_agreed = False  # over the stages of a pipeline, of which only the last sees a loss
        self._counted: Scalar = 0.0
        self._window: tuple[Scalar, Scalar] | None = None  # (sum, count) of the losses since the last step, on this rank
        self._votes: tuple[float, ...] = ()
        self._reduced: tuple[list[Scalar], Scalar] | None = None  # totals over ranks and the gradient norm, once known
        self._inside_backward = False
        self._wide = accumulate.dtype_of(cfg) is not None
        self._unchecked: StepResult | None = None
        self._true: tuple[list[Scalar], Scalar] | None = None  # totals and factor, where gradients are at their true scale already
        self._inside_no_sync = False
        self._updating = False
        self._rates_by_hand = False
        self._set_lr()
        weights = mesh.weights.get_group()
        self._views = Views(self.model, layout, weights)
        self._changes = Changes(self, self._views)
        self._foreign = isinstance(cfg.strategy, Foreign)
        self._strays = False  # gradients came from another engine's backward
        own_loop.watch_optimizers(self, optimizers)
        own_loop.keep_states_whole(self)
        own_loop.let_copy(self)

    # ------------------------------------------------------------------ whole steps

    def local(self, batch: tuple[Any, Any]) -> LocalBatch:
        """This rank's part of a global batch (inputs, targets) that every rank holds; peers in tp and pp get the same part.

        Samples are dealt in runs by the rule of `torch.tensor_split`: no sample is lost or repeated, whatever the number of ranks.
        """
        return batches.local(batch, self._data_rank, self._data_ranks)

    @agreed("engine.train_step()", rare=False)
    @_at_work
    def train_step(self, batch: LocalBatch | tuple[Any, Any], votes: Sequence[float] = ()) -> StepResult:
        """Train on this rank's part of a global batch.

        Args:
            batch: what `local` or the loader returned, or this rank's own (inputs, targets); then every rank must bring as
                many samples.
            votes: numbers to be summed over all ranks in the collective that sums the loss.

        Raises:
            UserError: for a loss or gradient that is not finite (where no loss scale can mend it); nothing has been updated then,
                except on CUDA, where it is found one step later, before anything is saved.
        """
        if self._window is not None:
            raise UserError("train_step() in the middle of a step: backward() has run; call engine.step() first")
        self._changes.follow()
        self._one_batch.check(batch)
        share, dealt = self._share(batch), isinstance(batch, LocalBatch)
        if self._auto is not None:
            self.micro_batch_size = self._auto.fit(share)
        micro = self._micro_batches(share, dealt)
        self._votes = tuple(votes)
        self._losses.begin(len(micro))
        self._moved.begin(len(micro), share.size, dealt)
        if self.cfg.trainer.loss_check:
            self._watch = self._proof.begin(share, micro, self.micro_batch_size)
        if not self._foreign:
            own_loop.clear(self)
        with rng.preserved(self.device), self._young(batch, micro):
            if (pipeline := self._layout.pipeline) is not None:
                self._train_stages(pipeline, micro)
                self._conclude()
                self._moved.end(partial(self._again_stages, pipeline, micro[:1]))
                return self.step()
            if self._in_backward is not None:
                self._update_in_backward(self._in_backward, micro)
                self._conclude()
                return self.step()
            for number, (inputs, targets, real) in enumerate(micro):
                rng.reseed(self.device, self.cfg.seed, self.global_step, number, self._weights_rank)
                self._moved.before(number)
                with self.no_sync() if number + 1 < len(micro) else nullcontext():
                    self._backward(*self._loss(self._layout.run, inputs, targets, real))
                self._moved.after(number, real)
            self._conclude()
            self._moved.end(None if self._foreign else partial(self._again, *micro[0]))
        return self.step()

    @agreed("engine.eval_step()")
    @_at_work
    @torch.no_grad()
    def eval_step(self, batch: LocalBatch | tuple[Any, Any]) -> StepResult:
        """The loss of this rank's part of a global batch, summed over ranks, in evaluation mode; changes nothing."""
        self._one_batch.check(batch)
        micro = self._micro_batches(batch, isinstance(batch, LocalBatch))
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        window: tuple[Scalar, Scalar] = (0.0, 0.0)
        try:
            with rng.preserved(self.device), averaged(self.optimizers), self._average_to_evaluate(), self._young(batch, micro):
                if self._layout.pipeline is not None:
                    window = self._evaluate_stages(self._layout.pipeline, micro)
                    micro = []
                for inputs, targets, real in micro:
                    window = self._totals.add(window, *self._loss(self.model, inputs, targets, real))
        finally:
            self._layout.settle()
            self._end_sequences()
            for module, mode in modes:
                module.training = mode
        totals = self._losses.weighed(self._totals.over_ranks((*window, *self._losses.sums)))
        self._losses.begin()
        return StepResult(totals, math.nan, self.lr, self.scaler.scale, False, tuple(self._losses.weights))

    def prove(self, batches: tuple[Any, Any] | Iterable[tuple[Any, Any]]) -> Any:
        """Prove, on the CPU of rank 0's host, that this layout trains the model as one process does; every rank must call it, and waits.

        Args:
            batches: one global batch (inputs, targets) or several, as `local` takes them, of which the first four are read; rank 0's are used.

        Returns:
            The verdict: `status` ("proven", or "not proven" where nothing could be said), `line` for people, and `report`.

        Raises:
            UserError: something differs; names the first that does and its likely cause.
        """
        from paratrain.verify import background

        return background.prove(self, batches)

    # ------------------------------------------------------------------ steps in the user's hands

    @agreed("engine()", wait=False, together=lambda engine: engine.needs_all, rare=lambda engine: not torch.is_grad_enabled())
    @_at_work
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward for a loop of your own, under this precision; follow it with `backward`, then `step`."""
        self._changes.follow_once()
        batch_norm.weigh(self._norms)
        if self._in_loop is None and (torch.is_grad_enabled() or self.model.training):  # an evaluation is no part of a step
            self._moved.begin(1)
            self._in_loop = next((len(leaf) for leaf in batches.tensors((args, kwargs)) if leaf.ndim), 1)
        if deal.shares((args, kwargs)):
            args, kwargs = deal.opened((args, kwargs))
        args, kwargs = batches.to_device((args, kwargs), self.device)
        args, kwargs = self._policy.cast_inputs((args, kwargs))
        with self._policy.autocast(self.device.type):
            outputs = self._policy.cast_outputs(self._layout.run(*args, **kwargs))
        for leaf in batches.tensors(outputs):
            if leaf.requires_grad:
                leaf.register_hook(self._guard)
        if not torch.is_grad_enabled():
            self._layout.settle()
        return outputs

    @agreed("engine.backward()", wait=False, together=False)
    @_at_work
    def backward(self, loss: torch.Tensor | tuple[torch.Tensor, Any], count: float = 1) -> None:
        """Backward of one micro-batch: a (sum, count), or a mean over `count`.

        Afterwards, outside of `no_sync`, the gradients are those of the mean over all micro-batches so far, on every rank. `optimizer.zero_grad()`
        by hand begins a new step.

        Raises:
            UserError: a gradient that another backward has left, or gradients that are clipped already.
        """
        if self._in_backward is not None:
            raise UserError(
                "backward() under trainer.update_in_backward=true, which needs the count of all ranks first; call engine.train_step()"
            )
        total, count = as_sum_and_count(loss, count)
        own_loop.begin_backward(self)
        self._backward(total, count)
        if not self._inside_no_sync and not self._foreign:
            own_loop.bring_to_scale(self)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients on this rank: for the forward and backward of every micro-batch but the last."""
        before, self._inside_no_sync = self._inside_no_sync, True
        try:
            with self._layout.no_sync():
                yield
        finally:
            self._inside_no_sync = before

    @agreed("engine.clip_grad_norm_()", rare=False)
    @_at_work
    def clip_grad_norm_(self, max_norm: float | None) -> Scalar:
        """Bring the gradients of this step to their true scale and clip their global norm to `max_norm` (None: do not).

        Returns:
            The norm before clipping, equal on every rank.
        """
        if self._window is None or self._unit is None:
            raise UserError("no gradients yet: call engine.backward(loss) before clipping")
        if self._reduced is not None:
            raise UserError("clip_grad_norm_() twice in one step: the gradients are clipped already; call engine.step()")
        # stages of a pipeline must do the same, and only the one that holds a parameter knows of its hooks
        if (self._changes.hooks or self._layout.pipeline is not None) and self._true is None:
            own_loop.bring_to_scale(self)
        factor: Scalar = 1.0
        if self._true is None:
            self._layout.reduce(self._params)
            totals, parts = self._sum_totals()
            factor = self._unit / self.scaler.scale / or_one(totals[1])
        else:
            totals, _ = self._true
            parts = self._totals.over_ranks(self.noise_scale.totals(self._data_ranks)) if self.noise_scale is not None else []
        grads = [param.grad for param in self._params if param.grad is not None]
        if self._layout.pipeline is None:
            norm = self._totals.scalar(self._total_norm(grads)) * factor
        else:
            norm = self._totals.scalar(self._layout.pipeline.norm(self._params, self.device)) * factor
        if max_norm is not None:
            factor = factor * _at_most(max_norm / (norm + 1e-6), 1.0)
        gradients.scale(grads, factor)
        value, adaptive = self.cfg.trainer.clip_value, self.cfg.trainer.clip_adaptive
        if value is not None or adaptive is not None:
            limits.clip(self._params, value, adaptive)
        self._reduced = (totals, norm)
        if self.noise_scale is not None:
            self.noise_scale.update(parts, self._layout.average * self.scaler.scale / self._unit, norm, totals[1])
        return norm

    @agreed("engine.step()", rare=False)
    @_at_work
    def step(self) -> StepResult:
        """Update the weights with the gradients of every `backward` since the last step, or skip if float16 overflowed."""
        if self._window is None:
            raise UserError("step() without gradients: call engine.backward(loss) first (or engine.train_step(batch) for all of it)")
        if self._in_loop is not None:
            self._moved.after(0, self._in_loop)
            self._in_loop = None
            self._moved.end(None)
        if self._reduced is None:
            self.clip_grad_norm_(self.cfg.trainer.clip_norm)
        assert self._reduced is not None
        totals, norm = self._reduced
        tolerant = self.cfg.trainer.nonfinite != "raise"
        skipped = ((tolerant or self.scaler.enabled) and not math.isfinite(float(norm))) or (
            tolerant and not math.isfinite(float(totals[0]))
        )
        result = StepResult(totals, norm, self.lr, self.scaler.scale, skipped, tuple(self._losses.weights))
        if not self.scaler.enabled and self.cfg.trainer.nonfinite == "raise":
            self._check_finite(result)
        if not skipped:
            self._update()
            self.updates += 1
            if self.ema is not None:
                self.ema.update(self.updates)
        relieved = self.fallback is not None and self.fallback.after_step(self.global_step + 1, skipped)
        if skipped and not tolerant and not relieved and not math.isfinite(float(totals[0])):  # a loss that no scale mends
            self._raise_unless_finite(result)
        self.scaler.update(skipped, relieved)
        for param in self._params:
            param.grad = None
        self._layout.end_step()
        self._end_sequences()
        self._counted = self._counted + totals[1]
        self._votes = ()
        self._losses.begin()
        self.global_step += 1
        if self.noise_scale is not None:
            self.noise_scale.begin(self.global_step)
        self._window = self._reduced = self._true = None
        self._views.steps += 1
        self._set_lr()
        return result

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group for the next update."""
        return self.optimizers[0].param_groups[0]["lr"]

    @property
    def tokens(self) -> float:
        """Everything the loss has counted so far (real tokens, or samples). Waits for the device."""
        return float(self._counted)

    # ------------------------------------------------------------------ state

    @agreed("engine.full_state_dict()", together=lambda engine: engine.needs_all)
    @_at_work
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model on rank 0's CPU under the user's own names; an empty dict on other ranks. Every rank must call it."""
        self._layout.settle()
        state = {}
        with averaged(self.optimizers):
            pipeline, experts = self._layout.pipeline, self._layout.experts
            entries = experts.whole_state(self.model) if pipeline is None else pipeline.whole_state()
            for name, value in entries:
                if isinstance(value, torch.Tensor):
                    whole = gradients.whole(self._layout.placed.natural(name, value))  # one at a time: never all of them on the device
                    if self.is_main_process:
                        state[self._layout.renamed.get(name, name)] = whole.detach().cpu().clone()
        return state

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the model the weights of `full_state_dict`: those that rank 0 brings, whole, under the user's own names.

        Every rank must call it; what the others bring is not looked at. `engine.model.load_state_dict` takes them too, where every rank has them.

        Raises:
            UserError: names or shapes that are not the model's.
        """
        own_loop.load_whole(self, state)

    @_at_work
    def ema_state_dict(self) -> dict[str, torch.Tensor]:
        """`full_state_dict` with the moving average for the weights that are trained. Every rank must call it.

        Raises:
            UserError: the configuration asks for no average.
        """
        if self.ema is None:
            raise UserError("ema_state_dict() without a moving average of the weights; write ema={decay: 0.999}")
        with self.ema.applied():
            return self.full_state_dict()

    @_at_work
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: `model/<name>`, `optimizer/<parameter>/<key>`, `ema/<parameter>`. Every rank must call it."""
        from paratrain import checkpoint

        averages = self.ema.tensors() if self.ema else {}
        tensors = self._model_tensors() | checkpoint.optimizer_tensors(self.optimizers, self._names()) | averages
        return self._layout.placed.to_save(tensors)

    @_at_work
    def prepare(self, saved: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        """The tensors for a checkpoint to fill, and what to call then.

        Args:
            saved: name -> (shape, dtype) of every tensor in the checkpoint.

        Raises:
            CheckpointError: another optimizer wrote it.
        """
        from paratrain import checkpoint

        states, finish_states = checkpoint.prepare_optimizer(self.optimizers, self._names(), saved)
        averages = {name: average for name, average in self.ema.tensors().items() if name in saved} if self.ema else {}

        to_fill, keep = self._layout.placed.to_fill(self._model_tensors() | states | averages)

        def finish() -> None:
            keep()
            finish_states()
            if self.ema:
                self.ema.restart(but=averages)

        return to_fill, finish

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        return {f"model/{name}": value for name, value in self.model.state_dict().items()}

    def _names(self) -> dict[torch.Tensor, str]:
        return {param: name for name, param in self.model.named_parameters()}

    def counters(self) -> dict[str, Any]:
        """Every number that a resume needs beside tensors: positions, the loss scale, and the unit that gradients are scaled by."""
        return {
            "global_step": self.global_step,
            "updates": self.updates,
            "counted": self.tokens,
            "unit": self._unit,
            "scaler": self.scaler.state_dict(),
            "fallback": self.fallback.state_dict() if self.fallback else None,
            "noise_scale": self.noise_scale.state_dict() if self.noise_scale else None,
            "optimizers": numbers(self.optimizers, since=self._base_numbers),
            "rates": self._base_lrs if self._rates_by_hand else None,
        }

    def restore(self, counters: dict[str, Any]) -> None:
        """Go on from what `counters` returned."""
        self.global_step, self.updates = int(counters["global_step"]), int(counters["updates"])
        self._counted, self._unit = self._totals.scalar(counters["counted"]), counters["unit"]
        set_numbers(self.optimizers, counters["optimizers"])
        if (rates := counters.get("rates")) and [len(each) for each in rates] == [len(each) for each in self._base_lrs]:
            self._base_lrs, self._rates_by_hand = [list(each) for each in rates], True
        self._views.steps += 1
        if self.scaler.enabled:
            self.scaler.load_state_dict(counters["scaler"])
        if self.fallback and counters["fallback"]:
            self.fallback.load_state_dict(counters["fallback"])
        if self.noise_scale:
            self.noise_scale.begin(self.global_step)
            if counters.get("noise_scale"):
                self.noise_scale.load_state_dict(counters["noise_scale"])
        self._set_lr()

    def plan_updates(self, total: int | None) -> None:
        """Tell the schedule how many updates training will take, where the config does not (`scheduler.total_steps`)."""
        self.total_updates = self.cfg.scheduler.total_steps or total
        self._set_lr()

    @agreed("engine.save()")
    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Save all that resumes training into the directory `path`, whole or not at all; every rank must call it. See `state.py`.

        Args:
            extra: JSON values of your own, which `load` returns.
        """
        from paratrain import state

        self.check_last_step()
        state.save(self, Path(path), extra or {})

    @agreed("engine.load()")
    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore what `save` saved, under this or any other layout; every rank must call it. Returns the `extra` it was given."""
        from paratrain import state

        return state.load(self, Path(path))

    # ------------------------------------------------------------------ helpers

    @property
    def is_main_process(self) -> bool:
        return dist.get_rank() == 0

    @agreed("engine.barrier()")
    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    @agreed("engine.gather()", together=False)
    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all data ranks, concatenated along dim 0, on every rank; dims 0 may differ."""
        group = self._data_group
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, tensor.detach().cpu(), group=group)
        return torch.cat(parts).to(self.device)

    def check_last_step(self) -> None:
        """Raise if the last step was not finite; on CUDA that is otherwise noticed one step later."""
        if self._unchecked is not None:
            self._raise_unless_finite(self._unchecked)
            self._unchecked = None

    def _loss(self, run: Callable, inputs: Any, targets: Any, real: int) -> tuple[torch.Tensor, Any]:
        inputs = self._policy.cast_inputs(batches.to_device(inputs, self.device))
        with self._policy.autocast(self.device.type):
            return self._measure(batches.call(run, inputs), targets, real)

    def _measure(self, outputs: Any, targets: Any, real: int) -> tuple[torch.Tensor, Any]:
        """(sum, count) of the loss of one micro-batch."""
        watch = self._watch
        with self._policy.autocast(self.device.type):
            outputs, targets = self._policy.cast_outputs(outputs), self._policy.cast_targets(batches.to_device(targets, self.device))
            weight = 1.0
            if isinstance(targets, Targets):
                assert self._layout.context is not None
                outputs, targets = self._layout.context.for_loss(outputs, targets, real, self._proof.pairs)
                weight = self._layout.context.loss.weight()
            if watch is not None:
                watch.before()
            total, count, constant = self._sum_and_count(outputs, targets, real)
            if not weight:  # another rank of cp computes the same
                total, count = total * 0.0, 0
            if torch.is_grad_enabled():
                total, count = self._proof.with_count(total, count, watch, bool(self._losses.weights))
            if watch is not None:
                watch.saw(outputs, targets, real, constant, float(count))
            return total, count

    def _sum_and_count(self, outputs: Any, targets: Any, real: int) -> tuple[torch.Tensor, Any, bool]:
        """(sum, count) of the loss of one micro-batch, and whether it is a constant here."""
        if real == 0:
            loss, joint = None, self._proof.joint
            if joint or self._watch is not None:  # where ranks meet in the loss, they wait for this one
                loss, joint = self._proof.of_nothing(self._loss_fn, outputs, targets, self._watch)
            self._losses.add_nothing()
            total = _weightless(outputs) + (_weightless(loss) if joint else 0.0)
            if torch.is_grad_enabled() and not total.requires_grad:  # outputs that are no tensors, as functions: the loss hangs on weights
                total = _weightless(self._loss_fn(outputs, targets))
            return total, 0, True
        loss = self._loss_fn(outputs, targets)
        if self._watch is not None:
            self._watch.after()
        several = loss.values() if isinstance(loss, Mapping) else [loss]
        count = None
        if any(isinstance(value, torch.Tensor) for value in several):  # means
            count = batches.count(targets, real, self.cfg.trainer.loss_count)
            if count == 0:
                self._losses.add_nothing()
                return _weightless(outputs), 0, True
        total, count = self._losses.add(named(loss, self._losses.weights, count)) if self._losses.weights else as_sum_and_count(loss, count)
        constant = torch.is_grad_enabled() and not total.requires_grad
        if constant and (self._watch is not None or self._totals.ranks > 1 or count == 0):
            total = total + _weightless(outputs)
        return total, count, constant

    @torch.no_grad()
    def _pairs(self, outputs: Any, targets: Any, real: int) -> list[tuple[float, float]]:
        """(sum, count) of each loss that loss_fn returns."""
        with self._policy.autocast(self.device.type):
            if isinstance(targets, Targets):
                assert self._layout.context is not None
                gathers = self._layout.context.loss.gathers
                outputs, targets = (self._layout.context.whole(outputs), targets.whole) if gathers else (outputs, targets.part)
            loss = self._loss_fn(outputs, targets)
            count = batches.count(targets, real, self.cfg.trainer.loss_count)
        pairs = named(loss, self._losses.weights, count) if self._losses.weights else [as_sum_and_count(loss, count)]
        return [(float(total), float(count)) for total, count in pairs]

    def _conclude(self) -> None:
        """Refuse, on every rank, a loss that this step has shown to be another one under this layout."""
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.conclude()

    def _peers(self) -> list[dist.ProcessGroup]:
        """Those with whom this rank computes one output."""
        return [self.mesh.root["tp"].get_group()] if self.cfg.parallel.tp > 1 else []

    @torch.no_grad()
    def _evaluated(self, inputs: Sequence[Any]) -> list[Any]:
        """What the model returns for each in evaluation mode; nothing on the stages of a pipeline but the last."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            found = [self._policy.cast_outputs(outputs) for outputs in self._outputs(inputs)]
            return batches.map_tensors(torch.clone, found)  # gathered weights among them are freed with the rest
        finally:
            self._layout.settle()
            for module, mode in modes:
                module.training = mode

    def _micro_batches(self, batch: LocalBatch | tuple[Any, Any], dealt: bool) -> list[tuple[Any, Any, int]]:
        """(inputs, targets, real samples) of each micro-batch; a pipeline gets as many as its schedule needs.

        Args:
            dealt: the batch is a part of one of all ranks, and not this rank's own.
        """
        share, size, pipeline = self._share(batch), self.micro_batch_size, self._layout.pipeline
        batch_norm.weigh(self._norms, share)
        if pipeline is not None:
            size = size or micro_batch_size(self.cfg, share.largest)
        micro = batches.split(share, size)
        if pipeline is not None:
            micro += [batches.filler(share)] * (pipeline.planned.micro_batches(len(micro)) - len(micro))
        context = self._layout.context
        if context is not None:
            context.refuse_shared(*micro[0][:2])
        elif pipeline is None and dealt:
            micro = self._fillers.filled(share, micro, training=torch.is_grad_enabled())
        micro = batches.opened(micro, self.model)
        return micro if context is None else self._sequences(context, micro)

    def _share(self, batch: LocalBatch | tuple[Any, Any]) -> LocalBatch:
        """This rank's part of a batch; the ranks agree on the largest where each brings its own and that decides about micro-batches."""
        share = batches.as_local(batch)
        if share is batch or self._data_ranks == 1 or (self.micro_batch_size is None and self._layout.pipeline is None):
            return share
        return share._replace(largest=int(self._totals.largest(float(share.real), over=self.mesh.data)))

    def _young(self, batch: Any, micro: list[tuple[Any, Any, int]]) -> AbstractContextManager:
        """What looks at the calls that the forwards of the first steps make."""
        if self._looked == _LOOKED or self.cfg.compile is not False:
            return nullcontext()
        self._looked += 1
        return bags.watching(self.model, batch, micro)

    def _beside(self, inputs: Any, training: bool) -> Any:
        """What the model returns beside the steps."""
        ((inputs, _, _),) = batches.opened([(inputs, None, 0)], self.model)
        try:
            return (self._outputs if training else self._evaluated)([inputs])
        finally:
            self._layout.settle()

    def _sequences(self, context: Context, micro: list[tuple[Any, Any, int]]) -> list[tuple[Any, Any, int]]:
        """This rank's part of every sequence."""
        parts = [(*context.part(inputs, targets), real) for inputs, targets, real in micro]
        if not context.proven:
            everywhere = self._layout.pipeline.everywhere if self._layout.pipeline is not None else lambda value: [value]
            with self._moved.preserved():
                context.prove(self._outputs, parts[0][0], everywhere)
                self._layout.settle()
        return parts

    def _end_sequences(self) -> None:
        """From here on the program may call the model, with whole sequences."""
        if self._layout.context is not None:
            self._layout.context.length = 0

    def _outputs(self, inputs: Sequence[Any]) -> list[Any]:
        """What the model returns for each; nothing on the stages of a pipeline but the last."""
        calls = self._calls([(each, None, 0) for each in inputs])
        with self._policy.autocast(self.device.type):
            if self._layout.pipeline is None:
                return [call(self.model, inputs) for inputs, call in calls]
            found: list[Any] = []
            self._layout.pipeline.evaluate(calls, lambda stage, number: nullcontext(), lambda number, outputs: found.append(outputs))
            return found

    def _train_stages(self, pipeline: Pipeline, micro: list[tuple[Any, Any, int]]) -> None:
        """Forward and backward of every micro-batch; the loss is known on the last stage and zero on the others until it is summed."""
        self._window = (0.0, 0.0)

        def finish(number: int, outputs: Any) -> torch.Tensor:
            unit = len(pipeline.planned.rank_of) - 1, number
            self._moved.before(unit, loss=True)
            total, count = self._measure(outputs, *micro[number][1:])
            self._moved.after(unit, micro[number][2], loss=True)
            return self._to_differentiate(total, count)

        @contextmanager
        def around(stage: int, number: int) -> Iterator[None]:
            self._moved.before((stage, number), loss=False)
            with self._around_stage(stage, number):
                yield
            with pipeline.split.apart():
                self._moved.after((stage, number), micro[number][2], loss=False)

        pipeline.train(self._calls(micro), around, finish, (self.cfg.seed, self.global_step, self._weights_rank))
        if not self._unit_agreed:
            self._unit = pipeline.largest(self._unit or 0.0)
            self._unit_agreed = True

    @contextmanager
    def _around_stage(self, stage: int, number: int) -> Iterator[None]:
        rng.reseed(self.device, self.cfg.seed, self.global_step, number, self._weights_rank, stage)
        watched = self._looked < _LOOKED and self.cfg.compile is False
        with self._policy.autocast(self.device.type), batch_norm.alone(self.cfg) if watched else nullcontext():
            yield

    def _again(self, inputs: Any, targets: Any, real: int) -> float:
        """The loss of a micro-batch that has been trained on, once more, as the first of its step; see `forward_state.py`."""
        sums = self._losses.sums
        with rng.all_preserved(), self._layout.unordered():
            rng.seed_all(self.cfg.seed)
            rng.reseed(self.device, self.cfg.seed, self.global_step, 0, self._weights_rank)
            total, _ = self._loss(self.model, inputs, targets, real)
        self._losses.sums = sums
        self._layout.settle()
        return float(total)

    def _again_stages(self, pipeline: Pipeline, micro: list[tuple[Any, Any, int]]) -> float:
        """`_again` over the stages; 0 on all but the last."""
        found, sums = [0.0], self._losses.sums
        with rng.all_preserved():
            rng.seed_all(self.cfg.seed)
            finish = lambda number, outputs: found.append(float(self._measure(outputs, *micro[number][1:])[0]))  # noqa: E731
            seeds = self.cfg.seed, self.global_step, self._weights_rank
            pipeline.evaluate(self._calls(micro), self._around_stage, finish, gradients=True, seeds=seeds)
        self._losses.sums = sums
        self._layout.settle()
        return found[-1]

    def _evaluate_stages(self, pipeline: Pipeline, micro: list[tuple[Any, Any, int]]) -> tuple[Scalar, Scalar]:
        window: tuple[Scalar, Scalar] = (0.0, 0.0)

        def finish(number: int, outputs: Any) -> None:
            nonlocal window
            window = self._totals.add(window, *self._measure(outputs, *micro[number][1:]))

        seeds = self.cfg.seed, self.global_step, self._weights_rank
        pipeline.evaluate(self._calls(micro), lambda stage, number: self._policy.autocast(self.device.type), finish, seeds=seeds)
        return window

    def _calls(self, micro: list[tuple[Any, Any, int]]) -> list[tuple[Any, Callable]]:
        inputs = [self._policy.cast_inputs(batches.to_device(part, self.device)) for part, _, _ in micro]
        return [(part, batches.call) for part in inputs]

    def _backward(self, total: torch.Tensor, count: Any) -> None:
        scaled = self._to_differentiate(total, count)
        self._inside_backward = True
        Engine._running += 1
        try:
            self._layout.backward(scaled)
        finally:
            self._inside_backward = False
            Engine._running -= 1
        if self.noise_scale is not None:
            self.noise_scale.end_part(self._totals.scalar(count))

    def _to_differentiate(self, total: torch.Tensor, count: Any) -> torch.Tensor:
        """Count a micro-batch, and scale its loss to what backward starts from."""
        if not total.requires_grad:
            raise UserError(
                "the loss does not depend on any trainable parameter: check that loss_fn uses the outputs and nothing detaches them"
            )
        self._window = self._totals.add(self._window or (0.0, 0.0), total, count)
        if self._unit is None:
            self._unit = self._agree_on_unit()
        return total * (self._layout.average * self.scaler.scale / self._unit)

    def _agree_on_unit(self) -> float:
        """A power of two near the count of a first micro-batch over all ranks, the same for the whole run.

        Sums are divided by it before backward so that float16 gradients have about the magnitude those of a mean have; a power of
        two rounds nothing, and the division by the true count makes up for it.
        """
        assert self._window is not None
        count = float(self._totals.over_ranks(self._window, over=self.mesh.weights)[1])
        return 2.0 ** round(math.log2(max(count, 1.0)))

    def _update_in_backward(self, updates: UpdateInBackward, micro: list[tuple[Any, Any, int]]) -> None:
        """Forward, the count over all ranks, and a backward from the mean, whose gradients are final as they come."""
        if len(micro) > 1:
            raise UserError(
                f"trainer.update_in_backward=true: a step has {len(micro)} micro-batches, and the first would change the weights of the next; "
                "write data.micro_batch_size=null, a smaller data.global_batch, or trainer.update_in_backward=false"
            )
        (inputs, targets, real), *_ = micro
        rng.reseed(self.device, self.cfg.seed, self.global_step, 0, self._weights_rank)
        total, count = self._loss(self._layout.run, inputs, targets, real)
        self._moved.after(0, real)
        self._moved.end(None)
        self._window = self._totals.add((0.0, 0.0), total, count)
        totals = self._losses.weighed(self._totals.over_ranks((*self._window, *self._losses.sums, *self._votes)))
        self._layout.backward(total * (self._layout.average / or_one(totals[1])))
        self._layout.reduce(self._params)
        if self._layout.used is not None:
            self._layout.used.clear()
        rest = [param.grad for param in self._params if param.grad is not None]
        self._reduced = totals, self._totals.scalar(updates.norm(rest, self.device))

    def _rehearse(self, share: LocalBatch, size: int) -> bool:
        """Whether forward and backward of micro-batches of `size` samples fit in this rank's memory; afterwards all is as it was."""
        micro = batches.split(share, size)[:2]  # one that accumulates and one that reduces
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        fits = True
        with rng.preserved(self.device), self._moved.preserved(), self._layout.rehearsal():
            try:
                for number, part in enumerate(micro):
                    with self.no_sync() if number + 1 < len(micro) else nullcontext():
                        self._rehearse_one(*part)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                fits = False
        for param in self.model.parameters():
            param.grad = None
        if self.noise_scale is not None:
            self.noise_scale.begin(self.global_step)
        self._losses.begin()
        if self._layout.used is not None:
            self._layout.used.clear()
        for buffer, value in buffers:
            buffer.copy_(value)
        if not fits and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fits

    def _rehearse_one(self, inputs: Any, targets: Any, real: int) -> None:
        total, _ = self._loss(self._layout.run, inputs, targets, real)
        if total.requires_grad:
            self._layout.backward(total)

    def _none_fits(self) -> UserError:
        self.micro_batch_size = 1
        return memory.report(self, torch.OutOfMemoryError("data.micro_batch_size=auto: a rank cannot train on a single sample"))

    def _average_to_evaluate(self) -> AbstractContextManager:
        return self.ema.applied() if self.ema and self.ema.options.evaluate else nullcontext()

    def _update(self) -> None:
        self._updating = True
        try:
            with accumulate.rounded(self._params) if self._wide else nullcontext():
                for optimizer in self.optimizers:
                    optimizer.step()
        finally:
            self._updating = False

    def _total_norm(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        return (
            self._layout.experts.norm(self.model, self.device) if self._layout.experts.owners else gradients.total_norm(grads, self.device)
        )

    def _sum_totals(self) -> tuple[list[Scalar], list[Scalar]]:
        """Sums, counts and votes of this step over the ranks, and what its noise scale needs; see `Totals.of_step`."""
        assert self._window is not None
        parts = self.noise_scale.totals(self._data_ranks) if self.noise_scale is not None else ()
        totals = self._totals.of_step((*self._window, *self._losses.sums, *self._votes, *parts))
        end = len(totals) - len(parts)
        return self._losses.weighed(totals[:end]), totals[end:]

    def _set_lr(self) -> None:
        factor = schedules.factor(self.cfg.scheduler, self.updates, self.total_updates)
        self._written_lrs = [[rate * factor for rate in rates] for rates in self._base_lrs]
        for optimizer, rates in zip(self.optimizers, self._written_lrs, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=False):  # a group may have been added just now
                group["lr"] = rate

    def _check_finite(self, result: StepResult) -> None:
        if self.device.type == "cpu":
            self._raise_unless_finite(result)
        else:
            self.check_last_step()
            self._unchecked = result

    def _raise_unless_finite(self, result: StepResult) -> None:
        nonfinite.check(
            result, self.global_step, late=self.device.type != "cpu", updated=self._in_backward is not None, half=self.scaler.enabled
        )

    def _guard(self, grad: torch.Tensor) -> torch.Tensor:
        if not self._inside_backward and Engine._running:
            if self._window is not None:
                raise UserError(
                    "the backward of another engine runs through this model while its own gradients wait for step(), and would add to them; call "
                    "step() of this engine first"
                )
            self._strays = True
        elif not self._inside_backward:
            raise UserError(
                "loss.backward() skips the loss scale and the division by the global count; write engine.backward(loss) instead"
            )
        return grad


def _at_most(value: Scalar, bound: float) -> Scalar:
    return value.clamp(max=bound) if isinstance(value, torch.Tensor) else min(value, bound)


def _weightless(outputs: Any) -> torch.Tensor:
    """A zero that depends on every output, so that a rank without samples takes part in the collectives of backward.

    Zero in value and gradient also of outputs that are not finite, as the loss a model computes itself is where no label counts.
    """
    sums = [(leaf.real if leaf.is_complex() else leaf).sum(dtype=torch.float64) for leaf in batches.tensors(outputs) if leaf.requires_grad]
    return sum((total.nan_to_num() * 0 for total in sums), torch.zeros((), dtype=torch.float64))

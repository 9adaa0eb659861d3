"""The loop: data in a fixed order, steps, logs, evaluations, checkpoints, and a clean end whatever ends it."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from paratrain import callbacks as events
from paratrain import checkpoint, data, distributed
from paratrain.api import setup
from paratrain.batch import LocalBatch
from paratrain.config import Config
from paratrain.durations import Duration, parse_duration
from paratrain.engine import Engine, StepResult
from paratrain.errors import ConfigError, UserError
from paratrain.loss import Loss
from paratrain.metrics import flops, sinks
from paratrain.metrics.meter import Meter, device_peak
from paratrain.schema import to_dict

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model on a data set until the config says stop.

    Args:
        cfg: the whole configuration.
        model_fn: any `nn.Module`, or a callable that returns one; see `setup`.
        loss_fn: `loss_fn(outputs, targets)` -> (sum, count) or a scalar mean.
        train_data: map-style data set of (inputs, targets) samples.
        eval_data: likewise; None evaluates nothing.
        callbacks: see `Callback`.

    Attributes:
        engine: the `Engine`, for callbacks and loops of your own.
        output_dir: metrics, checkpoints and logs of the job.
        interrupted: whether a signal ended training before its time.
    """

    def __init__(
        self,
        cfg: Config,
        model_fn: Callable[[], nn.Module] | nn.Module,
        loss_fn: Loss,
        train_data: Any,
        eval_data: Any = None,
        callbacks: Sequence[Any] = (),
    ):
        self.cfg = cfg
        self.callbacks = events.checked(callbacks)
        self.train_data = _dataset(train_data, "train_data")
        self.eval_data = _dataset(eval_data, "eval_data") if eval_data is not None else None
        self.order = data.Order(len(self.train_data), cfg.data.global_batch, cfg.seed, cfg.data.shuffle)
        self.engine: Engine = setup(model_fn, loss_fn, cfg)
        asked = Path(cfg.output_dir or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        self.output_dir: Path = distributed.on_main(lambda: _writable(asked))
        self.interrupted = False
        self._seconds = 0.0  # of training, by rank 0's clock, over all restarts
        self._signalled = False

    # ------------------------------------------------------------------ the loop

    def fit(self) -> dict[str, float]:
        """Train to the end, from the checkpoint that `resume` names, and return the last metrics.

        SIGINT and SIGTERM end training at a step boundary, on all ranks at the same one, with a checkpoint.

        Raises:
            UserError: nothing says when to stop, or what the config asks for cannot be done.
        """
        last = self._last_step()
        resumed = self._resume()
        self.engine.plan_updates(last)
        outputs = sinks.build(self.cfg.logger, self.output_dir, resume=resumed)
        info = sinks.run_info(to_dict(self.cfg), self.output_dir, distributed.world_size(), self.engine.global_step, last)
        exit_code = 1
        try:
            for sink in outputs:
                sink.start(info)
            with self._signals_end_training():
                metrics = self._run(outputs, last)
            exit_code = 0
            return metrics
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_exception(self, error)
            raise
        finally:
            for sink in outputs:
                sink.finish(exit_code)

    def _run(self, outputs: list[sinks.Sink], last: int | None) -> dict[str, float]:
        engine, cfg = self.engine, self.cfg
        meter = self._meter()
        eval_due = _Periodic("trainer.eval_every", cfg.trainer.eval_every, self._position)
        save_due = _Periodic("checkpoint.every", cfg.checkpoint.every, self._position)
        self._emit("on_fit_start")
        metrics: dict[str, float] = {}
        previous: StepResult | None = None
        began = time.monotonic() - self._seconds
        batches = self._batches(meter, last)
        while not self.interrupted and not self._reached_end(last):
            batch = next(batches)
            # rank 0's clock and any rank's signal reach all ranks in the collective that sums the loss
            elapsed = time.monotonic() - began if engine.is_main_process else 0.0
            result = engine.train_step(batch, votes=(float(self._signalled), elapsed))
            meter.add(batch.size, result.device_count if _is_text(batch) else None)
            self._emit("on_step_end", result)
            settled = result if engine.device.type == "cpu" else previous  # reading a step makes the host wait for it
            if settled is not None:
                self.interrupted, self._seconds = settled.votes[0] > 0, settled.votes[1]
            previous = result
            step = engine.global_step
            ending = self.interrupted or self._reached_end(last)
            if step == 1 or step % cfg.trainer.log_every == 0 or ending:
                metrics = self._log(outputs, result, meter)
            with meter.pause():
                if eval_due() or (ending and not self.interrupted and self.eval_data is not None):
                    metrics |= self._evaluate_and_log(outputs)
                if save_due() or (ending and cfg.checkpoint.at_end):
                    self._save(step)
        engine.check_last_step()
        self._emit("on_fit_end")
        return metrics

    def _batches(self, meter: Meter, last: int | None) -> Iterator[LocalBatch]:
        mesh = self.engine.mesh.data
        stream = data.loader(
            self.train_data,
            self.order,
            self.engine.global_step,
            mesh.get_local_rank(),
            mesh.size(),
            workers=self.cfg.data.workers,
            seed=self.cfg.seed,
            stop_step=last,
            pin_memory=self.engine.device.type == "cuda",
        )
        while True:
            with meter.data():
                _, batch = next(stream)
            yield batch

    def _meter(self) -> Meter:
        engine, cfg = self.engine, self.cfg
        sample = data.loader(self.train_data, self.order, 0, 0, 1, seed=cfg.seed, stop_step=1)
        _, batch = next(sample)
        return Meter(
            distributed.world_size(),
            engine.device,
            flops.count(engine.model, batch.inputs),
            device_peak(engine.device, cfg.precision.name, cfg.logger.peak_tflops),
        )

    def _log(self, outputs: list[sinks.Sink], result: StepResult, meter: Meter) -> dict[str, float]:
        engine = self.engine
        metrics = {
            "tokens": engine.tokens,
            "epoch": engine.global_step / self.order.steps_per_epoch,
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
        }
        if engine.scaler.enabled:
            metrics |= {"train/loss_scale": result.loss_scale, "train/skipped_steps": engine.scaler.skipped}
        metrics |= meter.read()
        self._emit("on_log", metrics)
        for sink in outputs:
            sink.log(engine.global_step, metrics)
        return metrics

    # ------------------------------------------------------------------ evaluation

    def evaluate(self) -> dict[str, float]:
        """`eval/loss` over the evaluation data, every sample once, and `eval/perplexity` where the targets are tokens.

        Raises:
            UserError: there is no evaluation data.
        """
        if self.eval_data is None:
            raise UserError("evaluate() without eval_data; pass Trainer(..., eval_data=...)")
        cfg, mesh = self.cfg, self.engine.mesh.data
        order = data.Order(len(self.eval_data), cfg.data.global_batch, cfg.seed, shuffle=False)
        steps = min(order.steps_per_epoch, cfg.trainer.eval_batches or order.steps_per_epoch)
        total = count = 0.0
        text = False
        for _, batch in data.loader(self.eval_data, order, 0, mesh.get_local_rank(), mesh.size(), seed=cfg.seed, stop_step=steps):
            result = self.engine.eval_step(batch)
            if result.count:
                total, count = total + result.loss * result.count, count + result.count
            text = _is_text(batch)
        metrics = {"eval/loss": total / count if count else math.nan}
        if text:
            metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 700.0))
        self._emit("on_eval_end", metrics)
        return metrics

    def _evaluate_and_log(self, outputs: list[sinks.Sink]) -> dict[str, float]:
        metrics = self.evaluate()
        for sink in outputs:
            sink.log(self.engine.global_step, {"tokens": self.engine.tokens, **metrics})
        return metrics

    # ------------------------------------------------------------------ checkpoints

    @property
    def checkpoint_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    def _save(self, step: int) -> None:
        path = checkpoint.step_path(self.checkpoint_dir, step)
        callbacks = [callback.state_dict() if hasattr(callback, "state_dict") else {} for callback in self.callbacks]
        self.engine.save(path, {"data": self._data_identity(), "seconds": self._seconds, "callbacks": callbacks})
        if self.cfg.checkpoint.keep is not None and self.engine.is_main_process:
            checkpoint.prune(self.checkpoint_dir, self.cfg.checkpoint.keep)
        self._emit("on_save", path)

    def _resume(self) -> bool:
        path = distributed.on_main(self._find_checkpoint)
        if path is None:
            return False
        extra = self.engine.load(path)
        for name, saved in extra["data"].items():
            mine = self._data_identity()[name]
            if saved != mine:
                raise UserError(
                    f"resume={path}: saved with {name}={saved}, this job has {mine}; the data order would not continue. Restore it, or write resume=none"
                )
        self._seconds = extra["seconds"]
        for callback, state in zip(self.callbacks, extra["callbacks"], strict=False):
            if state:
                callback.load_state_dict(state)
        if self.engine.is_main_process:
            log.info("resumed from %s at step %d", path, self.engine.global_step)
        return True

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from: this job's own newest one before the one `resume` names, so that a restarted job goes on."""
        own, asked = checkpoint.latest(self.checkpoint_dir), self.cfg.resume
        if asked == "none":
            if own is not None:
                raise UserError(
                    f"resume=none, but {self.checkpoint_dir} holds checkpoints of an earlier run; write resume=auto to go on with it, or another output directory"
                )
            return None
        if own is not None or asked == "auto":
            return own
        named = Path(asked)
        found = named if (named / checkpoint.FILE_NAME).exists() else checkpoint.latest(named) or checkpoint.latest(named / "checkpoints")
        if found is None:
            raise UserError(
                f"resume={asked}: no complete checkpoint there; write resume=auto, none, or the path of a step-... directory or of a run"
            )
        return found

    def _data_identity(self) -> dict[str, Any]:
        return {"data.global_batch": self.order.global_batch, "data.shuffle": self.order.shuffle, "len(train_data)": self.order.length}

    # ------------------------------------------------------------------ when

    def _position(self, unit: str) -> float:
        """How far training is, in `steps`, `epochs`, `tokens` or `seconds`; equal on every rank."""
        if unit == "tokens":
            return self.engine.tokens
        if unit == "seconds":
            return self._seconds
        step = self.engine.global_step
        return step if unit == "steps" else step / self.order.steps_per_epoch

    def _last_step(self) -> int | None:
        """The step at which training ends, where it can be told beforehand."""
        trainer = self.cfg.trainer
        ends = [trainer.max_steps] if trainer.max_steps is not None else []
        if trainer.max_epochs is not None:
            ends.append(math.ceil(trainer.max_epochs * self.order.steps_per_epoch))
        if not ends and trainer.max_tokens is None and trainer.max_time is None:
            raise ConfigError(["trainer: nothing says when to stop; write trainer.max_steps=1000 (or max_epochs, max_tokens, max_time)"])
        return min(ends, default=None)

    def _reached_end(self, last: int | None) -> bool:
        trainer = self.cfg.trainer
        return (
            (last is not None and self.engine.global_step >= last)
            or (trainer.max_tokens is not None and self.engine.tokens >= trainer.max_tokens)
            or (trainer.max_time is not None and self._seconds >= parse_duration(trainer.max_time).value)
        )

    @contextmanager
    def _signals_end_training(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for the end of training; a second SIGINT does not wait for the step."""

        def ask(number: int, frame: Any) -> None:
            if self._signalled and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signalled = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _emit(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(self, *args)


class _Periodic:
    """Says, asked once a step, whether another period (`500`, `1ep`, `10Mtok`, `30min`) is over."""

    def __init__(self, key: str, text: str | None, position: Callable[[str], float]):
        self.duration: Duration | None = _duration(key, text) if text else None
        self.position = position
        self._advance()

    def _advance(self) -> None:
        if self.duration:
            periods = math.floor(self.position(self.duration.unit) / self.duration.value + 1e-9)
            self.next = (periods + 1) * self.duration.value

    def __call__(self) -> bool:
        if self.duration is None or self.position(self.duration.unit) < self.next - 1e-9:
            return False
        self._advance()
        return True


def _duration(key: str, text: str) -> Duration:
    try:
        return parse_duration(str(text))
    except UserError as error:
        raise ConfigError([f"{key}: {error}"]) from None


def _dataset(dataset: Any, name: str) -> Any:
    dataset = data.map_style(dataset, name)
    if len(dataset) == 0:
        raise UserError(f"{name} is empty: it has no sample; check the data section of the config")
    return dataset


def _is_text(batch: LocalBatch) -> bool:
    """Whether the targets are tokens: integers along a sequence."""
    return any(isinstance(t, torch.Tensor) and t.ndim > 1 and t.dtype in (torch.int64, torch.int32) for t in tree_leaves(batch.targets))


def _writable(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir={directory}: cannot write there ({error.strerror}); choose another with hydra.run.dir=PATH (command line) or output_dir=PATH"
        ) from None
    return directory

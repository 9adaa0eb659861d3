"""The loop: data in a fixed order, steps, logs, evaluations, checkpoints, and a clean end whatever ends it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from paratrain import build, checkpoint, data, distributed, lock, notes, resume, when
from paratrain import callbacks as events
from paratrain.agreement import FIT, agreed
from paratrain.api import setup
from paratrain.batch import LocalBatch
from paratrain.checkpoint.saver import Saver
from paratrain.config import Config
from paratrain.engine import Engine
from paratrain.errors import UserError
from paratrain.faults import batches as bad_batches
from paratrain.faults import growth, memory, restarts, signals
from paratrain.faults.nonfinite import NonFiniteError
from paratrain.faults.watchdog import Watchdog
from paratrain.goodput import Goodput, since_process_start
from paratrain.loss import Loss
from paratrain.metrics import flops, sinks
from paratrain.metrics.meter import Meter, device_peak
from paratrain.redact import redact
from paratrain.result import StepResult
from paratrain.schema import to_dict
from paratrain.verify import background, verdict

log = logging.getLogger(__name__)

_GRACE = 30.0
"""Seconds that a save in flight has to end after an error: it may be the last one, and its peers may be gone."""


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
        proof: the verdict on the layout, on every rank once `fit` returns; `status` is "running" until it is known.
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
        made = time.monotonic()
        self.cfg = cfg
        self.callbacks = events.checked(callbacks)
        self.train_data = data.map_style(train_data, "train_data")
        self.eval_data = data.map_style(eval_data, "eval_data") if eval_data is not None else None
        for key, value in (("trainer.eval_every", cfg.trainer.eval_every), ("checkpoint.best", cfg.checkpoint.best)):
            if value is not None and eval_data is None:
                raise UserError(f"{key}={value} without evaluation data; pass eval_data, or leave {key} out")
        self.order = data.Order(len(self.train_data), cfg.data.global_batch, cfg.seed, cfg.data.shuffle)
        self.engine: Engine = setup(model_fn, loss_fn, cfg)
        self.agreement = self.engine.agreement
        asked = Path(cfg.output_dir or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        self.output_dir: Path = distributed.on_main(lambda: _writable(asked))
        distributed.refuse_unless_shared(self.output_dir)
        self.interrupted = False
        self.proof = verdict.Verdict("running", "not proven yet")
        self._record = build.record(to_dict(cfg), model_fn, self.engine.model, loss_fn, self.train_data, self.eval_data)
        self._made = made
        self._seconds = 0.0  # of training, by rank 0's clock, over all restarts
        self._asked = signals.Asked()
        self._watchdog = Watchdog(when.seconds(cfg.trainer.step_timeout), self.output_dir)
        self._spikes = bad_batches.SpikeDetector(cfg.trainer.spike)
        self._growth = growth.Growth()
        self._left_out: set[int] = set()  # steps whose batches are not trained on
        self._skipped = self._rollbacks = 0  # in a row; since the last checkpoint
        self._logged: int | None = None  # steps of the last log line and of the newest checkpoint
        self._saved: int | None = None
        self._evaluated: tuple[int | None, dict[str, float]] = (None, {})
        self._last: dict[str, float] = {}  # metrics that `fit` returned, or would return here
        self._best: float | None = None

    # ------------------------------------------------------------------ the loop

    @agreed(FIT)
    def fit(self) -> dict[str, float]:
        """Train to the end, from the checkpoint that `resume` names, and return the last metrics.

        SIGINT, SIGTERM and SIGUSR1 end training at a step boundary, on all ranks at the same one, with a checkpoint.

        Raises:
            UserError: nothing says when to stop, what the config asks for cannot be done, or another job writes in the output directory.
        """
        with ExitStack() as stack:
            distributed.on_main(lambda: stack.enter_context(lock.held(self.output_dir)))
            return self._fit()

    def _fit(self) -> dict[str, float]:
        cfg, engine = self.cfg, self.engine
        last = when.last_step(cfg.trainer, self.order.steps_per_epoch)
        began = since_process_start() if distributed.launched() else time.monotonic() - self._made
        self.goodput = Goodput(self.output_dir / "goodput.json" if engine.is_main_process else None, began)
        logs = [self.output_dir / name for name in sinks.ROWS]
        self.saver = Saver(engine, self.checkpoint_dir, cfg.checkpoint, beside=logs)
        engine.plan_updates(last)
        resumed = self._resume()
        distributed.on_main(lambda: restarts.note_attempt(self.output_dir, engine.global_step, cfg.trainer.max_stuck_restarts))
        outputs = sinks.build(cfg.logger, self.output_dir, resume=resumed)
        info = sinks.run_info(self._record, self.output_dir, distributed.world_size(), engine.global_step, last)
        exit_code = 1
        try:
            for sink in outputs:
                sink.start(info)
            self._outputs = outputs
            with closing(self._prove(last)) as self._proof, signals.listening(self._asked), self._watchdog:
                metrics = self._run(outputs, last)
            exit_code = 0
            return metrics
        except BaseException as error:
            self.agreement.tell(error)
            self.saver.join(_GRACE)
            self._note_bad_batch(error)
            for callback in self.callbacks:
                callback.on_exception(self, error)
            if memory.is_out_of_memory(error):
                raise memory.report(engine, error) from error
            raise
        finally:
            self.goodput.write(now=True)
            if engine.is_main_process:
                log.info(self.goodput.summary())
            for sink in outputs:
                sink.finish(exit_code)

    def _run(self, outputs: Sequence[sinks.Sink], last: int | None) -> dict[str, float]:
        engine, cfg = self.engine, self.cfg
        meter = self._meter()
        self._periods = {
            "eval": when.Periodic("trainer.eval_every", cfg.trainer.eval_every, self._position),
            "save": when.Periodic("checkpoint.every", cfg.checkpoint.every, self._position),
        }
        self._emit("on_fit_start")
        if (cfg.trainer.nonfinite == "rollback" or cfg.trainer.spike) and not distributed.on_main(
            lambda: checkpoint.latest(self.checkpoint_dir)
        ):
            self._save()  # something to go back to
        metrics: dict[str, float] = dict(self._last)  # of a run that is over
        result = previous = None
        began = time.monotonic() - self._seconds
        batches = self._batches(meter, last)
        self.goodput.start()
        while not self.interrupted and not when.is_over(cfg.trainer, last, self._position):
            batch = next(batches)
            step = engine.global_step
            if step in self._left_out:
                engine.global_step += 1
                continue
            # rank 0's clock, any rank's signal and the end of a save reach all ranks in the collective that sums the loss
            elapsed = time.monotonic() - began if engine.is_main_process else 0.0
            votes = float(bool(self._asked)), elapsed, float(self.saver.ended), 1.0, float(self._proof.failed())
            result = engine.train_step(batch, votes=votes)
            self._watchdog.beat(f"training step {step + 2}")
            meter.add(batch.size, result.device_count if _is_text(batch) else None)
            self._emit("on_step_end", result)
            settled, settled_step = (result, step) if engine.device.type == "cpu" else (previous, step - 1)  # reading a step waits for it
            previous = result
            if settled is not None:
                asked, self._seconds, saved, voters, disproven = settled.votes
                self.interrupted = asked > 0
                if disproven:
                    self._refuse_layout()
                if saved == voters:
                    self._settle_save()
            bad = self._judge(result, step, settled, settled_step)
            if bad is not None:
                self._roll_back(bad)
                batches, result, previous = self._batches(meter, last), None, None
                self.goodput.start()
                continue
            if self._proof.told():
                self._note_proof(self._proof.verdict)
            if engine.global_step == 1 or engine.global_step % cfg.trainer.log_every == 0:
                metrics = self._log(outputs, result, meter)
                self._growth.note(engine.global_step, last)
            with meter.pause():
                if self._periods["eval"]():
                    metrics |= self._evaluate_and_log(outputs)
                if self._periods["save"]():
                    self._save()
        with meter.pause():
            if result is not None:
                if self._logged != engine.global_step:
                    metrics |= self._log(outputs, result, meter)
                if not self.interrupted and self.eval_data is not None and self._evaluated[0] != engine.global_step:
                    metrics |= self._evaluate_and_log(outputs)
            self._end_proof()
            self._finish_saves(save=cfg.checkpoint.at_end and result is not None)
        engine.check_last_step()
        self._emit("on_fit_end")
        return metrics

    # ------------------------------------------------------------------ proof

    def _prove(self, last: int | None) -> background.Proof:
        """Begin to prove the layout, and with trainer.prove=before see it done."""
        mode = distributed.on_main(lambda: background.chosen(self.cfg.trainer.prove))
        proof = background.Proof(self.engine, self._first_batches, last, mode)
        self.proof = proof.verdict
        if mode == "before":
            try:
                self._note_proof(proof.wait(background.LONGEST))
            except BaseException:
                proof.close()
                raise
            if self.proof.status == "different":
                raise UserError(background.refusal(self.proof))
        if proof.told():
            self._note_proof(proof.verdict)
        return proof

    def _first_batches(self, samples: int) -> list[tuple[Any, Any]]:
        """The first global batches, each cut to about so many samples as they are read."""
        parts = max(1, self.order.global_batch // samples)
        stream = data.loader(self.train_data, self.order, 0, 0, parts, seed=self.cfg.seed, stop_step=verdict.STEPS)
        return [(batch.inputs, batch.targets) for _, batch in stream]

    def _refuse_layout(self) -> None:
        found = self._proof.wait(0)
        self._note_proof(found)
        self._save(wait=True)
        saved = f"Training was stopped after step {self.engine.global_step} and saved in {self.checkpoint_dir}: nothing is lost. "
        raise UserError(background.refusal(found, saved))

    def _end_proof(self) -> None:
        """The verdict on every rank; a proof that still runs gets as long again as training took, and at most 10 seconds."""
        found = self._proof.wait(min(self._seconds, 10.0))
        if found.status == "different":
            self._refuse_layout()
        if found != self.proof:
            self._note_proof(found)

    def _note_proof(self, found: verdict.Verdict) -> None:
        """Write the verdict wherever the run is recorded."""
        self.proof = found
        if not self.engine.is_main_process or found.status == "running":
            return
        log.log(
            logging.INFO if found.status in ("proven", "off") else logging.WARNING,
            found.line + (" (known from before)" if found.kept else ""),
        )
        for sink in self._outputs:
            sink.note("proof", found.line)
        record = {"proof": found.record(), "config": redact(to_dict(self.cfg))}
        notes.attempt("config.json", lambda: notes.write_private(self.output_dir / "config.json", json.dumps(record, indent=2)))

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
            with meter.data(), self.goodput.during("data"):
                _, batch = next(stream)
            yield batch

    def _meter(self) -> Meter:
        engine, cfg = self.engine, self.cfg
        sample = data.loader(self.train_data, self.order, 0, 0, 1, seed=cfg.seed, stop_step=1)
        _, batch = next(sample)
        return Meter(
            distributed.world_size(),
            engine.device,
            flops.count(engine.blueprint or engine.model, batch.inputs),
            device_peak(engine.device, cfg.precision.name, cfg.logger.peak_tflops),
            recomputed={"none": 0.0, "full": 1.0 / cfg.memory.recompute_every}.get(cfg.memory.recompute),
        )

    def _log(self, outputs: Sequence[sinks.Sink], result: StepResult, meter: Meter) -> dict[str, float]:
        engine = self.engine
        metrics = {
            "tokens": engine.tokens,
            "epoch": engine.global_step / self.order.steps_per_epoch,
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
        }
        metrics |= {f"train/loss/{name}": total / count if count else math.nan for name, (total, count) in result.losses.items()}
        if engine.scaler.enabled:
            metrics |= {"train/loss_scale": result.loss_scale, "train/skipped_steps": engine.scaler.skipped}
            metrics["train/loss_scale_changes"] = engine.scaler.changes
        if engine.fallback:
            metrics |= engine.fallback.metrics()
        if engine.noise_scale:
            metrics["train/noise_scale"] = engine.noise_scale.value
        metrics |= meter.read()
        metrics["goodput/ratio"] = self.goodput.ratio
        self.goodput.write()
        self._logged = engine.global_step
        self._emit("on_log", metrics)
        self._last = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for sink in outputs:
            sink.log(engine.global_step, metrics)
        return metrics

    # ------------------------------------------------------------------ evaluation

    @agreed("Trainer.evaluate()")
    def evaluate(self) -> dict[str, float]:
        """`eval/loss` over the evaluation data, every sample once, and `eval/perplexity` where the targets are tokens.

        Raises:
            UserError: there is no evaluation data.
        """
        if self.eval_data is None:
            raise UserError("evaluate() without eval_data; pass Trainer(..., eval_data=...)")
        if hasattr(self, "saver"):
            self.saver.wait_for_copy()  # an optimizer that averages weights swaps them for an evaluation
        cfg, mesh = self.cfg, self.engine.mesh.data
        order = data.Order(len(self.eval_data), cfg.data.global_batch, cfg.seed, shuffle=False)
        steps = min(order.steps_per_epoch, cfg.trainer.eval_batches or order.steps_per_epoch)
        total = count = 0.0
        named: dict[str, tuple[float, float]] = {}
        text = False
        for _, batch in data.loader(self.eval_data, order, 0, mesh.get_local_rank(), mesh.size(), seed=cfg.seed, stop_step=steps):
            result = self.engine.eval_step(batch)
            if result.count:
                total, count = total + result.loss * result.count, count + result.count
            for name, pair in result.losses.items():
                had = named.get(name, (0.0, 0.0))
                named[name] = had[0] + pair[0], had[1] + pair[1]
            text = _is_text(batch)
            self._watchdog.beat("evaluating")
        metrics = {"eval/loss": total / count if count else math.nan}
        if named:
            means = {name: part / number if number else math.nan for name, (part, number) in named.items()}
            metrics = {f"eval/loss/{name}": mean for name, mean in means.items()}
            weights = cfg.trainer.loss_weights or {}
            metrics["eval/loss"] = sum(weights[name] * mean for name, mean in means.items() if not math.isnan(mean))
        if text:
            metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 700.0))
        self._emit("on_eval_end", metrics)
        return metrics

    def _evaluate_and_log(self, outputs: Sequence[sinks.Sink]) -> dict[str, float]:
        step, options = self.engine.global_step, self.cfg.checkpoint
        with self.goodput.during("evaluation"):
            metrics = self.evaluate()
        for sink in outputs:
            sink.log(step, {"tokens": self.engine.tokens, **metrics})
        self._evaluated = step, metrics
        self._last = {**self._last, **{name: value for name, value in metrics.items() if isinstance(value, int | float)}}
        if options.best is not None:
            if options.best not in metrics:
                raise UserError(f"checkpoint.best={options.best}: no evaluation has it (there are: {', '.join(metrics)})")
            value = metrics[options.best]
            if self._best is None or (value < self._best if options.best_mode == "min" else value > self._best):
                self._best = value
                self._save()
        return metrics

    # ------------------------------------------------------------------ checkpoints

    @property
    def checkpoint_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    def _save(self, wait: bool = False) -> None:
        step = self.engine.global_step
        if step == self._saved:
            return
        with self.goodput.during("checkpoint"):
            self._settle_save()
            callbacks = [callback.state_dict() if hasattr(callback, "state_dict") else {} for callback in self.callbacks]
            extra = {
                "data": self._data_identity(),
                "seconds": self._seconds,
                "callbacks": callbacks,
                "metrics": self._evaluated[1] if self._evaluated[0] == step else {},
                "best": self._best,
                "last": self._last,
                "left_out": sorted(self._left_out),
                "spike": self._spikes.state_dict(),
                "goodput": self.goodput.state(),
                "proof": self.proof.record(),
            }
            self._watchdog.beat("saving")
            self.saver.begin(step, extra, wait=wait)
            self._saved = step
            if not self.saver.options.async_save or wait:
                self._settle_save()

    def _settle_save(self) -> None:
        """Learn, on all ranks together, how the save in flight ended; waits for it."""
        if self.saver.busy:
            with self.goodput.during("checkpoint"):
                path = self.saver.settle()
            if path is None:
                self._saved = None
                return
            self._rollbacks = 0
            self._emit("on_save", path)

    def _finish_saves(self, save: bool) -> None:
        """At the end of training a save that fails is an error: there is no later one."""
        self._settle_save()
        if save and self._saved != self.engine.global_step:
            self._save(wait=True)
            if self._saved is None:
                raise checkpoint.CheckpointError("the last checkpoint could not be saved, see above; the one before it is the newest")

    def _resume(self) -> bool:
        path = distributed.on_main(lambda: resume.find(self.cfg, self.checkpoint_dir))
        while path is not None:
            try:
                self._restore(path)
                return True
            except checkpoint.CheckpointError as error:
                kept, fault = path, error  # the names of an except clause end with it
            distributed.on_main(lambda: resume.set_aside_if_damaged(kept, self.checkpoint_dir, fault))  # noqa: B023 - called at once
            path = distributed.on_main(lambda: resume.find(self.cfg, self.checkpoint_dir))
        return False

    def _restore(self, path: Path) -> None:
        extra = self.engine.load(path)
        if checkpoint.read_meta(path)["seed"] is None:
            log.info("resumed from %s, a converted run, at step %d of this job's own data", path, self.engine.global_step)
            return
        extra = resume.checked_extra(extra, path)
        for name, mine in self._data_identity().items():
            saved = extra["data"].get(name)
            if saved != mine:
                raise UserError(
                    f"resume={path}: saved with {name}={saved}, this job has {mine}; the data order would not continue. Restore it, or write resume=none"
                )
        self._seconds = extra["seconds"]
        self._best = extra.get("best")
        self._last = dict(extra.get("last") or {})
        self._left_out |= set(extra["left_out"])
        self._spikes.load_state_dict(extra["spike"])
        self._saved = self.engine.global_step if path.parent == self.checkpoint_dir else None
        self.goodput.resumed(extra["goodput"])
        for callback, kept in zip(self.callbacks, extra["callbacks"], strict=False):
            if kept:
                callback.load_state_dict(kept)
        if self.engine.is_main_process:
            log.info("resumed from %s at step %d", path, self.engine.global_step)

    # ------------------------------------------------------------------ bad batches

    def _judge(self, result: StepResult, step: int, settled: StepResult | None, settled_step: int) -> int | None:
        """The step whose batch training must go back behind, if any. Ends training after too many."""
        if result.skipped and (not self.engine.scaler.enabled or not math.isfinite(result.loss)):
            self._record_batch(step, "not finite", loss=result.loss, grad_norm=result.grad_norm)
            self._skipped += 1
            if self.cfg.trainer.nonfinite == "rollback":
                return step
            if self._skipped > bad_batches.MOST_SKIPPED_IN_A_ROW:
                if self.engine.scaler.enabled:
                    raise UserError(
                        f"step {step}: {self._skipped} steps in a row had a loss that is not finite, which no loss scale mends: activations leave the "
                        "range of float16; move what overflows to float32 (precision.fallback.policy=module) or write precision=bf16"
                    )
                raise UserError(
                    f"step {step}: {self._skipped} steps in a row had a loss or gradient that is not finite (trainer.nonfinite=skip); "
                    f"it is not the batches. Their samples are in {bad_batches.FILE_NAME}; lower optimizer.lr or go back to an earlier checkpoint"
                )
            return None
        self._skipped = 0
        if settled is not None and self.cfg.trainer.spike and not settled.skipped and self._spikes.is_spike(settled.loss):
            self._record_batch(settled_step, "spike", loss=settled.loss, grad_norm=settled.grad_norm)
            return settled_step
        return None

    def _roll_back(self, step: int) -> None:
        """Go on from the last checkpoint before `step`, and leave its batch out this time."""
        self._settle_save()
        self.goodput.restarting()
        rollbacks = self._rollbacks + 1
        if rollbacks > bad_batches.MOST_ROLLBACKS:
            raise UserError(
                f"step {step}: went back {bad_batches.MOST_ROLLBACKS} times without reaching another checkpoint; it is not the batches. "
                f"Their samples are in {bad_batches.FILE_NAME}; lower optimizer.lr or clip (trainer.clip_norm=1.0)"
            )
        self._left_out.add(step)
        self._restore(distributed.on_main(lambda: resume.before(self.checkpoint_dir, step)))
        self._rollbacks = rollbacks
        for period in self._periods.values():
            period.restart()
        if self.engine.is_main_process:
            log.warning("step %d: bad batch; gone back to step %d, and it is left out", step, self.engine.global_step)

    def _note_bad_batch(self, error: BaseException) -> None:
        if isinstance(error, NonFiniteError):
            self._record_batch(error.step, "not finite")

    def _record_batch(self, step: int, reason: str, **numbers: float) -> None:
        if self.engine.is_main_process:
            bad_batches.record(self.output_dir, step, reason, self.order.batch(step), **numbers)

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

    def _emit(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(self, *args)


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

"""The loop: exact resume, clean ends, evaluation, callbacks."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from reference import LENGTH, VOCAB, Tiny, token_loss
from torch import nn

from paratrain import checkpoint, data
from paratrain.callbacks import Callback
from paratrain.checkpoint import saver
from paratrain.config import Checkpoint, Config, Logger, LossScale, Optimizer, Precision, Scheduler, Spike, SyntheticData
from paratrain.config import Trainer as TrainerConfig
from paratrain.errors import ConfigError, UserError
from paratrain.faults import batches as bad_batches
from paratrain.goodput import Goodput
from paratrain.spawn import run
from paratrain.trainer import Trainer


class Tokens:
    """21 token samples, some masked: 21 is no multiple of the batch nor of the ranks."""

    def __init__(self, length: int = 21):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, VOCAB, (length, LENGTH + 1), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        targets = self.tokens[index, 1:].clone()
        targets[: index % 4] = -100
        return self.tokens[index, :-1], targets


def config(directory: Path, **sections) -> Config:
    base = Config(
        seed=3,
        output_dir=str(directory),
        precision=Precision("64-true"),
        optimizer=Optimizer(lr=1e-2),
        scheduler=Scheduler("cosine", warmup_steps=2),
        data=SyntheticData(global_batch=5, micro_batch_size=1),
        trainer=TrainerConfig(max_steps=9, clip_norm=0.5, log_every=1, device="cpu"),
        logger=Logger(sinks=["jsonl"]),
        checkpoint=Checkpoint(every="2", keep=None),
    )
    return replace(base, **sections)


def build():
    return Tiny(dropout=0.3)


def fit(cfg: Config, callbacks=(), model=build, eval_data=None):
    trainer = Trainer(cfg, model, token_loss, Tokens(), eval_data, callbacks)
    trainer.fit()
    return trainer.engine.full_state_dict()


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [line["train/loss"] for line in lines(directory) if "train/loss" in line]


class Stop(Callback):
    """Ends the process' training the way SIGTERM from a queue does, or the way a crash does."""

    def __init__(self, step: int, how: str):
        self.step, self.how = step, how

    def on_step_end(self, trainer, result):
        if trainer.engine.global_step == self.step:
            if self.how == "crash":
                raise RuntimeError("crashed on purpose")
            if trainer.engine.is_main_process:
                os.kill(os.getpid(), signal.SIGTERM)


def crash(cfg: Config, step: int):
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(cfg, [Stop(step, "crash")])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_crash_and_resume_is_bit_exact(ranks, tmp_path):
    """Dropout on, mid-epoch, with ragged last batches, cosine schedule and clipping: not one bit differs."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected, *_ = run(lambda: fit(config(whole)), ranks)
    run(lambda: crash(config(broken), 7), ranks)
    resumed, *_ = run(lambda: fit(config(broken)), ranks)
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 9
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_resume_on_other_numbers_of_ranks(tmp_path):
    """Same data order, same loss to rounding, with any number of ranks before and after."""
    plain = lambda cfg: fit(cfg, model=Tiny)  # noqa: E731
    run(lambda: plain(config(tmp_path / "whole")), 1)
    for before, after in ((2, 1), (1, 3), (3, 2)):
        directory = tmp_path / f"{before}-{after}"
        short = replace(config(directory), scheduler=Scheduler("cosine", warmup_steps=2, total_steps=9))
        run(lambda cfg: plain(replace(cfg, trainer=replace(cfg.trainer, max_steps=4))), before, short)
        run(plain, after, config(directory))
        assert losses(directory) == pytest.approx(losses(tmp_path / "whole"), abs=1e-10)


def test_fp16_scale_resumes(tmp_path):
    """Scale, good steps and skipped steps go on where they were."""
    scale = Precision("16-mixed", LossScale(init=2.0**22, growth_interval=3))

    def body(directory, stop):
        cfg = config(directory, precision=scale)
        if stop:
            crash(cfg, 6)
        return fit(cfg)

    expected = body(tmp_path / "whole", False)
    resumed = body(tmp_path / "broken", True)
    scales = [line["train/loss_scale"] for line in lines(tmp_path / "whole")]
    assert len(set(scales)) > 1
    assert [line["train/loss_scale"] for line in lines(tmp_path / "broken")] == scales
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_sigterm_saves_and_ends_all_ranks_at_one_step(tmp_path):
    """The signal reaches one rank only; both stop after the same step, and the resumed run has the losses of the whole one."""
    run(lambda: fit(config(tmp_path / "whole")), 2)
    cfg = config(tmp_path / "stopped", checkpoint=Checkpoint(every=None))

    def body():
        trainer = Trainer(cfg, build, token_loss, Tokens(), callbacks=[Stop(3, "signal")])
        trainer.fit()
        return trainer.interrupted, trainer.engine.global_step

    assert run(body, 2) == [(True, 4), (True, 4)]
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-000004"]
    run(lambda: fit(cfg), 2)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_evaluation_is_exact_on_any_ranks(tmp_path):
    """Every sample counts once: 7 samples, batches of 5, on 1 and 3 ranks."""
    held_out = Tokens(7)

    def body(directory):
        trainer = Trainer(config(directory), Tiny, token_loss, Tokens(), held_out)
        before = trainer.evaluate()
        trainer.fit()
        return before, [line for line in lines(directory) if "eval/loss" in line] if trainer.engine.is_main_process else None

    (one, logged), (three, _), *_ = [run(body, ranks, tmp_path / str(ranks))[0] for ranks in (1, 3)]
    torch.manual_seed(3)
    model = Tiny().double().eval()
    total, count = token_loss(model(held_out.tokens[:, :-1]), torch.stack([held_out[i][1] for i in range(7)]))
    assert one["eval/loss"] == pytest.approx(float(total.detach() / count), abs=1e-10)
    assert three == pytest.approx(one, abs=1e-10)
    assert one["eval/perplexity"] == pytest.approx(2.718281828459045 ** one["eval/loss"])
    assert [line["step"] for line in logged] == [9]


def test_durations(tmp_path):
    """Epochs, tokens and time end training; evaluations and checkpoints come at their own times."""

    def steps(name, every="1ep", **trainer):
        options = {"max_steps": None, "clip_norm": None, "log_every": 1, "device": "cpu", **trainer}
        cfg = config(
            tmp_path / name, trainer=TrainerConfig(**options), scheduler=Scheduler(), checkpoint=Checkpoint(every=every, keep=None)
        )
        trainer_ = Trainer(cfg, Tiny, token_loss, Tokens(), Tokens(3))
        trainer_.fit()
        saved = sorted(int(path.name[5:]) for path in trainer_.checkpoint_dir.iterdir())
        evaluated = [line["step"] for line in lines(tmp_path / name) if "eval/loss" in line]
        return trainer_.engine.global_step, saved, evaluated

    assert steps("epochs", max_epochs=2, eval_every="4") == (10, [5, 10], [4, 8, 10])
    real = sum(int((Tokens()[i][1] != -100).sum()) for i in range(21))
    taken, _, evaluated = steps("tokens", max_tokens=real, eval_every=f"{real // 2}tok")
    assert taken == 5
    assert len(evaluated) == 2
    assert steps("time", every="1h", max_time="2s", max_steps=10**6)[0] > 5


def test_callbacks(tmp_path):
    seen = []

    class Watch(Callback):
        def __init__(self):
            self.count = 0

        def on_fit_start(self, trainer):
            seen.append("start")

        def on_log(self, trainer, metrics):
            metrics["mine/count"] = self.count = self.count + 1

        def on_save(self, trainer, path):
            seen.append(path.name)

        def on_fit_end(self, trainer):
            seen.append("end")

        def on_exception(self, trainer, error):
            seen.append(type(error).__name__)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    cfg = config(tmp_path)
    with pytest.raises(RuntimeError):
        fit(cfg, [Watch(), Stop(5, "crash")])
    assert seen in (["start", "step-000002", "step-000004", "RuntimeError"], ["start", "step-000002", "RuntimeError"])
    seen.clear()
    fit(cfg, [Watch()])
    assert [line["mine/count"] for line in lines(tmp_path)] == list(range(1, 10))
    assert seen == ["start", "step-000006", "step-000008", "step-000009", "end"]

    class Typo(Callback):
        def on_step_ends(self, trainer, result):
            pass

    with pytest.raises(UserError, match="on_step_ends is no event; did you mean 'on_step_end'"):
        Trainer(cfg, Tiny, token_loss, Tokens(), callbacks=[Typo()])


def test_keep_and_resume_choices(tmp_path):
    cfg = config(tmp_path, checkpoint=Checkpoint(every="2", keep=2))
    fit(cfg)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000008", "step-000009"]
    with pytest.raises(UserError, match="resume=none, but"):
        fit(replace(cfg, resume="none"))
    with pytest.raises(UserError, match="no complete checkpoint there"):
        fit(replace(cfg, output_dir=str(tmp_path / "b"), resume=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"data.global_batch=5, this job has 4"):
        fit(replace(cfg, data=SyntheticData(global_batch=4)))
    with pytest.raises(UserError, match="seed=3, this job has seed=4"):
        fit(replace(cfg, seed=4))
    longer = replace(
        cfg, output_dir=str(tmp_path / "c"), resume=str(tmp_path), trainer=replace(cfg.trainer, max_steps=12), scheduler=Scheduler()
    )
    with pytest.raises(
        UserError, match=r"(?s)scheduler.name: 'cosine' -> 'constant'\n .*resume_force=\[scheduler.name,scheduler.warmup_steps\]"
    ):
        fit(longer)
    longer = replace(longer, resume_force=["scheduler"])
    fit(longer)
    assert [line["step"] for line in lines(tmp_path / "c")] == [10, 11, 12]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing says when to stop"):
        fit(config(tmp_path, trainer=TrainerConfig(), scheduler=Scheduler()))
    with pytest.raises(UserError, match="train_data is empty"):
        Trainer(config(tmp_path), nn.Linear(1, 1), token_loss, Tokens(0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        fit(config(tmp_path / "file" / "run"))


def locking(directory, seconds):
    """The number of a process that holds the lock of `directory`, for so long."""
    from paratrain import lock

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with lock.held(directory):
            os.write(writer, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.read(reader, 1)
    return child


def test_two_jobs_in_one_directory_are_refused_by_name(tmp_path):
    """The lock of a live job holds, in whatever process; that of a dead one does not."""
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))  # its holder died
    child = locking(tmp_path, 60)
    with pytest.raises(UserError, match=f"another job, process {child} on host {socket.gethostname()}, is writing there"):
        fit(config(tmp_path))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    fit(config(tmp_path))
    assert (tmp_path / ".lock").read_text() == ""


def test_the_lock_of_a_dying_process_is_waited_for(tmp_path):
    """A killed process may end its write to the disk first; its lock lives so long."""
    from paratrain import lock

    child = locking(tmp_path, 0.7)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    os.waitpid(child, 0)


def test_a_configuration_in_a_checkpoint_builds_nothing(tmp_path):
    """A hostile `_target_` is shown as a difference; forced, the user's own model is trained all the same."""
    cfg = config(tmp_path)
    fit(replace(cfg, trainer=replace(cfg.trainer, max_steps=4)))
    manifest = checkpoint.step_path(tmp_path / "checkpoints", 4) / "manifest.json"
    content = json.loads(manifest.read_bytes())
    content.pop("xxh3_128")
    content["meta"]["config"]["model"] = {"_target_": "os.mkdir", "path": str(tmp_path / "executed")}
    body = json.dumps(content)[1:].encode()
    manifest.write_bytes(b'{"xxh3_128": "%s",\n%s' % (xxhash.xxh3_128_hexdigest(body).encode(), body))
    with pytest.raises(UserError, match=r"model\._target_: 'os\.mkdir' -> "):
        fit(cfg)
    fit(replace(cfg, resume_force=["*"]))
    assert not (tmp_path / "executed").exists()


def test_what_a_killed_save_left_is_gone_after_a_resume(tmp_path):
    """Also where all checkpoints are kept, and nothing is ever pruned."""
    cfg = config(tmp_path)
    fit(replace(cfg, trainer=replace(cfg.trainer, max_steps=4)))
    (tmp_path / "checkpoints" / f".step-000006.tmp-{'a' * 32}").mkdir()
    fit(cfg)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-00000{step}" for step in (2, 4, 6, 8, 9)]


def test_best_and_kept_checkpoints(tmp_path):
    """`best` saves at evaluations that improve, and keeps that one; `keep_every` keeps its multiples."""

    class Losses(Callback):
        def on_eval_end(self, trainer, metrics):
            metrics["eval/loss"] = {2: 3.0, 3: 1.0, 4: 2.0}.get(trainer.engine.global_step, 9.0)

    options = Checkpoint(every="4", keep=1, keep_every=4, best="eval/loss")
    cfg = config(tmp_path, checkpoint=options)
    fit(replace(cfg, trainer=replace(cfg.trainer, eval_every="1")), [Losses()], eval_data=Tokens(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-00000{n}" for n in (3, 4, 8, 9)]
    assert checkpoint.best(tmp_path / "checkpoints", "eval/loss", "min") == (1.0, 3)
    assert checkpoint.read_meta(tmp_path / "checkpoints" / "step-000004")["extra"]["best"] == 1.0


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(damage, tmp_path, caplog):
    whole = fit(config(tmp_path / "whole", scheduler=Scheduler()))
    cfg = config(tmp_path / "hurt", scheduler=Scheduler())
    fit(replace(cfg, trainer=replace(cfg.trainer, max_steps=6)))
    newest = tmp_path / "hurt" / "checkpoints" / "step-000006"
    name = "manifest.json" if damage == "manifest" else "rank-00000.safetensors"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 4
    (newest / name).write_bytes(content[:-1] if damage == "truncate" else content)
    resumed = fit(cfg)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert f"set aside as .damaged-{newest.name}" in caplog.text
    assert name in caplog.text
    assert (newest.parent / f".damaged-{newest.name}" / name).exists()
    assert [line["step"] for line in lines(tmp_path / "hurt")] == list(range(1, 10))


def test_failed_saves_are_reported_and_several_end_training(tmp_path, monkeypatch, caplog):
    """On both kinds of save; a success in between starts the count anew; the last one must succeed."""

    def failing(when):
        count = iter(range(100))

        def save(*args, **kwargs):
            if next(count) in when:
                raise checkpoint.CheckpointError("No space left on device")
            return real(*args, **kwargs)

        return save

    real = saver.save
    for mode in (False, True):
        directory = tmp_path / str(mode)
        cfg = config(directory, checkpoint=Checkpoint(every="1", keep=None, async_save=mode, max_failures=3))
        monkeypatch.setattr(saver, "save", failing({0, 1, 3, 4}))
        fit(cfg)
        assert "failed saves in a row: 2 of 3" in caplog.text
        assert [step for step, _ in checkpoint.steps(directory / "checkpoints")] == [3, 6, 7, 8, 9]
        monkeypatch.setattr(saver, "save", failing({0, 1, 2}))
        with pytest.raises(checkpoint.CheckpointError, match="3 saves in a row failed"):
            fit(replace(cfg, output_dir=str(directory / "b")))
        monkeypatch.setattr(saver, "save", failing({8, 9}))
        with pytest.raises(checkpoint.CheckpointError, match="the last checkpoint could not be saved"):
            fit(replace(cfg, output_dir=str(directory / "c")))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    """Tensors alone, an engine's own save, and counters that cannot be true: named, on every rank, never a KeyError."""
    path = tmp_path / "run" / "checkpoints" / "step-000003"

    def body(change):
        trainer = Trainer(config(tmp_path / "run"), Tiny, token_loss, Tokens())
        meta = {"seed": 3, "engine": trainer.engine.counters(), "extra": {}}
        for key, value in change.items():
            (meta["engine"] if key in meta["engine"] else meta)[key] = value
        names = {param: name for name, param in trainer.engine.model.named_parameters()}
        tensors = {f"model/{name}": value for name, value in trainer.engine.model.state_dict().items()}
        checkpoint.save(
            path, tensors | checkpoint.optimizer_tensors(trainer.engine.optimizers, names), meta, {"rng": checkpoint.rng_state()}
        )
        with pytest.raises(checkpoint.CheckpointError) as error:
            trainer.fit()
        return str(error.value)

    for change, message in [
        ({"engine": {}}, "counters are not valid"),
        ({"engine": None}, "not the state of a training run"),
        ({"seed": "x"}, "not the state of a training run"),
        ({"global_step": -1}, "counters are not valid"),
        ({"counted": "many"}, "counters are not valid"),
        ({"scaler": {"scale": None}}, "counters are not valid"),
        ({}, "was not saved by a Trainer"),
    ]:
        assert all(message in text for text in run(body, 2, change))


def test_bad_batches(tmp_path):
    """raise names the samples; skip leaves the weights; rollback equals a run that never saw the batch; too many end training."""
    poisoned = {"step": 5}
    engines = []

    def loss(outputs, targets):
        total, count = token_loss(outputs, targets)
        return total * (float("nan") if engines[-1].global_step == poisoned["step"] else 1.0), count

    def go(name, policy, **options):
        cfg = config(tmp_path / name, scheduler=Scheduler(), **options)
        trainer = Trainer(replace(cfg, trainer=replace(cfg.trainer, nonfinite=policy)), build, loss, Tokens())
        engines.append(trainer.engine)
        trainer.fit()
        return trainer.engine

    samples = data.Order(21, 5, 3, True).batch(5)
    with pytest.raises(UserError, match=r"step 5: the loss is nan.*trainer.nonfinite=raise"):
        go("raise", "raise")
    skipped, rolled = go("skip", "skip"), go("roll", "rollback")
    for name in ("raise", "skip", "roll"):
        bad = [json.loads(line) for line in (tmp_path / name / "bad_batches.jsonl").read_text().splitlines()]
        assert [(line["step"], line["samples"]) for line in bad] == [(5, samples)]
    assert (skipped.global_step, skipped.updates, rolled.updates) == (9, 8, 8)
    assert all(torch.equal(value, skipped.full_state_dict()[name]) for name, value in rolled.full_state_dict().items())
    assert [line["step"] for line in lines(tmp_path / "roll")] == [1, 2, 3, 4, 5, 5, 7, 8, 9]
    poisoned["step"] = 0
    assert go("first", "rollback", checkpoint=Checkpoint(every=None)).updates == 8


def test_a_loss_spike_is_gone_back_behind(tmp_path):
    engines = []

    def loss(outputs, targets):
        total, count = token_loss(outputs, targets)
        return total * (50.0 if engines[0].global_step == 7 else 1.0), count

    cfg = config(tmp_path, scheduler=Scheduler())
    cfg = replace(cfg, trainer=replace(cfg.trainer, max_steps=12, spike=Spike(window=8, sigmas=20, min_steps=5)))
    trainer = Trainer(cfg, Tiny, loss, Tokens())
    engines.append(trainer.engine)
    trainer.fit()
    assert (trainer.engine.global_step, trainer.engine.updates) == (12, 11)
    bad = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["step"], line["samples"]) for line in bad] == [("spike", 7, data.Order(21, 5, 3, True).batch(7))]


def test_goodput_accounts_for_the_whole_time_over_restarts(tmp_path):
    began = time.time()
    cfg = config(tmp_path)
    with pytest.raises(RuntimeError):
        fit(cfg, [Stop(7, "crash")])
    time.sleep(0.5)
    fit(cfg)
    kept = json.loads((tmp_path / "goodput.json").read_text())
    wall = time.time() - began
    seconds = kept["seconds"]
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.3)
    assert seconds["restart"] > 0.5
    assert all(seconds[cause] > 0 for cause in ("steps", "startup", "recomputed", "data", "checkpoint"))
    ratios = [line["goodput/ratio"] for line in lines(tmp_path) if "goodput/ratio" in line]
    assert ratios[-1] == pytest.approx(seconds["steps"] / sum(seconds.values()), abs=0.2)


@pytest.mark.parametrize("hours", [5, -9])
def test_goodput_does_not_see_a_clock_that_jumps_between_attempts(hours, tmp_path, monkeypatch):
    first = Goodput(tmp_path / "goodput.json")
    first.start()
    first.write(now=True)
    jumped = time.time() + 3600 * hours
    monkeypatch.setattr(time, "time", lambda: jumped)
    second = Goodput(tmp_path / "goodput.json")
    second.start()
    assert 0 < second.seconds["restart"] < 60


def test_out_of_memory_says_who_holds_what(tmp_path):
    def loss(outputs, targets):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(UserError, match=r"(?s)step 0: out of memory on cpu.*weights .* GiB.*memory.recompute=full.*strategy=fsdp"):
        Trainer(config(tmp_path), Tiny, loss, Tokens()).fit()


def test_a_disk_that_refuses_the_accounts_stops_nothing(tmp_path, monkeypatch, caplog):
    """Goodput, attempts and bad batches tell of the job; the loop does not depend on them."""
    from paratrain import notes

    def refuse(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(notes, "replace", refuse)
    (tmp_path / "bad_batches.jsonl").mkdir()
    cfg = config(tmp_path, logger=Logger(sinks=[]))
    fit(replace(cfg, trainer=replace(cfg.trainer, max_steps=3)))
    bad_batches.record(tmp_path, 4, "spike", [1, 2])
    for name in ("goodput.json", "attempts.json"):
        assert f"{name} was not written: [Errno 28] No space left on device" in caplog.text
    assert '"samples": [1, 2]' in caplog.text


def test_restarts_that_come_no_further_give_up(tmp_path, monkeypatch):
    from paratrain.faults.restarts import note_attempt

    for count in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        note_attempt(tmp_path, 40, 3)
    note_attempt(tmp_path, 50, 3)
    for _ in range(2):
        note_attempt(tmp_path, 50, 3)
    with pytest.raises(UserError, match="started 4 times in a row from step 50"):
        note_attempt(tmp_path, 50, 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    note_attempt(tmp_path, 50, 3)


def test_a_background_save_holds_its_own_step(tmp_path, monkeypatch):
    """The copy beside the next step is slow here: the update waits for it, and every checkpoint is that of a save in the foreground."""

    def slow(tensors, buffers):
        time.sleep(0.1 if buffers is not None and any("optimizer" in name for name in tensors) else 0.0)
        return real(tensors, buffers)

    real = saver.stage
    fit(config(tmp_path / "sync", checkpoint=Checkpoint(every="1", keep=None, async_save=False)))
    monkeypatch.setattr(saver, "stage", slow)
    fit(config(tmp_path / "async", checkpoint=Checkpoint(every="1", keep=None)))
    for step in range(1, 10):
        one, other = (checkpoint.step_path(tmp_path / name / "checkpoints", step) for name in ("sync", "async"))
        found = [{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(one).items()} for _ in range(2)]
        checkpoint.load(one, found[0])
        checkpoint.load(other, found[1])
        assert all(torch.equal(found[1][name], value) for name, value in found[0].items())

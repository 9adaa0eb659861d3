"""The loop: exact resume, clean ends, evaluation, callbacks."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import LENGTH, VOCAB, Tiny, token_loss
from torch import nn

from paratrain.callbacks import Callback
from paratrain.config import Checkpoint, Config, Logger, LossScale, Optimizer, Precision, Scheduler, SyntheticData
from paratrain.config import Trainer as TrainerConfig
from paratrain.errors import ConfigError, UserError
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


@pytest.mark.parametrize("ranks", [1, 2])
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
    assert steps("time", every="1h", max_time="0.2s", max_steps=10**6)[0] > 5


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
    assert seen == ["start", "step-000002", "step-000004", "RuntimeError"]
    fit(cfg, [Watch()])
    assert [line["mine/count"] for line in lines(tmp_path)] == list(range(1, 10))
    assert seen[4:] == ["start", "step-000006", "step-000008", "step-000009", "end"]

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

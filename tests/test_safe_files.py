"""Files that are damaged, hostile, or in the way: nothing is lost, nothing outside is touched, and the message says which."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import paratrain as pt
from paratrain import checkpoint, lock, state
from paratrain.checkpoint import CheckpointError, remote, sources
from paratrain.data import tokens
from paratrain.errors import UserError
from paratrain.metrics import sinks
from paratrain.resume import checked_extra


def trainer(directory: Path, *overrides: str) -> pt.Trainer:
    cfg = pt.load_config([
        "trainer.max_steps=4", "checkpoint.every=2", "checkpoint.async_save=false", "data.global_batch=4", "trainer.device=cpu", "trainer.log_every=1",
        f"output_dir={directory}", "logger.sinks=[jsonl,csv]", *overrides,
    ])  # fmt: skip
    data = [(torch.full((3,), float(i)), torch.ones(1)) for i in range(8)]
    return pt.Trainer(cfg, lambda: nn.Linear(3, 1), nn.functional.mse_loss, data)


def damage(path: Path, how: str) -> None:
    file = max(
        (entry for entry in path.iterdir() if entry.is_file() and entry.name != checkpoint.FILE_NAME),
        key=lambda entry: entry.stat().st_size,
    )
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_with_every_checkpoint_damaged_a_restart_stops_until_a_person_decides(tmp_path, how):
    trainer(tmp_path).fit()
    logged = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").glob("step-*"):
        damage(path, how)
    for _ in range(2):  # the attempt that finds it, and the one after a restart
        with pytest.raises(UserError, match=r"all 2 checkpoints of this job are damaged .*resume=none"):
            trainer(tmp_path).fit()
        assert (tmp_path / "metrics.jsonl").read_bytes() == logged
    trainer(tmp_path, "resume=none").fit()
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == logged, "no row of the first attempt is lost"
    assert len(list((tmp_path / "checkpoints").glob(".abandoned-damaged-*"))) == 2


def test_rows_that_are_logged_again_are_kept_aside(tmp_path):
    options = pt.load_config(["logger.sinks=[jsonl,csv]"]).logger
    info = {"config": {}, "run_dir": str(tmp_path), "step": 0}
    for step, resume in ((0, False), (2, True), (0, False)):
        for sink in sinks.build(options, tmp_path, resume=resume):
            sink.start({**info, "step": step})
            for number in range(step + 1, 4):
                sink.log(number, {"train/loss": 1.5})
            sink.finish(0)
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()]
    assert rows == [3, 1, 2, 3]
    assert [line.split(",")[0] for line in (tmp_path / "metrics.superseded.csv").read_text().split()] == [
        "step",
        "3",
        "step",
        "1",
        "2",
        "3",
    ]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_raised_under_float16_too():
    def loss(outputs, targets):
        total = (outputs.float() - targets).square().sum()
        return (total * float("nan") if targets[0, 0] == 2 else total), targets.numel()

    cfg = pt.load_config(["precision=fp16", "trainer.device=cpu"])
    engine = pt.setup(lambda: nn.Linear(3, 1), loss, cfg)
    batch = lambda value: (torch.ones(4, 3), torch.full((4, 1), value))  # noqa: E731
    while engine.train_step(batch(1.0)).skipped:  # until the scale fits
        pass
    before = engine.full_state_dict(), engine.scaler.scale
    with pytest.raises(UserError, match=r"the loss is nan, so training cannot go on \(trainer.nonfinite=raise\)"):
        engine.train_step(batch(2.0))
    assert engine.scaler.scale == before[1], "it is not the scale that is at fault"
    assert all(torch.equal(value, before[0][name]) for name, value in engine.full_state_dict().items())


def test_a_cache_of_tokens_that_was_changed_is_made_again(tmp_path):
    (tmp_path / "a.txt").write_text("some text to train on\n" * 50)
    data = pt.load_config(["data=text", f"data.path={tmp_path / 'a.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]).data
    _, files = tokens.prepare(data)
    file, written = files["train"].path, files["train"].path.read_bytes()
    file.write_bytes(bytes(len(written)))
    tokens.prepare(data)
    assert file.read_bytes() == written


@pytest.mark.parametrize("which", ["cache", "job"])
def test_a_link_planted_in_the_place_of_a_lock_is_not_followed(tmp_path, which):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if which == "job":
        (tmp_path / lock.FILE_NAME).symlink_to(victim)
        with pytest.raises(UserError, match="symbolic link"), lock.held(tmp_path):
            pass
    else:
        (tmp_path / "entry.lock").symlink_to(victim)
        with pytest.raises(UserError, match=r"data\.cache_dir"), tokens._only_one_builds(tmp_path / "entry"):
            pass
    assert victim.read_text() == "precious"


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w", force_zip64=True) as entry:
        for _ in range(64):
            entry.write(bytes(2**24))
    assert path.stat().st_size < 2**21
    with pytest.raises(CheckpointError, match="compressed"):
        sources.unpickled(path)


def test_a_refused_file_does_not_come_with_the_advice_to_run_it(tmp_path):
    path = tmp_path / "code.pt"
    torch.save({"a": io.StringIO}, path)
    with pytest.raises(CheckpointError, match="reading it would run code") as caught:
        sources.unpickled(path)
    assert "weights_only" not in str(caught.value)


def test_counters_that_no_job_has_counted_are_refused():
    engine = {"global_step": 5, "updates": 4, "counted": 10.0, "unit": 2.0, "scaler": {"scale": 1.0, "good_steps": 0, "skipped": 1}}
    meta = {"seed": 1, "extra": {}, "engine": engine}
    state._check(meta, [])
    wrong = (
        {"global_step": 10**18}, {"global_step": -1}, {"updates": 6}, {"counted": 10**400}, {"counted": -1.0}, {"counted": float("nan")},
        {"unit": -2.0}, *({"scaler": {**engine["scaler"], **more}} for more in ({"scale": -1.0}, {"scale": 0.0}, {"skipped": -1}, {"scale": 10**400})),
    )  # fmt: skip
    for fault in wrong:
        with pytest.raises(CheckpointError, match="counters are not valid"):
            state._check({**meta, "engine": {**engine, **fault}}, [])
    extra = {"data": {}, "seconds": 1.0, "callbacks": [], "metrics": {}, "left_out": [], "spike": [1.0], "goodput": {}}
    assert checked_extra(extra, Path("x")) == extra
    for fault in ({"spike": ["abc"]}, {"seconds": 10**400}, {"seconds": -1.0}, {"left_out": [1.5]}, {"spike": [float("nan")]}):
        with pytest.raises(CheckpointError, match=f"{next(iter(fault))} missing or not valid"):
            checked_extra({**extra, **fault}, Path("x"))


def test_a_store_that_does_not_answer_is_one_error(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the port of `discard`, where nothing listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"checkpoint.remote=s3://bucket/run: the store does not answer") as caught:
        remote.download("s3://bucket/run", tmp_path)
    assert caught.value.__suppress_context__


def test_what_is_converted_follows_the_umask(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt")
    from paratrain.checkpoint.convert import convert

    before = os.umask(0o027)
    try:
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors", "safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640

"""32 runs with secrets planted in their configurations: no file that they leave and no line that they print holds one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import paratrain as pt

WORD, NUMBER = "PLANTEDPLANTED", 7261726165
KINDS = [
    f"key={WORD}", f"token={WORD}", f"token={NUMBER}", f"password={NUMBER}", f"authorization={WORD}", f"pwd={WORD}", f"passphrase={WORD}",
    f"access_code={NUMBER}", f"pin={NUMBER}", f"hf_token={WORD}", f"db.api_key={NUMBER}", f"db={{user: u, password: {WORD}}}",
    f"dbs=[{{host: h, pwd: {NUMBER}}}]", f"secret={{a: {WORD}, b: [{WORD}]}}", f"connection_string='Server=s;Uid=u;Pwd={WORD}'",
    f"store='Server=s;Uid=u;Pwd={WORD};'", f"url='https://host/x?n=1&access_token={WORD}'", f"url='https://me:{WORD}@host/x'",
    f"url='postgres://me:p@{WORD}@host/x'", f"header='Authorization: Bearer {WORD}'", f"header='Authorization: token {WORD}'",
    f"header='X-Api-Key: {WORD}'", f"dsn='host=h password={WORD}'", f"private_key={WORD}", f"command='mysql --password {WORD} -h x'",
    f"credentials={{id: {WORD}}}", f"webhook='https://hooks.example.com/{WORD}'", f"cookie={WORD}", f"jwt={WORD}", f"client_secret={NUMBER}",
    "x=${oc.env:MY_PASSWORD}", f"db={{password: {WORD}, line: 'as ${{app.db.password}}'}}",
]  # fmt: skip
assert len(KINDS) == 32


def holds(content: bytes) -> bool:
    return WORD.encode() in content or str(NUMBER).encode() in content


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_run_leaves_a_secret(tmp_path, caplog, capfd, monkeypatch):
    """Every tenth run keeps a W&B run on disk, every fifth ends by an error; all save a checkpoint and are resumed once."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_PASSWORD", WORD)
    caplog.set_level(logging.DEBUG, "paratrain")
    data = [(torch.full((3,), float(i)), torch.ones(1)) for i in range(8)]
    for number, kind in enumerate(KINDS):
        sinks = "console,jsonl,csv,tensorboard" + (",wandb" if number % 10 == 0 else "")
        prove = "background" if number % 10 == 0 else "off"
        for steps in (2, 4):
            cfg = pt.load_config([
                f"+app.{kind}", f"trainer.max_steps={steps}", "checkpoint.every=2", "data.global_batch=4", "trainer.device=cpu", "trainer.log_every=1",
                f"output_dir={tmp_path / str(number)}", f"logger.sinks=[{sinks}]", f"checkpoint.remote='memory://me:{WORD}@bucket{number}'", f"trainer.prove={prove}",
            ])  # fmt: skip
            trainer = pt.Trainer(cfg, lambda: nn.Linear(3, 1), nn.functional.mse_loss, data)
            if number % 5 == 1 and steps == 4:
                monkeypatch.setattr(trainer.engine, "train_step", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    trainer.fit()
            else:
                trainer.fit()
    printed = capfd.readouterr()
    assert "train/loss" in (tmp_path / "0" / "metrics.jsonl").read_text()
    assert not holds((caplog.text + printed.out + printed.err).encode()), "a line has a secret"
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert len(files) > 200
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if holds(path.read_bytes())] == []

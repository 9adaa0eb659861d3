"""No secret that a user writes into a configuration is in any file or log of the job."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from paratrain.redact import HIDDEN, redact, redact_overrides

ROOT = Path(__file__).parent.parent
APP = """
import logging
from paratrain._hydra import main

@main(config_path="conf", config_name="mine")
def app(cfg):
    assert cfg.app["key"] and cfg.app["n"]
    print("ran")
    if cfg.app.get("fail"):
        raise RuntimeError("broken")

if __name__ == "__main__":
    app()
"""
PLANTED = (
    "+app.key=PLANTED", "+app.db={host: h, password: PLANTED, more: [{pwd: 7261726165}]}", "+app.token=7261726165", "+app.authorization=PLANTED",
    "+app.passphrase=PLANTED", "+app.access_code=7261726165", "+app.url='https://host/x?n=1&access_token=PLANTED'", "+app.n=3",
    "+app.store='postgres://me:PLANTED@host/x'", "+app.dsn='host=h password=PLANTED'", "+app.blob='Server=s;AccountKey=PLANTED;Pwd=PLANTED'",
    "+app.header='Authorization: Bearer PLANTEDPLANTED'",
)  # fmt: skip


@pytest.fixture
def project(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("hydra: {run: {dir: runs/a}, sweep: {dir: runs/s}}\n")
    return tmp_path


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PARATRAIN_", "RANK", "WORLD_SIZE"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=directory, env=env, capture_output=True, text=True, timeout=120, check=False)


def leaks(text: str) -> bool:
    return "PLANTED" in text or "7261726165" in text


@pytest.mark.parametrize("what", ["alone", "alone, failing", "sweep", "sweep, failing"])
def test_no_file_and_no_line_has_a_secret(project, what):
    more = (["-m", "seed=1,2"] if "sweep" in what else []) + (["+app.fail=true"] if "failing" in what else [])
    done = run(project, "app.py", *PLANTED, *more)
    assert "ran" in done.stdout
    assert (done.returncode != 0) == ("failing" in what), done.stderr
    assert not leaks(done.stdout + done.stderr), done.stdout + done.stderr
    if "failing" in what:
        assert "RuntimeError: broken" in done.stderr
    kept = [path for path in (project / "runs").rglob("*") if path.is_file()]
    assert [path for path in kept if path.name == "config.yaml"]
    assert not [path for path in kept if leaks(path.read_text())]
    configurations = [path for path in kept if path.suffix == ".yaml"]
    assert "sweep" not in what or "multirun.yaml" in {path.name for path in configurations}
    assert {stat.S_IMODE(path.stat().st_mode) for path in configurations} == {0o600}


@pytest.mark.parametrize(
    "flags", [["--help"], ["--cfg", "job"], ["--cfg", "all"], ["--cfg", "hydra"], ["--info"], ["hydra.verbose=true"]], ids=" ".join
)
def test_what_is_printed_on_request_has_no_secret(project, flags):
    done = run(project, "app.py", *PLANTED, "+app.secret={a: PLANTED, b: [PLANTED]}", f"+app.password='{'PLANTED ' * 30}'", *flags)
    assert done.returncode == 0, done.stderr
    assert HIDDEN in done.stdout + done.stderr
    assert not leaks(done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        "+app.db={password: PLANTED",
        "hydra.job.env_set={DB_PASSWORD: PLANTED}",
        "+app.x=${nope:password=PLANTED}}",
        "trainer.max_steps={pwd: PLANTED}",
    ],
)
def test_what_is_said_of_a_mistake_has_no_secret(project, wrong):
    done = run(project, "app.py", wrong)
    assert done.returncode == 2, done.stderr
    assert not leaks(done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("wrong", [
    "optimizer.lr=${oc.env:MY_PASSWORD}", "optimizer.lrr=${oc.env:MY_PASSWORD}", "seed=x${oc.env:MY_PASSWORD}y", "logger.sinks=['${oc.env:MY_PASSWORD}']",
    "+callbacks.a._target_=${oc.env:MY_PASSWORD}", "optimizer.lr=${app.db.password}", "hydra.run.dir=/dev/null/${oc.env:MY_PASSWORD}", "trainer.max_steps=${app.token}x",
])  # fmt: skip
def test_what_is_said_of_a_mistake_has_no_secret_that_an_interpolation_brought_there(project, wrong, monkeypatch, capsys):
    from paratrain._hydra import app, load_config
    from paratrain.errors import ConfigError

    monkeypatch.setenv("MY_PASSWORD", "PLANTEDPLANTED")
    monkeypatch.setattr(sys, "argv", ["app.py", "+app.db={password: PLANTEDPLANTED}", "+app.token=PLANTED7261726165", wrong])
    with pytest.raises(SystemExit) as stopped:
        app._start(lambda cfg: None, None, "paratrain")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "error: invalid configuration (1 problem)" in said
    assert not leaks(said)
    if "hydra" not in wrong:
        with pytest.raises(ConfigError) as caught:
            load_config(sys.argv[1:])
        assert not leaks(str(caught.value))


def test_what_an_interpolation_brought_under_another_name_is_no_secret_less(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "PLANTEDPLANTED")
    monkeypatch.setenv("SESSION_KEYRING", "training")
    data = {
        "db": {"password": 7261726165},
        "url": "host/7261726165?n=1",
        "n": 7261726165,
        "x": ["PLANTEDPLANTED"],
        "pwd": "short",
        "short": "short",
    }
    found = redact(data)
    assert not leaks(str(found))
    assert (found["short"], found["url"]) == ("short", f"host/{HIDDEN}?n=1")
    assert redact({"key": "train/loss", "best": "train/loss", "kind": "training"}) == {
        "key": HIDDEN,
        "best": "train/loss",
        "kind": "training",
    }


@pytest.mark.parametrize("line", [
    "Authorization: token PLANTED", "mysql --password PLANTED -h x", '{"password": "PLANTED", "n": 1}', "postgres://me:p@PLANTED@host/x",
    "-----BEGIN RSA PRIVATE KEY-----\nPLANTED\n-----END RSA PRIVATE KEY-----", "X-Api-Key: PLANTED", "https://host/?sig=PLANTED&n=1",
])  # fmt: skip
def test_a_text_that_holds_a_secret_is_cut(line):
    assert not leaks(redact({"note": line})["note"])
    assert HIDDEN in redact({"note": line})["note"]


def test_a_sweep_of_torchruns_leaves_no_secret(project):
    done = run(project, "-m", "paratrain", "sweep", "--nproc_per_node=1", "app.py", *PLANTED, "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran") == 2
    assert not leaks(done.stdout + done.stderr)
    assert not [path for path in (project / "runs").rglob("*") if path.is_file() and leaks(path.read_text())]


def test_settings_that_sound_like_secrets_stay():
    settings = {
        "num_key_value_heads": 4, "max_tokens": 1e6, "pad_token_id": 0, "eos_token": 2, "pin_memory": True, "pass_rate": 0.5, "tokenizer": "byte",
        "loss_count": "tokens", "tp_plan": {"*.key.weight": "colwise"}, "steps": 3, "text": "a: b", "lr": 0.1,
    }  # fmt: skip
    assert redact(settings) == settings
    words = [
        "trainer.max_steps=3",
        "checkpoint.every=10",
        "optimizer.groups=[{params: '*.key.*', lr: 0.1}]",
        "+model.num_key_value_heads=4",
    ]
    assert redact_overrides(words) == words
    assert redact({"api_key": 12, "keys": {"n": 1}, "hf_token": True}) == {"api_key": HIDDEN, "keys": {"n": 1}, "hf_token": True}

"""The examples run as their first lines say, alone and under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def example(path, *overrides, ranks=1, cwd):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples" / path, *overrides], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_model_trains_alike_on_one_process_and_two(tmp_path):
    alone, together = (example("own_model.py", "precision=fp64", "trainer.max_steps=60", ranks=ranks, cwd=tmp_path) for ranks in (1, 2))
    assert alone == together
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", alone)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 3


def test_vision_recognises_digits_on_two_processes(tmp_path):
    pytest.importorskip("sklearn")
    text = example("vision.py", "trainer.max_epochs=5", ranks=2, cwd=tmp_path)
    assert float(re.search(r"held-out digits: (\S+)%", text)[1]) > 85
    assert text.count("held-out digits") == 1


def test_own_conf_extends_the_library(tmp_path):
    overrides = ["trainer.max_steps=200", "model.hidden=48", "app.grid=12", f"hydra.run.dir={tmp_path}/run"]
    text = example("own_conf/train.py", *overrides, cwd=tmp_path)
    picture = [line.split() for line in text.splitlines() if re.fullmatch(r"([.#] ){11}[.#]", line)]
    assert len(picture) == 12
    assert {mark for row in picture for mark in row} == {".", "#"}
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_own_conf_reports_mistakes_in_it_as_the_library_does(tmp_path):
    command = [sys.executable, ROOT / "examples/own_conf/train.py", "model.hiden=48", "data=spiral"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "spirals" in done.stderr
    assert "Traceback" not in done.stderr

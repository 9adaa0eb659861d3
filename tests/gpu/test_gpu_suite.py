"""The suite itself: what it says where it cannot run, and its benchmark on a model small enough for a CPU."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_it_says_what_it_lacks():
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_packages_are_named_with_the_command_that_fetches_them(monkeypatch):
    sys.path.insert(0, str(ROOT))
    from tests.gpu import __main__ as suite

    monkeypatch.setitem(suite.MODULES, "hydra-core", "no_such_module")
    assert suite.missing() == ["hydra-core>=1.3.2,<1.4"]
    assert "make gpu-packages" in suite.problem()


def test_every_requirement_of_the_library_is_in_the_list():
    """But for those that only some choices need, which say so when they are missing."""
    listed = (ROOT / "tests" / "gpu" / "packages.txt").read_text()
    declared = (ROOT / "setup.py").read_text().split("install_requires=[")[1].split("]")[0]
    names = [line.split('"')[1].split(">")[0].split("=")[0] for line in declared.splitlines() if '"' in line]
    optional = {"torch", "numpy", "tokenizers", "rich", "wandb", "fsspec"}
    assert [name for name in names if name not in optional and name not in listed] == []


@pytest.mark.parametrize("compiled", [False, True])
def test_benchmark_measures_both_loops(compiled, monkeypatch):
    sys.path.insert(0, str(ROOT))
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "WINDOW", 0.05)
    case = gpu.Case({"vocab_size": 64, "seq_len": 32, "layers": 2, "dim": 32, "heads": 2, "tied": True}, 4)
    if compiled:
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # inductor would take half a minute here
        monkeypatch.setattr("paratrain.parallel.compile.apply", lambda *args: None)
    rows = gpu.rows(case, torch.device("cpu"), compiled, time.monotonic() + 60)
    assert list(rows) == ["by hand", "paratrain"]
    for row in rows.values():
        assert row["tokens_per_sec"] * row["ms_per_step"] / 1e3 == pytest.approx(case.tokens)
        assert row["tflops"] > 0
        assert "mfu" not in row, "no peak is known for this device"
    assert rows["by hand"]["time_over_hand"] == 1.0
    assert math.isfinite(rows["paratrain"]["time_over_hand"])

"""`make gpu`: the tests marked `gpu`, then the benchmark, on a machine with one NVIDIA GPU; needs no network, takes under 9 minutes.

Nothing is installed: what is missing is named, with the command that fetches it elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = Path(__file__).with_name("packages.txt")
MODULES = {"antlr4-python3-runtime": "antlr4", "hydra-core": "hydra", "pytest-timeout": "pytest_timeout", "PyYAML": "yaml"}
SECONDS, TESTS_SECONDS = 510.0, 270.0  # of the whole, and of the tests in it: the benchmark gets what is left


def missing() -> list[str]:
    """Requirements of packages.txt whose module is not here."""
    lines = [line for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
    names = {line: re.split(r"[=<>]", line)[0] for line in lines}
    return [line for line, name in names.items() if importlib.util.find_spec(MODULES.get(name, name)) is None]


def problem() -> str | None:
    """Why this machine cannot run the suite; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; write make gpu PYTHON=PYTHON_WITH_TORCH, a build for CUDA of version 2.11 or later"
    if importlib.util.find_spec("numpy") is None:
        return f"{sys.executable} has no numpy; install the one that fits its torch"
    if lacking := missing():
        return (
            f"missing: {', '.join(lacking)}\nOn a machine with a network, with the same checkout, run `make gpu-packages`: it fills .gpu-packages/ "
            "(for CPython 3.12 on x86-64 Linux; PYTHON_VERSION=3.13 for another). Bring that directory along, and run `make gpu` again"
        )
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def main() -> int:
    if (reason := problem()) is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    began = time.monotonic()
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # asking for a GPU does not keep forked ranks from using it
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-rsf", "--durations=5", "--timeout=120", "tests/gpu"]
    try:
        code = subprocess.run(tests, cwd=ROOT, env=environment, timeout=TESTS_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"make gpu: the tests took more than {TESTS_SECONDS:g} s", file=sys.stderr)
        code = 1
    left = SECONDS - (time.monotonic() - began)
    benchmark = [sys.executable, "-m", "benchmarks.gpu", f"--seconds={left - 20:.0f}"]
    try:
        return subprocess.run(benchmark, cwd=ROOT, env=environment, timeout=left).returncode or code
    except subprocess.TimeoutExpired:
        print("make gpu: the benchmark did not end in time", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""What a job runs on: the report of `python -m paratrain env`, and what a run records about its origin."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paratrain.metrics import peaks

_PACKAGES = (
    "hydra-core", "wandb", "tensorboard", "transformers", "datasets", "tokenizers", "torchao", "deepspeed", "fairscale", "apex",
)  # fmt: skip


def git_commit(directory: str | Path) -> str | None:
    """Commit of the checkout that holds `directory`, with `-dirty` where tracked files differ; None outside a checkout."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def report() -> dict[str, Any]:
    """Versions, devices and settings that decide how a job runs and how fast; nothing that identifies a person or a host."""
    cuda = torch.cuda.is_available()
    return {
        "paratrain": _version("paratrain"),
        "paratrain commit": _own_commit(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "torch threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
        "backends": _backends(),
        "devices": [_device(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def text() -> str:
    """The report for a terminal, one fact a line."""
    lines = []
    for name, value in report().items():
        if name == "devices":
            lines += [f"device {i}: {_describe(device)}" for i, device in enumerate(value)] or ["devices: cpu only"]
        elif name == "packages":
            lines += [f"{package}: {version or 'not installed'}" for package, version in value.items()]
        elif value is not None:
            lines.append(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines)


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, available in found.items() if available]


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    found = {dtype: peaks.peak(properties.name, dtype) for dtype in ("fp32", "tf32", "bf16", "fp16", "fp8")}
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "peak_tflops": {dtype: rate / 1e12 for dtype, rate in found.items() if rate},
    }


def _describe(device: dict[str, Any]) -> str:
    known = ", ".join(f"{dtype} {rate:g}" for dtype, rate in device["peak_tflops"].items())
    rates = f"peak TFLOP/s: {known}" if known else "no published peak known: MFU needs logger.peak_tflops"
    return f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}, {rates}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    return git_commit(root) if (root / ".git").exists() else None

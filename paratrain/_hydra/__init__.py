"""Hydra: from the YAML files and overrides to a checked `Config`. The only module that imports it.

Hydra composes plain values; `config.from_dict` gives them types and finds every fault. What Hydra itself would stop at (a group or a
choice that does not exist, a malformed override) is looked for first, so that one report holds all of it.

Under torchrun only rank 0 runs Hydra; the other ranks are told the result (`job.py`). Multirun (`-m`) is refused there: jobs that
follow each other in the same processes share a process group, a CUDA context and whatever the job before left behind. The way to
sweep over several processes is one torchrun a job, with any Hydra launcher and sweeper:

    python -m paratrain sweep --nproc_per_node=2 -m paratrain.train optimizer.lr=1e-3,3e-3
    python -m paratrain sweep --nproc_per_node=2 my_script.py optimizer.lr=1e-3,3e-3

A sweep in one process needs nothing: `python -m paratrain.train -m optimizer.lr=1e-3,3e-3`.
"""

from __future__ import annotations

from paratrain._hydra.app import main
from paratrain._hydra.compose import load_config

__all__ = ["load_config", "main"]

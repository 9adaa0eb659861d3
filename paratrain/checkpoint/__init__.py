"""Checkpoints that name no rank: saved under one layout, loaded under any other; atomic, verified, free of pickles."""

from paratrain.checkpoint.directory import check, latest, prune, read, read_meta, step_path, steps, tensors
from paratrain.checkpoint.manifest import FILE_NAME, CheckpointError, Manifest
from paratrain.checkpoint.state import optimizer_tensors, prepare_optimizer, rng_state, set_rng_state
from paratrain.checkpoint.storage import load, save

__all__ = [
    "FILE_NAME",
    "CheckpointError",
    "Manifest",
    "check",
    "latest",
    "load",
    "optimizer_tensors",
    "prepare_optimizer",
    "prune",
    "read",
    "read_meta",
    "rng_state",
    "save",
    "set_rng_state",
    "step_path",
    "steps",
    "tensors",
]

"""Checkpoints that name no rank: saved under one layout, loaded under any other; atomic, verified, free of pickles."""

from paratrain.checkpoint.directory import (
    best,
    check,
    damaged,
    incomplete,
    latest,
    prune,
    read,
    read_meta,
    recover,
    set_aside,
    step_path,
    steps,
    tensors,
)
from paratrain.checkpoint.manifest import FILE_NAME, CheckpointError, Manifest
from paratrain.checkpoint.state import optimizer_tensors, prepare_optimizer, rng_state, set_rng_state
from paratrain.checkpoint.storage import load, save, stage, together

__all__ = [
    "FILE_NAME",
    "CheckpointError",
    "Manifest",
    "best",
    "check",
    "damaged",
    "incomplete",
    "latest",
    "load",
    "optimizer_tensors",
    "prepare_optimizer",
    "prune",
    "read",
    "read_meta",
    "recover",
    "rng_state",
    "save",
    "set_aside",
    "set_rng_state",
    "stage",
    "step_path",
    "steps",
    "tensors",
    "together",
]

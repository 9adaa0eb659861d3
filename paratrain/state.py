"""Everything that resumes training, as one state that names no rank and no layout.

    tensors    model/<name>                 every entry of the user's own state_dict
               optimizer/<parameter>/<key>  whichever optimizer or group holds the parameter
               ema/<parameter>              its moving average; may be absent, and be left out by who asks for none
    meta       seed, counters, loss scale, the configuration, what the caller adds (data position, callbacks)
    rank_meta  generators of the user's program (`random`, numpy, torch), for each rank

A run converted from another program's has the seed None and no generators: its data had an order of its own.

The schedule and the randomness of the step are functions of the counters (see `optim/schedules.py`, `rng.py`), so they need no
entry of their own.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from paratrain import checkpoint
from paratrain.checkpoint import CheckpointError
from paratrain.compat import own_class
from paratrain.distributed import rank
from paratrain.errors import UserError
from paratrain.optim import ema
from paratrain.redact import redact
from paratrain.schema import to_dict

if TYPE_CHECKING:
    from paratrain.engine import Engine

log = logging.getLogger(__name__)

_MOST_STEPS = 10**12
"""More steps than a job can have taken: one a millisecond for thirty years."""
_LARGEST = 1e300
"""Numbers beyond it were not counted by a job, and an integer may be larger than any float."""


class State(NamedTuple):
    """What `checkpoint.save` takes: tensors that are still the engine's own, and JSON values of this moment."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    rank_meta: dict[str, Any]


def capture(engine: Engine, extra: dict[str, Any]) -> State:
    """The state of `engine` now. Every rank must call it."""
    meta = {
        "seed": engine.cfg.seed,
        "engine": engine.counters(),
        "config": redact(to_dict(engine.cfg)),
        "extra": extra,
    }
    if (hf_config := _hf_config(engine.model)) is not None:
        meta["hf_config"] = hf_config
    return State(engine.tensors(), meta, {"rng": checkpoint.rng_state()})


def save(engine: Engine, path: Path, extra: dict[str, Any]) -> None:
    """Save the state of `engine` into the directory `path`: whole or not at all. Every rank must call it.

    Raises:
        CheckpointError: names the rank, the file and the reason.
    """
    checkpoint.save(path, *capture(engine, extra))


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Restore what `save` saved, under any layout; returns its `extra`. Every rank must call it.

    Raises:
        CheckpointError: on every rank: the checkpoint is damaged, of another model, or nothing that `save` wrote.
        UserError: it was made under another seed, so that the data order would not continue.
    """
    doing = f"cannot load checkpoint {path}"
    prepared: list[Any] = []

    def prepare() -> None:
        manifest = checkpoint.read(path)
        _check(manifest.meta, _generators(manifest.meta, manifest.rank_meta))
        saved = {name: (tensor.shape, tensor.dtype) for name, tensor in manifest.tensors.items()}
        prepared.extend(engine.prepare(saved))

    checkpoint.together(doing, prepare, None)
    tensors, finish = prepared
    meta, rank_metas = checkpoint.load(path, tensors, partial=f"{ema.PREFIX}*")
    if meta["seed"] not in (None, engine.cfg.seed):
        raise UserError(
            f"resume={path}: saved under seed={meta['seed']}, this job has seed={engine.cfg.seed}; the data order would not continue"
        )

    def restore() -> None:
        finish()
        engine.restore(meta["engine"])
        generators = _generators(meta, rank_metas)
        if rank() < len(generators):
            checkpoint.set_rng_state(generators[rank()]["rng"])
        else:
            log.info("rank %d is new: its Python and numpy generators start afresh", rank())

    checkpoint.together(doing, restore, None)
    return meta["extra"]


def _generators(meta: dict[str, Any], rank_metas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [] if meta.get("seed") is None else rank_metas


def _check(meta: dict[str, Any], rank_metas: list[dict[str, Any]]) -> None:
    """Whether this is what `capture` made, field by field: a checkpoint may come from anywhere."""
    engine = meta.get("engine")
    if not isinstance(engine, dict) or type(meta.get("seed")) not in (int, type(None)) or not isinstance(meta.get("extra"), dict):
        raise CheckpointError("it holds tensors, but not the state of a training run (no seed, engine or extra)")
    unit, scaler = engine.get("unit"), engine.get("scaler")
    updates, steps = engine.get("updates"), engine.get("global_step")
    good = type(updates) is int and type(steps) is int and 0 <= updates <= steps <= _MOST_STEPS and _is_count(engine.get("counted"))
    good = good and (unit is None or (_is_number(unit) and unit > 0))
    good = good and isinstance(scaler, dict) and all(_is_count(scaler.get(key)) for key in ("scale", "good_steps", "skipped"))
    if not good or not scaler or not scaler["scale"]:
        raise CheckpointError(f"its counters are not valid: {engine!s:.200}")
    if not all(isinstance(entry.get("rng"), dict) for entry in rank_metas):
        raise CheckpointError("it lacks the state of the random number generators of a rank")


def _hf_config(model: Any) -> dict[str, Any] | None:
    """The configuration of a Hugging Face model, so that `convert --to hf` needs nothing else."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [own_class(model).__name__]}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # not so of NaN


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0

"""Everything that resumes training, as one state that names no rank and no layout.

    tensors    model/<name>                 every entry of the user's own state_dict
               optimizer/<parameter>/<key>  whichever optimizer or group holds the parameter
    meta       counters, loss scale, what the caller adds (data position, callbacks)
    rank_meta  generators of the user's program (`random`, numpy, torch), for each rank

The schedule and the randomness of the step are functions of the counters (see `optim/schedules.py`, `rng.py`), so they need no
entry of their own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paratrain import checkpoint
from paratrain.checkpoint.state import optimizer_tensors, prepare_optimizer, rng_state, set_rng_state
from paratrain.distributed import rank
from paratrain.errors import UserError

if TYPE_CHECKING:
    from paratrain.engine import Engine

log = logging.getLogger(__name__)


def save(engine: Engine, path: Path, extra: dict[str, Any]) -> None:
    """Save the state of `engine` into the directory `path`: whole or not at all. Every rank must call it.

    Raises:
        checkpoint.CheckpointError: names the rank, the file and the reason.
    """
    tensors = _model_tensors(engine) | optimizer_tensors(engine.optimizers, _names(engine))
    meta = {"seed": engine.cfg.seed, "engine": engine.counters(), "extra": extra}
    checkpoint.save(path, tensors, meta, {"rng": rng_state()})


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Restore what `save` saved, under any layout; returns its `extra`. Every rank must call it.

    Raises:
        checkpoint.CheckpointError: the checkpoint is damaged, or of another model.
        UserError: it was made under another seed, so that the data order would not continue.
    """
    saved = checkpoint.tensors(path)
    states, finish = prepare_optimizer(engine.optimizers, _names(engine), saved)
    meta, rank_metas = checkpoint.load(path, _model_tensors(engine) | states)
    finish()
    if meta["seed"] != engine.cfg.seed:
        raise UserError(
            f"resume={path}: saved under seed={meta['seed']}, this job has seed={engine.cfg.seed}; the data order would not continue"
        )
    engine.restore(meta["engine"])
    if rank() < len(rank_metas):
        set_rng_state(rank_metas[rank()]["rng"])
    else:
        log.info("rank %d is new: its Python and numpy generators start afresh", rank())
    return meta["extra"]


def _model_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"model/{name}": value for name, value in engine.model.state_dict().items()}


def _names(engine: Engine) -> dict[torch.Tensor, str]:
    return {param: name for name, param in engine.model.named_parameters()}

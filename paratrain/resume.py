"""Where training goes on from: the newest sound checkpoint of this job, or the one the user names. Runs on rank 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from paratrain import checkpoint, drift
from paratrain.checkpoint import CheckpointError, remote
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.faults import restarts
from paratrain.redact import redact
from paratrain.schema import to_dict

log = logging.getLogger(__name__)


def find(cfg: Config, directory: Path) -> Path | None:
    """The checkpoint to go on from: this job's own newest one before the one `resume` names, so that a restarted job goes on.

    With resume=none those are own that an earlier attempt of this very launch wrote: what torchrun restarts goes on.
    Own checkpoints that are not whole are set aside. Call it under the lock of the output directory.

    Args:
        directory: this job's own checkpoints.

    Raises:
        UserError: there is none where there should be one, or one where there should be none; or the configuration has changed.
    """
    checkpoint.recover(directory)
    own, asked = checkpoint.latest(directory), cfg.resume
    if asked == "none" and not restarts.began_here(directory.parent):
        _begin_anew(directory, own)
        return None
    for _, path, fault in checkpoint.incomplete(directory):
        log.warning("%s is damaged (%s); set aside as %s", path, fault, checkpoint.set_aside(path).name)
    if own is None and cfg.checkpoint.remote and asked != "none":
        directory.mkdir(parents=True, exist_ok=True)
        own = remote.download(cfg.checkpoint.remote, directory)
    if own is None and (spoilt := checkpoint.damaged(directory)):
        tried = f"all {len(spoilt)} checkpoints of this job are" if len(spoilt) > 1 else "the only checkpoint of this job is"
        raise UserError(
            f"{directory}: {tried} damaged ({', '.join(path.name for path in spoilt[-3:])}), so there is nothing to go on from; restore one of "
            "them from a copy, or write resume=none to train from the beginning"
        )
    if own is None and asked not in ("auto", "none"):
        named = Path(asked)
        own = named if (named / checkpoint.FILE_NAME).exists() else checkpoint.latest(named) or checkpoint.latest(named / "checkpoints")
        if own is None:
            raise UserError(
                f"resume={asked}: no complete checkpoint there; write resume=auto, none, or the path of a step-... directory or of a run"
            )
    if own is not None:
        for line in drift.check(own, checkpoint.read_meta(own).get("config"), redact(to_dict(cfg)), cfg.resume_force):
            log.info("changed since %s: %s", own.name, line)
    return own


def _begin_anew(directory: Path, own: Path | None) -> None:
    """Leave what an earlier job left in `directory` unread, and out of the way of this job's checkpoints.

    Raises:
        UserError: it holds a checkpoint to go on from.
    """
    if own is not None:
        raise UserError(
            f"resume=none, but {directory} holds checkpoints of an earlier run; write resume=auto to go on with it, or another output directory"
        )
    for path in [*checkpoint.damaged(directory), *(path for _, path, _ in checkpoint.incomplete(directory))]:
        log.warning("%s is left by an earlier run; set aside as %s", path, checkpoint.set_aside(path, "abandoned").name)


def set_aside_if_damaged(path: Path, directory: Path, error: CheckpointError) -> None:
    """After a load of `path` failed: rename it if it is one of this job's own and its bytes are not those that were written.

    Raises:
        CheckpointError: `error`, when it is sound and was refused for another reason, or is not ours to rename.
    """
    faults = checkpoint.check(path) if path.parent == directory else []
    if not faults:
        raise error
    log.warning("%s is damaged (%s); set aside as %s", path, "; ".join(faults[:3]), checkpoint.set_aside(path).name)


def before(directory: Path, step: int) -> Path:
    """The newest checkpoint from which `step` can be done again; newer ones, which may hold its harm, are set aside.

    Raises:
        UserError: there is none.
    """
    for saved, path in reversed(checkpoint.steps(directory)):
        if saved <= step:
            return path
        log.warning("%s is newer than what training goes back to; set aside as %s", path, checkpoint.set_aside(path, "abandoned").name)
    raise UserError(f"step {step}: no checkpoint in {directory} to go back to; save more often (checkpoint.every)")


def checked_extra(extra: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the trainer kept in a checkpoint, every field of the type it must have.

    Raises:
        CheckpointError: the trainer did not write it.
    """
    kinds: dict[str, Any] = {
        "data": dict,
        "seconds": (int, float),
        "callbacks": list,
        "metrics": dict,
        "left_out": list,
        "spike": list,
        "goodput": dict,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(extra.get(name), kind)]
    if not wrong:
        wrong = [] if 0 <= extra["seconds"] < 1e12 else ["seconds"]  # not so of NaN
        wrong += [] if all(type(step) is int for step in extra["left_out"]) else ["left_out"]
        wrong += [] if all(type(loss) in (int, float) and abs(loss) < 1e300 for loss in extra["spike"]) else ["spike"]
    if wrong:
        raise CheckpointError(f"resume={path}: it was not saved by a Trainer ({', '.join(wrong)} missing or not valid)")
    return extra

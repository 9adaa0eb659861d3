"""Checkpoints as directories: `<directory>/step-000020/`, complete or not counted at all. Nothing here is collective."""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paratrain.checkpoint import files
from paratrain.checkpoint.manifest import FILE_NAME, CheckpointError, Manifest, parse

_STEP = re.compile(r"step-(\d{6,})")
_HIDDEN = re.compile(r"\.(step-\d{6,})\.(tmp|old|gone)-[0-9a-f]{32}")
_LARGEST_MANIFEST = 4 << 30


def step_path(directory: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return Path(directory) / f"step-{step:06d}"


def read(path: str | os.PathLike) -> Manifest:
    """The verified manifest of a checkpoint.

    Raises:
        CheckpointError: when there is none, or it is damaged or not valid.
    """
    path = Path(path)
    try:
        with files.open_regular(path / FILE_NAME) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_MANIFEST:
                raise CheckpointError(f"{FILE_NAME} has {size} bytes")
            return parse(file.readall())  # type: ignore[attr-defined]
    except OSError as error:
        raise CheckpointError(f"{path}: {FILE_NAME}: {error.strerror}") from None
    except CheckpointError as error:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory") from None
        hint = "" if (path / FILE_NAME).exists() else ": not a complete checkpoint"
        raise CheckpointError(f"{path}: {error}{hint}") from None


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """What `save` was given as `meta`.

    Raises:
        CheckpointError: as `read`.
    """
    return read(path).meta


def tensors(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (global shape, dtype) of every tensor in a checkpoint.

    Raises:
        CheckpointError: as `read`.
    """
    return {name: (saved.shape, saved.dtype) for name, saved in read(path).tensors.items()}


def absent_files(path: Path, manifest: Manifest) -> list[str]:
    """Data files that are missing or of another size, without reading them."""
    found = []
    for saved in manifest.files:
        try:
            with files.VerifiedFile(path, saved):
                pass
        except CheckpointError as error:
            found.append(str(error))
    return found


def check(path: str | os.PathLike) -> list[str]:
    """Read every byte of a checkpoint and name each fault; an empty list means that all of it is as it was written."""
    try:
        manifest = read(path)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for saved in manifest.files:
        try:
            with files.VerifiedFile(Path(path), saved) as file:
                found += file.faults()
        except CheckpointError as error:
            found.append(str(error))
    return found


def steps(directory: str | os.PathLike) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint in `directory`, the newest last.

    Complete: its manifest is valid and its files are there at their sizes. Contents are verified by `check` and on load.
    """
    return sorted((step, path) for step, path in _candidates(Path(directory)) if _complete(path))


def latest(directory: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint in `directory`, or None. While others save there, ask on one rank and tell the rest.

    A checkpoint whose replacement was killed between two renames is found under the hidden name it was left with.
    """
    found = sorted(_candidates(Path(directory)) + _replaced(Path(directory)), reverse=True)
    return next((path for _, path in found if _complete(path)), None)


def incomplete(directory: str | os.PathLike) -> list[tuple[int, Path, str]]:
    """(step, path, what is wrong) of every checkpoint in `directory` that does not count, the newest last."""
    found = []
    for step, path in sorted(_candidates(Path(directory))):
        try:
            faults = absent_files(path, read(path))
        except CheckpointError as error:
            faults = [str(error)]
        if faults:
            found.append((step, path, faults[0]))
    return found


def recover(directory: str | os.PathLike) -> None:
    """Give checkpoints that a killed save had renamed aside their names back, and delete what else interrupted saves left.

    Call it where no save is under way.

    Raises:
        CheckpointError: something cannot be renamed or deleted; names it and the reason.
    """
    with _named():
        for step, path in _replaced(Path(directory)):
            if _complete(path):
                os.rename(path, step_path(directory, step))
        for entry in _entries(Path(directory)):
            if _HIDDEN.fullmatch(entry.name):
                shutil.rmtree(entry)


def set_aside(path: Path, kind: str = "damaged") -> Path:
    """Rename a checkpoint to `.damaged-step-...`, which nothing takes for one and nothing deletes; returns the new path."""
    for number in range(1, 10_000):
        aside = path.with_name(f".{kind}-{path.name.lstrip('.')}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(aside):
            os.rename(path, aside)
            return aside
    raise CheckpointError(f"{path.parent} holds thousands of {kind} checkpoints: look at them, and delete what you do not need")


def damaged(directory: str | os.PathLike) -> list[Path]:
    """Checkpoints of `directory` that `set_aside` renamed because they are damaged."""
    return sorted(entry for entry in _entries(Path(directory)) if entry.name.startswith(".damaged-"))


def best(directory: str | os.PathLike, metric: str, mode: str) -> tuple[float, int] | None:
    """(value, step) of the complete checkpoint with the best `metric` among those saved with one; mode: `min` or `max`."""
    sign = -1.0 if mode == "max" else 1.0
    found = [(sign * float(value), step) for step, path in steps(directory) if (value := _metric(read_meta(path), metric)) is not None]
    value, step = min(found, default=(0.0, None))
    return None if step is None else (sign * value, step)


def _metric(meta: dict[str, Any], name: str) -> float | None:
    extra = meta.get("extra")
    metrics = extra.get("metrics") if isinstance(extra, dict) else None
    value = metrics.get(name) if isinstance(metrics, dict) else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def prune(directory: str | os.PathLike, keep: int, protected: Callable[[int], bool] = lambda step: False) -> None:
    """Delete all but the `keep` newest complete checkpoints, after `recover`. Call it where no save is under way.

    A directory that is no complete checkpoint neither counts nor goes.

    Args:
        protected: whether the checkpoint of a step stays however old it is.

    Raises:
        CheckpointError: when something cannot be deleted; names it and the reason.
    """
    assert keep >= 1, "the last checkpoint is never deleted"
    recover(directory)
    with _named():
        for step, path in steps(directory)[:-keep]:
            if not protected(step):
                aside = beside(path, "gone")
                os.rename(path, aside)
                shutil.rmtree(aside)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot delete {error.filename}: {error.strerror}") from error


def beside(path: Path, kind: str) -> Path:
    """A fresh hidden name next to `path`, which nothing takes for a checkpoint."""
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex}")


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _candidates(directory: Path) -> list[tuple[int, Path]]:
    named = [(_STEP.fullmatch(entry.name), entry) for entry in _entries(directory)]
    return [(int(match[1]), entry) for match, entry in named if match]


def _replaced(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints that a save had renamed aside when it was killed, before it gave their names to the new ones."""
    hidden = [(match, entry) for entry in _entries(directory) if (match := _HIDDEN.fullmatch(entry.name)) and match[2] == "old"]
    return [(int(match[1][5:]), entry) for match, entry in hidden if not (directory / match[1]).exists()]


def _complete(path: Path) -> bool:
    try:
        return not absent_files(path, read(path))
    except CheckpointError:
        return False

"""Checkpoints as directories: `<directory>/step-000020/`, complete or not counted at all. Nothing here is collective."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from paratrain.checkpoint import files
from paratrain.checkpoint.manifest import FILE_NAME, CheckpointError, Manifest, parse

_STEP = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d{6,}\.(tmp|old)-[0-9a-f]{32}")
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
    """The newest complete checkpoint in `directory`, or None. While others save there, ask on one rank and tell the rest."""
    return next((path for _, path in sorted(_candidates(Path(directory)), reverse=True) if _complete(path)), None)


def prune(directory: str | os.PathLike, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and what interrupted saves left. Call it where no save is under way.

    A directory that is no complete checkpoint neither counts nor goes.

    Raises:
        CheckpointError: when something cannot be deleted; names it and the reason.
    """
    assert keep >= 1, "the last checkpoint is never deleted"
    directory = Path(directory)
    try:
        for _, path in steps(directory)[:-keep]:
            aside = beside(path, "old")
            os.rename(path, aside)
            shutil.rmtree(aside)
        for entry in _entries(directory):
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)
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


def _complete(path: Path) -> bool:
    try:
        return not absent_files(path, read(path))
    except CheckpointError:
        return False

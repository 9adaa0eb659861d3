"""Copies of checkpoints in stores that fsspec reaches (s3://, gs://, memory://): the manifest goes up last and comes down last.

A store has neither a rename nor a sync, so a checkpoint counts there when its manifest does; what comes down is verified as ever.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paratrain.checkpoint.directory import beside, best, check, read, step_path
from paratrain.checkpoint.manifest import FILE_NAME, CheckpointError, parse
from paratrain.config import Checkpoint
from paratrain.errors import UserError


def _open(url: str) -> tuple[Any, str]:
    """(file system, path in it)."""
    try:
        import fsspec
    except ImportError:
        raise UserError(f"checkpoint.remote={url}: fsspec is not installed; pip install 'paratrain[remote]'") from None
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"checkpoint.remote={url}: {error}") from None


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """One error that names the store, in the place of those of its client, whichever that is."""
    try:
        yield
    except (UserError, CheckpointError):
        raise
    except Exception as error:  # clients of stores raise errors of their own kinds
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        raise UserError(
            f"checkpoint.remote={url}: the store does not answer as it should ({type(error).__name__}: {str(error) or cause}); check its address, "
            "the network and the credentials, or write checkpoint.remote=null to go on with what is on this machine"
        ) from None


def steps(url: str) -> list[int]:
    """Steps whose checkpoints are complete in a store, the newest last."""
    fs, root = _open(url)
    fs.invalidate_cache()
    found = fs.glob(f"{root}/step-*/{FILE_NAME}")
    names = [path.rsplit("/", 2)[-2].removeprefix("step-") for path in found]
    return sorted(int(name) for name in names if name.isdecimal())


def upload(path: Path, url: str, options: Checkpoint) -> None:
    """Copy a complete checkpoint, then delete there what the options do not keep.

    Raises:
        UserError, OSError: the store cannot be reached or written.
    """
    fs, root = _open(url)
    there = f"{root}/{path.name}"
    manifest = read(path)
    if fs.exists(there):
        fs.rm(f"{there}/{FILE_NAME}")
    fs.makedirs(there, exist_ok=True)
    for file in manifest.files:
        fs.put_file(str(path / file.name), f"{there}/{file.name}")
    fs.put_file(str(path / FILE_NAME), f"{there}/{FILE_NAME}")
    if options.keep is not None:
        kept = best(path.parent, options.best, options.best_mode) if options.best else None
        for step in steps(url)[: -options.keep]:
            if not (options.keep_every and step % options.keep_every == 0) and not (kept and step == kept[1]):
                gone = f"{root}/{step_path('', step).name}"
                fs.rm(f"{gone}/{FILE_NAME}")
                fs.rm(gone, recursive=True)


def download(url: str, directory: Path) -> Path | None:
    """Bring the newest sound checkpoint of a store into `directory`; None when it has none.

    Raises:
        UserError: the store cannot be reached.
    """
    with _reached(url):
        return _download(url, directory)


def _download(url: str, directory: Path) -> Path | None:
    fs, root = _open(url)
    for step in reversed(steps(url)):
        target = step_path(directory, step)
        there, temporary = f"{root}/{target.name}", beside(target, "tmp")
        temporary.mkdir(parents=True)
        try:
            for file in parse(fs.cat_file(f"{there}/{FILE_NAME}")).files:
                fs.get_file(f"{there}/{file.name}", str(temporary / file.name))
            fs.get_file(f"{there}/{FILE_NAME}", str(temporary / FILE_NAME))
        except (CheckpointError, FileNotFoundError):
            shutil.rmtree(temporary)
            continue
        if not check(temporary):
            temporary.rename(target)
            return target
        shutil.rmtree(temporary)
    return None

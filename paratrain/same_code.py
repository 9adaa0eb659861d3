"""Whether every rank runs the same program: a host that was updated in between, or was not, would train something else without a word.

Compared are what paratrain's own sources, torch and the user's modules are on each rank. A module that only some ranks have loaded says
nothing: many are loaded by one rank alone.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from paratrain.distributed import world_size
from paratrain.errors import UserError

_PACKAGE = Path(__file__).parent
_INSTALLED = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib"))
_MOST_NAMED = 8


def check() -> None:
    """Refuse ranks that run different versions. Every rank must call it.

    Raises:
        UserError: on every rank: names the ranks, their hosts, and what differs.
    """
    if world_size() == 1:
        return
    mine = versions()
    digests: list[Any] = [None] * world_size()
    dist.all_gather_object(digests, _digest([json.dumps(mine, sort_keys=True).encode()]))
    if len(set(digests)) == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (socket.gethostname(), mine))
    home, first = found[0]
    others: dict[str, list[str]] = {}
    for rank, (host, theirs) in enumerate(found):
        if different := sorted(name for name in first.keys() & theirs.keys() if first[name] != theirs[name]):
            shown = [f"{name} {theirs[name]} and not {first[name]}" for name in different[:_MOST_NAMED]]
            more = [f"{len(different) - _MOST_NAMED} more"] if len(different) > _MOST_NAMED else []
            others.setdefault(", ".join(shown + more), []).append(f"rank {rank} on {host}")
    if others:
        told = [f"{', '.join(who[:_MOST_NAMED])}{' and others' * (len(who) > _MOST_NAMED)}: {what}" for what, who in others.items()]
        raise UserError(
            f"the ranks run different versions of the program, and rank 0 on {home} is not what these are (version, or digest of the file):\n  "
            + "\n  ".join(told)
            + "\nBring all hosts to one version and start again; a restart goes on from the last checkpoint"
        )


def versions() -> dict[str, str]:
    """Name -> version of what this process runs; for a module of the user's the digest of its file."""
    from paratrain import __version__

    found = {
        "paratrain": f"{__version__} ({_own_sources()})",
        "torch": torch.__version__.partition("+")[0],
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
    for name, file in user_files().items():
        try:
            found[f"{os.path.basename(file)} ({name})" if name == "__main__" else name] = _digest([Path(file).read_bytes()])
        except OSError:  # it came from an archive, or is gone
            continue
    return found


def own_files() -> list[Path]:
    """paratrain's own source files."""
    return sorted(_PACKAGE.rglob("*.py"))


def user_files() -> dict[str, str]:
    """Name -> source file of every loaded module that is not paratrain's own and comes neither with Python nor from a package that is installed."""
    files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in list(sys.modules.items())}
    return {
        name: file
        for name, file in files.items()
        if isinstance(file, str) and file.endswith(".py") and not _is_installed(os.path.dirname(file))
    }


@functools.cache
def _is_installed(directory: str) -> bool:
    """Whether what is in a directory is paratrain's own, or of a package that is installed and has a version of its own."""
    path = os.path.realpath(directory) + os.sep
    inside = any(f"{os.sep}{name}{os.sep}" in path for name in ("site-packages", "dist-packages"))
    return inside or path.startswith((*_INSTALLED, f"{_PACKAGE}{os.sep}"))


@functools.cache
def _own_sources() -> str:
    return _digest(part for path in own_files() for part in (str(path.relative_to(_PACKAGE)).encode(), path.read_bytes()))


def _digest(parts: Iterable[bytes]) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:10]

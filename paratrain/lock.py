"""One job an output directory: a second one would replace the checkpoints of the first, and neither would know.

The lock is a POSIX record lock, which the kernel gives back when its holder dies, however it dies, and which network file systems
carry between hosts. Where one does not, the file's time of change tells: the holder renews it every few seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paratrain.errors import UserError

FILE_NAME = ".lock"
_BEAT = 5.0
_DYING = 2.0
"""Seconds that a killed process may take to go: it ends its write to the disk first."""
_LEASE = 120.0
"""Seconds after which a file server gives up the lock of a host that does not answer (90 by NFSv4's default)."""


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the lock of an output directory.

    Raises:
        UserError: another live job holds it; names its host and process.
    """
    path = directory / FILE_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        link = error.errno == errno.ELOOP
        why = "it is a symbolic link, and its target would be written" if link else error.strerror
        raise UserError(
            f"output_dir={directory}: cannot open its lock {path.name} ({why}); "
            f"{'remove it' if link else 'make the directory writable'}, or choose another directory"
        ) from None
    ended = threading.Event()
    if os.fstat(fd).st_nlink > 1:
        os.close(fd)
        raise UserError(
            f"output_dir={directory}: its lock {path.name} is another name of a file that would be overwritten; remove it, or choose another directory"
        )
    try:
        _acquire(fd, directory)
        holder = _holder(fd)
        if holder and holder.get("host") != socket.gethostname() and _beats(path):
            raise _taken(directory, holder)
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}).encode(), 0)
        threading.Thread(target=_beat, args=(path, ended), name="paratrain-lock", daemon=True).start()
        yield
        os.ftruncate(fd, 0)
    finally:
        ended.set()
        os.close(fd)


def _acquire(fd: int, directory: Path) -> None:
    """Take the lock. That of a dying process, or of a host that is gone, may outlive it for a while; a live holder renews its file."""
    deadline = time.monotonic() + _DYING
    while True:
        try:
            return fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(fd)
            elsewhere = holder.get("host") != socket.gethostname()
            if time.monotonic() > deadline + (_LEASE if elsewhere else 0.0) or (elsewhere and _beats(directory / FILE_NAME)):
                raise _taken(directory, holder) from None
        time.sleep(0.1)


def _taken(directory: Path, holder: dict) -> UserError:
    who = f"process {holder.get('pid', '?')} on host {holder.get('host', '?')}"
    return UserError(f"output_dir={directory}: another job, {who}, is writing there; wait for its end, or choose another directory")


def _holder(fd: int) -> dict:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _beats(path: Path) -> bool:
    """Whether somebody renews the file; its clock may differ from ours, so that only a change counts."""
    before, deadline = path.stat().st_mtime_ns, time.monotonic() + 3 * _BEAT
    while time.monotonic() < deadline:
        time.sleep(_BEAT / 10)
        if path.stat().st_mtime_ns != before:
            return True
    return False


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        try:
            os.utime(path)
        except OSError:
            return

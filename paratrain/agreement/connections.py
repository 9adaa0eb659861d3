"""The TCP connections of this process to other ranks, so that those who wait on them can be let go: gloo knows no other way."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence

Pair = tuple[tuple[str, int], tuple[str, int]]  # (address, port) of this end and of the other


def pairs() -> list[Pair]:
    """The ends of every established TCP connection of this process."""
    return [pair for _, pair in _connections()]


def shut(peers: Sequence[Pair], but: int | None) -> None:
    """Shut down the connections whose other ends are among `peers`, the pairs of another process.

    Args:
        but: a port whose connections are left alone: that of the store.
    """
    theirs = {(remote, local) for local, remote in peers if but not in (local[1], remote[1])}
    for connection, pair in _connections():
        if pair in theirs:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _connections() -> Iterator[tuple[socket.socket, Pair]]:
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # not Linux: they end with the process
        return
    for number in numbers:
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as twin:
                if twin.family in (socket.AF_INET, socket.AF_INET6) and twin.type == socket.SOCK_STREAM:
                    yield twin, (_end(twin.getsockname()), _end(twin.getpeername()))


def _end(name: Sequence) -> tuple[str, int]:
    return str(name[0]).removeprefix("::ffff:"), int(name[1])

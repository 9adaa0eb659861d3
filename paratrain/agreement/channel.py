"""Short messages between the ranks beside their collectives: asked and answered while a main thread is stuck in one.

Each rank listens on a socket of its own, in a thread that sleeps until somebody connects. Addresses are exchanged once, over the store of
the rendezvous, so that nothing here needs a rank or a store that has died since.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

_LONGEST = 1 << 20  # bytes of a message
_PATIENCE = 2.0  # seconds for the whole of a message that arrives


@dataclass(frozen=True)
class Peer:
    """Where a rank listens, and how to look after its process from the same machine.

    Attributes:
        token: what a message to it must carry: its port may have passed on to another program.
        machine: equal where `/proc` shows the same processes.
        started: the process's start time in clock ticks, since its number may have passed on as well.
    """

    rank: int
    address: str
    port: int
    token: str
    host: str
    machine: str
    pid: int
    started: str


class Channel:
    """This rank's end.

    Args:
        rank: of this process.
        address: of this machine, where peers reach it.
        answer: what to reply to a message; runs in the listening thread.
    """

    def __init__(self, rank: int, address: str, answer: Callable[[dict[str, Any]], Any]):
        self._answer = answer
        self._listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=1024)
        port = self._listener.getsockname()[1]
        self.me = Peer(rank, address, port, uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), started(os.getpid()))
        self._open = True
        os.register_at_fork(after_in_child=self._listener.close)  # or a data worker would keep the port of a dead rank open
        threading.Thread(target=self._listen, name="paratrain-channel", daemon=True).start()

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close alone does not
        self._listener.close()

    def entry(self) -> str:
        """This rank's `Peer`, to be published."""
        return json.dumps(asdict(self.me))

    def _listen(self) -> None:
        while self._open:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError, ValueError):
                connection.settimeout(_PATIENCE)
                message = json.loads(_line(connection))
                if isinstance(message, dict) and message.pop("token", None) == self.me.token:
                    connection.sendall(json.dumps(self._answer(message)).encode() + b"\n")


def parse(entry: str | bytes) -> Peer:
    return Peer(**json.loads(entry))


def ask(peers: Iterable[Peer], message: dict[str, Any], seconds: float) -> dict[int, Any]:
    """Send `message` to all peers at once. A rank that refuses the connection, or does not answer in time, has no entry in the result.

    Returns:
        rank -> its answer.
    """
    answers: dict[int, Any] = {}
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            line = json.dumps({**message, "token": peer.token}).encode() + b"\n"
            begun = socket.socket(socket.AF_INET6 if ":" in peer.address else socket.AF_INET)
            begun.setblocking(False)
            begun.connect_ex((peer.address, peer.port))
            selector.register(begun, selectors.EVENT_WRITE, [peer.rank, line, b""])
        deadline = time.monotonic() + seconds
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                connection, exchange = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                try:
                    done = _go_on(selector, connection, exchange)
                except (OSError, ValueError):
                    done = True
                else:
                    if done:
                        answers[exchange[0]] = json.loads(exchange[2])
                if done:
                    selector.unregister(connection)
                    connection.close()
        for late in list(selector.get_map().values()):
            assert isinstance(late.fileobj, socket.socket)
            late.fileobj.close()
    return answers


def _go_on(selector: selectors.BaseSelector, connection: socket.socket, exchange: list[Any]) -> bool:
    """Write what is left of the message, or read what has come of the answer; whether that is whole."""
    if exchange[1]:
        exchange[1] = exchange[1][connection.send(exchange[1]) :]
        if not exchange[1]:
            selector.modify(connection, selectors.EVENT_READ, exchange)
        return False
    part = connection.recv(65536)
    exchange[2] += part
    if exchange[2].endswith(b"\n"):
        json.loads(exchange[2])
        return True
    if not part or len(exchange[2]) > _LONGEST:
        raise OSError("the connection was closed before the answer was whole")
    return False


def _line(connection: socket.socket) -> bytes:
    text, deadline = b"", time.monotonic() + _PATIENCE
    while not text.endswith(b"\n"):
        part = connection.recv(65536)
        text += part
        if not part or len(text) > _LONGEST or time.monotonic() > deadline:
            raise OSError("no whole message")
    return text


def own_address(towards: str) -> str:
    """The address of this machine by which it reaches the host `towards`, and is reached from there."""
    family, _, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]


def started(pid: int) -> str:
    """When a process began, in clock ticks since the start of the machine; empty where it is gone."""
    return _stat(pid)[19]


def state(peer: Peer, me: Peer) -> str:
    """What the kernel says of a process on this machine that does not answer: "ended", "stopped", or "" for one that runs or is elsewhere."""
    if peer.machine != me.machine or not me.started:
        return ""
    fields = _stat(peer.pid)
    if fields[0] in ("", "Z", "X") or fields[19] != peer.started:
        return "ended"
    return "stopped" if fields[0] in "Tt" else ""


def kills_for_memory() -> int:
    """How many processes the kernel of this machine has killed for want of memory, of the machine or of a control group, since it started."""
    try:
        with open("/proc/vmstat") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, ValueError):
        return 0


def _stat(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return [""] * 50


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return uuid.uuid4().hex

"""Processes: who is this one, and how do they meet.

A restarted job must never read what its dead predecessor wrote: under torchrun the agent's store outlives the workers, and
torch's own `env://` rendezvous then connects to addresses that no longer exist. `rendezvous` therefore agrees on a nonce first
and scopes every key by it.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from paratrain import compat
from paratrain.errors import PeerError, UserError

_HANDSHAKE = "paratrain"
_PR_SET_PDEATHSIG = 1
_SLEEPY = 2.0  # seconds that threads have to fall asleep at the end; a user's own may never
_SHOWN = 10.0  # seconds that a network file system may take to show a new file
T = TypeVar("T")


def rank() -> int:
    """Rank of this process in the job; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Processes of the job; 1 when this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return rank() == 0


def launched() -> bool:
    """Whether a launcher (torchrun, srun with its variables set) started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def barrier() -> None:
    """Wait for every rank; returns at once without a process group."""
    if world_size() > 1:
        dist.barrier()


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank; a mistake it finds there is raised on every rank.

    Raises:
        UserError: the one that `function` raised on rank 0; PeerError in the place of any other error there.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None]
    fault: Exception | None = None
    if is_main_process():
        try:
            answer = [(True, function())]
        except UserError as error:
            answer = [(False, error)]
        except Exception as error:
            fault, answer = error, [(False, PeerError(f"rank 0 failed with {type(error).__name__}: {error}"))]
    dist.broadcast_object_list(answer, src=0)
    if fault is not None:
        raise fault
    good, value = answer[0]
    if not good:
        raise value
    return value


def refuse_unless_shared(directory: Path) -> None:
    """Find out before anything is trained whether every rank sees the directory of rank 0. Every rank must call it.

    Raises:
        UserError: on every rank: names those that do not.
    """
    if world_size() == 1:
        return
    mark = directory / on_main(lambda: f".shared-{uuid.uuid4().hex}")
    try:
        on_main(mark.touch)
        seen: list[Any] = [None] * world_size()
        dist.all_gather_object(seen, (_appears(mark), socket.gethostname(), str(directory.absolute())))
    finally:
        if is_main_process():
            mark.unlink(missing_ok=True)
    if blind := [f"rank {rank} on {host} ({where})" for rank, (sees, host, where) in enumerate(seen) if not sees]:
        raise UserError(
            f"output_dir={directory}: {', '.join(blind[:8])} {'do' if len(blind) > 1 else 'does'} not see what rank 0 on {seen[0][1]} writes to "
            f"{seen[0][2]}, so no checkpoint could be whole; name a directory on a file system that all hosts share"
        )


def _appears(path: Path) -> bool:
    """Whether a file is there; a network file system may take some seconds to show it."""
    deadline = time.monotonic() + _SHOWN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # which asks the server anew
        time.sleep(0.1)
    return True


def rendezvous(timeout: timedelta = timedelta(minutes=10)) -> dist.Store:
    """A store that only the ranks of this very attempt of the job share.

    Every other rank posts a nonce of its own and rank 0 answers it with the name of the session, until each has confirmed:
    a nonce that a dead process left behind gets an answer that nobody reads.

    Raises:
        UserError: when ranks do not appear within `timeout`; names them.
    """
    if not launched():
        return dist.HashStore()
    die_with_launcher()
    me, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as missing:
        raise UserError(f"RANK is set but {missing.args[0]} is not: start the job with torchrun, or unset RANK to run alone") from None
    store = dist.TCPStore(
        host, port, ranks, is_master=me == 0 and not agent_store, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    session = _welcome(store, ranks, timeout) if me == 0 else _report(store, me)
    return dist.PrefixStore(f"{_HANDSHAKE}/{session}", store)


def _welcome(store: dist.Store, ranks: int, timeout: timedelta) -> str:
    session, answered = uuid.uuid4().hex, dict[int, bytes]()
    absent = set(range(1, ranks))
    deadline = time.monotonic() + timeout.total_seconds()
    while absent:
        for peer in sorted(absent):
            if store.check([f"{_HANDSHAKE}/{session}/here/{peer}"]):
                absent.discard(peer)
            elif store.check([f"{_HANDSHAKE}/hello/{peer}"]):
                nonce = store.get(f"{_HANDSHAKE}/hello/{peer}")
                if answered.get(peer) != nonce:
                    store.set(f"{_HANDSHAKE}/welcome/{nonce.decode()}", session)
                    answered[peer] = nonce
        if time.monotonic() > deadline:
            raise UserError(f"waited {timeout} for ranks {sorted(absent)} of {ranks} to start; see their output")
        time.sleep(0.002)
    return session


def _report(store: dist.Store, me: int) -> str:
    nonce = uuid.uuid4().hex
    store.set(f"{_HANDSHAKE}/hello/{me}", nonce)
    session = store.get(f"{_HANDSHAKE}/welcome/{nonce}").decode()
    store.set(f"{_HANDSHAKE}/{session}/here/{me}", "")
    return session


def launch_id() -> str | None:
    """What all attempts of one launch have in common and no other launch has: torchrun's store outlives its workers. Rank 0 asks.

    None where nothing outlives them, so that a restart cannot be told from a start.
    """
    store = compat.whole_store()
    if store is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return store.compare_set(f"{_HANDSHAKE}/launch", "", uuid.uuid4().hex).decode()


def choose_device(asked: str) -> torch.device:
    """The device this rank computes on: `auto`, `cpu` or `cuda` -> `cuda:<local rank>`, shared where ranks outnumber GPUs."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda: torch finds no CUDA device here; write trainer.device=cpu, or see `python -m paratrain env`")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def init(device: torch.device, timeout: timedelta) -> None:
    """Create the default process group (NCCL on GPUs, gloo on CPUs), or keep the one the caller created.

    Ranks that share one GPU talk over gloo, since NCCL refuses that.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps, for the report of a hang
    if device.type == "cuda":
        torch.cuda.set_device(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nccl = device.type == "cuda" and local <= torch.cuda.device_count() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=rendezvous(timeout),
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        timeout=timeout,
    )
    atexit.register(_leave)


def _leave() -> None:
    """Give up the process group before the interpreter ends, and wait until its threads sleep.

    A thread of gloo lets go of the tensors of a collective only after the main thread has gone on. Letting go of a Python object needs the
    interpreter, and a C++ thread that asks for one that is ending aborts the process: "terminate called without an active exception".
    Whoever still holds the group (a trainer in a global variable) keeps its threads, so that destroying it alone does not suffice.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        deadline = time.monotonic() + _SLEEPY
        while _others_run() and time.monotonic() < deadline:
            time.sleep(0.001)  # without the interpreter's lock, which they need


def _others_run() -> bool:
    """Whether a thread of this process other than the calling one computes or wants to; False where the system does not tell."""
    try:
        threads = {int(name) for name in os.listdir("/proc/self/task")} - {threading.get_native_id()}
    except OSError:
        return False
    return any(_state(thread) == "R" for thread in threads)


def _state(thread: int) -> str:
    try:
        with open(f"/proc/self/task/{thread}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:  # it has ended
        return ""


def die_with_launcher() -> None:
    """Have the kernel kill this process when torchrun dies: its workers are in sessions of their own and would train on, unseen."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        raise UserError("the launcher died while this process started")


def seed_for(*parts: int) -> int:
    """A 63-bit seed that is a function of all `parts`; near-by parts give unrelated seeds."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

"""Run a function on several local ranks: `run(fn, ranks)` returns what it returned on each of them.

Importing torch takes seconds, so one warm process does that once, is kept between calls and runs nothing itself. Each call forks
its ranks from it, at some 10 ms a rank: real processes that know nothing of the calls before, neither process groups nor caches,
seeds or environment. When the calling process dies, the warm one and its ranks die too. Needs Linux 5.3 or later.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

MAX_RANKS = 200  # their sockets travel in one message, which holds 253
_WARM_IMPORTS = (
    "cloudpickle",
    "numpy",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "paratrain._hydra.compose",
    "paratrain.api",
    "paratrain.trainer",
    "paratrain.verify",
)
_GRACE = 3.0  # seconds that ranks have to end once another has failed
_EXIT = struct.Struct("ii")  # rank, exit code as of os.waitstatus_to_exitcode
_PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """Some rank raised, died or hung. The message tells of every such rank, the likely cause first.

    Attributes:
        failures: rank -> its exit code, its traceback or the stack in which it hung: ranks that died, then those that raised, in
            the order in which they did, then those that never ended.
    """

    def __init__(self, summary: str, failures: dict[int, str]):
        self.summary, self.failures = summary, failures
        super().__init__("\n\n".join([summary, *(f"--- rank {rank}: {text.rstrip()}" for rank, text in failures.items())]))

    def __reduce__(self):
        return type(self), (self.summary, self.failures)


def run(fn: Callable, ranks: int, *args: Any, timeout: float = 120.0, init: bool = True, **kwargs: Any) -> list[Any]:
    """Call `fn(*args, **kwargs)` on each of `ranks` new local processes and wait for all of them.

    Args:
        fn: any callable, lambdas and closures included. It, its arguments and its results are pickled by `cloudpickle`.
        ranks: number of processes. Each has the caller's environment with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
            and MASTER_PORT as torchrun sets them, the caller's sys.path, working directory, stdout and stderr, one thread and seed 0.
        timeout: seconds until ranks that still run are killed.
        init: initialise the default process group over gloo before the call; False where `fn` does so itself.

    Returns:
        What `fn` returned, by rank.

    Raises:
        RankError: `fn` raised, died or hung on some rank. Once one rank has failed, the others have 3 seconds to end.
    """
    import cloudpickle

    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks={ranks}: must be between 1 and {MAX_RANKS}")
    call = cloudpickle.dumps((fn, args, kwargs))
    with _lock, tempfile.TemporaryDirectory(prefix="paratrain-") as scratch, _forked(ranks) as workers:
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank, pipe in enumerate(workers.pipes):
            env = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with contextlib.suppress(OSError):  # it is dead already, as its exit code will tell
                pipe.send_bytes(cloudpickle.dumps((env, os.getcwd(), sys.path, scratch, init, timeout)))
                pipe.send_bytes(call)
        return [cloudpickle.loads(result) for result in _collect(workers, timeout, Path(scratch))]


@atexit.register
def close() -> None:
    """End the warm process. The next `run` starts another; a program that ends need not call this."""
    global _warm
    if _warm:
        _warm.control.close()
        _warm.process.kill()
        _warm.process.wait()
    _warm = None


class _Warm(NamedTuple):
    process: subprocess.Popen
    control: socket.socket


class _Workers(NamedTuple):
    pids: tuple[int, ...]
    pipes: list[Connection]
    control: socket.socket  # the warm process reports exits here
    exits: dict[int, int]  # rank -> exit code


_lock = threading.Lock()
_warm: _Warm | None = None


def _start() -> _Warm:
    global _warm
    if _warm is None or _warm.process.poll() is not None:
        close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        callers = [name for name in ("pytest",) if name in sys.modules]  # test modules that ranks import need it
        code = f"import sys; sys.path[:] = {sys.path!r}; from paratrain.spawn import _serve; _serve({theirs.fileno()}, {callers!r})"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with a pool of threads must not fork
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=env,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the caller alone, who ends the ranks
        )
        theirs.close()
        _warm = _Warm(process, ours)
    return _warm


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _forked(ranks: int) -> Iterator[_Workers]:
    """New ranks, which are dead and reaped on leaving, however that happens."""
    control = _start().control
    pairs = [socket.socketpair() for _ in range(ranks)]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        socket.send_fds(control, [b"fork"], [1, 2, *(theirs.fileno() for _, theirs in pairs)])
        pids = struct.unpack(f"{ranks}i", _receive(control, 4 * ranks))
    except BaseException:
        close()
        raise
    finally:
        for _, theirs in pairs:
            theirs.close()
    workers = _Workers(pids, [Connection(ours.detach()) for ours, _ in pairs], control, {})
    try:
        yield workers
    finally:
        for pipe in workers.pipes:
            pipe.close()
        with contextlib.suppress(OSError):  # the warm process itself is dead, and its ranks with it
            control.send(b"kill")
        while len(workers.exits) < ranks and _warm:
            _note_exit(workers)


def _receive(control: socket.socket, size: int) -> bytes:
    message = control.recv(size)
    if not message:
        close()
        raise RankError("the process that forks the ranks has died", {})
    return message


def _note_exit(workers: _Workers) -> int:
    rank, code = _EXIT.unpack(_receive(workers.control, _EXIT.size))
    workers.exits[rank] = code
    return rank


def _collect(workers: _Workers, timeout: float, scratch: Path) -> list[bytes]:
    """Every rank's pickled result, or RankError."""
    results: dict[int, bytes] = {}
    raised: dict[int, str] = {}
    died: dict[int, str] = {}
    stuck: dict[int, str] = {}
    listening = {pipe: rank for rank, pipe in enumerate(workers.pipes)}
    running = set(listening.values())
    deadline = time.monotonic() + timeout

    def read(rank: int) -> None:
        del listening[workers.pipes[rank]]
        with contextlib.suppress(EOFError, OSError):
            answer = workers.pipes[rank].recv_bytes()
            running.discard(rank)
            if answer[:1] == b"+":
                results[rank] = answer[1:]
            else:
                raised[rank] = answer[1:].decode()

    while running and (left := deadline - time.monotonic()) > 0:
        for ready in wait([workers.control, *listening], left):
            if isinstance(ready, Connection):
                if ready in listening:
                    read(listening[ready])
                continue
            rank = _note_exit(workers)
            if workers.pipes[rank] in listening:
                read(rank)
            if rank in running:
                running.discard(rank)
                died[rank] = _describe_exit(workers.exits[rank])
        if raised or died:
            deadline = min(deadline, time.monotonic() + _GRACE)
    if running:
        after_failure = "stopped: still running after another rank had failed"
        reason = after_failure if raised or died else f"hung: still running after {timeout:g} s, killed"
        stacks = _stacks({rank: workers.pids[rank] for rank in sorted(running)}, scratch)
        stuck = {rank: f"{reason}\n{stack}" for rank, stack in stacks.items()}
    if failures := {**died, **raised, **stuck}:
        summary = f"{len(failures)} of {len(workers.pids)} ranks failed ({', '.join(map(str, failures))})"
        raise RankError(f"{summary}; finished: {', '.join(map(str, sorted(results))) or 'none'}", failures)
    return [results[rank] for rank in sorted(results)]


def _describe_exit(code: int) -> str:
    return f"died: killed by {signal.Signals(-code).name}" if code < 0 else f"died: exit code {code}, without raising"


def _stacks(pids: dict[int, int], scratch: Path) -> dict[int, str]:
    """The Python stacks of live ranks, which dump them into `scratch` when asked to."""
    files = {rank: scratch / f"{rank}.stack" for rank in pids}
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    previous, patience = None, time.monotonic() + 1.0
    while time.monotonic() < patience:
        time.sleep(0.05)
        texts = {rank: file.read_text() if file.exists() else "" for rank, file in files.items()}
        if texts == previous and all(texts.values()):
            break
        previous = texts
    return {rank: text or "(it did not answer with its stack: stuck in the kernel, or before Python ran)" for rank, text in texts.items()}


def _serve(fd: int, names: Sequence[str]) -> None:
    """The warm process: import `names` too, fork ranks whenever asked, report their exits, end when the caller does."""
    control = socket.socket(fileno=fd)
    for name in (*_WARM_IMPORTS, *names):
        importlib.import_module(name)
    while True:
        message, fds, _, _ = socket.recv_fds(control, 16, MAX_RANKS + 2)
        if not message:
            return
        if fds:
            stdout, stderr, *pipes = fds
            pids = [_fork(pipe, stdout, stderr, [control.fileno(), *fds]) for pipe in pipes]
            for inherited in fds:
                os.close(inherited)
            _reap(control, pids)


def _fork(pipe: int, stdout: int, stderr: int, inherited: list[int]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for fd in inherited:
                if fd != pipe:
                    os.close(fd)
            _work(Connection(pipe))
        finally:
            os._exit(1)
    return pid


def _reap(control: socket.socket, pids: list[int]) -> None:
    control.send(struct.pack(f"{len(pids)}i", *pids))
    live = {os.pidfd_open(pid): (rank, pid) for rank, pid in enumerate(pids)}
    while live:
        for ready in select.select([control.fileno(), *live], [], [])[0]:
            if ready == control.fileno():
                ended = not control.recv(16)
                for _, pid in live.values():
                    os.kill(pid, signal.SIGKILL)
                if ended:
                    sys.exit()
            elif ready in live:
                rank, pid = live.pop(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                control.send(_EXIT.pack(rank, os.waitstatus_to_exitcode(status)))


def _work(pipe: Connection) -> None:
    """A rank: make the one call, answer, wait to be killed (an early exit could cut off what peers still have to read)."""
    import cloudpickle
    import torch

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    env, directory, path, scratch, init, timeout = cloudpickle.loads(pipe.recv_bytes())
    os.environ.clear()
    os.environ.update(env)
    rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, file=open(f"{scratch}/{rank}.stack", "w"), all_threads=True)  # noqa: SIM115
    try:
        os.chdir(directory)
        sys.path[:] = path
        torch.set_num_threads(1)
        torch.manual_seed(0)
        random.seed(0)
        sys.modules["numpy"].random.seed(0)
        fn, args, kwargs = cloudpickle.loads(pipe.recv_bytes())
        if init:
            store = torch.distributed.FileStore(f"{scratch}/store", ranks)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=2 * timeout))
        answer = b"+" + cloudpickle.dumps(fn(*args, **kwargs))
    except BaseException:
        answer = b"-" + traceback.format_exc().encode(errors="backslashreplace")
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(answer)
    pipe.poll(None)

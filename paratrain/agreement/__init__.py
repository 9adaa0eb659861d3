"""What one rank refuses, all refuse; who waits in vain is told for whom.

An exception that leaves a call of the engine on one rank leaves the others in a collective. So a rank that fails says so to its peers:

    all of them fail in the same call      each raises its own error, and the process groups stay as they are
    they make different calls              found before anything is sent where the call is not one of every step; each raises what they called
    others wait in a collective for it     their connections are shut, and each raises the error of the rank that failed
    a collective fails or runs into its    the ranks ask each other where they are; each raises the error of the rank that failed first,
    timeout                                or names those that ended, were stopped, or are elsewhere

Nothing is sent while all goes well: a call costs an entry in a list and a `try`.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import re
import sys
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from paratrain import compat
from paratrain.agreement import abort, channel, connections, where
from paratrain.agreement.channel import Channel, Peer
from paratrain.errors import PeerError, UserError

log = logging.getLogger(__name__)

FIT = "Trainer.fit()"
_STUCK = 0.7  # seconds without computing after which a rank inside a collective waits for those that will not come
_AWAY = 3.0  # likewise for one that is elsewhere: it may be about to fail as well
_CLEANING_UP = 45.0  # likewise for one that has failed and ends a save before it says so
_LONGEST = 15.0  # seconds after which a rank that computes is not waited for any longer
_EXPLAINED = 3.0  # seconds that the cause of a broken connection has to become known
_TIMED_OUT = 1.0  # likewise for a wait that was too long
_ON_ITS_WAY = 0.3  # seconds that a message may take
_ANSWER = 2.0  # seconds that a rank has to answer
_RECENT = 60.0  # seconds for which an error that a rank caught may be why it ended
_MOST_NAMED = 8  # ranks in a message
_REMEMBERED = 64  # calls that are compared when the ranks wait for each other

_COMMUNICATION = re.compile(
    r"gloo|NCCL|nccl|[Cc]onnection (was )?(closed|reset|refused)|Timed out waiting|Broken pipe|Socket|process group|recvValue|sendBytes"
)

_TIMEOUT = re.compile(r"[Tt]imed? ?out")
_MISMATCH = re.compile(r"[Rr]eceived data size|collective mismatch|preamble")

_SAME_CALLS = (
    "Every rank must make the same calls of the engine, of its model and of torch.distributed, in the same order: do on all ranks what one does "
    "alone (validation, sampling, saving), or use the weights of engine.full_state_dict() for it."
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """An error on some rank.

    Attributes:
        text: its message.
        user: whether it is a `UserError`.
        whole: whether the message speaks of all ranks, and not of `rank` alone.
        place: where it was raised.
    """

    rank: int
    kind: str
    text: str
    user: bool
    whole: bool
    place: str

    def error(self) -> UserError | PeerError:
        """The same on another rank."""
        who = "" if self.whole else f"rank {self.rank}: "
        if self.user:
            return UserError(f"{who}{self.text}")
        if self.whole:
            return PeerError(self.text)
        return PeerError(f"rank {self.rank} failed with {self.kind}: {self.text}\n(in {self.place}; its traceback is in its own output)")


class Call(NamedTuple):
    """A call of the engine by the program, or by a callback of the trainer.

    Attributes:
        number: among all calls on this rank.
        together: among those that every rank must make; -1 for others.
    """

    number: int
    together: int
    name: str
    file: str
    line: int

    @property
    def shown(self) -> str:
        return f"{self.name} ({where.shown(self.file, self.line)})"


class Agreement:
    """This process among the ranks of a process group.

    Args:
        rank: of this process.
        address: where peers reach this machine; empty where there are none.
        patience: seconds for which a rank waits for the others.

    Attributes:
        doing: calls of the engine that run in this process, outermost first.
        over: the failure after which the ranks have parted; None while they work together.
        models: modules of engines, to tell where their forward runs.
    """

    def __init__(self, rank: int, address: str, patience: float):
        self.rank, self.patience = rank, patience
        self.doing: list[str] = []
        self.over: Failure | None = None
        self.models: list[weakref.ref[Any]] = []
        self.peers: dict[int, Peer] = {}
        self._thread = where.Observed()
        self._told: deque[tuple[BaseException, Failure]] = deque(maxlen=8)  # errors that peers know of
        self._failing = False  # on the way out of an inner call
        self._place = ""  # where it was that this rank failed
        self._waited = False  # whether it failed in a collective
        self._calls: deque[tuple[int, int, str, str, int]] = deque(maxlen=_REMEMBERED)  # the fields of `Call`
        self._called = self._together = 0  # calls so far, and those of them that every rank must make
        self._reached = 0  # the most that a peer has made together, as far as they said
        self._inbox: dict[int, deque[Failure]] = defaultdict(deque)
        self._hints: dict[int, tuple[float, Failure]] = {}  # errors that a rank may still catch
        self._lock = threading.Lock()
        self.channel = Channel(rank, address, self._answer) if address else None
        self._kills = channel.kills_for_memory()
        self.undo = abort.explain(self) if address else None

    # ------------------------------------------------------------------ on the rank that calls

    def enter(self, doing: str, together: bool = True, rare: bool = True) -> None:
        """A call of the engine begins.

        Args:
            together: every rank must make it.
            rare: it is not a part of every step, so that asking another rank whether it does the same costs nothing that counts.

        Raises:
            UserError: another rank called something else, or the ranks have parted before.
        """
        if self.between_calls:
            if self.over is not None:
                raise self._echoed(self.over)
            self._failing = False
            frame = sys._getframe(2)
            self.note(doing, frame.f_code.co_filename, frame.f_lineno, together, rare)
        self.doing.append(doing)

    def note(self, doing: str, file: str, line: int, together: bool, rare: bool) -> None:
        """Something begins that peers may have to do at the same point of their programs; see `enter`."""
        number = self._together if together else -1
        call = (self._called, number, doing, file, line)
        self._called += 1
        self._together += together
        compared = together and rare and self.peers and (not self._calls or self._calls[-1][2] != doing)
        self._calls.append(call)
        if compared:
            self._compare(Call(*call))

    def _compare(self, mine: Call) -> None:
        """Ask the next rank whether it makes the same call, once it is there: where ranks differ, some rank differs from its next."""
        peer = self.peers.get(self.rank + 1) or self.peers[min(self.peers)]
        deadline, pause = time.monotonic() + self.patience, 0.001
        while self.over is None:
            answer = channel.ask([peer], {"kind": "call", "together": mine.together}, _ANSWER).get(peer.rank)
            if answer is None:  # it is gone, as the collective will tell
                return
            if answer["call"] is not None:
                theirs = Call(*answer["call"])
                if theirs.name != mine.name:
                    text = f"rank {self.rank} called {mine.shown}, where rank {peer.rank} called {theirs.shown}. {_SAME_CALLS}"
                    raise self._parted(text)
                return
            if answer["reached"] > mine.together:  # and forgot it
                return
            if time.monotonic() > deadline:
                self._place = mine.shown
                raise self._parted(self._hang(channel.ask(self.peers.values(), {"kind": "where"}, _ANSWER)))
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _parted(self, text: str) -> UserError | PeerError:
        failure = Failure(self.rank, UserError.__name__, text, True, True, self._place)
        self._part(failure)
        return self._echoed(failure)

    def leave(self, error: BaseException | None, wait: bool) -> None:
        """It ends, by `error` or well; `wait`: all ranks must end it the same way.

        Raises:
            UserError, PeerError: in the place of an error that is only the echo of what another rank did.
        """
        try:
            if error is None:
                if self.over is not None:
                    raise self._echoed(self.over)
            elif self.peers and isinstance(error, Exception):
                self._leave_by(error, wait)
        finally:
            self.doing.pop()

    def _leave_by(self, error: Exception, wait: bool) -> None:
        outermost, found = len(self.doing) == 1, self.cause_of(error)
        if found is None:
            self._waited, self._place = _is_echo(error), self._here(error)
            self._failing = True
            found = self._explained(error) if self._waited else self._failure(error)
            if self._waited:
                if outermost:
                    self._part(found)
                raise self._echoed(found) from error
            self._told.append((error, found))
            self._tell(found, soft=True)
        if outermost:
            if found.rank != self.rank or found.whole:
                self._part(found)
            elif wait or found.user:
                self._settle(found)
            self._failing = False

    def cause_of(self, error: BaseException) -> Failure | None:
        """The failure behind an error that this rank has told of, or raised because of another rank."""
        return next((failure for known, failure in self._told if known is error), None)

    def tell(self, error: BaseException) -> None:
        """An error ends this rank's program: its peers are to know of it when they find it gone."""
        if self.peers and not _is_echo(error) and self.cause_of(error) is None:
            self._waited, self._place = False, self._here(error)
            self._failing = bool(self.doing)
            failure = self._failure(error)
            self._told.append((error, failure))
            self._tell(failure, soft=True)

    def _failure(self, error: BaseException) -> Failure:
        return Failure(self.rank, type(error).__name__, str(error), isinstance(error, UserError), False, self._place)

    def _echoed(self, failure: Failure) -> UserError | PeerError:
        made = failure.error()
        self._told.append((made, failure))
        return made

    def _tell(self, failure: Failure, soft: bool) -> dict[int, Any]:
        return channel.ask(
            self.peers.values(), {"kind": "soft" if soft else "failed", "failure": asdict(failure), "reached": self._together}, _ANSWER
        )

    def _settle(self, mine: Failure) -> None:
        """Return once every peer has failed as well, or has been told that it waits in vain."""
        self._tell(mine, soft=False)
        began, pause, silent = time.monotonic(), 0.005, dict.fromkeys(self.peers, 0)
        while True:
            with self._lock:
                missing = [peer for rank, peer in self.peers.items() if not self._inbox[rank]]
                if not missing:
                    for failures in self._inbox.values():
                        failures.popleft()
                    self._together = max(self._together, self._reached)  # they may have failed before and after a call inside
                    return
            if self.over is not None:
                break
            answers = channel.ask(missing, {"kind": "where"}, _ANSWER)
            for peer in missing:
                silent[peer.rank] = 0 if peer.rank in answers else silent[peer.rank] + 1
            patience = _CLEANING_UP if any(answer["failing"] for answer in answers.values()) else _LONGEST
            if any(map(_waits_in_vain, answers.values())) or max(silent.values()) > 2 or time.monotonic() - began > patience:
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        self._part(mine)

    def _part(self, cause: Failure) -> None:
        """From here on nobody waits for anybody."""
        with self._lock:
            self.over = self.over or cause
        compat.abort_nccl()
        message = {"kind": "over", "failure": asdict(cause), "pairs": connections.pairs()}
        channel.ask(self.peers.values(), message, _ANSWER)

    # ------------------------------------------------------------------ why a collective failed

    def _explained(self, error: Exception) -> Failure:
        """Why a collective failed here: what another rank did before, or who is gone or elsewhere."""
        deadline, answers = time.monotonic() + (_TIMED_OUT if _TIMEOUT.search(str(error)) else _EXPLAINED), dict[int, Any]()
        gone: list[str] = []
        pause = 0.01
        while True:
            if (cause := self._cause()) is not None:
                return cause
            answers = channel.ask(self.peers.values(), {"kind": "where"}, _ANSWER)
            asked_before, gone = bool(gone), self._gone(answers)
            if asked_before or (not gone and time.monotonic() > deadline):
                break  # an error that ended a rank that is gone has been told by now, or is on its way
            time.sleep(_ON_ITS_WAY if gone else pause)
            pause = min(2 * pause, 0.2)
        if (cause := self._cause()) is not None:
            return cause
        if gone:
            gone = self._gone(answers) or gone  # what was dying is dead by now
            text = f"{'; '.join(gone)}. Seen by rank {self.rank}, which was in {self._place}"
            return Failure(self.rank, type(error).__name__, text, False, True, self._place)
        return Failure(self.rank, type(error).__name__, self._hang(answers, str(error)), True, True, self._place)

    def broken(self, what: str) -> tuple[Failure, bool]:
        """Why an exception that says `what` is about to abort this process, and whether a peer had told so before; from any thread."""
        self._waited, self._place = True, where.told(where.places(self._thread.frame()), self._now(), self.modules())
        self._failing = True
        failure = self._explained(RuntimeError(what))
        self._part(failure)
        return failure, failure.rank != self.rank

    def why(self, error: BaseException) -> Failure | None:
        """What is behind an error that ends this program; None where the error says so itself."""
        if not self.peers or not isinstance(error, Exception) or not _is_echo(error) or self.cause_of(error) is not None:
            return None
        self._waited, self._place, self._failing = True, self._here(error), True
        return self._explained(error)

    def _cause(self) -> Failure | None:
        """The first error that a peer told of, if any did."""
        if self.over is not None:
            return self.over
        with self._lock:
            for failures in self._inbox.values():
                if failures:
                    return failures[0]
            recent = [(when, hint) for when, hint in self._hints.values() if time.monotonic() - when < _RECENT]
        return min(recent, key=lambda each: each[0])[1] if recent else None

    def _gone(self, answers: dict[int, Any]) -> list[str]:
        """The ranks that do not answer, and what is known of them."""
        assert self.channel is not None
        told = []
        if killed := channel.kills_for_memory() - self._kills:
            ended = (
                f"has ended, though its peers wait for it, and the kernel has killed {killed} process{'es' * (killed > 1)} of this machine for want of "
                "memory since the job began (oom_kill in /proc/vmstat): most likely this one. Lower data.micro_batch_size or data.workers, shard "
                "more, or give the job's control group more memory"
            )
        else:
            ended = "has ended, though its peers wait for it: it was killed, left by os._exit, or came to the end of its program; see its output"
        for rank, peer in self.peers.items():
            if rank in answers:
                continue
            how = {
                "ended": ended,
                "stopped": "is stopped (SIGSTOP, or a debugger)",
                "": "does not answer: its process or its machine is gone, or stands still",
            }[channel.state(peer, self.channel.me)]
            told.append(f"rank {rank} (process {peer.pid} on {peer.host}) {how}")
        return [*told[:_MOST_NAMED], *([f"and {len(told) - _MOST_NAMED} more"] if len(told) > _MOST_NAMED else [])]

    def _hang(self, answers: dict[int, Any], error: str = "") -> str:
        groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
        groups[True, self._place].append(self.rank)
        for rank, answer in answers.items():
            groups[bool(answer["collective"]), answer["place"]].append(rank)
        lines = [
            f"{_ranks(who)} {('waits' if len(who) == 1 else 'wait') if waits else ('is' if len(who) == 1 else 'are')} in {place}"
            for (waits, place), who in sorted(groups.items(), key=lambda item: item[1])
        ]
        calls = {rank: answer["calls"] for rank, answer in answers.items()} | {self.rank: list(self._calls)}
        head, tail = (
            "trainer.timeout_minutes is over, and the ranks wait for each other:",
            " If a rank was only slow, raise trainer.timeout_minutes",
        )
        if _MISMATCH.search(error):
            head, tail = "the ranks make different collectives, and what one sent is not what another expects:", ""
        return "\n  ".join([head, *lines, *_first_difference(calls)]) + f"\n{_SAME_CALLS}{tail}"

    def survey(self) -> list[str]:
        """A line for each peer that says where it is; those last that do not answer."""
        answers = channel.ask(self.peers.values(), {"kind": "where"}, _ANSWER)
        lines = [
            f"rank {rank} {'waits' if answer['collective'] else 'is'} in {answer['place']}" for rank, answer in sorted(answers.items())
        ]
        return [*lines, *self._gone(answers)]

    # ------------------------------------------------------------------ in the thread that listens

    def _answer(self, message: dict[str, Any]) -> Any:
        kind = message["kind"]
        if kind == "call":
            call = next((call for call in list(self._calls) if call[1] == message["together"]), None)
            return {"call": call, "reached": self._together}
        if kind == "where":
            frame = self._thread.frame()
            stack = where.places(frame)
            return {
                "place": self._place if self._failing else where.told(stack, self._now(), self.modules()),
                "collective": self._waited if self._failing else where.in_collective(stack),
                "idle": self._thread.idle(),
                "failing": self._failing,
                "calls": list(self._calls),
            }
        failure = Failure(**message["failure"])
        with self._lock:
            if kind == "soft":
                self._hints[failure.rank] = time.monotonic(), failure
            elif kind == "failed":
                self._inbox[failure.rank].append(failure)
                self._reached = max(self._reached, message["reached"])
            first = kind == "over" and self.over is None
            if first:
                self.over = failure
        if kind == "over":
            self._shut(message["pairs"], failure if first else None)
        return {}

    def _shut(self, pairs: list[Any], first: Failure | None) -> None:
        """Let the main thread go that waits for the sender, and those that wait for this rank."""
        connections.shut([((a[0], a[1]), (b[0], b[1])) for a, b in pairs], compat.store_port())
        if first is not None:
            compat.abort_nccl()
            message = {"kind": "over", "failure": asdict(first), "pairs": connections.pairs()}
            with suppress(RuntimeError):  # the interpreter ends, and the connections with it
                threading.Thread(target=channel.ask, args=(list(self.peers.values()), message, _ANSWER), daemon=True).start()

    @property
    def last(self) -> str:
        """What was noted last."""
        return self._calls[-1][2] if self._calls else ""

    @property
    def between_calls(self) -> bool:
        """Whether the program runs, or a callback of it, and no call of the engine."""
        return not self.doing or self.doing == [FIT]

    def _now(self) -> str:
        return self.doing[-1] if self.doing else ""

    def modules(self) -> list[Any]:
        """The modules of engines that are still there."""
        return [model for each in self.models if (model := each()) is not None]

    def _here(self, error: BaseException) -> str:
        return where.told(where.places(sys._getframe(1), error), self._now(), self.modules())


def _waits_in_vain(answer: dict[str, Any]) -> bool:
    return not answer["failing"] and answer["idle"] > (_STUCK if answer["collective"] else _AWAY)


def _is_echo(error: BaseException) -> bool:
    """Whether it is what a collective raises, or comes of that."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or (isinstance(seen, RuntimeError) and _COMMUNICATION.search(str(seen))):
            return True
        seen = seen.__cause__
    return False


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, sorted(ranks)[:_MOST_NAMED]))
    return f"rank{'s' * (len(ranks) > 1)} {named}" + (f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else "")


def _first_difference(calls: Mapping[int, Sequence[Sequence[Any]]]) -> list[str]:
    """A line about the first call that is not the same on all ranks, where their last ones show it."""
    by_rank = {rank: {call.number: call for call in (Call(*fields) for fields in made)} for rank, made in calls.items()}
    for number in sorted(set.intersection(*map(set, by_rank.values()))):
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, made in by_rank.items():
            groups[made[number].name].append(rank)
        if len(groups) > 1:
            shown = [f"{_ranks(who)} called {by_rank[who[0]][number].shown}" for who in sorted(groups.values())]
            return [f"before that, {', where '.join(shown)}"]
    return []


# ---------------------------------------------------------------------- the one of this job


_MADE: list[tuple[Any, Agreement]] = []  # the default process group and its agreement


def of_job(patience: float = 1800.0) -> Agreement:
    """The agreement among the ranks of the default process group, made when it is first asked for; every rank must do so.

    Args:
        patience: seconds for which a rank waits for the others.
    """
    world = dist.group.WORLD
    if _MADE and _MADE[0][0] is world:
        _MADE[0][1].patience = patience
        return _MADE[0][1]
    close()
    made = _make(patience)
    _MADE.append((world, made))
    return made


def close() -> None:
    """Give up what listens for the peers of a process group that is no more."""
    while _MADE:
        _, made = _MADE.pop()
        if made.channel is not None:
            made.channel.close()
        if made.undo is not None:
            made.undo()


def know(model: torch.nn.Module) -> Agreement:
    """The agreement of the engine of a model; it notes calls of its forward from outside of the engine where that needs every rank."""
    assert _MADE, "setup makes it"
    agreement = _MADE[0][1]
    agreement.models.append(weakref.ref(model))
    if agreement.peers and needs_all(model):
        model.register_forward_pre_hook(note_forward, prepend=True)  # before the weights are gathered
    return agreement


def needs_all(model: torch.nn.Module) -> bool:
    """Whether every rank holds a part of some weight, so that a forward on one rank alone would wait for ever."""
    return any(_held_by_all(param) for param in model.parameters())


def _held_by_all(param: torch.Tensor) -> bool:
    """Whether every rank has a part of its own."""
    if not isinstance(param, DTensor):
        return False
    parts = (size for size, placement in zip(param.device_mesh.shape, param.placements, strict=True) if placement.is_shard())
    return math.prod(parts) == dist.get_world_size()


def note_forward(module: torch.nn.Module, args: Any = ()) -> None:
    """The program calls the forward of an engine's model, which every rank must do."""
    if _MADE:
        agreement = _MADE[0][1]
        if agreement.between_calls and any(module is model for model in agreement.modules()):
            agreement.note(where.FORWARD, *where.caller(sys._getframe(1)), together=True, rare=True)


def note_reading(weight: DTensor) -> None:
    """The program asks for the whole of a split weight, which its ranks must do together; noted once for several of them on end."""
    if _MADE and _held_by_all(weight):
        agreement = _MADE[0][1]
        if agreement.peers and agreement.between_calls and agreement.last != where.WHOLE:
            agreement.note(where.WHOLE, *where.caller(sys._getframe(1)), together=True, rare=True)


def tell(error: BaseException) -> None:
    """Before this process ends by `error`: see `Agreement.tell`."""
    if _MADE:
        _MADE[0][1].tell(error)


def survey() -> list[str]:
    """A line for each other rank, those last that do not answer, for the report of a hang; empty where there are no others."""
    return _MADE[0][1].survey() if _MADE else []


def cause_of(error: BaseException) -> Failure | None:
    """What another rank did that made this one raise `error`; None for an error of its own."""
    if not _MADE:
        return None
    agreement = _MADE[0][1]
    found = agreement.cause_of(error)
    return found if found is not None and found.rank != agreement.rank else None


@atexit.register
def _leave() -> None:
    """The interpreter ends: peers learn of the exception that ends it, if one does, before their connections break."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is not None:
        tell(error)
        if _MADE and (failure := _MADE[0][1].why(error)) is not None:  # a collective that no call of the engine made
            print(f"error: {failure.error()}", file=sys.stderr, flush=True)
    close()


def _make(patience: float) -> Agreement:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return Agreement(rank, "", patience)
    try:
        made = Agreement(rank, channel.own_address(os.environ.get("MASTER_ADDR", "127.0.0.1")), patience)
    except OSError as error:
        log.warning("no socket for messages between the ranks (%s): a rank that fails leaves the others to their timeout", error)
        made = Agreement(rank, "", patience)
    entries: list[Any] = [None] * ranks
    dist.all_gather_object(entries, made.channel.entry() if made.channel else None)
    if made.channel is not None:
        made.peers = {peer: channel.parse(entry) for peer, entry in enumerate(entries) if entry is not None and peer != rank}
    return made


@contextmanager
def during(doing: str, patience: float) -> Iterator[None]:
    """A part of a program that every rank must end the same way; see `of_job`."""
    agreement = of_job(patience)
    agreement.enter(doing)
    try:
        yield
    except BaseException as error:
        agreement.leave(error, wait=True)
        raise
    agreement.leave(None, wait=True)


def agreed(
    doing: str, wait: bool = True, together: bool | Callable[[Any], bool] = True, rare: bool | Callable[[Any], bool] = True
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Make a method of an engine (or of what has one as `agreement`) a call that all ranks end the same way.

    Args:
        doing: what it is called in messages.
        wait: whether an error that is no `UserError` is told to the others at once; else they learn of it when this process is gone.
        together: see `Agreement.enter`, likewise `rare`; or what tells it of the engine.
    """

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            agreement: Agreement = self.agreement
            if not agreement.between_calls:  # the one that runs ends as this one does
                return method(self, *args, **kwargs)
            agreement.enter(
                doing, together if isinstance(together, bool) else together(self), rare if isinstance(rare, bool) else rare(self)
            )
            try:
                result = method(self, *args, **kwargs)
            except BaseException as error:
                agreement.leave(error, wait)
                raise
            agreement.leave(None, wait)
            return result

        return call

    return decorate

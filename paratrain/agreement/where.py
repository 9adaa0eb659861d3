"""Where a thread is, in words that a person finds in their program."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

FORWARD = "the forward of the engine's model"
WHOLE = "for the whole of a split weight"
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__))) + os.sep
_LIBRARIES = (_TORCH, *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")))
_WIDEST = 80  # characters of a line of source
_COLLECTIVE = (f"torch{os.sep}distributed{os.sep}", f"torch{os.sep}autograd{os.sep}")


class Observed:
    """The thread that trains, looked at from another one."""

    def __init__(self) -> None:
        self._thread, self._native = threading.get_ident(), threading.get_native_id()
        self._used, self._since = -1.0, time.monotonic()

    def frame(self) -> FrameType | None:
        return sys._current_frames().get(self._thread)

    def idle(self) -> float:
        """Seconds for which it has neither computed nor wanted to, as far as calls of this method tell."""
        used, now = self._seconds(), time.monotonic()
        if used - self._used > 0.001 or used < 0:
            self._used, self._since = used, now
        return now - self._since

    def _seconds(self) -> float:
        """CPU time of the thread; negative while it waits for a processor or a disk, or where nothing tells."""
        try:
            with open(f"/proc/self/task/{self._native}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
            return time.clock_gettime(time.pthread_getcpuclockid(self._thread)) if state == "S" else -1.0
        except (OSError, AttributeError):
            return -1.0


def places(frame: FrameType | None, error: BaseException | None = None) -> list[tuple[FrameType, int]]:
    """The frames of a stack with their lines, outermost first; those of a traceback below them."""
    stack = list(traceback.walk_stack(frame))[::-1]
    if error is not None:
        inner = list(traceback.walk_tb(error.__traceback__))
        known = {id(each) for each, _ in inner}
        stack = [(each, line) for each, line in stack if id(each) not in known] + inner
    return stack


def in_collective(stack: list[tuple[FrameType, int]]) -> bool:
    """Whether a stack ends inside torch.distributed or a backward pass, whose hooks communicate."""
    return bool(stack) and any(part in stack[-1][0].f_code.co_filename for part in _COLLECTIVE)


def told(stack: list[tuple[FrameType, int]], doing: str, models: Sequence[Any] = ()) -> str:
    """A line such as "engine.train_step(), train.py:12 `engine.train_step(batch)`, all_reduce".

    Args:
        doing: the call of the engine that runs; empty outside of any.
        models: the modules of engines, whose forward may run outside of any.
    """
    entry = None if doing else _entry(stack, models)
    parts = [doing or (FORWARD if entry is not None else "code outside of the engine")]
    if (line := _line(stack, entry)) is not None:
        parts.append(shown(*line))
    if in_collective(stack):
        inner = [each for each, _ in stack if _COLLECTIVE[0] in each.f_code.co_filename and each.f_code.co_name != "wrapper"]
        parts.append(inner[-1].f_code.co_name if inner else "backward")
    return ", ".join(parts)


def shown(file: str, line: int) -> str:
    """A line of a program, with its text where the file is there."""
    source = linecache.getline(file, line).strip()
    return f"{os.path.basename(file)}:{line}" + (f" `{source:.{_WIDEST}}{'...' * (len(source) > _WIDEST)}`" if source else "")


def caller(frame: FrameType | None) -> tuple[str, int]:
    """The line of the user's program that is nearest to `frame`; the outermost one where there is none."""
    file, line = "", 0
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if _is_users(frame):
            break
        frame = frame.f_back
    return file, line


def asks(frame: FrameType | None) -> str | None:
    """The line of the program that calls what runs in `frame`, at once or through another library; None where this one does."""
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        if _is_users(frame):
            return shown(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def _entry(stack: list[tuple[FrameType, int]], models: Sequence[Any]) -> int | None:
    """Which frame is the outermost call of one of the models."""
    for index, (frame, _) in enumerate(stack):
        if frame.f_code.co_name == "_call_impl" and any(frame.f_locals.get("self") is model for model in models):
            return index
    return None


def _line(stack: list[tuple[FrameType, int]], entry: int | None) -> tuple[str, int] | None:
    """The line of the user's program from which the frame `entry`, or else the engine, was called; its last one where none was."""
    users = [index for index, (frame, _) in enumerate(stack) if _is_users(frame)]
    if entry is not None:
        users = [index for index in users if index < entry]
    else:
        users = [index for index in users if index + 1 < len(stack) and _enters(stack[index + 1][0])] or users
    if not users:
        return None
    frame, line = stack[users[-1]]
    return frame.f_code.co_filename, line


def _enters(frame: FrameType) -> bool:
    """Whether it is of a call that the ranks agree about."""
    file = frame.f_code.co_filename
    return file.startswith(_HERE) or (file.startswith(_OURS) and frame.f_code.co_name == "setup")


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith((_OURS, *_LIBRARIES, "<frozen", "<string>"))

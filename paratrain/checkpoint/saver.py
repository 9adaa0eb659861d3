"""When and how a trainer's checkpoints are written: in the background, one at a time, with failures agreed on by all ranks."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from paratrain import notes, state
from paratrain.checkpoint import files, remote
from paratrain.checkpoint.directory import best, prune, read_meta, step_path
from paratrain.checkpoint.manifest import CheckpointError
from paratrain.checkpoint.storage import save, stage
from paratrain.config import Checkpoint
from paratrain.distributed import is_main_process

if TYPE_CHECKING:
    from paratrain.engine import Engine

log = logging.getLogger(__name__)

_SLOW = 30.0
"""Seconds after which a save that training waits for is told of, again and again."""


class Saver:
    """Writes the checkpoints of an engine into a directory, and deletes those that the options do not keep.

    `begin` copies the state to host memory, and a thread writes it, over a process group of its own. What only an optimizer's step
    changes, and is in host memory already, the thread copies too, beside the next forward and backward; that step waits for it.
    `settle` is called on all ranks once the thread of each has ended, which they find out by voting (`ended`).

    Args:
        directory: gets step-000020/ and so on.
        options: the `checkpoint` section.
        beside: files of rank 0 that tell of the steps in a checkpoint, and are to be on disk before it is.
    """

    def __init__(self, engine: Engine, directory: Path, options: Checkpoint, beside: Sequence[Path] = ()):
        self.engine, self.directory, self.options, self.beside = engine, directory, options, beside
        self.failures = 0
        self._group = dist.new_group(backend="gloo") if options.async_save and dist.get_world_size() > 1 else None
        self._buffers: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})  # of copies made at once, and by the thread
        self._copied = threading.Event()
        self._copied.set()
        self._hooked = all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in engine.optimizers)
        if self._hooked and options.async_save:
            for optimizer in engine.optimizers:
                optimizer.register_step_pre_hook(lambda *_: self.wait_for_copy())
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save was begun and not settled; the same on every rank."""
        return self._path is not None

    @property
    def ended(self) -> bool:
        """Whether the save in flight has ended on this rank, well or not."""
        return self.busy and not (self._thread and self._thread.is_alive())

    def begin(self, step: int, extra: dict[str, Any], *, wait: bool) -> None:
        """Save the state of the engine at `step`. Every rank must call it, with no save in flight.

        Args:
            extra: JSON values to keep with it.
            wait: write before returning.
        """
        assert not self.busy
        self.engine.check_last_step()
        self._path, self._error, self._thread = step_path(self.directory, step), None, None
        captured = state.capture(self.engine, extra)
        if wait or not self.options.async_save:
            self._write(captured, None)
            return
        later = self._changed_by_optimizers_alone(captured.tensors)
        staged = stage({name: tensor for name, tensor in captured.tensors.items() if name not in later}, self._buffers[0])
        self._copied.clear()
        self._thread = threading.Thread(target=self._copy_and_write, args=(captured, staged, later), name="paratrain-save", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return once nothing of the engine's memory is still to be copied: call it before changing weights outside of a step."""
        self._copied.wait()

    def settle(self) -> Path | None:
        """Wait for the save in flight; its path, or None when it failed and training may go on. Every rank must call it.

        Raises:
            CheckpointError: as many saves in a row failed as `checkpoint.max_failures` allows.
        """
        self._wait()
        path, error = self._path, self._error
        self._path = self._error = self._thread = None
        if error is None:
            self.failures = 0
            return path
        if not isinstance(error, CheckpointError):
            raise error
        self.failures += 1
        if self.failures >= self.options.max_failures:
            raise CheckpointError(
                f"{error}\n{self.failures} saves in a row failed (checkpoint.max_failures={self.options.max_failures})"
            ) from error
        if is_main_process():
            log.error("%s\ntraining goes on; failed saves in a row: %d of %d", error, self.failures, self.options.max_failures)
        return None

    def _wait(self) -> None:
        """`join`, that says what a save waits for when that takes long: a file system that does not answer looks like a hang."""
        began = time.monotonic()
        while self._thread and self._thread.is_alive():
            self._thread.join(_SLOW)
            if self._thread.is_alive():
                log.warning(
                    "training has waited %.0f s for the end of the save of %s, which %s",
                    time.monotonic() - began,
                    self._path,
                    self._doing(),
                )

    def _doing(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread else None
        while frame is not None and frame.f_code.co_filename != files.__file__:
            frame = frame.f_back
        if frame is None:
            return "is being prepared, or waits for other ranks"
        return f"waits for the file system of {frame.f_locals.get('path')} ({frame.f_code.co_name})"

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread of the save in flight, for at most `seconds`."""
        if self._thread:
            self._thread.join(seconds)

    def _changed_by_optimizers_alone(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._hooked:
            return {}
        owned = [param for o in self.engine.optimizers for group in o.param_groups for param in group["params"]]
        owned += [
            value for o in self.engine.optimizers for kept in o.state.values() for value in kept.values() if isinstance(value, torch.Tensor)
        ]
        memory = {address(tensor) for tensor in owned}
        return {name: tensor for name, tensor in tensors.items() if tensor.device.type == "cpu" and address(tensor) in memory}

    def _copy_and_write(self, captured: state.State, staged: dict[str, torch.Tensor], later: dict[str, torch.Tensor]) -> None:
        try:
            staged |= stage(later, self._buffers[1])
        except BaseException as error:
            self._error = error
            return
        finally:
            self._copied.set()
        self._write(captured, staged)

    def _write(self, captured: state.State, staged: dict[str, torch.Tensor] | None) -> None:
        assert self._path is not None
        if is_main_process():
            for path in self.beside:
                notes.attempt(f"{path} may not be on disk", lambda path=path: files.sync(path))  # type: ignore[misc]
        try:
            save(self._path, *captured, group=self._group, staged=staged)
        except BaseException as error:
            self._error = error
            return
        if is_main_process():
            notes.attempt("old checkpoints could not be deleted", lambda: tidy(self.directory, self.options))
            if self.options.remote:
                to, path = self.options.remote, self._path
                notes.attempt(f"the checkpoint was not copied to {to}", lambda: remote.upload(path, to, self.options))


def address(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor's local part begins."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def tidy(directory: Path, options: Checkpoint) -> None:
    """Delete the checkpoints that the options do not keep."""
    if options.keep is None:
        return
    found = best(directory, options.best, options.best_mode) if options.best else None
    every = options.keep_every

    def protected(step: int) -> bool:
        return (every is not None and step % every == 0) or (found is not None and step == found[1])

    prune(directory, options.keep, protected)


def config_of(path: Path) -> Any:
    """The configuration kept in a checkpoint: to compare and to show, never to build from."""
    return read_meta(path).get("config")

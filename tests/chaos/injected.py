"""Faults for the jobs of these tests, each done once: a marker in the output directory tells the restarted job that it was."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import torch

from paratrain.callbacks import Callback
from paratrain.checkpoint import files, planning
from paratrain.distributed import rank


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(Callback):
    """Does `kind` on rank `on` after step `step` (kinds of saving: in the first save from that step on)."""

    def __init__(self, kind: str, step: int, on: int = 0, times: int = 1):
        self.kind, self.step, self.on, self.times = kind, step, on, times

    def on_fit_start(self, trainer):
        self.trainer = trainer
        if self.kind.startswith("save") and rank() == self.on:
            write, publish = files.write, planning.Writer._publish

            def torn(path, parts):
                half = self.kind == "save-data" and path.name != "manifest.json"
                if half and self._now():
                    path.write_bytes(b"".join(bytes(part) for part in parts)[:1000])
                    die()
                if self.kind == "save-manifest" and path.name == "manifest.json" and self._now():
                    die()
                if self.kind == "save-full" and path.name != "manifest.json" and self._now():
                    raise files.CheckpointError(f"{path.name}: No space left on device after 0 bytes")
                return write(path, parts)

            def unpublished(writer):
                if self.kind == "save-rename" and self._now():
                    die()
                publish(writer)

            files.write, planning.Writer._publish = torn, unpublished

    def on_step_end(self, trainer, result):
        if self.kind.startswith("save") or rank() != self.on or not self._now():
            return
        if self.kind == "sigkill":
            die()
        if self.kind == "segv":
            ctypes.string_at(0)
        if self.kind == "raise":
            raise RuntimeError("raised on purpose")
        if self.kind in ("SIGTERM", "SIGUSR1", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "hang-with-gil":
            ctypes.PyDLL(None).sleep(3600)
        if self.kind == "loader":
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)

    def _now(self) -> bool:
        marker = self.trainer.output_dir / f"did-{self.kind}"
        done = len(marker.read_text()) if marker.exists() else 0
        if self.trainer.engine.global_step < self.step or done >= self.times:
            return False
        marker.write_text("x" * (done + 1))
        return True


class Slow(Callback):
    """Makes steps last, so that a signal from outside meets one."""

    def __init__(self, seconds: float = 0.1):
        self.seconds = seconds

    def on_step_end(self, trainer, result):
        time.sleep(self.seconds)


class Weights(Callback):
    """Writes the final weights."""

    def on_fit_end(self, trainer):
        weights = trainer.engine.full_state_dict()
        if rank() == 0 and not trainer.interrupted:
            torch.save(weights, trainer.output_dir / "weights.pt")

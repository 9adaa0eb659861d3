"""Faults for the jobs of these tests, each done once: a marker in the output directory tells the restarted job that it was."""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch

from paratrain import checkpoint
from paratrain.callbacks import Callback
from paratrain.checkpoint import files, planning
from paratrain.distributed import rank


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(Callback):
    """Does `kind` on rank `on` after step `step` (kinds of saving: in the first save from that step on; nonfinite: in that step)."""

    def __init__(self, kind: str, step: int, on: int = 0, times: int = 1):
        self.kind, self.step, self.on, self.times = kind, step, on, times

    def on_fit_start(self, trainer):
        self.trainer = trainer
        if rank() != self.on:
            return
        if self.kind.startswith("save"):
            self._hurt_saves()
        if self.kind == "nonfinite":
            norm = next(module for name, module in trainer.engine.model.named_modules() if "norm" in name)
            norm.register_forward_hook(lambda _, __, out: out * math.nan if norm.training and self._now(exactly=True) else out)

    def _hurt_saves(self):
        write, publish, check_space = files.write, planning.Writer._publish, planning.Writer._check_space

        def torn(path, parts):
            if self.kind == "save-data" and path.name != "manifest.json" and self._now():
                path.write_bytes(b"".join(bytes(part) for part in parts)[:1000])
                die()
            if self.kind == "save-stop" and path.name != "manifest.json" and self._now():
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.kind == "save-manifest" and path.name == "manifest.json" and self._now():
                die()
            return write(path, parts)

        def unpublished(writer):
            if self.kind == "save-rename" and self._now():
                die()
            publish(writer)

        def filled(writer, needed):
            check_space(writer, needed)
            if self.kind == "save-full" and self._now():
                with open(self._filler, "w") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self._filler).free - needed // 2)

        files.write, planning.Writer._publish, planning.Writer._check_space = torn, unpublished, filled

    @property
    def _filler(self) -> Path:
        return self.trainer.output_dir / "filler"

    def on_step_end(self, trainer, result):
        if self.kind == "save-full" and rank() == self.on and trainer.engine.global_step == self.step + 5:
            self._filler.unlink(missing_ok=True)
        if self.kind.startswith("save") or self.kind == "nonfinite" or rank() != self.on or not self._now():
            return
        if self.kind == "sigkill":
            die()
        if self.kind == "segv":
            ctypes.string_at(0)
        if self.kind == "raise":
            raise RuntimeError("raised on purpose")
        if self.kind == "memory":
            torch.empty(1 << 50, dtype=torch.uint8)
        if self.kind in ("SIGTERM", "SIGUSR1", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        if self.kind == "read-only":  # as a journalling file system does after an error of its disk
            subprocess.run(["mount", "-o", "remount,abort", str(self.trainer.output_dir.parent)], check=True)
        if self.kind == "greed":
            kept = []
            while True:
                kept.append(torch.ones(16 << 20, dtype=torch.uint8))
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "hang-with-gil":
            ctypes.PyDLL(None).sleep(3600)
        if self.kind == "loader":
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)
        if self.kind.startswith("clock"):
            Path(os.environ["CLOCK_JUMP"]).write_text(str({"clock-forward": 5, "clock-back": -9}[self.kind] * 3600))
        if self.kind == "bit":
            weight = next(param for name, param in trainer.engine.model.named_parameters() if "norm" in name)
            weight = weight.to_local() if hasattr(weight, "to_local") else weight
            weight.data.view(torch.int32).view(-1)[3] ^= 1 << 20
        if self.kind.startswith("damage"):
            trainer.saver.join()
            damage(trainer.checkpoint_dir, self.kind.removeprefix("damage-"))
            die()

    def _now(self, exactly: bool = False) -> bool:
        marker = self.trainer.output_dir / f"did-{self.kind}"
        done = len(marker.read_text()) if marker.exists() else 0
        step = self.trainer.engine.global_step
        if step < self.step or done >= self.times or (exactly and step != self.step):
            return False
        marker.write_text("x" * (done + 1))
        return True


def damage(directory: Path, kind: str):
    """Damage the newest of at least two checkpoints."""
    chance = random.Random(os.urandom(8))
    (_, before), (_, newest) = checkpoint.steps(directory)[-2:]
    victim = chance.choice(sorted(newest.iterdir()))
    content = bytearray(victim.read_bytes())
    if kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    if kind == "truncate":
        del content[chance.randrange(len(content)) :]
    if kind == "zero":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    if kind == "swap":
        content[:] = (before / victim.name).read_bytes()
    victim.write_bytes(content)
    if kind == "missing":
        victim.unlink()


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

"""What the proof of a job came to, in one line and as data, and where it is kept so that it costs once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from paratrain import notes
from paratrain.same_code import own_files, user_files
from paratrain.verify.report import Report

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a job's layout trains as one process does.

    Attributes:
        status: proven; different; not proven, either way; off where nobody asked; running until it is known.
        line: one line for people.
        left_out: what of the job was not part of the proof.
        seconds: of CPU that it took, over all its processes.
        kept: whether it was made before, and read from the user's cache.
        lasting: whether another attempt on this machine would come to the same.
        report: what was compared; None where nothing was, or it was kept.
    """

    status: Literal["proven", "different", "not proven", "off", "running"]
    line: str
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    kept: bool = False
    lasting: bool = False
    report: Report | None = dataclasses.field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the layout is proven."""
        return self.status == "proven"

    def __str__(self) -> str:
        return self.line

    def record(self) -> dict[str, Any]:
        """Plain data for checkpoints and records of runs."""
        return {"status": self.status, "line": self.line, "left_out": list(self.left_out), "cpu_seconds": round(self.seconds, 1)}


def not_proven(reason: str, lasting: bool = False) -> Verdict:
    return Verdict("not proven", f"not proven: {reason}", lasting=lasting)


def of_report(report: Report, ranks: int, left_out: Iterable[str]) -> Verdict:
    """The verdict that `report` comes to."""
    left_out = (*left_out, *report.left_out)
    without = f"; left out: {', '.join(left_out)}" if left_out else ""
    if report.unproven:
        return dataclasses.replace(not_proven(report.unproven, lasting=True), left_out=left_out, report=report)
    first = report.first_difference
    if first is not None and first.error in ("exception", "hang"):
        what = first.detail or "the ranks wait for each other"
        return dataclasses.replace(not_proven(f"on the CPU the layout fails where one process does not: {what}"), report=report)
    if first is not None:
        amount = f"{first.amount:.2g} of its size, where rounding explains {first.tolerance:.0e}"
        line = f"different: {first.what} in step {max(first.step, 0)} is not that of one process ({amount}). {report.explanation}"
        return Verdict("different", line, left_out, report=report)
    many = f"{ranks} rank{'s' if ranks != 1 else ''}"
    return Verdict("proven", f"proven: {STEPS} steps, {many}, largest difference {report.largest:.0e}{without}", left_out, report=report)


# ---------------------------------------------------------------------- kept


def directory() -> Path:
    """Where verdicts are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "paratrain" / "proofs"


def fingerprint(*parts: bytes | str, packages: Iterable[str] = ()) -> str:
    """A hash of `parts`, of every source file that is loaded and comes neither with Python nor from a package index, of paratrain's own
    sources, and of the versions of torch, Python and `packages`."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    for file in sorted({*own_files(), *map(Path, user_files().values())}):
        if file.is_file():
            digest.update(file.read_bytes())
    versions = [f"{name} {getattr(sys.modules.get(name), '__version__', '')}" for name in sorted(set(packages))]
    digest.update("\n".join([torch.__version__, platform.python_version(), *versions]).encode())
    return digest.hexdigest()


def kept(name: str) -> Verdict | None:
    """The verdict kept under `name`, if there is one."""
    try:
        found = json.loads((directory() / f"{name}.json").read_text(encoding="utf-8"))
        return Verdict(found["status"], found["line"], tuple(found["left_out"]), found["cpu_seconds"], kept=True, lasting=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(name: str, verdict: Verdict) -> None:
    """Keep `verdict` under `name`, where another attempt would come to the same; a directory that cannot be written keeps nothing."""
    if verdict.status == "proven" or (verdict.status == "not proven" and verdict.lasting):
        try:
            directory().mkdir(parents=True, exist_ok=True)
            notes.replace(directory() / f"{name}.json", json.dumps(verdict.record()))
        except OSError:
            return

"""Files that tell of a job and that training does not depend on: whole or as they were, and a disk that refuses them stops nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def replace(path: Path, text: str, sync: bool = False) -> None:
    """Write a whole file so that a reader, or a crash, finds the old one or the new one.

    Args:
        sync: so does a crash of the whole machine or of its disk, which takes a while.

    Raises:
        OSError: it cannot be written; the old one stands.
    """
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", newline="") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(new, path)


def write_private(path: Path, text: str) -> None:
    """Write a file that holds configuration, which only its owner may read: what was redacted by name may still say too much.

    Raises:
        OSError: it cannot be written.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def for_launcher(text: str) -> None:
    """Have torchrun's report, the last thing that it prints, show why this process ends, and not only by which code."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    said = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(f"{path}.part").write_text(json.dumps({"message": said}))
        os.replace(f"{path}.part", path)


def size(count: float) -> str:
    """Bytes for a person: "3 bytes", "1.5 MiB", "12 GiB"."""
    value, unit = float(count), 0
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    while value >= 1000 and unit + 1 < len(units):
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {units[unit]}"


def attempt(failure: str, call: Callable[[], Any]) -> bool:
    """Whether `call` went well; an error in it is a warning that begins with `failure`."""
    try:
        call()
    except Exception as error:
        log.warning("%s: %s", failure, error)
        return False
    return True

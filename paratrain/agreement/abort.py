"""An exception that gloo or NCCL throws in a thread of its own aborts the process: what it comes of is told before.

gloo does so when data of another size arrives than it expects, which is seen on the rank that did nothing wrong as often as on the other;
NCCL's watchdog does when another rank is gone. The report of the launcher then blames the rank that was aborted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from paratrain import compat, notes

if TYPE_CHECKING:
    from paratrain.agreement import Agreement

_MISTAKE = 2  # exit code of the command line after a `UserError`
_FIRST = 1.0  # seconds that the rank behind it has to say so itself


def explain(agreement: Agreement) -> Callable[[], None]:
    """Explain what aborts this process, and end it by an exit code; returns what undoes it."""
    own = os.getpid()

    def ends(what: str) -> None:
        if os.getpid() != own:  # a process forked from this one
            return
        failure, known = agreement.broken(what)
        if known:
            time.sleep(_FIRST)
        text = f"{failure.error()}\n({what})"
        print(f"error: {text}", file=sys.stderr, flush=True)
        notes.for_launcher(text)
        os._exit(_MISTAKE if failure.user else 1)

    return compat.on_terminate(ends)

"""Nearest valid names, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'nearest'?`, or nothing where no known name is near."""
    names = sorted(known)  # a set's order differs between processes, the message must not
    by_lower = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name, names, n=1) or [
        by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else ""

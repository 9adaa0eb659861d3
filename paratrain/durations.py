"""Lengths of training as people write them: `500`, `1ep`, `10Mtok`, `30min`."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from paratrain.errors import UserError
from paratrain.suggest import did_you_mean

Unit = Literal["steps", "epochs", "tokens", "seconds"]

_UNITS: dict[str, tuple[Unit, float]] = {
    "": ("steps", 1),
    "step": ("steps", 1),
    "steps": ("steps", 1),
    "ep": ("epochs", 1),
    "epoch": ("epochs", 1),
    "epochs": ("epochs", 1),
    "tok": ("tokens", 1),
    "ktok": ("tokens", 1e3),
    "Mtok": ("tokens", 1e6),
    "Btok": ("tokens", 1e9),
    "Ttok": ("tokens", 1e12),
    "s": ("seconds", 1),
    "sec": ("seconds", 1),
    "min": ("seconds", 60),
    "h": ("seconds", 3600),
    "d": ("seconds", 86400),
}
_FORM = re.compile(r"\s*(\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")


class Duration(NamedTuple):
    """A length of training.

    Attributes:
        value: how much of `unit`: a whole number of steps or tokens, any number of epochs or seconds.
        unit: `steps`, `epochs`, `tokens` or `seconds`.
    """

    value: float
    unit: Unit


def parse_duration(text: str) -> Duration:
    """`500` or `500steps`, `1.5ep`, `10Mtok` (tok, ktok, Mtok, Btok, Ttok), `90s`, `30min`, `12h`, `2d`.

    Raises:
        UserError: when the text is no duration, is not positive, or is part of a step.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r} is no length of training; write 500 (steps), 1ep, 10Mtok or 30min")
    number, name = found.groups()
    if name not in _UNITS:
        known = ", ".join(unit for unit in _UNITS if unit)
        raise UserError(f"{text!r} has the unknown unit {name!r}{did_you_mean(name, _UNITS)} (known: {known})")
    unit, factor = _UNITS[name]
    value = float(number) * factor
    if not 0 < value < float("inf"):
        raise UserError(f"{text!r} must be more than nothing and finite")
    if unit in ("epochs", "seconds"):
        return Duration(value, unit)
    if not value.is_integer():
        raise UserError(f"{text!r} is not a whole number of {unit}")
    return Duration(int(value), unit)

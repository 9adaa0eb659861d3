"""What verify found, for a person, for a program and for a browser."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from paratrain.verify.compare import Difference, Line

MEASURED = ("loss", "gradient", "gradient norm", "clipped gradient", "weight")


@dataclass
class Report:
    """The verdict of `verify`.

    Attributes:
        ok: whether the layout is the same function as one process.
        first_difference: the first tensor that differs, in the order of execution; None where nothing does.
        explanation: the kind of error, what usually causes it and where to look; "" where nothing differs.
        differences: everything that differs, the first one first.
        lines: what was compared: tensors, worst relative difference and its tolerance, by kind.
        setup: the layout in words and numbers.
        notes: what was left out of the comparison, and why.
        seconds: how long it took.
        unproven: why nothing could be proven either way; "" where something was.
        left_out: what the comparison says nothing of, in words: weights that no gradient reached, state that forward only writes.
    """

    first_difference: Difference | None
    explanation: str
    differences: list[Difference]
    lines: list[Line]
    setup: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    unproven: str = ""
    left_out: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.first_difference is None and not self.unproven

    @property
    def largest(self) -> float:
        """The largest relative difference of a loss, gradient, norm or weight."""
        return max((line.worst for line in self.lines if line.kind in MEASURED), default=0.0)

    def verdict(self) -> str:
        """One sentence."""
        first, where = self.first_difference, self.setup["layout"]
        if self.unproven:
            return f"NOT PROVEN: {where}: {self.unproven}"
        if first is None:
            return f"SAME FUNCTION: {where} trains as one process does"
        when = "before the first step" if first.step < 0 else f"in step {first.step}"
        return f"DIFFERENT: {where} is not the same function as one process; first difference {when}: {first.what}"

    def text(self) -> str:
        """For a terminal."""
        rows = [("compared", "tensors", "differ", "worst", "tolerance"), *map(_cells, self.lines)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines = [f"verify: {self.setup['layout']}, {self.setup['steps']} steps, {self.setup['dtype']}, {self.seconds:.1f} s", ""]
        lines += [f"  {row}" for row in table]
        lines += ["", self.verdict()]
        if (first := self.first_difference) is not None:
            lines += [f"  {label:<12} {value}" for label, value in _facts(first)]
            lines += [f"  {'explanation':<12} {self.explanation}"]
            if len(self.differences) > 1:
                lines += [f"  {'then':<12} {len(self.differences) - 1} more tensors differ, most of them as a consequence"]
        lines += [f"  note: {note}" for note in [*self.notes, *(f"left out: {part}" for part in self.left_out)]]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ok, verdict, explanation, first_difference, differences (the first 100), compared, setup, notes, seconds."""
        return {
            "ok": self.ok,
            "unproven": self.unproven,
            "verdict": self.verdict(),
            "explanation": self.explanation,
            "first_difference": _plain(self.first_difference) if self.first_difference else None,
            "differences": [_plain(difference) for difference in self.differences[:100]],
            "compared": [{key: _finite(value) for key, value in asdict(line).items()} for line in self.lines],
            "setup": self.setup,
            "notes": self.notes,
            "left_out": self.left_out,
            "seconds": round(self.seconds, 3),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self) -> str:
        """One page that needs nothing else."""
        escape = html.escape
        parts = [f"<h1>verify</h1><p class='{'ok' if self.ok else 'bad'}'>{escape(self.verdict())}</p>"]
        if (first := self.first_difference) is not None:
            facts = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in _facts(first))
            parts.append(f"<h2>First difference</h2><table>{facts}</table><p>{escape(self.explanation)}</p>")
        setup = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in self.setup.items())
        head = "".join(f"<th>{name}</th>" for name in ("compared", "tensors", "differ", "worst", "tolerance"))
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(line)) + "</tr>" for line in self.lines)
        parts.append(f"<h2>What was compared</h2><table><tr>{head}</tr>{body}</table><h2>Setup</h2><table>{setup}</table>")
        if self.differences:
            rows = "".join(
                f"<tr><td>{d.step}</td><td>{escape(d.key.kind)}</td><td>{escape(d.name)}</td><td>{_ranks(d.ranks)}</td><td>{d.amount:.2e}</td>"
                f"<td>{d.tolerance:.2e}</td></tr>"
                for d in self.differences[:200]
            )
            names = "".join(f"<th>{name}</th>" for name in ("step", "kind", "name", "ranks", "difference", "tolerance"))
            parts.append(f"<h2>All differences ({len(self.differences)})</h2><table><tr>{names}</tr>{rows}</table>")
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>verify</title><style>{_STYLE}</style>{''.join(parts)}</html>"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left;font-variant-numeric:"
    "tabular-nums}.ok,.bad{font-weight:600;padding:.6rem 1rem;border-left:5px solid}.ok{border-color:#2a7d2a;background:#eef7ee}"
    ".bad{border-color:#b3261e;background:#fbeeee}"
)


def _facts(first: Difference) -> list[tuple[str, str]]:
    """(label, value) of the first difference."""
    where = "before the first step" if first.step < 0 else f"step {first.step}"
    amount = f"{first.amount:.3g} of its norm (rounding explains {first.tolerance:.1e})"
    if first.largest is not None:
        amount += f", {first.largest:.3g} in one element"
    facts = [("where", f"{first.what}, {where}, {_ranks(first.ranks)}"), ("how much", amount)]
    if first.detail:
        facts.append(("values", first.detail))
    return [*facts, ("error", first.error or "unknown")]


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _cells(line: Line) -> tuple[str, ...]:
    return line.kind, str(line.compared), str(line.differ), f"{line.worst:.1e}", f"{line.tolerance:.1e}"


def _plain(difference: Difference) -> dict[str, Any]:
    step, kind, name = difference.key
    return {
        "step": step,
        "kind": kind,
        "name": name,
        "what": difference.what,
        "ranks": difference.ranks,
        "error": difference.error,
        "amount": _finite(difference.amount),
        "tolerance": _finite(difference.tolerance),
        "largest": _finite(difference.largest),
        "detail": difference.detail,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Compare what one process and the ranks of a layout recorded, with tolerances that follow from rounding.

For an event e (a tensor, recorded on one process as x, under the layout as y, and on one process with every weight moved by its last bit
as z), with norms over all elements,

    differs  if  |y - x| > lambda * scale * max(noise, floor)
    scale  = max(|x|, rms of the events of this kind * sqrt(elements))
    noise  = the largest |z - x| / scale of this kind up to this step: what rounding does to this very model
    floor  = u * sqrt(n * d): how the rounding of a sum of n terms grows (Higham and Mary, "A New Approach to Probabilistic Rounding
             Error Analysis", 2019, theorem 2.4), over d operations in a row; u is the unit roundoff of the narrowest dtype that was seen,
             inside of modules too. In 16 bits, u16 * sqrt(d) comes on top: sums are kept in float32, and what every operation returns
             is rounded.
    lambda = sqrt(2 ln(2 M / p)): the bound that all of M comparisons keep with probability 1 - p, p = 1e-6 (the same theorem)

n is the longest sum that makes up such a tensor: the widest row of a weight for activations, also the positions of the global batch for
the loss and gradients, and all parameters for the norm. What is integer must be equal; a count that is none is a sum like any other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paratrain.reach import matches
from paratrain.verify.attributes import Found, apart
from paratrain.verify.trace import Event, Key, Trace

FALSE_ALARM = 1e-6  # probability that rounding alone makes a run of verify fail
_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass
class Difference:
    """A tensor that is not what one process has.

    Attributes:
        key: step, kind and name.
        ranks: where it differs.
        amount: norm of the difference relative to the norm of the reference.
        tolerance: likewise, what rounding explains.
        largest: largest difference of one element, once it has been looked at.
        error: the kind of error, such as "factor" or "not reduced"; None until explained.
        detail: numbers, for kinds of event that are no tensors.
    """

    key: Key
    ranks: list[int]
    amount: float
    tolerance: float
    largest: float | None = None
    error: str | None = None
    detail: str = ""

    @property
    def what(self) -> str:
        return f"{self.key.kind} of {self.key.name}" if self.key.name else self.key.kind

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def step(self) -> int:
        return self.key.step


@dataclass
class Line:
    """What was compared of one kind: how many tensors, the worst of them and its tolerance, both relative, and the widest tolerance."""

    kind: str
    compared: int = 0
    differ: int = 0
    worst: float = 0.0
    tolerance: float = 0.0
    widest: float = 0.0


@dataclass
class Comparison:
    differences: list[Difference] = field(default_factory=list)
    lines: dict[str, Line] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # outputs whose dim 0 does not count samples
    passing: list[str] = field(default_factory=list)  # state that is of the last forward alone
    accepted: list[str] = field(default_factory=list)  # state that the configuration leaves to each rank
    written: list[str] = field(default_factory=list)  # state that forward writes and does not read, each rank its own
    once: bool = False  # the loss is a mean that counts 1: parts of a batch count more, which changes nothing while they are equal
    bound: Tolerance | None = None

    def line(self, kind: str) -> Line:
        return self.lines.setdefault(kind, Line(kind))


def compare(reference: Trace, noise: Trace, ranks: Sequence[Trace], compute: torch.dtype, accepted: Sequence[str] = ()) -> Comparison:
    """Every difference, in the order of execution on one process.

    Args:
        accepted: globs of states that the configuration leaves to each rank, which are not compared.
    """
    bound = Tolerance(reference, noise, compute)
    result = Comparison(bound=bound)

    written = {path for trace in ranks for path in trace.extra.get("left", ())}

    def left(kind: str, name: str) -> bool:
        path = name.replace("(loss)", "loss")
        for globs, names in ((accepted, result.accepted), (written, result.written)):
            if kind in ("buffer", "weight", "attribute") and (found := matches(path, globs)):
                names.append(path if globs is accepted else found)
                return True
        return False

    steps = sorted({key.step for key in reference.events})
    for step in steps:
        _compare_samples(step, reference, ranks, result)
        for key, event in reference.events.items():
            if key.step != step or left(key.kind, key.name):
                continue
            if not (key.kind == "buffer" and _passing(key, event, reference, ranks, result)):
                _compare_event(key, event, ranks, bound, result)
        _compare_attributes(step, reference, ranks, bound, result, left)
    counts = [event.value for key, event in reference.events.items() if key.kind == "count"]
    if all(difference.key.kind == "count" for difference in result.differences) and all(float(count) == 1 for count in counts):
        result.once, result.differences = bool(result.differences), []
    return result


class Tolerance:
    """The formula above, for the events of one run."""

    def __init__(self, reference: Trace, noise: Trace, compute: torch.dtype):
        events = reference.events
        seen = {event.dtype for key, event in events.items() if key.kind != "optimizer state"} | reference.extra["narrow"]
        counts = [float(event.value) for key, event in events.items() if key.kind == "count"]
        self.counts = 0.0  # unit roundoff of the sum that is the count
        if any(not count.is_integer() or count >= 2.0**24 for count in counts):
            self.counts = _ROUNDOFF.get(reference.extra.get("count dtype", torch.float64), 0.0)
            seen.add(reference.extra.get("count dtype", torch.float64))
        self.roundoff = max(_ROUNDOFF.get(dtype, 0.0) for dtype in (compute, reference.loss_dtype, *seen))
        self.depth = max(reference.depth, reference.extra["modules"], 1)
        self.confidence = math.sqrt(2 * math.log(2 * max(len(events), 1) / FALSE_ALARM))
        weights = [event for key, event in events.items() if key.kind == "initial weight"]
        rows = [e.per_sample * len(e.value) * math.prod(e.shape[:-1]) for k, e in events.items() if k.kind == "activation" and e.per_sample]
        width = max([1, *(event.numel // event.shape[0] for event in weights if event.numel and event.shape)])
        positions = max([width, reference.extra["positions"], *rows])
        self.longest = {"activation": width, "gradient norm": max(positions, sum(e.numel for e in weights)), "": positions}
        self.rms = self._root_mean_squares(events)
        self.noise = self._noise(events, noise.events)

    def _root_mean_squares(self, events: dict[Key, Event]) -> dict[str, float]:
        squares: dict[str, float] = defaultdict(float)
        numbers: Counter[str] = Counter()
        for key, event in events.items():
            squares[group(key)] += float(event.value.square().sum())
            numbers[group(key)] += self._elements(event)
        return {name: math.sqrt(squares[name] / max(numbers[name], 1)) for name in squares}

    def _noise(self, events: dict[Key, Event], permuted: dict[Key, Event]) -> dict[tuple[str, int], float]:
        found: dict[tuple[str, int], float] = {}
        running: dict[str, float] = {}
        for key in sorted(events, key=lambda key: key.step):
            name, other = group(key), permuted.get(key)
            if other is not None and other.value.shape == events[key].value.shape:
                relative = float((other.value - events[key].value).norm()) / max(self.scale(key, events[key]), 1e-300)
                running[name] = max(running.get(name, 0.0), relative)
            found[name, key.step] = running.get(name, 0.0)
        return found

    @staticmethod
    def _elements(event: Event) -> int:
        return len(event.value) * event.per_sample * math.prod(event.shape) if event.per_sample else event.numel

    def scale(self, key: Key, event: Event) -> float:
        """The size of what was added up to make this tensor."""
        return max(float(event.value.norm()), self.rms[group(key)] * math.sqrt(self._elements(event)))

    def __call__(self, key: Key, event: Event) -> float:
        """How far two correct results may be apart, as a norm."""
        if not event.dtype.is_floating_point or key.step < 0:
            return 0.0
        if key.kind == "count":
            return self.confidence * self.scale(key, event) * self.counts * math.sqrt(self.longest[""])
        steps = (max(key.step, 0) + 1) * self.depth
        length = self.longest.get(key.kind, self.longest[""])
        half = self.roundoff > _ROUNDOFF[torch.float32]
        floor = min(self.roundoff, _ROUNDOFF[torch.float32]) * math.sqrt(length * steps) + half * self.roundoff * math.sqrt(steps)
        return self.confidence * self.scale(key, event) * max(floor, self.noise.get((group(key), key.step), 0.0))


def group(key: Key) -> str:
    """Events of like magnitude: a kind, and a kind of optimizer state."""
    return f"{key.kind} {key.name.rpartition('/')[2]}" if key.kind == "optimizer state" else key.kind


def peers(ranks: Sequence[Trace]) -> list[list[int]]:
    """The ranks that between them hold a global batch, in the order of its samples."""
    groups: dict[int, list[int]] = {}
    for rank in sorted(range(len(ranks)), key=lambda rank: ranks[rank].place):
        groups.setdefault(ranks[rank].place[1], []).append(rank)
    return list(groups.values())


def _compare_samples(step: int, reference: Trace, ranks: Sequence[Trace], result: Comparison) -> None:
    expected = reference.samples.get(step)
    if expected is None:
        return
    for members in peers(ranks):
        given = [sample for rank in members for sample in ranks[rank].samples.get(step, [])]
        line = result.line("data")
        line.compared += 1
        if given == expected:
            continue
        line.differ += 1
        line.worst = 1.0
        wanted, got = Counter(expected), Counter(given)
        missing, extra = sum((wanted - got).values()), got - wanted
        repeated = {sample: [rank for rank in members if sample in ranks[rank].samples.get(step, [])] for sample in extra}
        culprits = sorted({rank for holders in repeated.values() for rank in holders}) or list(members)
        difference = Difference(Key(step, "data", ""), culprits, (missing or len(given)) / max(len(expected), 1), 0.0)
        if not missing and not extra:
            difference.error, difference.detail = "permuted rows", "every sample is there, in another order"
        else:
            difference.error = "repeated samples" if any(sample in wanted for sample in extra) else "wrong samples"
            difference.detail = (
                f"{missing} of {len(expected)} samples of the global batch reach no rank, and {sum(extra.values())} are there that should "
                f"not be (on ranks {', '.join(map(str, culprits))})"
            )
        result.differences.append(difference)


def _compare_event(key: Key, event: Event, ranks: Sequence[Trace], bound: Tolerance, result: Comparison) -> None:
    found = {rank: trace.events[key] for rank, trace in enumerate(ranks) if key in trace.events}
    if key.kind == "activation" and key.kind not in ranks[0].extra.get("hidden", ()):
        pairs = _activations(key, event, found, ranks, result)
        if pairs is None:
            return
    elif not found and key.kind in ranks[0].extra.get("hidden", ()):
        return
    elif not found or (key.kind not in (*ranks[0].extra.get("partial", ()), "optimizer state") and len(found) < len(ranks)):
        absent = [rank for rank in range(len(ranks)) if rank not in found]
        _note(key, event, Difference(key, absent, 1.0, 0.0, error="missing"), result)
        return
    else:
        pairs = [([rank], other.value, event.value, other) for rank, other in found.items()]
    wrong: list[int] = []
    worst, allowed, error, detail = 0.0, bound(key, event), None, ""
    norm = bound.scale(key, event) or 1e-300
    for members, value, expected, other in pairs:
        if other.shape != event.shape or value.shape != expected.shape:
            wrong, worst, error = [*wrong, *members], 1.0, "shape"
            detail = f"shape {_shape(other)}, on one process {_shape(event)}"
        elif (other.nonfinite > 0) != (event.nonfinite > 0):
            wrong, worst, error = [*wrong, *members], math.inf, "not finite"
        else:
            distance = float((value - expected).norm())
            worst = max(worst, distance / norm)
            if distance > allowed:
                wrong += members
    line = result.line(key.kind)
    line.compared += 1
    line.widest = max(line.widest, allowed / norm)
    if worst >= line.worst:
        line.worst, line.tolerance = worst, allowed / norm
    if wrong:
        line.differ += 1
        difference = Difference(key, sorted(set(wrong)), worst, allowed / norm, error=error, detail=detail)
        if event.numel == 1 and not event.per_sample and not error:
            values = sorted({f"{float(other.value):.10g}" for other in found.values()})
            difference.detail = f"{' and '.join(values)}, on one process {float(event.value):.10g}"
        result.differences.append(difference)


def _passing(key: Key, event: Event, reference: Trace, ranks: Sequence[Trace], result: Comparison) -> bool:
    """Whether a buffer says only what the last forward was given: its rows are the samples of a micro-batch, or it forgets."""
    others = [trace.events[key] for trace in ranks if key in trace.events]
    sized = event.shape and event.shape[0] == reference.extra["samples"]
    sized = sized and any(other.shape != event.shape and other.shape[1:] == event.shape[1:] for other in others)
    if sized or f"buffer {key.name}" in reference.extra["attributes"].memoryless:
        result.passing.append(key.name)
        return True
    return False


def _compare_attributes(
    step: int, reference: Trace, ranks: Sequence[Trace], bound: Tolerance, result: Comparison, left: Callable[[str, str], bool]
) -> None:
    """Numbers and tensors in plain attributes, of those that moved anywhere."""
    found: Found = reference.extra["attributes"]
    here = found.after.get(step, {})
    theirs = [trace.extra["attributes"] for trace in ranks]
    moved = dict.fromkeys([*here, *(name for other in theirs for name in other.after.get(step, {}) if name in found.first)])
    for name in moved:
        if left("attribute", name):
            continue
        if name in found.memoryless:
            result.passing.append(name)
            continue
        expected = here.get(name, found.first.get(name))
        line = result.line("attribute")
        line.compared += 1
        wrong: dict[int, Any] = {}
        for rank, other in enumerate(theirs):
            got = other.after.get(step, {}).get(name, other.first.get(name))
            if got is None or expected is None:  # on another stage, or made by one of the two alone
                continue
            off = apart(got, expected)
            if off is None:
                result.passing.append(name)
                continue
            line.worst = max(line.worst, off)
            if off > max(1e-6, 1e4 * bound.roundoff):
                wrong[rank] = got
        if wrong:
            line.differ += 1
            values = sorted({_short(value) for value in wrong.values()})
            detail = f"{name} is {' and '.join(values)} after step {step}, on one process {_short(expected)}"
            worst = max(apart(value, expected) or 0.0 for value in wrong.values())
            result.differences.append(Difference(Key(step, "attribute", name), list(wrong), worst, 1e-6, error="state", detail=detail))


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        return f"a tensor of norm {float(value.double().norm()):.6g}"
    return f"{float(value):.10g}"


def _activations(key: Key, event: Event, found: dict[int, Event], ranks: Sequence[Trace], result: Comparison):
    """(ranks, value, expected, event) to compare, or None where the layout gives nothing that can be put side by side."""
    if not event.per_sample:
        pairs = [([rank], other.value, event.value, other) for rank, other in found.items() if other.shape == event.shape]
        if not pairs:
            result.skipped.append(key.name)
        return pairs or None
    pairs = []
    for members in peers(ranks):
        if any(rank not in found or found[rank].per_sample != event.per_sample for rank in members):
            result.skipped.append(key.name)
            return None
        start = 0
        for rank in members:
            count = len(ranks[rank].samples[key.step])
            if count:
                pairs.append(([rank], found[rank].value, event.value[start : start + count], found[rank]))
            start += count
    return pairs


def _note(key: Key, event: Event, difference: Difference, result: Comparison) -> None:
    line = result.line(key.kind)
    line.compared += 1
    line.differ += 1
    line.worst = max(line.worst, difference.amount)
    result.differences.append(difference)


def _shape(event: Event) -> str:
    return f"[{', '.join(['samples'] * bool(event.per_sample) + [str(size) for size in event.shape])}]"

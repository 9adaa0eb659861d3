"""When nothing is proven either way: a comparison that cannot fail, or that fails for reasons that are right, is no proof."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paratrain.verify.compare import Comparison, peers
from paratrain.verify.report import MEASURED
from paratrain.verify.trace import Key, Trace

WIDEST = 0.3
"""A tolerance, relative to the size of the tensors, above which a missing or doubled half might pass."""

_COARSE = 2.0**-20
"""A unit roundoff above that of float32."""


def doubts(result: Comparison, reference: Trace, traces: Sequence[Trace]) -> str:
    """Why the comparison says nothing; "" where it does.

    Draws that depend on the samples at hand explain a difference, and may hide one.
    """
    for key, event in reference.events.items():
        if key.kind == "loss" and (event.nonfinite or not math.isfinite(float(event.value))):
            return f"the loss of one process is not finite in step {key.step}"
    if reference.extra["moved generator"]:
        return "the model draws random numbers in a way that cannot be made comparable; make it a function of its input"
    drawn = reference.extra["draws"]
    for trace in traces:
        for place, found in trace.extra["draws"].items():
            if found != drawn.get(place, found):
                step, path = place
                return (
                    f"what {path or 'the model'} draws at random depends on the samples at hand (step {step}: {found[0].partition(' of ')[0]}); "
                    "draw it for each sample, from torch, or in the data set"
                )
    if result.differences and reference.extra["generators"]:
        return (
            f"{reference.extra['generators'][0]} is a generator of random numbers of the model's own, which ranks and micro-batches draw from "
            "in turn; use torch's default generator"
        )
    if result.differences and result.accepted:
        return (
            f"trainer.forward_state leaves {result.accepted[0]} to each rank, and what is trained depends on it "
            f"({result.differences[0].what} in step {max(result.differences[0].step, 0)}), as the configuration accepts"
        )
    for kind in MEASURED:
        line = result.lines.get(kind)
        if line is not None and line.widest > WIDEST:
            return (
                f"rounding alone moves the {kind} by up to {line.widest:.1g} of its size, so that a factor of two could hide in it; the model "
                "amplifies the last bit of its weights too much to be compared, or draws random numbers from a source of its own"
            )
    return "" if result.differences else _vacuous(result, reference, traces)


# ---------------------------------------------------------------------- comparisons that could not fail


def _vacuous(result: Comparison, reference: Trace, traces: Sequence[Trace]) -> str:
    if said := _alike(traces):
        return said
    if not _moved(reference):
        return "no weight moves in these steps (a learning rate of 0?), so that a wrong update would not show"
    trained, unreached = reference.extra["trained"], _unreached(result, reference)
    if sum(trained[name] for name in unreached) > 0.5 * sum(trained.values()):
        return (
            f"the loss reaches {len(trained) - len(unreached)} of {len(trained)} trained weights in these steps, the smaller part of the model; the "
            f"gradient of {unreached[0]} is zero, or no larger than rounding"
        )
    return ""


def _alike(traces: Sequence[Trace]) -> str:
    """Where ranks, or micro-batches of one rank, were all given the same in every step, a reduction that is missing does not show."""
    for members in peers(traces):
        steps = [[traces[rank].parts.get(step, []) for rank in members] for step in traces[members[0]].parts]
        for index, rank in enumerate(members):
            for other in range(index):
                if steps and all(sorted(given[index]) == sorted(given[other]) for given in steps):
                    return f"ranks {members[other]} and {rank} are given the same samples in every step, so that a missing reduction would not show"
        several = [parts for given in steps for parts in given if len(parts) > 1]
        if several and all(len(set(parts)) == 1 for parts in several):
            return "all micro-batches of a rank are given the same samples, so that one that is lost would not show"
    return ""


def _moved(reference: Trace) -> bool:
    first = {key.name: event for key, event in reference.events.items() if key.kind == "initial weight"}
    return any(
        not bool((event.value == first[key.name].value).all())
        for key, event in reference.events.items()
        if key.kind == "weight" and key.name in first and event.value.shape == first[key.name].value.shape
    )


def _unreached(result: Comparison, reference: Trace) -> list[str]:
    """Trained weights whose gradient could be wrong by a factor of two in every step without being found."""
    bound, events = result.bound, reference.events
    assert bound is not None
    steps = {key.step for key in events if key.kind == "gradient"}

    def seen(name: str) -> bool:
        found = [(key, events[key]) for key in (Key(step, "gradient", name) for step in steps) if key in events]
        if bound.roundoff > _COARSE:  # a tolerance of some 10 % says little of single tensors
            return any(bool(event.value.any()) for _, event in found)
        return any(bound(key, event) < WIDEST * float(event.value.norm()) for key, event in found)

    return [name for name in reference.extra["trained"] if not seen(name)]


def unreached_weights(result: Comparison, reference: Trace) -> str:
    """How many trained weights are of no account in the comparison, in words; "" where all are."""
    names, every = _unreached(result, reference), len(reference.extra["trained"])
    if not names:
        return ""
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} of {every} weights, whose gradients are zero or no larger than rounding in these steps ({shown})"

"""When nothing is proven either way: a comparison that cannot fail, or that fails for reasons that are right, is no proof."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paratrain.verify.compare import Comparison
from paratrain.verify.report import MEASURED
from paratrain.verify.trace import Trace

WIDEST = 0.3
"""A tolerance, relative to the size of the tensors, above which a missing or doubled half might pass."""


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
    for kind in MEASURED:
        line = result.lines.get(kind)
        if line is not None and line.widest > WIDEST:
            return (
                f"rounding alone moves the {kind} by up to {line.widest:.1g} of its size, so that a factor of two could hide in it; the model "
                "amplifies the last bit of its weights too much to be compared"
            )
    return ""

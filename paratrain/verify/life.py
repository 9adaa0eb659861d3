"""Dropout and resume: what is wrong with the randomness of a run, and with one that was saved and resumed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from paratrain.verify.case import Explanation
from paratrain.verify.compare import Comparison, Difference, Line, peers
from paratrain.verify.trace import Key, Trace

Finding = tuple[Difference, Explanation]


def findings(ranks: Sequence[Trace], result: Comparison) -> list[Finding]:
    """What is wrong, in the order in which it would happen; `result` gets a line for everything that was looked at."""
    found: list[Finding] = []
    for check in (_masks, _recomputation, _loaded_data, _loaded_state, _next_step):
        found += check(ranks, result)
    return found


def _masks(ranks: Sequence[Trace], result: Comparison) -> Iterator[Finding]:
    """Ranks with other samples draw from another state of the generator, ranks with the same samples from the same."""
    line = result.lines["dropout"] = Line("dropout")
    for key in sorted({key for trace in ranks for key in trace.draws}):
        states = {rank: trace.draws[key] for rank, trace in enumerate(ranks) if key in trace.draws}
        line.compared += 1
        for members in peers(ranks):
            held = [states[rank] for rank in members if rank in states]
            if len(held) > 1 and len(set(held)) < len(held):
                same = [rank for rank in members if rank in states and held.count(states[rank]) > 1]
                line.differ += 1
                yield (
                    Difference(Key(key[0], "dropout", key[2]), same, 1.0, 0.0, error="same dropout", detail=f"micro-batch {key[1]}"),
                    Explanation(
                        "same dropout",
                        "ranks with different samples draw the same random numbers there, so that their dropout masks are the same",
                        "the generator is seeded without the data rank, or the model seeds it itself",
                        "torch.manual_seed inside the model or the loss; leave seeding to cfg.seed",
                    ),
                )
                return


def _recomputation(ranks: Sequence[Trace], result: Comparison) -> Iterator[Finding]:
    """What is computed again in backward starts from the state of the generator it had in forward."""
    line = result.lines["recomputation"] = Line("recomputation")
    for rank, trace in enumerate(ranks):
        drawn: dict[tuple[int, str], set[str]] = defaultdict(set)
        for (step, _, path, _), digest in trace.draws.items():
            drawn[step, path].add(digest)
        for step, path, digest in trace.replays:
            if (step, path) in drawn:
                line.compared += 1
                if digest not in drawn[step, path]:
                    line.differ += 1
                    yield (
                        Difference(Key(step, "recomputation", path), [rank], 1.0, 0.0, error="recomputation"),
                        Explanation(
                            "recomputation",
                            "computed again in backward, it draws other random numbers than in forward: the gradient is that of another dropout mask",
                            "activation checkpointing with preserve_rng_state=False",
                            "torch.utils.checkpoint(..., preserve_rng_state=True)",
                        ),
                    )
                    return


def _loaded_data(ranks: Sequence[Trace], result: Comparison) -> Iterator[Finding]:
    line = result.lines["resume: data"] = Line("resume: data", compared=len(ranks))
    for rank, trace in enumerate(ranks):
        expected = trace.samples.get(trace.extra["saved step"])
        got = next(iter(trace.extra["resumed samples"].values()), None)
        if got != expected or trace.extra["resumed step"] != trace.extra["saved step"]:
            line.differ += 1
            earlier = [step for step, samples in trace.samples.items() if samples == got and step != trace.extra["saved step"]]
            seen = f", which are those of step {earlier[0]}" if earlier else ""
            yield (
                Difference(Key(trace.extra["saved step"], "data after resume", ""), [rank], 1.0, 0.0, error="data after resume"),
                Explanation(
                    "data after resume",
                    f"saved after {trace.extra['saved step']} steps, it goes on at step {trace.extra['resumed step']} and sees "
                    f"{'the same' if got == expected else 'other'} samples{seen}",
                    "the position in the data is not part of what is saved, or the loader starts from the beginning: data is repeated or lost",
                    "engine.global_step after engine.load; resume",
                ),
            )
            return


def _loaded_state(ranks: Sequence[Trace], result: Comparison) -> Iterator[Finding]:
    line = result.lines["resume: state"] = Line("resume: state")
    for rank, trace in enumerate(ranks):
        saved, loaded = trace.extra["saved"], trace.extra["loaded"]
        loaded = {key[1:]: digest for key, digest in loaded.items()}
        line.compared += len(saved)
        of_ranks = {*result.passing, *result.written, *result.accepted}
        kept = [key for key in saved if not (key.kind == "buffer" and key.name in of_ranks)]
        wrong = [key for key in kept if loaded.get(key[1:]) != saved[key]]
        line.differ += len(wrong)
        if wrong:
            kind, absent = wrong[0].kind, sum(key[1:] not in loaded for key in wrong)
            missing = f", {absent} of them are not there at all" if absent else ""
            yield (
                Difference(wrong[0]._replace(kind=f"{kind} after resume"), [rank], 1.0, 0.0, error="stale state"),
                Explanation(
                    "stale state",
                    f"{len(wrong)} of {len(saved)} tensors are not what was saved{missing}; first: {kind} of {wrong[0].name}",
                    f"the {kind} is not restored: it starts afresh, or from an older checkpoint",
                    "resume; engine.load must come after setup and before the first step",
                ),
            )
            return


def _next_step(ranks: Sequence[Trace], result: Comparison) -> Iterator[Finding]:
    """The step after a resume draws the same random numbers as that of the run that went on, and ends with the same values.

    The bits may differ where an all-reduce adds in another order: DDP reduces its very first step in other buckets than the next.
    """
    line = result.lines["resume: next step"] = Line("resume: next step")
    for rank, trace in enumerate(ranks):
        step = trace.extra["saved step"]
        draws = {key: digest for key, digest in trace.draws.items() if key[0] == step}
        line.compared += len(draws)
        moved = [key for key in draws if trace.extra["resumed draws"].get(key) != draws[key]]
        if moved:
            line.differ += len(moved)
            yield (
                Difference(Key(step, "dropout after resume", moved[0][2]), [rank], 1.0, 0.0, error="randomness after resume"),
                Explanation(
                    "randomness after resume",
                    "the first step after a resume draws other random numbers than the run that went on",
                    "the state of the generator is neither saved nor a function of the step",
                    "seed; torch.manual_seed inside the model",
                ),
            )
            return
        wrong = _unequal(trace, line, result)
        line.differ += len(wrong)
        if wrong:
            kinds = Counter(key.kind for key in wrong)
            first = wrong[0]
            yield (
                Difference(
                    first._replace(step=step, kind=f"{first.kind} after resume"), [rank], line.worst, line.tolerance, error="stale state"
                ),
                Explanation(
                    "stale state",
                    f"everything that was saved is restored, but after the next step {len(wrong)} of {len(trace.extra['after'])} tensors differ "
                    f"({', '.join(f'{kind}: {n}' for kind, n in kinds.items())}; loss {trace.extra['resumed loss']:.10g}, without resume {trace.extra['loss']:.10g})",
                    "state outside the checkpoint: attributes of the model or loss that are no buffers, a schedule or a loss scale with a position of its own",
                    "register_buffer for what must be kept; scheduler",
                ),
            )
            return


def _unequal(trace: Trace, line: Line, result: Comparison) -> list[Key]:
    """What differs after the step by more than another order of sums explains."""
    assert result.bound is not None
    after, resumed, wrong = trace.extra["after events"], trace.extra["resumed events"], []
    for key, event in after.items():
        line.compared += 1
        other = resumed.get(key)
        if trace.extra["after"][key] == trace.extra["resumed"].get(key):
            continue
        last = key._replace(step=key.step - 1)  # the step after which this is the state
        scale = max(result.bound.scale(last, event), 1e-300)
        distance = float((other.value - event.value).norm()) if other is not None and other.value.shape == event.value.shape else math.inf
        allowed = result.bound(last, event)
        if distance / scale >= line.worst:
            line.worst, line.tolerance = distance / scale, allowed / scale
        if distance > allowed:
            wrong.append(key)
    return wrong


def notes(result: Comparison) -> list[str]:
    """What is no fault and yet worth knowing."""
    line = result.lines.get("resume: next step")
    if line is None or line.differ or not line.worst:
        return []
    return [
        "the step after a resume has the same values up to rounding, but not the same bits: the all-reduce of a first step adds in another order"
    ]

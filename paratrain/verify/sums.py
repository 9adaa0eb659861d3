"""Hypotheses about sums over ranks and micro-batches: missing, doubled, scaled or weighted wrongly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from paratrain.verify.case import COUNT, REDUCTION, Evidence, Explanation, along, near, number, ranks_text, scaled, total


def own_gradient(e: Evidence) -> Iterator[Explanation]:
    """The gradient of this rank's own samples."""
    if "gradient" not in e.key.kind or e.key.kind == "gradient norm" or e.solo is None:
        return
    own = {r: total([p.grad for p in parts]) for r, parts in enumerate(e.solo.parts)}
    if any(grad is None for grad in own.values()) or e.ranks == 1:
        return
    count = e.solo.count
    factors = {f"{e.ranks} times ": e.ranks / count, "": 1 / count}
    for words, factor in factors.items():
        if e.equals({rank: scaled(grad, factor) for rank, grad in own.items()}):
            accumulates = any(len(parts) > 1 for parts in e.solo.parts)
            late = e.key.step > 0
            if late:
                cause = (
                    "no_sync was entered and never left, so that from then on no backward reduces (the step before was still reduced); "
                    "or gradients are kept local by a flag that is not reset"
                )
            elif accumulates:
                cause = "the last micro-batch ran inside no_sync, or the module was called past its data-parallel wrapper"
            else:
                cause = "backward ran inside no_sync, or the module was called past its data-parallel wrapper, whose hooks then never fire"
            yield Explanation(
                "not reduced", f"each rank has {words}the gradient of its own samples: it was not reduced over axis dp", cause, REDUCTION
            )
            return
    if any(e.equals(scaled(own[0], factor)) for factor in factors.values()):
        yield Explanation(
            "not reduced",
            "every rank has the gradient of rank 0's samples alone",
            "gradients were broadcast from rank 0 instead of reduced",
            REDUCTION,
        )
        return
    last = {r: scaled(parts[-1].grad, 1 / count) for r, parts in enumerate(e.solo.parts)}
    if any(len(parts) > 1 for parts in e.solo.parts):
        reduced_last = total(list(last.values()))
        first = total([scaled(p.grad, 1 / count) for parts in e.solo.parts for p in parts[:-1]])
        for name, part in (("last", reduced_last), ("first", first)):
            if e.equals(part):
                yield Explanation(
                    "lost micro-batches",
                    f"it is the gradient of the {name} micro-batches alone",
                    "gradients are cleared between micro-batches, or only some of them are reduced",
                    "data.micro_batch_size; zero_grad belongs after the step",
                )
                return


def means(e: Evidence) -> Iterator[Explanation]:
    """A mean of means, where the ranks or micro-batches have different counts."""
    if e.solo is None:
        return
    parts = e.solo.parts
    groups = {
        "ranks": [[p for p in rank if p.count] for rank in parts],
        "micro-batches": [[p] for rank in parts for p in rank if p.count],
    }
    for words, members in groups.items():
        members = [group for group in members if group]
        if len(members) < 2:
            continue
        if e.key.kind == "loss":
            mean = sum(sum(p.total for p in group) / sum(p.count for p in group) for group in members) / len(members)
            guess: Tensor | None = torch.tensor([mean], dtype=torch.float64).reshape(e.x.shape)
        elif e.key.kind in ("gradient", "clipped gradient") and all(p.grad is not None for group in members for p in group):
            guess = total([scaled(p.grad, 1 / sum(q.count for q in group) / len(members)) for group in members for p in group])
        else:
            continue
        if e.equals(guess) and len({sum(p.count for p in group) for group in members}) == 1:
            yield Explanation(
                "own samples",
                f"each of the {words} has computed it from its own samples alone, as many as the others: on one process the loss of a sample depends on "
                "the rest of the batch",
                "a loss that compares samples with each other, such as a contrastive one",
                "loss: gather what it compares from all ranks (a differentiable all_gather), with data.micro_batch_size=null",
            )
            return
        if e.equals(guess):
            yield Explanation(
                "mean of means",
                f"it is the mean over {words} of their own means, but their counts differ ({_counts(members)})",
                f"the loss is averaged by {words} instead of by tokens (or samples): each mean is divided by its local count",
                COUNT,
            )
            return


def wrong_count(e: Evidence) -> Iterator[Explanation]:
    if e.key.kind != "count" or e.solo is None:
        return
    got = float(next(iter(e.y.values())))
    want = float(e.x)
    for rank, parts in enumerate(e.solo.parts):
        if got == sum(p.count for p in parts):
            yield Explanation(
                "not reduced", f"it is the count of rank {rank} alone ({got:g})", "the count was not summed over axis dp", COUNT
            )
            return
    held = [part.count for parts in e.solo.parts for part in parts if part.count]
    if want == 1 and all(count == 1 for count in held) and got == len(held):
        yield Explanation(
            "mean of means",
            f"every micro-batch of every rank counts 1, whatever is in it ({got:g} in all, on one process 1): the result is the mean of their means",
            "loss_fn returns a mean with the count 1, so that the loss is averaged by ranks instead of by tokens (or samples)",
            COUNT,
        )
        return
    direction = "more" if got > want else "fewer"
    yield Explanation(
        "count",
        f"{abs(got - want):g} {direction} targets count than on one process ({got:g} instead of {want:g})",
        "padding or masked targets (-100) are counted, a filler or repeated sample weighs something, or the loss counts samples here and tokens there",
        COUNT,
    )


def tied(e: Evidence) -> Iterator[Explanation]:
    if e.solo is None or "gradient" not in e.key.kind or len(e.solo.uses) < 2:
        return
    for name, grad in e.solo.uses.items():
        if e.equals(grad / e.solo.count):
            others = [other for other in e.solo.uses if other != name]
            yield Explanation(
                "half of a tied weight",
                f"the weight is shared by {', '.join(e.solo.uses)}, and this is the gradient through {name} alone ({', '.join(others)} is missing)",
                "the layout untied the weight: each module got a copy, or only one of the copies' gradients is added up",
                "tie the weights again after the layout is applied (reset_parameters), parallel.tp, parallel.pp",
            )
            return


def norm(e: Evidence) -> Iterator[Explanation]:
    if e.key.kind != "gradient norm":
        return
    want = float(e.x)
    got = {rank: float(y) for rank, y in e.y.items()}
    if e.solo is not None and e.ranks > 1:
        for factor in (e.ranks, 1):
            local = [norm * factor / e.solo.count for norm in e.solo.norms]
            if all(near(got[rank], local[rank]) for rank in got):
                yield Explanation(
                    "local norm",
                    "each rank has the norm of the gradient of its own samples",
                    "the norm was taken before the reduction",
                    "trainer.clip_norm; clip with engine.clip_grad_norm_",
                )
                return
    total = math.sqrt(sum(value**2 for value in got.values()))
    if len(set(got.values())) > 1 and near(total, want):
        yield Explanation(
            "local norm",
            f"each rank has the norm of its own part of the gradient: their squares add up to the whole ({', '.join(f'{v:.4g}' for v in got.values())})",
            "the squared norms were not summed over the ranks, so every rank clips by a norm of its own",
            "trainer.clip_norm; clip with engine.clip_grad_norm_",
        )
        return
    if near(next(iter(got.values())), want * math.sqrt(e.ranks)) and e.ranks > 1:
        yield Explanation(
            "local norm",
            f"it is sqrt({e.ranks}) times too large: replicated gradients were counted once for every rank",
            "squared norms summed over an axis that holds replicas",
            "trainer.clip_norm",
        )


def known_factor(e: Evidence) -> Iterator[Explanation]:
    """A factor that has a name."""
    k = along(e.y[e.wrong[0]], e.expected(e.wrong[0]))
    if k is None or not e.equals({rank: k * e.expected(rank) for rank in e.wrong}):
        return
    precise = max(1e-4, e.tolerance / max(float(e.x.norm()), 1e-300))
    for value, error, found, cause, look in _known_factors(e):
        if near(k, value, min(precise, 0.2)):
            size = f"{number(k)} times the right value" if k > 1 else f"{number(k)} of the right value"
            yield Explanation(error, f"it is {size}: {found}", cause, look)
            return


def _known_factors(e: Evidence) -> Iterator[tuple[float, str, str, str, str]]:
    n, scale = e.ranks, e.numbers.get("loss scale", 1.0)
    micro = max((len(parts) for parts in e.solo.parts), default=1) if e.solo else 1
    yield -1.0, "sign", "the sign is wrong", "a loss that is maximised, or a difference taken the other way round", "loss"
    if "gradient" not in e.key.kind and e.key.kind != "loss":
        return
    if scale not in (1.0, 0.0):
        yield (
            1 / scale,
            "unscaled twice",
            f"1/{scale:g} is one over the loss scale",
            "gradients are unscaled twice (once for clipping, once by the step)",
            "precision.loss_scale",
        )
        yield (
            scale,
            "not unscaled",
            f"{scale:g} is the loss scale",
            "gradients are clipped or applied before they are unscaled",
            "precision.loss_scale",
        )
    ep = e.cfg.parallel.ep
    if ep > 1 and ("expert" in e.key.name.lower() or ep != n):
        cause = "the all-to-all has added up what the ranks of ep contribute, and the reduction over those that share an expert divides by fewer"
        yield ep, "expert scale", f"{ep} is the degree of axis ep", cause, "parallel.ep"
        yield 1 / ep, "expert scale", f"1/{ep} is one over the degree of axis ep", "divided by the ranks of ep twice", "parallel.ep"
    if n > 1:
        yield (
            1 / n,
            "averaged twice",
            f"1/{n} is one over the ranks of axis dp",
            "averaged over the ranks twice, or averaged where the engine expects the sum",
            REDUCTION,
        )
        yield (
            n,
            "summed",
            f"{n} is the number of ranks of axis dp",
            "summed over the ranks where it should be averaged, or reduced twice",
            REDUCTION,
        )
        yield (
            1 / n**2,
            "averaged twice",
            f"1/{n}^2: divided by the ranks twice too often",
            "averaged over the ranks in three places",
            REDUCTION,
        )
    if micro > 1:
        yield (
            micro,
            "accumulation",
            f"{micro} is the number of micro-batches",
            "the sum over micro-batches is not divided",
            "data.micro_batch_size",
        )
        yield (
            1 / micro,
            "accumulation",
            f"1/{micro} is one over the number of micro-batches",
            "divided by the number of micro-batches on top of the count",
            "data.micro_batch_size",
        )
        if n > 1:
            yield (
                1 / (n * micro),
                "accumulation",
                f"1/{n * micro} is one over ranks times micro-batches",
                "divided by micro-batches and ranks on top of the count",
                "data.micro_batch_size",
            )
    window = e.numbers.get("samples"), float(e.cfg.data.global_batch)
    if window[0] and window[0] != window[1]:
        yield (
            window[0] / window[1],
            "accumulation",
            (f"{window[0]:g} samples are in this window, and it was divided by the {window[1]:g} of a full one"),
            "the last, partial accumulation window is scaled as if it were full",
            "data.global_batch, data.micro_batch_size",
        )
    clip, norm = e.cfg.trainer.clip_norm, e.numbers.get("gradient norm")
    if clip is not None and norm:
        factor = min(clip / norm, 1.0)
        if factor < 1:
            yield 1 / factor, "clipping", "it was not clipped", "clipping is skipped under this layout", "trainer.clip_norm"
            yield factor, "clipping", "it was clipped twice", "clipped by the engine and once more", "trainer.clip_norm"
    yield 0.5, "factor", "half", "one of two contributions is missing, or an average over two", REDUCTION
    yield 2.0, "factor", "twice", "counted twice", REDUCTION


def any_factor(e: Evidence) -> Iterator[Explanation]:
    """Every element off by one factor, or by one factor on each rank."""
    if e.x.numel() < 2:
        return
    factors = {rank: along(e.y[rank], e.expected(rank)) for rank in e.wrong}
    if any(k is None for k in factors.values()) or not e.equals({rank: (k or 0.0) * e.expected(rank) for rank, k in factors.items()}):
        return
    values = [k for k in factors.values() if k is not None]
    if max(values) - min(values) <= 1e-6 * abs(values[0]):
        yield Explanation(
            "factor",
            f"it is {number(values[0])} times the right value, in every element, on {ranks_text(e.wrong)}",
            "a division or multiplication too many; compare the factor with the number of ranks, micro-batches and samples",
            COUNT,
        )
        return
    norms = "clipped" in e.key.kind
    yield Explanation(
        "local norm" if norms else "factor",
        f"each rank has another multiple of the right value ({', '.join(f'{number(k)} on rank {r}' for r, k in factors.items() if k)})",
        "every rank clips by a norm of its own" if norms else "a scale that depends on the rank",
        "trainer.clip_norm; clip with engine.clip_grad_norm_" if norms else "strategy",
    )


def _counts(groups: list) -> str:
    counts = [f"{sum(p.count for p in group):g}" for group in groups]
    return ", ".join([*counts[:6], "..."] if len(counts) > 6 else counts)

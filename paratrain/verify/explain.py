"""From the first tensor that differs to the kind of error: hypotheses, tried from the most specific to the most general.

A hypothesis is a tensor computed from the reference and from what each rank alone would have contributed. It holds when it explains
all but a hundredth of the difference, or leaves no more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paratrain.config import Config
from paratrain.verify.evidence import Solo
from paratrain.verify.record import Key


@dataclass
class Evidence:
    """The first difference in full.

    Attributes:
        key: what differs.
        x: the tensor on one process.
        y: by rank, under the layout; for an activation, the rows of this rank's samples.
        rows: for an activation, the same rows of x, by rank.
        before: x one step earlier (the initial value at step 0), where there was one.
        wrong: the ranks where it differs.
        tolerance: norm that rounding explains.
        solo: what each rank alone would have contributed; None if it could not be computed.
        norms: gradient norm on one process at this step.
        numbers: other numbers of this step on one process: loss scale, norm, learning rate.
    """

    key: Key
    x: Tensor
    y: dict[int, Tensor]
    wrong: list[int]
    tolerance: float
    ranks: int
    cfg: Config
    rows: dict[int, Tensor] = field(default_factory=dict)
    before: Tensor | None = None
    solo: Solo | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def expected(self, rank: int) -> Tensor:
        return self.rows.get(rank, self.x)

    def equals(self, guess: Tensor | Mapping[int, Tensor | None] | None) -> bool:
        """Whether every rank that differs has `guess`, one tensor for all or one by rank."""
        for rank in self.wrong:
            tensor, y = guess.get(rank) if isinstance(guess, Mapping) else guess, self.y[rank]
            if tensor is None or tensor.shape != y.shape:
                return False
            if not float((y - tensor).norm()) <= max(self.tolerance, 0.01 * float((y - self.expected(rank)).norm())):
                return False
        return bool(self.wrong)


@dataclass(frozen=True)
class Explanation:
    """A kind of error, what was found, what usually causes it, and which configuration key to look at."""

    error: str
    found: str
    cause: str
    look: str = ""

    def __str__(self) -> str:
        return f"{self.found}. Usual cause: {self.cause}." + (f" Look at: {self.look}." if self.look else "")


REDUCTION = "strategy, and how your own code calls backward (engine.backward, engine.no_sync)"
COUNT = "loss (return (sum, count)), trainer.loss_count"


def explain(evidence: Evidence) -> Explanation:
    """The most specific explanation that fits."""
    for hypothesis in _HYPOTHESES:
        for found in hypothesis(evidence):
            return found
    return Explanation(
        "unknown",
        "no simple relation to what one process has: not a factor, a missing reduction, another step's value, a permutation or rounding",
        f"a computation in or before {evidence.key.name or 'the loss'} that depends on which samples a rank holds, or on the rank itself",
        "the module named above, and anything in it that uses the rank, the position in the batch, or statistics over samples",
    )


def missing(key: Key, wrong: list[int]) -> Explanation:
    ranks = _ranks(wrong)
    if "gradient" in key.kind:
        return Explanation(
            "missing",
            f"there is no gradient on {ranks}",
            "the layout does not use this parameter: a module was replaced or detached, or the gradient was cleared before the step",
            REDUCTION,
        )
    return Explanation("missing", f"not there on {ranks}", "the layout renamed, dropped or replaced it", "strategy, parallel")


def shape(key: Key, detail: str) -> Explanation:
    return Explanation(
        "shape",
        f"{detail}",
        "padding that the layout added and did not take away again, such as a vocabulary padded to a multiple of the ranks: padded classes "
        "take part in the softmax and leak into the loss",
        "vocab_size of the model; slice the logits back before the loss",
    )


# ---------------------------------------------------------------------- hypotheses


def _not_finite(e: Evidence) -> Iterator[Explanation]:
    if any(not bool(torch.isfinite(e.y[rank]).all()) for rank in e.wrong):
        yield Explanation(
            "not finite",
            f"it is not finite on {_ranks(e.wrong)}, where one process is",
            "overflow in the dtype of the layout, or a division by a local count of 0",
            "precision, loss",
        )


def _zero(e: Evidence) -> Iterator[Explanation]:
    if all(not bool(e.y[rank].any()) for rank in e.wrong):
        if e.key.kind == "optimizer state":
            yield Explanation("zero", "it is zero", "the state was made afresh instead of kept", "resume")
        else:
            yield Explanation(
                "zero", f"it is zero on {_ranks(e.wrong)}", "detached from the loss, or cleared before it was used", REDUCTION
            )


def _own_gradient(e: Evidence) -> Iterator[Explanation]:
    """The gradient of this rank's own samples."""
    if "gradient" not in e.key.kind or e.key.kind == "gradient norm" or e.solo is None:
        return
    own = {r: _total([p.grad for p in parts]) for r, parts in enumerate(e.solo.parts)}
    if any(grad is None for grad in own.values()) or e.ranks == 1:
        return
    count = e.solo.count
    factors = {f"{e.ranks} times ": e.ranks / count, "": 1 / count}
    for words, factor in factors.items():
        if e.equals({rank: _scaled(grad, factor) for rank, grad in own.items()}):
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
    if any(e.equals(_scaled(own[0], factor)) for factor in factors.values()):
        yield Explanation(
            "not reduced",
            "every rank has the gradient of rank 0's samples alone",
            "gradients were broadcast from rank 0 instead of reduced",
            REDUCTION,
        )
        return
    last = {r: _scaled(parts[-1].grad, 1 / count) for r, parts in enumerate(e.solo.parts)}
    if any(len(parts) > 1 for parts in e.solo.parts):
        reduced_last = _total(list(last.values()))
        first = _total([_scaled(p.grad, 1 / count) for parts in e.solo.parts for p in parts[:-1]])
        for name, part in (("last", reduced_last), ("first", first)):
            if e.equals(part):
                yield Explanation(
                    "lost micro-batches",
                    f"it is the gradient of the {name} micro-batches alone",
                    "gradients are cleared between micro-batches, or only some of them are reduced",
                    "data.micro_batch_size; zero_grad belongs after the step",
                )
                return


def _means(e: Evidence) -> Iterator[Explanation]:
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
            guess = _total([_scaled(p.grad, 1 / sum(q.count for q in group) / len(members)) for group in members for p in group])
        else:
            continue
        if e.equals(guess):
            yield Explanation(
                "mean of means",
                f"it is the mean over {words} of their own means, but their counts differ ({_counts(members)})",
                f"the loss is averaged by {words} instead of by tokens (or samples): each mean is divided by its local count",
                COUNT,
            )
            return


def _wrong_count(e: Evidence) -> Iterator[Explanation]:
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


def _tied(e: Evidence) -> Iterator[Explanation]:
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


def _weight_update(e: Evidence) -> Iterator[Explanation]:
    """What became of w - lr * (update + decay * w)."""
    if e.key.kind != "weight" or e.before is None:
        return
    some = f"only on {_ranks(e.wrong)}" if len(e.wrong) < e.ranks else "on every rank"
    if e.equals(e.before):
        yield Explanation(
            "stale",
            f"it is still the weight of the step before, {some}",
            "the optimizer did not step there, or stepped a copy",
            "optimizer",
        )
        return
    rank = e.wrong[0]
    off, before = e.y[rank] - e.x, e.before
    k = _along(off, before)
    if k is not None and e.equals(e.x + k * before):
        decay, lr = e.cfg.optimizer.weight_decay, e.numbers.get("learning rate", e.cfg.optimizer.lr)
        extra = -k / lr if lr else math.nan
        amount = f"{abs(extra):.3g} {'more' if extra > 0 else 'less'} than on one process, where it is {decay:g}"
        yield Explanation(
            "weight decay",
            f"it differs by a multiple of the weight itself, {some}: a weight decay {amount}, while its gradient is the same",
            "decay applied on some ranks only, twice, or to other parameter groups",
            "optimizer.weight_decay, optimizer.no_decay, optimizer.groups",
        )
        return
    update = e.x - before
    k = _along(e.y[rank] - before, update)
    if k is not None and e.equals(before + k * update):
        yield Explanation(
            "factor",
            f"the update is {_number(k)} times that of one process, {some}, while the gradient is the same",
            "the optimizer stepped twice, or has another learning rate there"
            if k > 1
            else "another learning rate, or a schedule at another step",
            "optimizer.lr, scheduler, optimizer.groups",
        )


def _norm(e: Evidence) -> Iterator[Explanation]:
    if e.key.kind != "gradient norm":
        return
    want = float(e.x)
    got = {rank: float(y) for rank, y in e.y.items()}
    if e.solo is not None and e.ranks > 1:
        for factor in (e.ranks, 1):
            local = [norm * factor / e.solo.count for norm in e.solo.norms]
            if all(_near(got[rank], local[rank]) for rank in got):
                yield Explanation(
                    "local norm",
                    "each rank has the norm of the gradient of its own samples",
                    "the norm was taken before the reduction",
                    "trainer.clip_norm; clip with engine.clip_grad_norm_",
                )
                return
    total = math.sqrt(sum(value**2 for value in got.values()))
    if len(set(got.values())) > 1 and _near(total, want):
        yield Explanation(
            "local norm",
            f"each rank has the norm of its own part of the gradient: their squares add up to the whole ({', '.join(f'{v:.4g}' for v in got.values())})",
            "the squared norms were not summed over the ranks, so every rank clips by a norm of its own",
            "trainer.clip_norm; clip with engine.clip_grad_norm_",
        )
        return
    if _near(next(iter(got.values())), want * math.sqrt(e.ranks)) and e.ranks > 1:
        yield Explanation(
            "local norm",
            f"it is sqrt({e.ranks}) times too large: replicated gradients were counted once for every rank",
            "squared norms summed over an axis that holds replicas",
            "trainer.clip_norm",
        )


def _stale(e: Evidence) -> Iterator[Explanation]:
    if e.before is None or e.before.shape != e.x.shape or e.key.kind == "weight":
        return
    if e.equals(e.before):
        yield Explanation(
            "stale",
            f"it is what one process had one step earlier, on {_ranks(e.wrong)}",
            "a value is reused that should have been computed again: an overlapped or cached copy, or an update that did not happen",
            "strategy",
        )
    elif e.key.kind == "gradient" and e.equals(e.x + e.before):
        yield Explanation(
            "not cleared",
            "it is the sum of this step's gradient and the last step's",
            "gradients are not cleared after the step",
            "engine.step clears them; do not keep p.grad",
        )


def _own_statistics(e: Evidence) -> Iterator[Explanation]:
    """Statistics over this rank's samples."""
    if e.solo is None or e.ranks == 1:
        return
    own = e.solo.buffers if e.key.kind == "buffer" else e.solo.outputs if e.key.kind == "activation" else []
    if len(own) != e.ranks:
        return
    doubles: dict[int, Tensor | None] = {rank: tensor.double() for rank, tensor in enumerate(own)}
    if e.key.kind == "activation":
        if e.equals(doubles):
            yield Explanation(
                "own statistics",
                "every rank computes it from its own samples, but on one process a sample's value depends on the rest of the batch",
                "statistics over the batch that are not synchronised, such as BatchNorm over each rank's samples",
                "trainer.batch_norm=sync, data.micro_batch_size=null",
            )
        return
    if e.equals(doubles) or e.equals(doubles[0]):
        whose = "each rank's own samples" if e.equals(doubles) else "rank 0's samples"
        yield Explanation(
            "own statistics",
            f"the buffer holds what {whose} alone give: it is not synchronised over axis dp",
            "statistics over the batch that are neither reduced nor exact when broadcast from rank 0",
            "strategy.broadcast_buffers, trainer.batch_norm=sync; reduce the statistics in the module itself",
        )


def _known_factor(e: Evidence) -> Iterator[Explanation]:
    """A factor that has a name."""
    k = _along(e.y[e.wrong[0]], e.expected(e.wrong[0]))
    if k is None or not e.equals({rank: k * e.expected(rank) for rank in e.wrong}):
        return
    precise = max(1e-4, e.tolerance / max(float(e.x.norm()), 1e-300))
    for value, error, found, cause, look in _known_factors(e):
        if _near(k, value, min(precise, 0.2)):
            size = f"{_number(k)} times the right value" if k > 1 else f"{_number(k)} of the right value"
            yield Explanation(error, f"it is {size}: {found}", cause, look)
            return


def _any_factor(e: Evidence) -> Iterator[Explanation]:
    """Every element off by one factor, or by one factor on each rank."""
    if e.x.numel() < 2:
        return
    factors = {rank: _along(e.y[rank], e.expected(rank)) for rank in e.wrong}
    if any(k is None for k in factors.values()) or not e.equals({rank: (k or 0.0) * e.expected(rank) for rank, k in factors.items()}):
        return
    values = [k for k in factors.values() if k is not None]
    if max(values) - min(values) <= 1e-6 * abs(values[0]):
        yield Explanation(
            "factor",
            f"it is {_number(values[0])} times the right value, in every element, on {_ranks(e.wrong)}",
            "a division or multiplication too many; compare the factor with the number of ranks, micro-batches and samples",
            COUNT,
        )
        return
    norms = "clipped" in e.key.kind
    yield Explanation(
        "local norm" if norms else "factor",
        f"each rank has another multiple of the right value ({', '.join(f'{_number(k)} on rank {r}' for r, k in factors.items() if k)})",
        "every rank clips by a norm of its own" if norms else "a scale that depends on the rank",
        "trainer.clip_norm; clip with engine.clip_grad_norm_" if norms else "strategy",
    )


def _learning_rate(e: Evidence) -> Iterator[Explanation]:
    """The rate of another position in the schedule."""
    if e.key.kind != "learning rate":
        return
    from paratrain.optim.schedules import factor

    got, total = float(e.y[e.wrong[0]]), e.cfg.scheduler.total_steps or e.cfg.trainer.max_steps
    micro = max((len(parts) for parts in e.solo.parts), default=1) if e.solo else 1
    for times, whose in ((e.ranks, "process"), (micro, "micro-batch"), (e.ranks * micro, "process and micro-batch")):
        if times > 1 and _near(got, e.cfg.optimizer.lr * factor(e.cfg.scheduler, e.key.step * times, total)):
            yield Explanation(
                "schedule",
                f"it is the rate of step {e.key.step * times}: the schedule advances {times} times a step",
                f"the scheduler is stepped once for every {whose} instead of once an update",
                "scheduler; the engine sets the rate itself, call no scheduler.step()",
            )
            return


def _known_factors(e: Evidence) -> Iterator[tuple[float, str, str, str, str]]:
    n, scale = e.ranks, e.numbers.get("loss scale", 1.0)
    micro = max((len(parts) for parts in e.solo.parts), default=1) if e.solo else 1
    yield -1.0, "sign", "the sign is wrong", "a loss that is maximised, or a difference taken the other way round", "loss"
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


def _permuted(e: Evidence) -> Iterator[Explanation]:
    """The same rows in another order."""
    x = torch.cat([e.rows[rank] for rank in sorted(e.rows)]) if e.rows else e.x
    y = torch.cat([e.y[rank] for rank in sorted(e.rows)]) if e.rows else e.y[e.wrong[0]]
    if x.ndim == 0 or x.shape != y.shape or len(x) < 2:
        return
    probe = torch.randn(x[0].numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected = [t.reshape(len(t), -1) @ probe for t in (x, y)]
    a, b = (p.sort() for p in projected)
    moved = int((a.indices != b.indices).sum())
    if moved and float((a.values - b.values).norm()) <= 0.01 * float((projected[0] - projected[1]).norm()):
        yield Explanation(
            "permuted rows",
            f"the same rows in another order ({moved} of {len(x)} moved)",
            "shards put together in the wrong order, or samples dealt to other ranks than their targets",
            "parallel; a fused weight (q|k|v) that was sharded as if it were one matrix",
        )


def _rounded(e: Evidence) -> Iterator[Explanation]:
    """A difference of the size that rounding to a narrow dtype leaves, as measured by rounding what is added up."""
    parts = [e.expected(rank) for rank in e.wrong[:1]]
    if e.solo is not None and e.key.kind in ("gradient", "clipped gradient"):
        own = [_total([p.grad for p in rank]) for rank in e.solo.parts]
        parts = [grad / e.solo.count for grad in own if grad is not None and grad.shape == e.x.shape] or parts
    largest = max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
    if not largest:
        return
    scale = 2.0 ** -math.floor(math.log2(largest))  # narrow dtypes are tried where they are accurate
    off = max(float((e.y[rank] - e.expected(rank)).norm()) for rank in e.wrong)
    compute = torch.float64 if e.cfg.precision.name == "64-true" else torch.float32
    distances = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if torch.finfo(dtype).bits < torch.finfo(compute).bits:
            error = torch.stack([(part * scale).to(dtype).double() / scale - part for part in parts]).sum(0).norm()
            distances[dtype] = abs(math.log(max(off, 1e-300) / max(float(error), 1e-300)))
    nearest = min(distances, key=lambda dtype: distances[dtype], default=None)
    if nearest is None or distances[nearest] > math.log(4):
        return
    name = str(nearest).removeprefix("torch.")
    where = "in the reduction over the ranks" if "gradient" in e.key.kind else "in this module, or in what it is given"
    yield Explanation(
        "rounding",
        f"the difference has the size that rounding to {name} leaves ({off / max(float(e.expected(e.wrong[0]).norm()), 1e-300):.1e} of the whole)",
        f"{name} is used {where}: a cast, an autocast region, or a compressed communication",
        "strategy.comm_hook, precision.reduce_dtype, precision",
    )


def _one_rank(e: Evidence) -> Iterator[Explanation]:
    if 0 < len(e.wrong) < e.ranks and not e.rows:
        what = "weights" if "weight" in e.key.kind else "values"
        yield Explanation(
            "replicas differ",
            f"only {_ranks(e.wrong)} differ from one process: {what} that should be replicas are not the same",
            "initial weights drawn from a generator that depends on the rank and not broadcast"
            if e.key.step < 0
            else "something that is done on some ranks only",
            "seed in model_fn by cfg.seed alone, and not by the rank; strategy",
        )


def _initial(e: Evidence) -> Iterator[Explanation]:
    if e.key.step < 0:
        yield Explanation(
            "initial values",
            f"on {_ranks(e.wrong)} it starts from other values than on one process",
            "initialisation that depends on the rank, the number of ranks, or the order of the layout's transforms",
            "model_fn: it runs under cfg.seed; draw nothing from the rank",
        )


_HYPOTHESES = (
    _not_finite,
    _wrong_count,
    _zero,
    _tied,
    _own_gradient,
    _norm,
    _learning_rate,
    _weight_update,
    _known_factor,
    _means,
    _stale,
    _own_statistics,
    _any_factor,
    _permuted,
    _one_rank,
    _initial,
    _rounded,
)


# ---------------------------------------------------------------------- helpers


def _along(y: Tensor, x: Tensor) -> float | None:
    """The factor k for which y is nearest to k x."""
    square = float(x.square().sum()) if x.shape == y.shape else 0.0
    return float((x * y).sum()) / square if square > 0 else None


def _total(tensors: list[Tensor | None]) -> Tensor | None:
    kept = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(kept).sum(0) if kept else None


def _scaled(tensor: Tensor | None, factor: float) -> Tensor | None:
    return None if tensor is None else tensor * factor


def _near(a: float, b: float, relative: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=relative)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _number(k: float) -> str:
    return f"1/{round(1 / k)}" if 0 < k < 1 and _near(1 / k, round(1 / k), 1e-4) else f"{k:.6g}"


def _counts(groups: list) -> str:
    counts = [f"{sum(p.count for p in group):g}" for group in groups]
    return ", ".join([*counts[:6], "..."] if len(counts) > 6 else counts)

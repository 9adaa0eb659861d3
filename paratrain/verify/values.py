"""Hypotheses about values: stale, zero, rounded, permuted, or another on some ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from paratrain.verify.case import REDUCTION, Evidence, Explanation, along, near, number, ranks_text, total


def not_finite(e: Evidence) -> Iterator[Explanation]:
    if any(not bool(torch.isfinite(e.y[rank]).all()) for rank in e.wrong):
        yield Explanation(
            "not finite",
            f"it is not finite on {ranks_text(e.wrong)}, where one process is",
            "overflow in the dtype of the layout, or a division by a local count of 0",
            "precision, loss",
        )


def zero(e: Evidence) -> Iterator[Explanation]:
    if all(not bool(e.y[rank].any()) for rank in e.wrong):
        if e.key.kind == "optimizer state":
            yield Explanation("zero", "it is zero", "the state was made afresh instead of kept", "resume")
        else:
            yield Explanation(
                "zero", f"it is zero on {ranks_text(e.wrong)}", "detached from the loss, or cleared before it was used", REDUCTION
            )


def learning_rate(e: Evidence) -> Iterator[Explanation]:
    """The rate of another position in the schedule."""
    if e.key.kind != "learning rate":
        return
    from paratrain.optim.schedules import factor

    got, total = float(e.y[e.wrong[0]]), e.cfg.scheduler.total_steps or e.cfg.trainer.max_steps
    micro = max((len(parts) for parts in e.solo.parts), default=1) if e.solo else 1
    for times, whose in ((e.ranks, "process"), (micro, "micro-batch"), (e.ranks * micro, "process and micro-batch")):
        if times > 1 and near(got, e.cfg.optimizer.lr * factor(e.cfg.scheduler, e.key.step * times, total)):
            yield Explanation(
                "schedule",
                f"it is the rate of step {e.key.step * times}: the schedule advances {times} times a step",
                f"the scheduler is stepped once for every {whose} instead of once an update",
                "scheduler; the engine sets the rate itself, call no scheduler.step()",
            )
            return


def weight_update(e: Evidence) -> Iterator[Explanation]:
    """What became of w - lr * (update + decay * w)."""
    if e.key.kind != "weight" or e.before is None:
        return
    some = f"only on {ranks_text(e.wrong)}" if len(e.wrong) < e.ranks else "on every rank"
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
    k = along(off, before)
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
    k = along(e.y[rank] - before, update)
    if k is not None and e.equals(before + k * update):
        yield Explanation(
            "factor",
            f"the update is {number(k)} times that of one process, {some}, while the gradient is the same",
            "the optimizer stepped twice, or has another learning rate there"
            if k > 1
            else "another learning rate, or a schedule at another step",
            "optimizer.lr, scheduler, optimizer.groups",
        )


def stale(e: Evidence) -> Iterator[Explanation]:
    if e.before is None or e.before.shape != e.x.shape or e.key.kind == "weight":
        return
    if e.equals(e.before):
        yield Explanation(
            "stale",
            f"it is what one process had one step earlier, on {ranks_text(e.wrong)}",
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


def own_statistics(e: Evidence) -> Iterator[Explanation]:
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


def permuted(e: Evidence) -> Iterator[Explanation]:
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


def one_rank(e: Evidence) -> Iterator[Explanation]:
    if 0 < len(e.wrong) < e.ranks and not e.rows:
        what = "weights" if "weight" in e.key.kind else "values"
        yield Explanation(
            "replicas differ",
            f"only {ranks_text(e.wrong)} differ from one process: {what} that should be replicas are not the same",
            "initial weights drawn from a generator that depends on the rank and not broadcast"
            if e.key.step < 0
            else "something that is done on some ranks only",
            "seed in model_fn by cfg.seed alone, and not by the rank; strategy",
        )


def initial(e: Evidence) -> Iterator[Explanation]:
    if e.key.step < 0:
        yield Explanation(
            "initial values",
            f"on {ranks_text(e.wrong)} it starts from other values than on one process",
            "initialisation that depends on the rank, the number of ranks, or the order of the layout's transforms",
            "model_fn: it runs under cfg.seed; draw nothing from the rank",
        )


def rounded(e: Evidence) -> Iterator[Explanation]:
    """A difference of the size that rounding to a narrow dtype leaves, as measured by rounding what is added up."""
    parts = [e.expected(rank) for rank in e.wrong[:1]]
    if e.solo is not None and e.key.kind in ("gradient", "clipped gradient"):
        own = [total([p.grad for p in rank]) for rank in e.solo.parts]
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

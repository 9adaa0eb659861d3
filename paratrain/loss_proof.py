"""Whether the loss of a batch is the weighted mean of the losses of its parts, on which every layout rests: seen in the first steps.

A layout evaluates loss_fn on the samples of each micro-batch of each rank, and divides the sum of the sums by the sum of the counts. For a loss
that is no sum over what it counts (a mean over tokens that is weighed by samples, a loss that compares samples with each other) that is another
number. So the loss of some samples is compared with that of parts of them, on the outputs of the training step itself; where outputs are not
those of samples, as the loss that a Hugging Face model computes, the model runs once more on the parts.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from paratrain import deal, rng
from paratrain.batch import LocalBatch, map_tensors, tensors
from paratrain.compat import collectives_started
from paratrain.errors import UserError
from paratrain.parallel.tp_split import plain
from paratrain.totals import Totals, or_one
from paratrain.unchanged import unchanged

STEPS = (0, 1, 2, 4, 8, 16)
"""Steps of a run that are looked at. A loss may be a mean over everything until the first padded batch comes."""
_KEPT = 4  # micro-batches
_ACCEPT = "trainer.loss_check=false accepts a loss that depends on the layout"
_WRITE = "let loss_fn return (sum, count): losses.sum() and the number of terms in it, such as F.cross_entropy(..., reduction='sum') and (targets != -100).sum()"
_HUGGING_FACE = (
    "the model computes the loss itself, a mean over the labels of what it is given; leave them out of its inputs and make them the targets of the batch, "
    "({input_ids: ..., attention_mask: ...}, labels), with loss=huggingface (paratrain.huggingface_loss), which shifts them as the model does"
)

Pairs = list[tuple[float, float]]  # (sum, count) of each loss that loss_fn returns


@dataclasses.dataclass
class _Seen:
    """What loss_fn was given for one micro-batch: `real` samples of the `held` ones count."""

    outputs: Any
    targets: Any
    real: int
    held: int


@dataclasses.dataclass
class _Report:
    """What a rank tells the others."""

    fault: str | None = None
    joint: bool = False  # the loss has collectives
    rerun: bool = False  # outputs are not those of samples
    reals: tuple[int, ...] = ()
    constant: bool = False
    counted: float = 0.0


class LossProof:
    """Watches the first steps of one engine.

    Args:
        measure: (sum, count) of every loss that loss_fn returns for outputs and targets of so many samples.
        run: the model's outputs for each of several inputs, in evaluation mode; none where another rank has them.
        kept: what may change when they are called: the loss and the model.
        groups: those of ranks that compute one output together.
        of_library: the loss is the library's own, which is a sum by construction.
        totals: sums and compares numbers over ranks.
        over: the ranks that hold parts of the batch.
    """

    def __init__(
        self,
        measure: Callable[[Any, Any, int], Pairs],
        run: Callable[[Sequence[Any]], list[Any]],
        kept: Sequence[Any],
        groups: Sequence[Any],
        of_library: bool,
        totals: Totals,
        over: DeviceMesh,
    ):
        self._measure, self._run, self._kept, self._groups, self._of_library = measure, run, kept, groups, of_library
        self._totals, self._over = totals, over
        self._steps = 0
        self._uneven_seen = False
        self._several = False  # micro-batches in this step
        self.joint = False  # the loss has collectives
        self._weighted = False  # its count has a gradient

    def begin(self, share: LocalBatch, micro: Sequence[tuple[Any, Any, int]], size: int | None) -> Watch | None:
        """What watches this step, if it is one to watch; the same answer on every rank."""
        step, self._steps, self._several, ranks = self._steps, self._steps + 1, len(micro) > 1, self._totals.ranks
        uneven = share.form is not None and (share.size != share.largest * ranks or share.largest % (size or share.largest) != 0)
        new = uneven and not self._uneven_seen
        self._uneven_seen |= uneven
        if (ranks == 1 and len(micro) == 1) or not (step in STEPS or new):
            return None
        return Watch(self, micro)

    def with_count(self, total: torch.Tensor, count: Any, watch: Watch | None, several_losses: bool) -> tuple[torch.Tensor, Any]:
        """The (sum, count) of a micro-batch, where the count may have a gradient, which the division after all backwards leaves out.

        The gradient of sum / count is that of (sum - mean * count) / count with the mean of the whole step, which one micro-batch a step lets
        the ranks compute between forward and backward. Every rank must call it for every micro-batch.
        """
        here = isinstance(count, torch.Tensor) and count.requires_grad
        if watch is not None:
            self._weighted = self._weighted or bool(self._totals.largest(float(here), over=self._over))
        if not (here or self._weighted):
            return total, count
        if self._several or several_losses or (not self._weighted and self._over.size() > 1):
            text = (
                "loss_fn returned a count with a gradient, and the gradient of sum / count cannot be known before the counts of all micro-batches "
                "are; detach it if it is to be a constant (count.detach()), or return one loss, and write data.micro_batch_size=null without parallel.pp"
            )
            if watch is None:
                raise UserError(text)
            watch.refuse(text)
            return total, count.detach() if here else count
        whole = self._totals.over_ranks([self._totals.scalar(total), self._totals.scalar(count)], over=self._over)
        if here:
            total = total - (count - count.detach()) * (whole[0] / or_one(whole[1]))
        return total, count.detach() if here else count

    @torch.no_grad()
    def pairs(self, outputs: Any, targets: Any, real: int, seed: int = 0, joint: bool = False) -> Pairs | None:
        """(sum, count) of the losses, with everything left as it was; None where loss_fn cannot be asked so."""
        with unchanged(*self._kept):
            rng.seed_all(seed)
            try:
                pairs = self._measure(outputs, targets, real)
            except Exception:  # whatever it says to fewer samples than it was written for, or memory that does not suffice
                return None
        return None if any(not math.isfinite(number) for pair in pairs for number in pair) and not joint else pairs

    def of_nothing(self, loss_fn: Callable, outputs: Any, targets: Any, watch: Watch | None) -> tuple[Any, bool]:
        """What loss_fn returns for no samples, and whether it has collectives, in which other ranks wait for this one."""
        try:
            loss = loss_fn(_rows(outputs, 0, 0, 1), deal.Cut(0, 0, 1)(targets))
        except Exception:  # not written for no samples: then nobody waits, but for a loss that is known to have collectives
            if self.joint:
                raise
            loss = None
        return loss, self.joint or (watch is not None and watch.after() and loss is not None)

    def collectives(self) -> int:
        """How many this rank has started, but for those of tensor parallelism."""
        return collectives_started(self._groups)


class Watch:
    """One step under observation."""

    def __init__(self, proof: LossProof, micro: Sequence[tuple[Any, Any, int]]):
        self._proof, self._micro = proof, micro
        self._seen: list[_Seen] = []
        self._report = _Report(reals=tuple(real for _, _, real in micro), constant=True)
        self._rerun = False
        self._before = 0

    # ------------------------------------------------------------------ while the step runs

    def before(self) -> None:
        self._before = self._proof.collectives()

    def after(self) -> bool:
        """Whether the loss that was just computed has collectives."""
        joint = self._proof.collectives() != self._before
        self._report.joint |= joint
        return joint

    def saw(self, outputs: Any, targets: Any, real: int, constant: bool, counted: float) -> None:
        """A micro-batch, its loss computed."""
        self._report.constant &= constant
        self._report.counted += counted
        if self._proof._of_library or len(self._seen) == _KEPT:
            return
        held = max(real, 1)
        for leaf in tensors(outputs):
            if real and leaf.requires_grad and not (leaf.dim() and leaf.size(0) == held):
                self._report.rerun = True
        with torch.no_grad():
            self._seen.append(_Seen(map_tensors(_kept, outputs), targets, real, held))

    def refuse(self, text: str) -> None:
        """What this rank has to say once every rank has come to the end of the step."""
        self._report.fault = self._report.fault or text

    # ------------------------------------------------------------------ at its end

    def conclude(self) -> None:
        """Every rank must call it.

        Raises:
            UserError: on every rank: the loss is another one under this layout, or depends on no weight.
        """
        reports = _everywhere(self._report)
        _raise(reports)
        counted = [report for report in reports if report.counted]
        if counted and all(report.constant for report in counted):
            raise UserError(
                "the loss does not depend on any trainable parameter: check that loss_fn uses the outputs and nothing detaches them"
            )
        joint, rerun = any(report.joint for report in reports), any(report.rerun for report in reports)
        self._proof.joint |= joint
        several = len(self._micro) > 1
        if self._proof._of_library or (joint and not several):
            return
        uneven = len({real for report in reports for real in report.reals}) > 1
        if joint:
            fault = self._joint()
        elif rerun:
            fault = self._again(uneven)
        else:
            fault = self._parts(uneven)
        _raise(_everywhere(_Report(fault=fault)))

    def _parts(self, uneven: bool) -> str | None:
        """What is wrong with the loss of the parts of what this rank saw, if anything."""
        seen = [each for each in self._seen if each.real]
        whole = _joined([_rows(each.outputs, 0, each.real, each.held) for each in seen]) if seen else None
        targets = _joined([each.targets for each in seen]) if seen else None
        if whole is None or targets is None:  # the largest alone
            seen = sorted(seen, key=lambda each: each.real)[-1:]
            whole, targets = ((seen[0].outputs,), (seen[0].targets,)) if seen else (None, None)
        held = sum(each.real for each in seen)
        if whole is None or targets is None or held < 2:
            return None
        for cuts in _cuts(held):
            try:
                calls = _cut(whole[0], targets[0], held, cuts)
            except Exception:  # outputs of a kind that nothing can cut
                return None
            fault = self._compare(*calls, uneven=uneven)
            if fault:
                return fault
        return None

    def _again(self, uneven: bool) -> str | None:
        """Likewise, of a model that runs once more, on the first micro-batch and on parts of it. Every rank must call it."""
        inputs, targets, real = self._micro[0]
        if real == 1 and len(self._micro) > 1:
            joined = _joined([part[0] for part in self._micro[:2]]), _joined([part[1] for part in self._micro[:2]])
            if self._micro[1][2] and joined[0] is not None and joined[1] is not None:
                inputs, targets, real = joined[0][0], joined[1][0], 2
        held = max(real, 1)
        cuts = _cuts(held)[-1 if uneven else 0] if held > 1 else [(0, held)] * 3
        parts = [(_rows(inputs, start, stop, held), deal.Cut(start, stop, held)(targets)) for start, stop in cuts]
        with unchanged(*self._proof._kept):
            rng.seed_all(0)
            outputs = self._proof._run([part[0] for part in parts])
            rng.seed_all(1)
            again = self._proof._run([parts[0][0]])
        if not outputs or real < 2:
            return None
        tried = [(out, part[1], stop - start) for out, part, (start, stop) in zip(outputs, parts, cuts, strict=True)]
        first = self._proof.pairs(*tried[0])
        other = self._proof.pairs(again[0], *tried[0][1:])
        if first is None or other is None or not _same(first, [other], 1e-6):  # draws of its own, also in evaluation
            return None
        return self._compare(tried[0], tried[1:], _HUGGING_FACE if any(_own_loss(out) for out in outputs) else None, uneven=uneven)

    def _joint(self) -> str | None:
        """Of a loss with collectives, which every rank calls as often: of all micro-batches at once, and one by one."""
        whole, targets = _joined([_rows(e.outputs, 0, e.real, e.held) for e in self._seen]), _joined([_slice(e) for e in self._seen])
        if not all(_everywhere(whole is not None and targets is not None)):
            return None
        assert whole is not None
        assert targets is not None
        calls = [(whole[0], targets[0], sum(each.real for each in self._seen))]
        calls += [(_rows(each.outputs, 0, each.real, each.held), _slice(each), each.real) for each in self._seen]
        totals = []
        for call in calls:
            pairs = self._proof.pairs(*call, joint=True)
            totals.append([math.nan] if pairs is None else [number for pair in pairs for number in pair])
        gathered = _everywhere(totals)
        if any(math.isnan(number) for rank in gathered for numbers in rank for number in numbers):
            return None
        summed = [[sum(numbers) for numbers in zip(*(rank[call] for rank in gathered), strict=True)] for call in range(len(totals))]
        whole_pairs, *part_pairs = [list(zip(numbers[::2], numbers[1::2], strict=True)) for numbers in summed]
        if _same(whole_pairs, part_pairs, self._tolerance()):
            return None
        return (
            f"loss_fn communicates between ranks once a micro-batch, and its mean over {len(self._seen)} micro-batches at once is {_mean_of([whole_pairs]):.6g}, one by "
            f"one {_mean_of(part_pairs):.6g}: a loss that compares samples must see all of them at once; write data.micro_batch_size=null and a smaller "
            f"data.global_batch; {_ACCEPT}"
        )

    # ------------------------------------------------------------------ comparison

    def _compare(
        self, whole: tuple[Any, Any, int], parts: Sequence[tuple[Any, Any, int]], instead: str | None = None, *, uneven: bool
    ) -> str | None:
        """What is wrong if the loss of `whole` is not the weighted mean of those of its `parts`.

        A loss that counts every part as one is right as long as the parts that this layout makes are of one size.
        """
        pairs = self._all_pairs(whole, parts)
        if pairs is None or _same(pairs[0], pairs[1:], self._tolerance()):
            return None
        sizes, counts = {part[2] for part in parts}, {tuple(count for _, count in each) for each in pairs}
        if len(sizes) > 1 and not uneven and len(counts) == 1:
            return None
        if (again := self._proof.pairs(*whole, seed=1)) is None or not _same(pairs[0], [again], self._tolerance()):
            return None  # it draws numbers, or goes on from call to call: nothing to compare
        if (wide := self._all_pairs(_double(whole), [_double(part) for part in parts])) is None:
            if _same(pairs[0], pairs[1:], 0.05):  # rounding may explain it
                return None
        elif _same(wide[0], wide[1:], 1e-6):
            return None
        else:
            pairs = wide
        expected, *found = pairs
        told = " + ".join(f"{part[0][1]:.6g}" for part in found)
        return (
            f"loss_fn is no sum over what it counts, so training would depend on the layout: the loss of {whole[2]} samples is {_mean_of([expected]):.6g}, and that of its "
            f"parts of {' and '.join(str(part[2]) for part in parts)} samples, by their counts ({told}), {_mean_of(found):.6g}; {instead or _WRITE}; {_ACCEPT}"
        )

    def _all_pairs(self, whole: tuple[Any, Any, int], parts: Sequence[tuple[Any, Any, int]]) -> list[Pairs] | None:
        found = []
        for call in (whole, *parts):
            if (pairs := self._proof.pairs(*call)) is None:
                return None
            found.append(pairs)
        return found

    def _tolerance(self) -> float:
        eps = max((torch.finfo(t.dtype).eps for each in self._seen for t in tensors(each.outputs) if t.is_floating_point()), default=1e-7)
        return 1e-8 if eps < 1e-12 else 1e-4 if eps < 1e-5 else 1e-2


def _kept(leaf: torch.Tensor) -> torch.Tensor:
    """An output as it is now: a weight among the outputs may be freed, or updated, before it is looked at."""
    return plain(leaf).detach().clone() if leaf.is_leaf else plain(leaf).detach()


def _everywhere(value: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _raise(reports: Sequence[_Report]) -> None:
    for report in reports:
        if report.fault:
            raise UserError(report.fault)


class _Rows(deal.Cut):
    """Cuts what a model returned: leaves whole what does not count samples."""

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return super()._tensor(tensor) if tensor.dim() and tensor.size(0) == self._size else tensor

    def _guess(self, node: Any) -> bool:
        return len(node) == self._size and super()._guess(node)

    def _object(self, node: Any) -> Any:
        """An object that keeps tensors in attributes is copied, and its attributes are cut."""
        if not any(True for _ in tensors(node)):
            return node
        other = copy.copy(node)
        for name, value in vars(node).items():
            object.__setattr__(other, name, self(value))
        return other


def _rows(outputs: Any, start: int, stop: int, held: int) -> Any:
    return outputs if (start, stop) == (0, held) else _Rows(start, stop, held).arguments(outputs)


def _slice(each: _Seen) -> Any:
    """The targets of what is real."""
    return each.targets if each.real == each.held else deal.Cut(0, each.real, each.held)(each.targets)


def _cuts(real: int) -> list[list[tuple[int, int]]]:
    """Spans of a whole and of its parts: two of one size, and two that differ."""
    half, third = real // 2, max(real // 3, 1)
    return [
        [(0, 2 * half), (0, half), (half, 2 * half)],
        [(0, real), (0, real - third), (real - third, real)],
        [(0, real), (0, third), (third, real)],
    ]


def _cut(outputs: Any, targets: Any, held: int, cuts: Sequence[tuple[int, int]]) -> tuple[tuple[Any, Any, int], list[tuple[Any, Any, int]]]:
    whole, *parts = [(_rows(outputs, start, stop, held), deal.Cut(start, stop, held)(targets), stop - start) for start, stop in cuts]
    return whole, parts


def _joined(parts: Sequence[Any]) -> tuple[Any] | None:
    """The parts of a whole together, in a tuple; None where they do not go together."""
    first = parts[0]
    if all(isinstance(part, torch.Tensor) for part in parts):
        if any(
            part.dim() == 0 or part.is_nested or part.layout is not torch.strided or part.shape[1:] != first.shape[1:] for part in parts
        ):
            return None
        return (torch.cat(list(parts)),)
    found = [deal.children(part) for part in parts]
    if any(each is None for each in found):
        return (first,) if all(part is first or (isinstance(part, str | int | float) and part == first) for part in parts) else None
    if len({len(each[0]) for each in found}) > 1 or any(type(part) is not type(first) for part in parts):  # type: ignore[index]
        return None
    joined = [_joined(column) for column in zip(*(each[0] for each in found), strict=True)]  # type: ignore[index]
    return None if any(each is None for each in joined) else (found[0][1]([each[0] for each in joined]),)  # type: ignore[index]


def _double(call: tuple[Any, Any, int]) -> tuple[Any, Any, int]:
    def wide(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.double() if leaf.is_floating_point() else leaf

    return map_tensors(wide, call[0]), map_tensors(wide, call[1]), call[2]


def _own_loss(outputs: Any) -> bool:
    return isinstance(outputs, Mapping) and "loss" in outputs and "logits" in outputs


def _means(pairs: Pairs, parts: Sequence[Pairs]) -> Iterator[tuple[float, float, float]]:
    """For each loss: its mean, that of its parts, and how large a number the comparison is of."""
    for number, (total, count) in enumerate(pairs):
        totals, counts = [part[number][0] for part in parts], [part[number][1] for part in parts]
        if count and sum(counts):
            yield total / count, sum(totals) / sum(counts), max(abs(total / count), sum(map(abs, totals)) / abs(sum(counts)))


def _same(pairs: Pairs, parts: Sequence[Pairs], tolerance: float) -> bool:
    return all(abs(whole - mean) <= tolerance * max(size, 1e-12) for whole, mean, size in _means(pairs, parts))


def _mean_of(parts: Sequence[Pairs]) -> float:
    counts = sum(part[0][1] for part in parts)
    return sum(part[0][0] for part in parts) / (counts or 1)

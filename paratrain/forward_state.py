"""State that forward moves: counters, moving averages, queues, hidden states carried from batch to batch.

One process moves it once a step, by the whole batch. Over micro-batches, ranks, stages and recomputation it would move more often, or by other
samples. So the first steps (and steps 4, 8, 16, ...) look at everything that model and loss keep, wherever they keep it, before and after each
micro-batch, each of which starts from what was there before the step. What changed is one of

    step    every micro-batch and rank made the same of it: it does not hang on the samples, and is moved once a step
    rows    it holds something for each sample of the micro-batch, and forward reads it: each micro-batch gets its own back
    local   forward writes and never reads it (features kept for the loss, caches): nothing to do
    other   it hangs on the samples: refused, unless `trainer.forward_state` says what is to become of it

What reads it is found by running a micro-batch once more, from the state after it. BatchNorm's statistics are not looked at: see `batch_norm.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from paratrain import reach
from paratrain.config import DDP, Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel import written_weights
from paratrain.parallel.written_weights import WrittenWeights
from paratrain.reach import ABSENT, Frozen, Slot

log = logging.getLogger(__name__)
_FIRST = 3  # steps that are looked at, beside those that are powers of two
_COPIED = 256 << 20  # bytes of tensors that are copied to be put back; larger ones only where the configuration names them
_TRIED = 16  # states that are tried one by one
_WEIGHTS = 64 << 20
Unit = Hashable  # the number of a micro-batch, or (stage, number)


@dataclass
class _Step:
    """What is known of the step that runs."""

    probing: bool
    units: int
    before: dict[str, tuple[Slot, Frozen]]
    after: dict[Unit, dict[str, tuple[Slot, Frozen]]] = field(default_factory=dict)
    weights: dict[Unit, int] = field(default_factory=dict)  # real samples
    generators: dict[str, tuple[Slot, Frozen]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fact:
    """What the micro-batches of one rank made of a state."""

    digests: tuple[str, ...]
    rows: bool
    kind: str
    lasting: bool
    complete: bool
    present: bool


class ForwardState:
    """Follows what forward moves. Its methods return at once where nothing moves, or where the layout is one process with one micro-batch."""

    def __init__(self, model: nn.Module, loss_fn: Any, cfg: Config, mesh: Mesh, device: torch.device):
        self._model, self._cfg, self._mesh, self._device = model, cfg, mesh, device
        self._rules = cfg.trainer.forward_state
        self._loss = reach.roots_of(loss_fn, "loss")
        self._ranks, self._pp = mesh.weights.size(), mesh.root["pp"].size()
        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        self._gathered_weights = {id(module._parameters) for module in model.modules()} if sharded else set()
        self._fresh = self._pp > 1  # backwards are still to come when the next micro-batch begins
        self._written = WrittenWeights(model)
        self._kinds: dict[str, str] = {}
        self._followed: list[Slot] = []
        self._partial: dict[str, int] = {}  # states that some stages move and others do not -> a stage that does
        self._rows: dict[str, tuple[Any, dict[Unit, Frozen]]] = {}
        self._given: set[str] = set()  # states that had their form before the first forward, which no number of samples gave them
        self._draws: dict[str, tuple[Slot, Frozen]] = {}  # generators that draw once a step
        self._steps = 0
        self._size: int | None = None
        self._odd: set[bool] = set()  # kinds of batches seen that not every rank has as many samples of: some have none, or all have some
        self._step: _Step | None = None

    # ------------------------------------------------------------------ a step

    def begin(self, units: int, size: int | None = None, dealt: bool = False) -> None:
        """Before the forwards of a step of so many micro-batches of a global batch of `size` samples, which were dealt to ranks or are its own."""
        self._step = None
        before, self._size = self._size, size
        if self._ranks == 1 and units == 1 and self._pp == 1:
            return
        probing = self._steps < _FIRST or not self._steps & (self._steps - 1)
        if dealt and size is not None and size % self._mesh.data.size() and (few := size < self._mesh.data.size()) not in self._odd:
            self._odd.add(few)
            probing = True
        self._steps += 1
        self._draws = {path: (slot, Frozen(slot.get())) for path, (slot, _) in self._draws.items()}
        if not probing and not self._followed and not self._draws:
            return
        if before not in (None, size) and (rows := [path for path, kind in self._kinds.items() if kind == "rows"]):
            raise UserError(
                f"model: {rows[0]} holds something for each sample of the batch before, which had {before} samples, and this one has {size}; which of "
                "them belong together depends on the layout; give every batch as many samples, and reset it between batches that do not follow "
                f"each other, or write trainer.forward_state={{{rows[0]}: local}}"
            )
        if probing:
            self._written.begin()
        found = self._slots() if probing else self._followed
        self._step = _Step(probing, units, reach.frozen(found, self._copies(found)))
        if probing and (units > 1 or self._pp > 1):
            self._step.generators = {slot.path: (slot, Frozen(slot.get())) for slot in found if isinstance(slot.get(), reach.GENERATORS)}
            self._draws |= {path: pair for path, pair in self._step.generators.items() if self._asked(path) == "step"}
        for path, (left, _) in list(self._rows.items()):
            if path in self._step.before and self._step.before[path][0].get() is not left:  # reset by the user
                del self._rows[path]

    def before(self, unit: Unit, loss: bool | None = None) -> None:
        """Before the forward of a micro-batch: everything as it was before the step.

        Args:
            loss: whether this is the loss (True) or the model alone (False); None: both.
        """
        step = self._step
        if step is None:
            return
        if step.after or self._fresh:
            self._restore(step, loss)
            for _, frozen in self._draws.values():
                frozen.thaw(generators=True)
        for path, (_, rows) in self._rows.items():
            if unit in rows and path in step.before:
                step.before[path][0].put(rows[unit].thaw(fresh=self._fresh))

    def after(self, unit: Unit, real: int, loss: bool | None = None) -> None:
        """After its forward (and backward, where one follows the other): what it moved.

        Args:
            real: samples that belong to the batch.
        """
        step = self._step
        if step is None:
            return
        if step.probing and not loss:
            self._written.after()
        moved = step.after.setdefault(unit, {})
        step.weights[unit] = real
        for slot in self._slots(loss) if step.probing else self._followed:
            if not _of(slot.path, loss):
                continue
            had = step.before.get(slot.path)
            if had is None or not had[1].same(slot.get()):
                moved[slot.path] = slot, Frozen(slot.get())
        for path in step.before.keys() - moved.keys() if step.probing else ():  # attributes that forward deleted
            slot, had_ = step.before[path]
            if _of(path, loss) and slot.get() is ABSENT and had_.object is not ABSENT:
                moved[path] = slot, Frozen(ABSENT)

    def end(self, again: Callable[[], float] | None) -> None:
        """After the last micro-batch, before the weights are updated: every state gets what it ends this step with. Every rank must call it.

        Args:
            again: runs the first micro-batch once more, forward and loss alone, on every rank together; returns the loss. None where
                that is not possible.

        Raises:
            UserError: on every rank: a state would depend on the layout; names it, and what to write.
        """
        step, self._step = self._step, None
        if step is None:
            return
        self._judge_generators(step)
        paths = {path for moved in step.after.values() for path in moved}
        tried = False
        if step.probing:
            facts = self._gathered(step, paths)
            if not facts:
                return
            unresolved = self._decide(facts)
            if unresolved and again is not None:
                tried = True
                self._try(step, unresolved, facts, again)
            elif unresolved:
                self._without_trying(unresolved, facts)
        self._finish(step, paths, restored=tried or self._fresh)
        if step.probing:
            self._follow(step)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Give everything that model and loss keep back as it was, whatever forward does inside."""
        found = self._slots()
        kept = reach.frozen(found, self._copies(found))
        statistics = [(buffer, buffer.clone()) for buffer in self._statistics()]
        try:
            yield
        finally:
            reach.put_back(kept, self._slots(), generators=True)
            for buffer, value in statistics:
                buffer.copy_(value)

    def left(self) -> list[str]:
        """What forward writes and never reads, as far as steps were looked at, and what the configuration leaves to each rank."""
        return sorted(path for path, kind in self._kinds.items() if kind == "local")

    def digests(self) -> dict[str, str]:
        """What can be compared of all that forward may move, but for weights and what is large."""
        found = [slot for slot in self._slots() if slot.kind != "parameter"]
        return {slot.path: reach.digest(slot.get()) for slot in found if sum(map(_bytes, reach.tensors(slot.get()))) <= _COPIED}

    def _statistics(self) -> list[torch.Tensor]:
        """Those of BatchNorm, which are no slots."""
        return [
            buffer for module in self._model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) for buffer in module.buffers()
        ]

    # ------------------------------------------------------------------ what there is

    def _slots(self, loss: bool | None = None) -> list[Slot]:
        found = [] if loss else reach.slots([("", self._model)])
        if self._gathered_weights:  # now whole, now parts, whoever moves them: see `parallel/shard_uses.py`
            found = [slot for slot in found if slot.kind != "parameter" or id(slot.store) not in self._gathered_weights]
        if loss is not False:
            found += reach.slots(self._loss, known=list(self._model.modules()))
        return found

    def _copies(self, found: Sequence[Slot]) -> Callable[[Slot], bool]:
        """Of which slots tensors are copied, so that they can be put back: all but large ones that nobody named."""
        weights = sum(_bytes(tensor) for slot in found if slot.kind == "parameter" for tensor in reach.tensors(slot.get()))
        rest = sum(_bytes(tensor) for slot in found if slot.kind != "parameter" for tensor in reach.tensors(slot.get()))
        over = {"parameter": weights > _WEIGHTS, "other": rest > _COPIED}
        return lambda slot: not over["parameter" if slot.kind == "parameter" else "other"] or bool(reach.matches(slot.path, self._rules))

    def _restore(self, step: _Step, loss: bool | None) -> None:
        kept = {path: pair for path, pair in step.before.items() if _of(path, loss)}
        reach.put_back(kept, self._slots(loss) if step.probing else (), fresh=self._fresh)

    # ------------------------------------------------------------------ what it is

    def _gathered(self, step: _Step, paths: set[str]) -> list[tuple[int, dict[str, _Fact]]]:
        """(stage, what moved) of every rank; nothing where nothing moved anywhere."""
        written = self._written.end()
        flag = torch.tensor([float(bool(paths or written))], device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(flag)
        if not float(flag):
            return []
        here = self._mesh.root["pp"].get_local_rank(), {path: self._fact(step, path) for path in sorted(paths)}, written
        told: list[Any] = [here] * dist.get_world_size()
        if len(told) > 1:
            dist.all_gather_object(told, here)
        written_weights.refuse([each for _, _, each in told])
        return [(stage, facts) for stage, facts, _ in told] if any(facts for _, facts, _ in told) else []

    def _judge_generators(self, step: _Step) -> None:
        """Refuse generators of the model's own, of which every micro-batch draws on, unless the configuration says what they do."""
        for path, (_, was) in step.generators.items():
            if self._asked(path) is None and was.drawn():
                raise UserError(
                    f"model: forward draws from a generator of its own, {path}, once a micro-batch, so that under {self._layout()} each draws other numbers than one "
                    f"process does; draw without generator=..., from torch's, which the engine seeds for each step, or write trainer.forward_state={{{path}: step}} where "
                    f"it is drawn from once a batch (every micro-batch draws the same), or {{{path}: local}} where it is once a sample, and differs as dropout does"
                )

    def _asked(self, path: str) -> str | None:
        """What the configuration says about a state."""
        pattern = reach.matches(path, self._rules)
        return self._rules[pattern] if pattern is not None else None

    def _fact(self, step: _Step, path: str) -> _Fact:
        slot, had = step.before.get(path, (None, Frozen(ABSENT)))
        digests, rows = [], True
        for unit, moved in step.after.items():
            if path in moved:
                slot, now = moved[path]
                value = now.value()
                if self._steps == 1 and _has_form(slot, had.value(), value):
                    self._given.add(path)
                digests.append(reach.digest(value))
                rows = rows and _is_rows(value, had.value(), {step.weights[unit] or 1, step.weights[unit]})
            elif self._pp == 1 or path in self._kinds:
                digests.append(reach.digest(had.value()) if self._pp == 1 else "")
        assert slot is not None
        return _Fact(
            tuple(digest for digest in digests if digest),
            rows and path not in self._given,
            slot.kind,
            slot.lasting,
            had.complete,
            path in step.before,
        )

    def _decide(self, facts: list[tuple[int, dict[str, _Fact]]]) -> list[str]:
        """Settle the kinds of what moved; returns what needs to be tried."""
        unresolved = []
        for path in sorted({path for _, here in facts for path in here}):
            held = [here[path] for _, here in facts if path in here]
            asked = reach.matches(path, self._rules)
            stages = {stage for stage, here in facts if path in here}
            everywhere = all(path in here for stage, here in facts if stage in stages)
            equal = everywhere and len({digest for fact in held for digest in fact.digests}) == 1
            if asked is not None:
                self._kinds[path] = self._rules[asked]
                if self._rules[asked] in ("mean", "sum") and not all(fact.present for fact in held):
                    raise UserError(
                        f"trainer.forward_state={{{asked}: {self._rules[asked]}}}: {path} is not there before the first forward; give it its first "
                        "value in the constructor"
                    )
                if self._rules[asked] == "step" and not equal:
                    raise UserError(
                        f"trainer.forward_state={{{asked}: step}}: {path} does not end a step with the same value on every rank and micro-batch: it "
                        f"hangs on the samples; write {_CHOICES}"
                    )
            elif equal:
                if not all(fact.complete for fact in held):
                    raise UserError(
                        f"model: forward moves {path}, which is too large to be copied unasked, so each micro-batch would move it again; write "
                        f"trainer.forward_state={{{path}: step}}, or move it once a step, after engine.train_step"
                    )
                self._kinds.setdefault(path, "step")
            elif self._kinds.get(path) not in ("local", "rows"):
                unresolved.append(path)
            # what belongs to a block is read by the stage that holds it alone
            if self._kinds.get(path, "local") not in ("local", "rows") and len(stages) < self._pp and not _of_a_block(path):
                self._partial[path] = min(stages)
        return unresolved

    def _try(self, step: _Step, unresolved: list[str], facts: list[tuple[int, dict[str, _Fact]]], again: Callable[[], float]) -> None:
        """Run the first micro-batch from what it was given and from what it left, and see what comes out."""
        first = next(iter(step.after.values()), {})

        def run(moved: Sequence[str]) -> tuple[float, dict[str, str]]:
            reach.put_back(step.before, self._slots(), generators=True)
            for path in moved:
                if path in first:
                    slot, value = first[path]
                    slot.put(value.thaw())
            total = again()
            left = {slot.path: slot for slot in self._slots()}
            return total, {path: reach.digest(left[path].get()) if path in left else "" for path in unresolved}

        total, left = run(())
        joint, joint_left = run(unresolved)
        other, moves = self._agreed([self._differ(total, joint), *(left[path] != joint_left[path] for path in unresolved)])
        read = [other] * len(unresolved)
        if other and 1 < len(unresolved) <= _TRIED:
            _, read = self._agreed([False, *(self._differ(total, run([path])[0]) for path in unresolved)])
            if not any(read):  # together only
                read = moves
        reach.put_back(step.before, self._slots(), generators=True)
        self._judge(dict(zip(unresolved, zip(read, moves, strict=True), strict=True)), facts)

    def _differ(self, a: float, b: float) -> bool:
        """Whether two losses of the same samples differ by more than a device does from one run to the next."""
        slack = 0.0 if self._device.type == "cpu" else 1e-6
        return a != b and not (math.isnan(a) and math.isnan(b)) and not abs(a - b) <= slack * abs(a)

    def _agreed(self, flags: list[bool]) -> tuple[bool, list[bool]]:
        """The first flag and the others, each true where it is true on any rank."""
        box = torch.tensor([float(flag) for flag in flags], device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        values = [bool(value) for value in box.tolist()]
        return values[0], values[1:]

    def _without_trying(self, unresolved: list[str], facts: list[tuple[int, dict[str, _Fact]]]) -> None:
        """In a loop of the user's own: buffers that are saved are state, of what else is kept nobody knows."""
        held = {path: fact for _, here in facts for path, fact in here.items()}
        self._judge({path: (held[path].kind == "buffer" and held[path].lasting, True) for path in unresolved}, facts)

    def _judge(self, verdicts: Mapping[str, tuple[bool, bool]], facts: list[tuple[int, dict[str, _Fact]]]) -> None:
        """Settle what hangs on the samples.

        Args:
            verdicts: path -> (whether the loss hangs on it, whether it moves on).
        """
        refused = []
        for path, (read, moves) in verdicts.items():
            held = [here[path] for _, here in facts if path in here]
            rows = all(fact.rows for fact in held) and self._mesh.weights.size() == self._mesh.data.size()
            kept = held[0].kind in ("buffer", "parameter") and held[0].lasting and not path.startswith("loss")
            broadcast = held[0].kind == "buffer" and isinstance(self._cfg.strategy, DDP) and self._cfg.strategy.broadcast_buffers
            if rows and read and not (broadcast and self._ranks > 1):
                self._kinds[path] = "rows"
            elif read or kept:
                refused.append(path)
            else:
                self._kinds[path] = "local"
                if moves:
                    log.warning(
                        "model: forward adds up %s over what this rank sees; the loss does not hang on it, so it is left to each rank "
                        "(trainer.forward_state={%s: sum} adds it up over all)",
                        path,
                        path,
                    )
        if refused:
            raise UserError(
                f"{'loss' if refused[0].startswith('loss.') else 'model'}: forward moves {', '.join(refused[:5])} by the samples that it sees, and under "
                f"{self._layout()} these are not those of the whole batch, so the loss would depend on the layout; write "
                f"trainer.forward_state={{{refused[0]}: mean}}, or one of {_CHOICES}. What forward reads after it moved it is exact with one "
                "process alone: read first, then move"
            )

    def _layout(self) -> str:
        parts = [f"{self._ranks} data ranks"] if self._ranks > 1 else []
        parts += [f"parallel.pp={self._pp}"] if self._pp > 1 else []
        size = self._cfg.data.micro_batch_size
        parts += [f"data.micro_batch_size={size}"] if size is not None else []
        return " and ".join(parts) or "several micro-batches"

    # ------------------------------------------------------------------ what becomes of it

    def _finish(self, step: _Step, paths: set[str], restored: bool) -> None:
        everyone = sorted(paths | {path for path, kind in self._kinds.items() if kind in ("mean", "sum", "rank0")} | set(self._partial))
        if restored:
            reach.put_back(step.before, self._slots() if step.probing else ())
        for path in everyone:
            kind = self._kinds.get(path, "local")
            moved = {unit: pairs[path] for unit, pairs in step.after.items() if path in pairs}
            pair = step.before.get(path) or next(iter(moved.values()), None)
            if pair is None:
                continue
            slot, had = pair[0], step.before[path][1] if path in step.before else Frozen(ABSENT)
            last = next(reversed(moved.values()), (slot, had))[1]
            if kind in ("mean", "sum"):
                value = self._combined(step, path, kind, had, moved)
            elif kind == "rank0":
                value = self._from(0, self._mesh.weights.get_group(), next(iter(moved.values()), (slot, had))[1].value())
            else:
                added = kind == "local" and len(moved) > 1
                if not (restored or added or path in self._partial):
                    if kind == "rows" and step.units > 1:
                        self._rows[path] = slot.get(), {unit: frozen for unit, (_, frozen) in moved.items()}
                    continue  # it is what the last left
                value = last.thaw()
                if added:
                    value = _added(had.value(), [frozen.value() for _, frozen in moved.values()], value)
            if path in self._partial:
                value = self._from(self._partial[path], self._mesh.root["pp"].get_group(), value)
            _settle(slot, had, value)
            if kind == "rows" and step.units > 1:
                self._rows[path] = slot.get(), {unit: frozen for unit, (_, frozen) in moved.items()}

    def _from(self, rank: int, group: dist.ProcessGroup, value: Any) -> Any:
        if group.size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=group, group_src=rank)
        return box[0]

    def _combined(self, step: _Step, path: str, kind: str, had: Frozen, moved: dict[Unit, tuple[Slot, Frozen]]) -> Any:
        """The mean over samples, or what was there and the sum of all changes but those by filler samples."""
        start = had.value()
        leaves, spec = tree_flatten(start)
        stage = min((unit[0] for unit in moved if isinstance(unit, tuple)), default=None)  # another of this rank's would count it again
        units = [unit for unit in step.weights if stage is None or (isinstance(unit, tuple) and unit[0] == stage)]
        units = [unit for unit in units if step.weights[unit]]  # what a filler sample made of it may be no number
        parts = [(step.weights[unit], tree_flatten(moved[unit][1].value())[0] if unit in moved else leaves) for unit in units]
        weight = self._summed(float(sum(real for real, _ in parts)))
        results = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, int | float | torch.Tensor) or any(_shape(part[index]) != _shape(leaf) for _, part in parts):
                raise UserError(
                    f"trainer.forward_state={{{path}: {kind}}}: {path} is no number or tensor of one shape; write rank0 or local"
                )
            wide = _tensor(leaf, self._device).to(torch.float64)
            if kind == "sum":
                change = sum((_wide(part[index], wide) - wide for _, part in parts), torch.zeros_like(wide))
                result = wide + self._summed(change)
            else:
                total = self._summed(sum((_wide(part[index], wide) * real for real, part in parts), torch.zeros_like(wide)))
                result = total / weight if weight else wide
            results.append(result.to(leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)(result.item()))
        return tree_unflatten(results, spec)

    def _summed(self, value: Any) -> Any:
        if self._ranks == 1:
            return value
        box = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(box, group=self._mesh.weights.get_group())
        return box if isinstance(value, torch.Tensor) else float(box)

    def _follow(self, step: _Step) -> None:
        """From now on only what needs something done in each step."""
        slots = {path: slot for path, (slot, _) in step.before.items()}
        slots |= {path: slot for moved in step.after.values() for path, (slot, _) in moved.items()}
        self._followed = [slots[path] for path, kind in self._kinds.items() if kind != "local" and path in slots]


_CHOICES = (
    "mean (over the samples of all), sum (of the changes of all), rank0 (as rank 0's first micro-batch leaves it), local (each rank's own, moved "
    "by each micro-batch)"
)


def _of_a_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _of(path: str, loss: bool | None) -> bool:
    return loss is None or path.startswith("loss.") is loss


def _settle(slot: Slot, had: Frozen, value: Any) -> None:
    """`value` in a slot: of a buffer or weight in the tensor that was there, which others may refer to."""
    old = had.object
    if (
        slot.kind in ("buffer", "parameter")
        and isinstance(value, torch.Tensor)
        and isinstance(old, torch.Tensor)
        and old.shape == value.shape
        and old.dtype == value.dtype
    ):
        if old is not value:
            with torch.no_grad():
                old.copy_(value)
        value = old
    slot.put(value)


def _added(start: Any, ends: Sequence[Any], last: Any) -> Any:
    """What micro-batches that each began from `start` would have made of a number or list one after another; else what the last made."""
    if isinstance(start, int | float) and all(isinstance(end, int | float) for end in ends) and not isinstance(start, bool):
        return start + sum(end - start for end in ends)
    if isinstance(last, list) and isinstance(start, list) and all(isinstance(end, list) and len(end) >= len(start) for end in ends):
        last[:] = [*start, *(item for end in ends for item in end[len(start) :])]
    return last


def _is_rows(value: Any, had: Any, samples: set[int]) -> bool:
    """Whether a state that forward made holds something for each sample: it has their number among its sizes, and did not before."""
    found, before = list(reach.tensors(value)), list(reach.tensors(had))
    if not found or len(list(reach.leaves("", value))) != len(found):
        return False
    sized = not any(samples.isdisjoint(tensor.shape) for tensor in found)
    return sized and (len(before) != len(found) or not any(samples.isdisjoint(tensor.shape) for tensor in before))


def _has_form(slot: Slot, had: Any, value: Any) -> bool:
    """Whether a state had the shapes that forward left it with before any forward, and is no memory that was emptied."""
    before, now = list(reach.tensors(had)), list(reach.tensors(value))
    if not before or [tensor.shape for tensor in before] != [tensor.shape for tensor in now]:
        return False
    return slot.kind in ("buffer", "parameter") or any(bool(tensor.any()) for tensor in before)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shape(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, torch.Tensor) else ()


def _wide(leaf: Any, like: torch.Tensor) -> torch.Tensor:
    return _tensor(leaf, like.device).to(like)


def _tensor(leaf: Any, device: torch.device) -> torch.Tensor:
    """A number as it is: Python's are float64."""
    return leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=torch.float64, device=device)

"""Pipeline parallelism: the blocks of a model dealt to ranks in runs (stages), micro-batches passed from one to the next.

`cut` decides which stage runs and holds what and drops the rest; `Pipeline` runs steps over the stages. A weight that several stages
use, such as an embedding tied to the output layer, is held by each of them and gets the sum of their gradients.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from paratrain import agreement, distributed, gradients
from paratrain.compat import finish_backward
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel import blocks, pipeline_schedule, pipeline_uses
from paratrain.parallel import pipeline_places as places
from paratrain.parallel.pipeline_deferred import defer
from paratrain.parallel.pipeline_run import Pass, Wire, as_bytes, kind_of
from paratrain.parallel.pipeline_split import Stages, drop, split
from paratrain.parallel.pipeline_trace import Route

log = logging.getLogger(__name__)
Calls = Sequence[tuple[Any, Callable]]  # for each micro-batch its inputs, and what calls a module with (module, inputs)
Around = Callable[[int, int], AbstractContextManager]  # (stage, micro-batch) -> context of its forward


@dataclass(frozen=True)
class Cut:
    """Who holds what.

    Attributes:
        split: the model, able to run one stage at a time.
        planned: where stages are, and the schedule.
        holders: name of a parameter, by every name it has, -> pipeline ranks that hold it.
        state: name -> shape of every entry of the whole model's state_dict, in its order.
        units: the blocks that this rank holds.
    """

    split: Stages
    planned: pipeline_schedule.Plan
    holders: dict[str, tuple[int, ...]]
    state: dict[str, torch.Size]
    units: list[tuple[str, nn.Module]]


def cut(model: nn.Module, units: Sequence[tuple[str, nn.Module]], mesh: Mesh, cfg: Config, device: torch.device) -> Cut:
    """Cut `model` into stages, and put ghosts in the places of the weights that are not this rank's.

    Args:
        units: the blocks, in the order in which forward calls them.

    Raises:
        UserError: too few blocks, or `pipeline.cuts` or `pipeline.place` that name nothing.
    """
    planned, units, positions, firsts = _planned(model, units, cfg)
    state = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    ready = split(model, [name for name, _ in units], firsts, device)
    holders = _holders(model, ready, units, positions, cfg.pipeline.place, planned)
    ready.holds = lambda name, stage: planned.rank_of[stage] in holders[name]
    mine = mesh.root["pp"].get_local_rank()
    if distributed.rank() == 0:
        log.info("%s", _text(planned, units, firsts, cfg))
    ready.swap(name for name, param in model.named_parameters(remove_duplicate=False) if _is_stray(name, units, ready, holders, planned))
    drop(ready, {name for name, ranks in holders.items() if mine not in ranks}, device)
    held = [unit for index, unit in enumerate(units) if planned.rank_of[ready.stage(index)] == mine]
    return Cut(ready, planned, holders, state, held)


def _is_stray(
    name: str, units: Sequence[tuple[str, nn.Module]], ready: Stages, holders: dict[str, tuple[int, ...]], planned: pipeline_schedule.Plan
) -> bool:
    """Whether a weight of a block is held by ranks that do not run the block."""
    index = next((index for index, (unit, _) in enumerate(units) if name.startswith(f"{unit}.")), None)
    return index is not None and holders[name] != (planned.rank_of[ready.stage(index)],)


def describe(model: nn.Module, cfg: Config) -> str:
    """The stages of a model under a configuration."""
    planned, units, _, firsts = _planned(model, blocks.find(model, cfg.memory.blocks), cfg)
    return _text(planned, units, firsts, cfg)


def _text(planned: pipeline_schedule.Plan, units: Sequence[tuple[str, nn.Module]], firsts: list[int], cfg: Config) -> str:
    lines = [f"pipeline stages ({cfg.pipeline.schedule}):"]
    for stage, (first, end) in enumerate(itertools.pairwise([*firsts, len(units)])):
        names = [name for name, _ in units[first:end]]
        weights = sum(param.numel() for _, block in units[first:end] for param in block.parameters())
        shown = " ... ".join(dict.fromkeys((names[0], names[-1])))
        lines.append(f"{stage} on rank {planned.rank_of[stage]} of pp: {shown}, {weights:,} parameters in blocks")
    return "\n  ".join(lines)


def _planned(
    model: nn.Module, units: Sequence[tuple[str, nn.Module]], cfg: Config
) -> tuple[pipeline_schedule.Plan, list[tuple[str, nn.Module]], dict[str, list[int]], list[int]]:
    """Where stages are, the blocks that nothing but stages divides, the positions of weights outside them, and each stage's first."""
    options = cfg.pipeline
    planned = pipeline_schedule.plan(options.schedule, cfg.parallel.pp, options.stages_per_rank)
    stages = len(planned.rank_of)
    units = [(name, block) for name, block in units if not any(name.startswith(f"{other}.") for other, _ in units)]
    if len(units) < stages:
        found = f"{len(units)} blocks ({', '.join(name for name, _ in units[:4])})" if units else "no blocks"
        raise UserError(
            f"parallel.pp={cfg.parallel.pp}: schedule {options.schedule} needs {stages} stages of at least one block each, but the model has {found}; "
            "write memory.blocks=[...] with modules that forward calls one after another, or fewer stages"
        )
    positions = _positions(model, units)
    costs = [float(sum(param.numel() for param in block.parameters())) for _, block in units]
    inside = {param for _, block in units for param in block.parameters()}
    for name, param in model.named_parameters():
        if name in positions and param not in inside:
            costs[min(positions[name][0], len(units) - 1)] += param.numel()
    return planned, units, positions, _firsts([name for name, _ in units], costs, stages, options.cuts)


def _positions(model: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> dict[str, list[int]]:
    """Name of each parameter outside the blocks, and of those in blocks that are used outside of these, -> how many blocks are done there.

    Found by running forward once; where nothing shows what inputs it takes, how many blocks are defined before the parameter.
    """
    cuttable = {block for _, block in units}
    inside = {module for block in cuttable for module in block.modules()}
    defined, seen = {}, 0
    for path, module in model.named_modules(remove_duplicate=False):
        seen += module in cuttable
        if module not in inside:
            for key, param in module._parameters.items():
                if param is not None:
                    defined[f"{path}.{key}" if path else key] = seen
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    used = pipeline_uses.find(model, [name for name, _ in units], every)
    return {name: used.get(name) or [defined[name]] for name in every if name in defined or name in used}


def _firsts(names: list[str], costs: list[float], stages: int, cuts: Sequence[str] | None) -> list[int]:
    """The first block of each stage."""
    if cuts is None:
        return _balanced(costs, stages)
    unknown = [name for name in cuts if name not in names]
    if unknown or len(cuts) != stages - 1 or sorted(cuts, key=names.index) != list(cuts) or names[0] in cuts:
        reason = f"{unknown[0]!r} is none of them" if unknown else f"expected {stages - 1} different ones, in order, without the first"
        raise UserError(
            f"pipeline.cuts={list(cuts)}: names the blocks at which the {stages - 1} stages after the first begin; {reason} "
            f"(the blocks are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        )
    return [0, *map(names.index, cuts)]


def _balanced(costs: list[float], stages: int) -> list[int]:
    """Runs of blocks whose dearest is as cheap as possible."""
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[stop] = (dearest run, firsts) of blocks before `stop` in as many stages as rounds have passed
    best: dict[int, tuple[float, list[int]]] = {stop: (sums[stop], [0]) for stop in range(1, count + 1)}
    for done in range(1, stages):
        best = {
            stop: min((max(best[start][0], sums[stop] - sums[start]), [*best[start][1], start]) for start in range(done, stop))
            for stop in range(done + 1, count + 1)
        }
    return best[count][1]


def _holders(
    model: nn.Module,
    ready: Stages,
    units: Sequence[tuple[str, nn.Module]],
    positions: dict[str, list[int]],
    place: dict[str, Any],
    planned: pipeline_schedule.Plan,
) -> dict[str, tuple[int, ...]]:
    stages_of: dict[int, set[int]] = {}
    names = list(model.named_parameters(remove_duplicate=False))
    for index, (_, block) in enumerate(units):
        for param in block.parameters():
            stages_of.setdefault(id(param), set()).add(ready.stage(index))
    inside, also = set(stages_of), []
    unused = set(place)
    for name, param in names:
        pattern = next((pattern for pattern in place if fnmatchcase(name, pattern)), None)
        if name not in positions and pattern is None:
            continue
        stages = {ready.stage(min(position, len(units) - 1)) for position in positions.get(name, ())}
        if pattern is not None:
            unused.discard(pattern)
            asked = place[pattern] if isinstance(place[pattern], list) else [place[pattern]]
            if not all(isinstance(stage, int) and -ready.stages <= stage < ready.stages for stage in asked):
                raise UserError(f"pipeline.place: {pattern!r}: {asked} are not numbers of stages; there are {ready.stages}, from 0")
            stages = {stage % ready.stages for stage in asked}
        if id(param) in inside and not stages <= stages_of[id(param)]:
            also.append(name)
        stages_of.setdefault(id(param), set()).update(stages)
    if unused:
        raise UserError(
            f"pipeline.place: {sorted(unused)[0]!r} matches no parameter; those outside the blocks are {', '.join(list(positions)[:6]) or 'none'}"
        )
    if also and distributed.rank() == 0:
        log.warning(
            "pipeline: %d weights of blocks are used outside of their block, so other stages hold them too (%s%s)",
            len(also),
            ", ".join(also[:4]),
            ", ..." if len(also) > 4 else "",
        )
    return {name: tuple(sorted({planned.rank_of[stage] for stage in stages_of[id(param)]})) for name, param in names}


class Pipeline:
    """Runs a model that `cut` has cut, on all stages together: every rank calls the same methods in the same order.

    Args:
        sharded: whether `fully_shard` holds the weights; its reductions wait until the last micro-batch then.
    """

    def __init__(self, made: Cut, mesh: Mesh, cfg: Config, device: torch.device, sharded: bool):
        self.model, self.split, self.planned = made.split.model, made.split, made.planned
        self.group = mesh.root["pp"].get_group()
        self.rank = self.group.rank()
        self.is_last = planned_last(made) == self.rank
        self._made, self._sharded = made, sharded
        self._data_group = mesh.weights.get_group()
        self._wire = Wire(self.group, device)
        self._shared = [name for name, ranks in made.holders.items() if len(ranks) > 1]
        names = {param: name for name, param in self.model.named_parameters()}
        self._lent = {param for param, name in names.items() if made.holders[name][0] != self.rank}  # counted by another rank
        self.state = made.state
        self.elsewhere = [name for name, ranks in made.holders.items() if self.rank not in ranks]
        self._deferred = defer(self.model) if self.planned.splits_backward else None
        made.split.alone = self.forward
        made.split.refresh()

    def forget(self) -> None:
        """What is trained has changed: find out again what crosses the boundaries."""
        self.split.routes.clear()
        self.split.answers.clear()

    def largest(self, value: float) -> float:
        """The largest of the values that the stages have."""
        box = torch.tensor(value, dtype=torch.float64, device=self._wire.device)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group)
        return float(box)

    def everywhere(self, value: Any) -> list[Any]:
        """What each rank of the pipeline gives it, in their order."""
        values: list[Any] = [None] * self.group.size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    # ------------------------------------------------------------------ passes

    def train(self, calls: Calls, around: Around, finish: Callable[[int, Any], torch.Tensor], seeds: Sequence[int] = ()) -> None:
        """Forward and backward of one step.

        Args:
            seeds: what random numbers that all stages draw alike depend on, beside the micro-batch.
            finish: (micro-batch, outputs of the model) -> scalar to differentiate; called on ranks that are `is_last`.
        """
        if self._sharded:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(False)
            self.model.set_is_last_backward(False)
            self.model.set_reshard_after_backward(False)
        self._pass(calls, around, finish, self.planned.orders(len(calls)), seeds)
        if self._sharded:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(True)
            self.model.set_is_last_backward(True)
            self.model.set_reshard_after_backward(True)
            finish_backward(self.model)

    def evaluate(
        self, calls: Calls, around: Around, finish: Callable[[int, Any], None], gradients: bool = False, seeds: Sequence[int] = ()
    ) -> None:
        """Forward alone; without gradients, or as one that a backward could follow."""
        with torch.set_grad_enabled(gradients):
            self._pass(calls, around, finish, self.planned.forwards(len(calls)), seeds)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model on every rank of the pipeline, for sampling: all call it with the same inputs, without gradients."""
        if torch.is_grad_enabled():
            raise UserError(
                "parallel.pp: calling the model runs one stage here, so its outputs have no backward; write engine.train_step(batch), or call it under torch.no_grad()"
            )
        if self.group.size() == dist.get_world_size():
            agreement.note_forward(self.model)
        results: list[Any] = []
        self.evaluate(
            [((args, kwargs), lambda module, inputs: module(*inputs[0], **inputs[1]))],
            lambda stage, micro: nullcontext(),
            lambda micro, out: results.append(out),
        )
        box = [results[0] if results else None]
        dist.broadcast_object_list(box, group=self.group, group_src=planned_last(self._made))
        return box[0]

    def _ready(self, calls: Calls) -> tuple[list[Any], list[Route], list[Callable[[nn.Module], Any]]]:
        """For each micro-batch what its shapes depend on, how it passes through the stages, and what calls a module with it."""
        kinds = [kind_of(inputs, self.model.training) for inputs, _ in calls]
        routes = [self.split.route(kind, inputs, call) for (kind, _), (inputs, call) in zip(kinds, calls, strict=True)]
        ready: list[Callable[[nn.Module], Any]] = [
            partial(_call_with, inputs, call, route) for (inputs, call), route in zip(calls, routes, strict=True)
        ]
        return [shapes for _, shapes in kinds], routes, ready

    def _pass(self, calls: Calls, around: Around, finish: Any, orders: list[list[pipeline_schedule.Action]], seeds: Sequence[int]) -> None:
        kinds, routes, ready = self._ready(calls)
        run = Pass(self.split, self._wire, self.planned.rank_of, ready, kinds, routes, around, finish, self._deferred, seeds)
        with self.split.whole_lists():
            run.run(orders[self.rank])

    # ------------------------------------------------------------------ gradients

    def reduce(self, params: Sequence[torch.Tensor]) -> None:
        """Sum the gradients of shared weights over their stages and, unless they are sharded, all of them over the data ranks.

        A parameter that no rank used has no gradient afterwards.
        """
        self._sum_shared()
        if self._sharded or self._data_group.size() == 1:
            return
        gradients.reduce(params, self._data_group, average=False)

    def _sum_shared(self) -> None:
        """Each holder of a shared weight sends its gradient to the others; all add them in the order of the ranks, to the same bits."""
        seen: set[torch.Tensor] = set()
        held = dict(self.model.named_parameters())
        for name in self._shared:
            ranks, param = self._made.holders[name], held.get(name)
            if param is None or param in seen or not param.requires_grad or self.rank not in ranks:
                continue
            seen.add(param)
            whole = torch.zeros_like(param, dtype=param.grad_dtype) if param.grad is None else param.grad
            like = whole.to_local() if isinstance(whole, DTensor) else whole
            mine = torch.zeros(like.numel() + 1, dtype=like.dtype, device=like.device)
            if param.grad is not None:
                mine[:-1], mine[-1] = like.detach().flatten(), 1
            others = {rank: torch.empty_like(mine) for rank in ranks if rank != self.rank}
            ops = []
            for rank, buffer in others.items():
                pair = [
                    dist.P2POp(dist.isend, mine, group=self.group, group_peer=rank),
                    dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=rank),
                ]
                ops += pair
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            total = sum((others.get(rank, mine) for rank in ranks[1:]), others.get(ranks[0], mine))
            assert isinstance(total, torch.Tensor)
            if float(total[-1]):
                grad = total[:-1].view_as(like)
                param.grad = (
                    DTensor.from_local(grad, param.device_mesh, param.placements, shape=param.shape, stride=param.stride())
                    if isinstance(param, DTensor)
                    else grad
                )

    def norm(self, params: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """2-norm of the gradients over all stages, shared weights counted once; equal on every rank. A 0-dim float64 tensor."""
        own = [param.grad for param in params if param.grad is not None and param not in self._lent]
        square = gradients.total_norm(own, device).double().square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    # ------------------------------------------------------------------ state

    def whole_state(
        self, entries: Iterable[tuple[str, torch.Tensor]] | None = None, trained: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every entry of the model's state_dict, whole, on global rank 0; elsewhere whatever is here. Every rank must iterate it.

        Args:
            entries: what to take in the place of `model.state_dict()`, in its order.
            trained: dtype of trained parameters among them; None: their own.
        """
        state = self.model.state_dict(keep_vars=True)
        own = {
            name: trained if trained and value.requires_grad else value.dtype
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        dtypes = {name: dtype for part in self.everywhere(own) for name, dtype in part.items()}
        values = iter(self.model.state_dict().items() if entries is None else entries)
        column = dist.get_process_group_ranks(self.group)
        for name, shape in self._made.state.items():
            holder = self._made.holders.get(name, self._buffer_holder(name))[0]
            value = next(value for key, value in values if key == name) if name in own else None
            if isinstance(value, DTensor) and holder == self.rank:
                value = value.full_tensor()
            if holder and column[0] == 0:
                if self.rank == holder:
                    assert value is not None
                    dist.send(as_bytes(value.detach().contiguous()), group=self.group, group_dst=0)
                elif self.rank == 0:
                    value = torch.empty(shape, dtype=dtypes[name], device=self._wire.device)
                    dist.recv(as_bytes(value), group=self.group, group_src=holder)
            if value is not None:
                yield name, value

    def spread(self, held: Mapping[str, torch.Tensor], names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named entries of the whole model's state_dict, those that another rank of the pipeline holds copied from it. Every rank must iterate it.

        Args:
            held: those of them that this rank holds.
        """
        every = self.everywhere({name: value.dtype for name, value in held.items()})
        for name in names:
            holder = next(rank for rank, dtypes in enumerate(every) if name in dtypes)
            here = held.get(name)
            value = here if self.rank == holder else torch.empty(self.state[name], dtype=every[holder][name], device=self._wire.device)
            assert value is not None
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if not all(name in dtypes for dtypes in every):
                dist.broadcast(as_bytes(value.detach().contiguous() if self.rank == holder else value), group=self.group, group_src=holder)
            yield name, value if here is None else here

    def _buffer_holder(self, name: str) -> tuple[int, ...]:
        """Buffers live where the weights of their module do, or everywhere."""
        path = name.rpartition(".")[0]
        beside = [ranks for param, ranks in self._made.holders.items() if param.rpartition(".")[0] == path]
        if beside:
            return beside[0]
        index = next((i for i, block in enumerate(self.split.names) if name.startswith(f"{block}.")), None)
        return (0,) if index is None else (self.planned.rank_of[self.split.stage(index)],)


def _call_with(inputs: Any, call: Callable, route: Route, module: nn.Module) -> Any:
    # every stage and every trace runs forward from its start, so what it writes into its inputs is written into a copy
    return call(module, places.replaced(inputs, torch.clone) if route.writes else inputs)


def planned_last(made: Cut) -> int:
    """The rank of the last stage."""
    return made.planned.rank_of[-1]

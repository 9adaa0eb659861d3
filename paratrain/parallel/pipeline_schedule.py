"""In which order a rank runs the forwards and backwards of its stages: torch's schedules, or one from a file."""

from __future__ import annotations

import csv
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from paratrain.compat import pipeline_orders, with_transfers
from paratrain.config import Config
from paratrain.errors import UserError


class Action(NamedTuple):
    """One thing that a rank does.

    Attributes:
        kind: F forward; B backward; I, W the gradients of inputs, of weights; SEND_F, RECV_F, SEND_B, RECV_B their transfers.
        stage: number of the stage.
        micro: number of the micro-batch.
    """

    kind: str
    stage: int
    micro: int


class Kind(NamedTuple):
    """What there is to know about a schedule.

    Attributes:
        torch_name: its class in `torch.distributed.pipelining`; None: made here.
        per_rank: stages a rank holds unless the user says otherwise.
        fixed: whether that number cannot be changed.
        shape: "loop": stage s is on rank s mod ranks; "v": ranks 0, 1, ..., 1, 0.
        splits_backward: whether gradients of inputs and of weights are computed apart.
    """

    torch_name: str | None
    per_rank: int
    fixed: bool
    shape: str
    splits_backward: bool


KINDS = {
    "gpipe": Kind(None, 1, True, "loop", False),  # Huang et al., 2019
    "1f1b": Kind(None, 1, True, "loop", False),  # Narayanan et al., 2019
    "interleaved": Kind("Interleaved1F1B", 2, False, "loop", False),  # Narayanan et al., 2021
    "looped_bfs": Kind("LoopedBFS", 2, False, "loop", False),  # Lamy-Poirier, 2023
    "interleaved_zero_bubble": Kind("InterleavedZeroBubble", 2, False, "loop", True),  # Qi et al., 2023
    "zbv": Kind("ZBVZeroBubble", 2, True, "v", True),  # Qi et al., 2024
    "dualpipev": Kind("DualPipeV", 2, True, "v", True),  # DeepSeek-AI, 2025
}


class Plan(NamedTuple):
    """Where stages are, and how many micro-batches a step has.

    Attributes:
        name: the schedule, or the path of its file.
        ranks: pipeline ranks.
        rank_of: the rank of each stage.
        fixed: micro-batches that a file prescribes.
    """

    name: str
    ranks: int
    rank_of: tuple[int, ...]
    fixed: int | None = None

    @property
    def splits_backward(self) -> bool:
        return KINDS[self.name].splits_backward if self.name in KINDS else any(a.kind == "I" for row in read(self.name) for a in row)

    def micro_batches(self, wanted: int) -> int:
        """The fewest micro-batches this schedule runs with that are at least `wanted`; those in excess are filled with nothing."""
        if self.fixed is not None:
            if wanted > self.fixed:
                raise UserError(
                    f"pipeline.schedule={self.name}: the file is for {self.fixed} micro-batches, but a step has {wanted}; "
                    f"write pipeline.micro_batches={self.fixed}"
                )
            return self.fixed
        least = {"gpipe": 1, "1f1b": 1, "looped_bfs": 1, "dualpipev": len(self.rank_of)}.get(self.name, self.ranks)
        count = max(wanted, least)
        if self.name in ("interleaved", "interleaved_zero_bubble"):
            while count % max(1, count // self.ranks):
                count += 1
        return count

    def orders(self, micro_batches: int) -> list[list[Action]]:
        """What each rank does in a step, transfers included, in an order that cannot deadlock."""
        return _orders(self, micro_batches)

    def forwards(self, micro_batches: int) -> list[list[Action]]:
        """What each rank does to evaluate: stage after stage, each for all micro-batches."""
        return _forwards(self, micro_batches)


def plan(name: str, ranks: int, per_rank: int | None) -> Plan:
    """The plan of a schedule.

    Args:
        name: a key of `KINDS`, or the path of a .csv file.
        per_rank: stages a rank; None: what the schedule is made for.

    Raises:
        UserError: the number of stages does not fit, or the file is no schedule.
    """
    if name not in KINDS:
        return _plan_of_file(name, ranks)
    kind = KINDS[name]
    each = per_rank or kind.per_rank
    if kind.fixed and each != kind.per_rank:
        raise UserError(
            f"pipeline.stages_per_rank={each}: schedule {name} has {kind.per_rank} a rank; leave it out, or write pipeline.schedule=interleaved"
        )
    there = list(range(ranks))
    turns = [there if kind.shape == "loop" or turn % 2 == 0 else there[::-1] for turn in range(each)]
    return Plan(name, ranks, tuple(rank for turn in turns for rank in turn))


def micro_batch_size(cfg: Config, samples: int) -> int:
    """Samples in a micro-batch where the config gives their number, or nothing."""
    return -(-samples // (cfg.pipeline.micro_batches or 2 * cfg.parallel.pp))


@lru_cache
def _orders(planned: Plan, micro_batches: int) -> list[list[Action]]:
    if planned.name in ("gpipe", "1f1b"):
        orders = [_one_stage(planned, rank, micro_batches) for rank in range(planned.ranks)]
    elif planned.name in KINDS:
        name = KINDS[planned.name].torch_name
        assert name is not None
        rows = pipeline_orders(name, planned.ranks, len(planned.rank_of), micro_batches)
        orders = [[Action(*action) for action in row] for row in rows]
    else:
        orders = read(planned.name)
    return [[Action(*action) for action in row] for row in with_transfers(orders, planned.rank_of)]


@lru_cache
def _forwards(planned: Plan, micro_batches: int) -> list[list[Action]]:
    orders: list[list[Action]] = [[] for _ in range(planned.ranks)]
    for stage, rank in enumerate(planned.rank_of):
        orders[rank] += [Action("F", stage, micro) for micro in range(micro_batches)]
    return [[Action(*action) for action in row] for row in with_transfers(orders, planned.rank_of)]


def _one_stage(planned: Plan, rank: int, micro_batches: int) -> list[Action]:
    """All forwards and then all backwards, or a backward after each forward once the first can have come back."""
    ahead = micro_batches if planned.name == "gpipe" else min(planned.ranks - 1 - rank, micro_batches)
    order = [Action("F", rank, micro) for micro in range(ahead)]
    for micro in range(micro_batches):
        order += [Action("F", rank, micro + ahead)] if micro + ahead < micro_batches else []
        order.append(Action("B", rank, micro))
    return order


_CELL = re.compile(r"(\d+)(F|B|I|W)(\d+)")


@lru_cache
def read(path: str) -> list[list[Action]]:
    """The schedule in a .csv file: a row a rank; cells such as 0F1 (stage 0, forward, micro-batch 1), with B, or I and W; empty: wait.

    Raises:
        UserError: the file is not there, or some cell is not an action.
    """
    try:
        rows = list(csv.reader(Path(path).read_text().splitlines()))
    except OSError as error:
        raise UserError(
            f"pipeline.schedule={path}: no such schedule ({', '.join(KINDS)}), and no readable .csv file: {error.strerror}"
        ) from error
    orders = []
    for number, row in enumerate(rows):
        cells = [part.strip() for cell in row for part in cell.replace("OVERLAP_F_B", "").strip().strip("()").split(";") if part.strip()]
        faulty = [cell for cell in cells if not _CELL.fullmatch(cell)]
        if faulty:
            raise UserError(
                f"pipeline.schedule={path}: row {number + 1}: {faulty[0]!r} is no action; write cells such as 0F1, 0B1, 0I1, 0W1"
            )
        orders.append([Action(match[2], int(match[1]), int(match[3])) for match in map(_CELL.fullmatch, cells) if match])
    return orders


def _plan_of_file(path: str, ranks: int) -> Plan:
    orders = read(path)
    if len(orders) != ranks:
        raise UserError(f"pipeline.schedule={path}: {len(orders)} rows, but parallel.pp={ranks}; a row is what one rank does")
    done = Counter(action for row in orders for action in row)
    stages = 1 + max((action.stage for action in done), default=-1)
    micro_batches = 1 + max((action.micro for action in done), default=-1)
    rank_of = {action.stage: rank for rank, row in enumerate(orders) for action in row}
    for stage in range(stages):
        for micro in range(micro_batches):
            forward, both, inputs, weights = (done[Action(kind, stage, micro)] for kind in "FBIW")
            if forward != 1 or (both, inputs, weights) not in ((1, 0, 0), (0, 1, 1)):
                raise UserError(
                    f"pipeline.schedule={path}: stage {stage} must run micro-batch {micro} forward once and backward once (B, or I and W); "
                    f"the file has F {forward}, B {both}, I {inputs}, W {weights} times"
                )
            if any(action.stage == stage and rank_of[stage] != rank for rank, row in enumerate(orders) for action in row):
                raise UserError(f"pipeline.schedule={path}: stage {stage} is in several rows; a stage lives on one rank")
    planned = Plan(path, ranks, tuple(rank_of[stage] for stage in range(stages)), micro_batches)
    try:
        planned.orders(micro_batches)
    except AssertionError as error:
        raise UserError(f"pipeline.schedule={path}: some rank waits for what nobody has computed yet: {error}") from error
    return planned

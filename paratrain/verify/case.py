"""What is known about the first tensor that differs, and how a guess at its cause is put to the test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paratrain.config import Config
from paratrain.verify.evidence import Solo
from paratrain.verify.trace import Key

REDUCTION = "strategy, and how your own code calls backward (engine.backward, engine.no_sync)"
COUNT = "loss (return (sum, count)), trainer.loss_count"


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


def along(y: Tensor, x: Tensor) -> float | None:
    """The factor k for which y is nearest to k x."""
    square = float(x.square().sum()) if x.shape == y.shape else 0.0
    return float((x * y).sum()) / square if square > 0 else None


def total(tensors: list[Tensor | None]) -> Tensor | None:
    kept = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(kept).sum(0) if kept else None


def scaled(tensor: Tensor | None, factor: float) -> Tensor | None:
    return None if tensor is None else tensor * factor


def near(a: float, b: float, relative: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=relative)


def ranks_text(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def number(k: float) -> str:
    return f"1/{round(1 / k)}" if 0 < k < 1 and near(1 / k, round(1 / k), 1e-4) else f"{k:.6g}"

"""Which samples make up step k: a pure function of (length, global batch, seed, k), whatever the number of ranks or workers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The order in which samples are visited, epoch after epoch, without end.

    Every epoch visits every sample once; its last batch is smaller where the length is no multiple of the global batch. A step
    is computed on its own in O(global batch): nothing is stored, so that training can start anywhere in a data set of any size.

    Args:
        length: samples in the data set, at least 1.
        global_batch: samples a step over all ranks.
        seed: of the shuffle.
        shuffle: visit in a new order every epoch, a function of (seed, epoch) alone; otherwise in the order of the data set.
    """

    length: int
    global_batch: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        assert self.length > 0, "an empty data set has no order"
        assert self.global_batch > 0, "a batch needs a sample"

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.length // self.global_batch)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def size(self, step: int) -> int:
        """Samples in the global batch of `step`."""
        return min(self.global_batch, self.length - step % self.steps_per_epoch * self.global_batch)

    def batch(self, step: int) -> list[int]:
        """The indices of the samples of global step `step`, over all ranks, in order."""
        first = step % self.steps_per_epoch * self.global_batch
        positions = np.arange(first, first + self.size(step), dtype=np.uint64)
        return (permute(positions, self.length, self.seed, self.epoch(step)) if self.shuffle else positions).tolist()


def permute(positions: np.ndarray, length: int, *key: int) -> np.ndarray:
    """Where a pseudorandom permutation of range(length), chosen by `key`, sends `positions`.

    An 8-round Feistel network over a grid of about sqrt(length) rows and columns, repeated for what falls outside the range ("cycle
    walking"; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). The round function is the finaliser of SplitMix64
    (Steele et al., 2014). No step depends on a library's random generator, so that an order outlives versions.

    Args:
        positions: uint64, each below `length`.
    """
    columns = np.uint64(math.isqrt(length - 1) + 1)
    rows = np.uint64(-(-length // int(columns)))
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=64).digest(), dtype="<u8").reshape(4, 2)

    def send(x: np.ndarray) -> np.ndarray:
        row, column = np.divmod(x, columns)
        for left, right in keys:
            row = (row + _mix(column ^ left) % rows) % rows
            column = (column + _mix(row ^ right) % columns) % columns
        return row * columns + column

    sent = send(positions)
    while (outside := sent >= length).any():
        sent[outside] = send(sent[outside])
    return sent


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

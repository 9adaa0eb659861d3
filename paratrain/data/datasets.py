"""The built-in data sets: packed tokens of a file, and random ones."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from paratrain.data.tokens import TokenFile
from paratrain.distributed import seed_for

IGNORED = -100


class Packed:
    """A file of n tokens as ceil((n - 1) / seq_len) samples, in which every token but the first is a target once.

    Sample i is (inputs, targets), both int64 [seq_len]: inputs are tokens i·seq_len onwards, targets[t] the token after inputs[t].
    The last sample is filled up with `filler` as input and -100 as target.
    """

    draws_random_numbers = False

    def __init__(self, file: TokenFile, seq_len: int, filler: int):
        self.file = file
        self.seq_len = seq_len
        self.filler = filler

    def __len__(self) -> int:
        return max(0, -(-(self.file.length - 1) // self.seq_len))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.seq_len
        tokens = torch.from_numpy(self._tokens[start : start + self.seq_len + 1].astype(np.int64))
        if len(tokens) == self.seq_len + 1:
            return tokens[:-1], tokens[1:]
        missing = self.seq_len + 1 - len(tokens)
        inputs = torch.cat([tokens[:-1], torch.full((missing,), self.filler)])
        return inputs, torch.cat([tokens[1:], torch.full((missing,), IGNORED)])

    @cached_property
    def _tokens(self) -> np.memmap:
        return np.memmap(self.file.path, self.file.dtype, mode="r", shape=(self.file.length,))

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.seq_len, self.filler)  # a worker maps the file itself; a memmap travels as its content


class Synthetic:
    """Random tokens: sample i is a function of (seed, i), (inputs, targets) of int64 [seq_len], targets shifted by one."""

    draws_random_numbers = False

    def __init__(self, samples: int, seq_len: int, vocab_size: int, seed: int):
        self.samples = samples
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(seed_for(self.seed, index))
        tokens = torch.randint(self.vocab_size, (self.seq_len + 1,), generator=generator)
        return tokens[:-1], tokens[1:]

"""Randomness of the training step as a function of (seed, step, micro-batch, data rank).

Ranks that hold replicas of one activation draw the same numbers, ranks with other samples draw others, and a resumed run draws
what the uninterrupted one would have drawn. The generators of the user's program are handed back as they were found.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from paratrain.distributed import seed_for


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Give torch's generators back as they were, whatever is drawn inside."""
    cpu = torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def reseed(device: torch.device, *parts: int) -> None:
    """Start torch's generators at a state that is a function of `parts`."""
    seed = seed_for(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Draw from `random` and `numpy.random` inside as `seed` says, and as before afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def python_state() -> tuple[Any, ...]:
    """Something that differs once `random` or `numpy.random` was drawn from."""
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), *numpy[2:]


def seed_all(seed: int) -> None:
    """Seed `random`, `numpy.random` and torch's CPU generator: what code of the user's that builds or reads things may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def all_preserved() -> Iterator[None]:
    """Give the generators that `seed_all` seeds back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])

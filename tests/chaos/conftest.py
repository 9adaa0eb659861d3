"""Jobs that nothing happened to, once a session for each layout."""

import functools

import pytest
import torch
from jobs import train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Weights of a job that nothing happened to."""

    @functools.cache
    def weights(*overrides: str, ranks: int = 2) -> dict[str, torch.Tensor]:
        directory = tmp_path_factory.mktemp("undisturbed")
        train(directory, *overrides, ranks=ranks)
        return torch.load(directory / "weights.pt", weights_only=True)

    return weights

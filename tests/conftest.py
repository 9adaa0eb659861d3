"""What all tests share: one thread a process, and the warm process behind `paratrain.spawn.run`, ended with the session."""

import os
import sys

import pytest

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when torch and numpy are first imported
    os.environ[variable] = "1"

os.environ.setdefault("PARATRAIN_PROVE", "off")  # hundreds of trainers are made here; what proves them is tested by itself


@pytest.fixture(scope="session", autouse=True)
def _end_warm_process():
    yield
    from paratrain import spawn

    spawn.close()


@pytest.fixture(autouse=True)
def _no_process_group():
    """A process group that a test made in this process is not there for the next."""
    yield
    if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _seed():
    """Each test draws the same numbers, whichever tests ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)

"""`device`: each test runs on the CPU in every suite, and on the GPU in `make gpu`."""

import dataclasses
import os

import pytest
import torch

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU does not keep forked ranks from using it
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: make gpu")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request):
    return request.param


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU)])
def gpu(request):
    """For what a CPU has nothing of."""
    torch.cuda.empty_cache()
    return torch.device("cuda", 0)


@pytest.fixture
def on(device):
    """A configuration, with its device changed to this one."""
    return lambda cfg: dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, device=device))

"""Inputs for a model of which nothing is known but its layers, so that its forward can be watched before there is a batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paratrain import rng
from paratrain.copies import copied

_MOST_REAL = 1 << 28  # elements of a model that is run with data where it cannot run without


class NoInputs(Exception):
    """A model ran on no inputs that could be guessed; says what it answered to the likeliest."""


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs on inputs of `runnable`."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def runnable(model: nn.Module) -> tuple[nn.Module, Any]:
    """A copy of the model, and inputs on which it runs: on meta, or with zeros where its forward looks at values.

    Raises:
        NoInputs: it ran on none of those that were tried.
    """
    reason = "no layer shows what it takes"
    tensors = [*model.parameters(), *model.buffers()]
    devices = ["meta"] + (["cpu"] if sum(tensor.numel() for tensor in tensors) < _MOST_REAL else [])
    for device in devices:
        for number, inputs in enumerate(_guesses(model, device)):
            twin = _copy(model, device)
            try:
                with rng.preserved(torch.device("cpu")), torch.enable_grad():  # forward may differentiate
                    call(twin, inputs)
                return twin, inputs
            except Exception as error:  # whatever a model says to inputs that are not for it
                if not number:  # the likeliest inputs
                    reason = f"on {device}: {type(error).__name__}: {error}".splitlines()[0][:160]
    raise NoInputs(reason)


def _copy(model: nn.Module, device: str) -> nn.Module:
    """The model with zeros on `device`, and what it holds beside parameters and buffers; what was shared is."""
    registered = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}

    def make(tensor: Tensor) -> Tensor:
        if id(tensor) not in registered and device == "cpu" and not tensor.is_meta:
            return tensor.detach().clone()
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return nn.Parameter(zeros, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros

    return copied(model, make)


def _guesses(model: nn.Module, device: str) -> Iterator[Any]:
    """Inputs that models of the usual kinds take: tokens, images, features."""
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    count = max(1, len(required))
    numbers = _numbers(model)
    translates = "decoder_input_ids" in inspect.signature(model.forward).parameters  # an encoder and decoder of Hugging Face
    if isinstance(dummy := getattr(model, "dummy_inputs", None), dict):
        yield {name: torch.ones_like(value, device=device) for name, value in dummy.items()}  # some are on the device of the model: meta
    lengths = [8, *(n for n in numbers if 2 <= n <= 4096)]
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules()):
        for length in lengths:
            tokens = torch.zeros(2, length, dtype=torch.int64, device=device)
            yield {"input_ids": tokens, "decoder_input_ids": tokens} if translates else (tokens,) * count
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def floats(*shape: int) -> tuple[Tensor, ...]:
        return (torch.zeros(shape, dtype=dtype, device=device),) * count

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if convolutions:
        first = convolutions[0]
        spatial = len(first.kernel_size)
        steps = [first.stride[0] * math.isqrt(n - k) for n in numbers for k in (0, 1) if n > k]
        for size in [*steps, *numbers, 224, 32, 64, 28]:
            if first.kernel_size[0] <= size <= 1024:
                yield floats(2, first.in_channels, *[size] * spatial)
    recurrent = [m.input_size for m in model.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    linears = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    for features in dict.fromkeys([*recurrent[:2], *linears[:4]]):
        yield floats(2, features)
        for length in lengths:
            yield floats(2, length, features)
    for size in [*numbers, 224, 32, 28, 64]:
        for channels in (3, 1):
            if 4 <= size <= 512:
                yield floats(2, channels, size, size)


def _numbers(model: nn.Module) -> list[int]:
    """Whole numbers by which a model may know its sizes: attributes, and the shapes of lone parameters and of matrices."""
    found: dict[int, None] = {}
    for module in model.modules():
        values = [value for name, value in vars(module).items() if not name.startswith("_")]
        values += [size for param in module._parameters.values() if param is not None for size in param.shape]
        for value in values:
            for number in value if isinstance(value, tuple | list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool) and number > 1:
                    found[number] = None
    return list(found)[:24]

"""A precision is a row of a table; the functions below read the row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paratrain.batch import map_tensors
from paratrain.errors import UserError


@dataclass(frozen=True)
class Policy:
    """dtypes of a precision.

    Attributes:
        param_dtype: weights, buffers and optimizer states.
        autocast_dtype: compute dtype of the operations autocast lists; None without autocast.
    """

    param_dtype: torch.dtype
    autocast_dtype: torch.dtype | None = None

    def autocast(self, device_type: str) -> AbstractContextManager:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)

    def cast_inputs(self, inputs: Any) -> Any:
        """Floating inputs in the dtype of the weights, where the weights decide the compute dtype.

        Under autocast, inputs stay as they are: torch casts them where an operation wants it, and rounds nothing else.
        """
        return inputs if self.autocast_dtype is not None else _cast(inputs, self.param_dtype)

    def cast_targets(self, targets: Any) -> Any:
        """Floating targets in float64 under 64-true, where some losses insist on equal dtypes; otherwise as they are."""
        return _cast(targets, torch.float64) if self.param_dtype is torch.float64 else targets

    def cast_outputs(self, outputs: Any) -> Any:
        """Outputs of half-precision weights in float32, so that the loss is not summed in 8 bits."""
        if self.param_dtype.itemsize >= 4:
            return outputs
        return _cast(outputs, torch.float32)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda x: x.to(dtype) if x.dtype is not dtype and x.is_floating_point() else x, tree)


POLICIES = {
    "32-true": Policy(torch.float32),
    "64-true": Policy(torch.float64),
    "bf16-mixed": Policy(torch.float32, autocast_dtype=torch.bfloat16),
    "bf16-true": Policy(torch.bfloat16),
    "16-mixed": Policy(torch.float32, autocast_dtype=torch.float16),
}


def convert_module(module: nn.Module, name: str) -> nn.Module:
    """Cast floating parameters and buffers to the dtype of precision `name`, in place.

    Raises:
        UserError: for float16 weights under 16-mixed: whoever made them wanted float16 weights, whose small updates are lost and
            whose gradients cannot be unscaled.
    """
    if name == "16-mixed":
        half = [key for key, param in module.named_parameters() if param.dtype is torch.float16]
        if half:
            raise UserError(
                f"precision=16-mixed keeps float32 weights and scales the loss, but {len(half)} parameters are float16 (first: {half[0]}); "
                "load or build the model in float32 (model.float()), or write precision=bf16_true for weights in 16 bits"
            )
    dtype = POLICIES[name].param_dtype
    for owner in module.modules():
        for param in owner._parameters.values():
            if param is not None:
                param.data = _in_precision(param.data, dtype)
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[key] = _in_precision(buffer, dtype)
    return module


def _in_precision(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floating tensors in `dtype`, complex ones of that width (`Module.to` would drop their imaginary part), others as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype is torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

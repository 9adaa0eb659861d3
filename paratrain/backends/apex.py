"""NVIDIA Apex: fused norms for any model. Its fused optimizers need no code: `optimizer=apex_fused_adam` names the class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paratrain.backends import replace_layers
from paratrain.build import locate


def fuse_norms(model: nn.Module) -> nn.Module:
    """Put Apex' FusedLayerNorm and FusedRMSNorm in the place of torch's, in place, with the same parameters under the same names.

    Without Apex torch's own are the twin: on CUDA they are fused kernels too.

    Raises:
        UserError: Apex is not installed; has the command that builds it.
    """
    fused: dict[type, Any] = {
        nn.LayerNorm: locate("apex.normalization.FusedLayerNorm", "model.norm"),
        nn.RMSNorm: locate("apex.normalization.FusedRMSNorm", "model.norm"),
    }
    return replace_layers(model, lambda layer: _twin(fused[type(layer)], layer) if type(layer) in fused else None)


def _twin(cls: Any, norm: Any) -> nn.Module:
    dtype = norm.weight.dtype if norm.weight is not None else torch.get_default_dtype()
    eps = norm.eps if norm.eps is not None else torch.finfo(dtype).eps  # what torch.nn.RMSNorm takes None for
    return cls(norm.normalized_shape, eps=eps, elementwise_affine=norm.elementwise_affine)

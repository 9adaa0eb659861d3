"""Linear layers whose products run in float8, through torchao: weights stay float32, scales are found anew in every step."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain.compat import replace_local
from paratrain.config import Float8
from paratrain.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_MULTIPLE = 16  # of both sides of a matrix, which float8 kernels need
_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # first compute capability whose matrix units do it


def convert(model: nn.Module, options: Float8 | None, device: torch.device) -> None:
    """Replace the `nn.Linear` modules of `model` that `options` names by torchao's Float8Linear, in place; parameters stay the same objects.

    Raises:
        ConfigError: a pattern that matches no linear layer.
        UserError: torchao is missing, or this device has no float8 products and nobody asked for emulation.
    """
    if options is None:
        return
    _check_device(options, device)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    problems = [
        f"precision.fp8.{key}: {pattern!r} matches no linear layer; their names look like {', '.join(list(linear)[:3]) or '(there is none)'}"
        for key, patterns in (("include", options.include), ("exclude", options.exclude))
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in linear)
    ]
    if problems:
        raise ConfigError(problems)
    chosen = {
        name
        for name in linear
        if any(fnmatchcase(name, p) for p in options.include) and not any(fnmatchcase(name, p) for p in options.exclude)
    }
    odd = {name for name in chosen if linear[name].in_features % _MULTIPLE or linear[name].out_features % _MULTIPLE}
    if odd:
        log.info(
            "precision.fp8: %d linear layers stay in bfloat16, their sides are no multiples of %d: %s", len(odd), _MULTIPLE, sorted(odd)[0]
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError:
        raise UserError("precision.fp8 needs torchao, which is not installed; run: pip install 'paratrain[fp8]'") from None
    config = Float8LinearConfig.from_recipe_name(options.recipe)
    object.__setattr__(config, "emulate", options.emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in chosen - odd)


def gather_in_float8(model: nn.Module, options: Float8 | None) -> None:
    """Make `fully_shard` send the weights of float8 layers in float8, rounded by a scale that all ranks agree on: that of the whole weight."""
    if options is None or not options.all_gather:
        return
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    for module in model.modules():
        if isinstance(module, Float8Linear) and isinstance(module.weight, DTensor):
            dtype = module.config.cast_config_weight.target_dtype
            replace_local(module.weight, lambda local: WeightWithDynamicFloat8CastTensor(local, module.linear_mm_config, dtype))  # noqa: B023


def _check_device(options: Float8, device: torch.device) -> None:
    if options.emulate:
        return
    have = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if have is None or have < _CAPABILITY[options.recipe]:
        need = ".".join(map(str, _CAPABILITY[options.recipe]))
        what = f"a GPU of compute capability {have[0]}.{have[1]}" if have else f"the {device.type}"
        raise UserError(
            f"precision.fp8.recipe={options.recipe}: needs a GPU of compute capability {need} or later, and this is {what}; write precision=bf16, "
            "or precision.fp8.emulate=true to round as float8 does, slowly"
        )

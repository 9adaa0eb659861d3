"""Where a forward uses the weights outside its blocks: which stages of a pipeline need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import rng
from paratrain.errors import UserError
from paratrain.parallel import guess
from paratrain.parallel import pipeline_places as places
from paratrain.parallel.pipeline_trace import has_tensor


def find(model: nn.Module, blocks: Sequence[str], names: Sequence[str]) -> dict[str, list[int]]:
    """Each of `names` that one run of the forward uses -> how many blocks are done there, in order; a block counts itself as to be done.

    What a block uses of its own does not count. Nothing where no inputs can be guessed for the model.

    Raises:
        UserError: for a forward that differentiates outside of its blocks.
    """
    untouched = places.Before(places.containers(places.roots(model)))  # a copy shares what its hooks and functions hold
    try:
        return _find(model, blocks, names)
    except guess.NoInputs:
        return {}
    finally:
        untouched.restore()


def _find(model: nn.Module, blocks: Sequence[str], names: Sequence[str]) -> dict[str, list[int]]:
    twin, inputs = guess.runnable(model)
    params = dict(twin.named_parameters(remove_duplicate=False))
    modules = [twin.get_submodule(name) for name in blocks]
    watch = _Watch({id(params[name]) for name in names}, [{id(param) for param in block.parameters()} for block in modules])
    for index, block in enumerate(modules):
        block.register_forward_pre_hook(watch.at(index, True))
        block.register_forward_hook(watch.at(index + 1, False))
    with rng.preserved(torch.device("cpu")), torch.enable_grad(), watch:
        outputs = guess.call(twin, inputs)
    for leaf in tree_leaves(outputs):
        if id(leaf) in watch.params:  # handed out as it is
            watch.found.setdefault(id(leaf), set()).add(len(blocks))
    return {name: sorted(watch.found[id(params[name])]) for name in names if id(params[name]) in watch.found}


class _Watch(TorchFunctionMode):
    """Notes at which position each parameter goes into a tensor."""

    def __init__(self, params: set[int], own: Sequence[set[int]]):
        super().__init__()
        self.params, self.own = params, own
        self.position = 0
        self.inside: set[int] | None = None  # parameters of the block that is running
        self.found: dict[int, set[int]] = {}

    def at(self, position: int, inside: bool) -> Any:
        def hook(*ignored: Any) -> None:
            self.position = position
            self.inside = self.own[position] if inside else None

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad and self.position and self.inside is None:
            raise UserError(
                "parallel.pp: forward differentiates (torch.autograd.grad) through what several stages compute, and none of them can; keep the "
                "derivative inside one block, or train with parallel.pp=1"
            )
        result = func(*args, **(kwargs or {}))
        if has_tensor(result):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.params and id(leaf) not in (self.inside or ()):
                    self.found.setdefault(id(leaf), set()).add(self.position)
        return result

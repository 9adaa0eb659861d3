"""Tensors with a shape, a dtype and a device, and no values: what a pipeline stage has of the weights that other stages hold.

Whatever is computed from a ghost is a ghost and knows the weight it hangs on; whatever is not is computed as ever. So a stage can run
the user's own forward from its start: positions, masks and rotary angles come out real, activations come out as ghosts until the
real ones arrive from the stage before.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from paratrain.errors import UserError


class Ghost(torch.Tensor):
    """A tensor without values.

    Attributes:
        meta: the same tensor on the meta device, on which its operators run.
        origin: name of a weight that it hangs on.
        travels: a stage that follows the forward of a step made it; False outside of any, where nothing brings its values.
    """

    meta: torch.Tensor
    origin: str
    travels: bool

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device, origin: str, travels: bool = True) -> Ghost:
        ghost = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, requires_grad=False
        )
        ghost.meta, ghost.origin, ghost.travels = meta, origin, travels
        return ghost

    def __deepcopy__(self, memo: Any) -> Ghost:
        return self  # there is nothing to copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Ghost({tuple(self.shape)}, {self.dtype}, hangs on {self.origin})"

    def requires_grad_(self, requires_grad: bool = True) -> Ghost:
        return self  # the stage that holds it trains it or does not

    def register_hook(self, hook: Any) -> RemovableHandle:
        return RemovableHandle(OrderedDict())  # it is called where the weight is

    def register_post_accumulate_grad_hook(self, hook: Any) -> RemovableHandle:
        return RemovableHandle(OrderedDict())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        ghosts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Ghost)]
        first = ghosts[0]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and not isinstance(value, Ghost):
                raise NeedsValues(first, f"{func} writes into a tensor that does not")
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else first.device
        inner = tree_map_only(torch.Tensor, _meta, (args, kwargs))
        if "device" in inner[1]:
            inner[1]["device"] = torch.device("meta")
        try:
            result = func(*inner[0], **inner[1])
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            raise NeedsValues(first, f"{func} depends on values") from error
        if func._schema.is_mutable and len(func._schema.returns) == 1 and isinstance(result, torch.Tensor):
            return args[0]  # in place: the ghost that was written to
        return tree_map_only(torch.Tensor, lambda meta: Ghost(meta, device, first.origin, first.travels), result)


class NeedsValues(UserError):
    """Something asked for the values of a ghost."""

    def __init__(self, ghost: Ghost, what: str):
        self.origin = ghost.origin
        super().__init__(
            f"parallel.pp: outside the blocks the model depends on {ghost.origin!r} in a way that no stage can follow without its values: {what}; "
            "move this into a block, or train with parallel.pp=1"
            if ghost.travels
            else f"parallel.pp: {ghost.origin!r} is held by another stage, and what is computed with it here has no values ({what}): outside of the engine's steps "
            "only a call of the whole model, engine.model(inputs) under torch.no_grad() on every rank, runs over all stages, and not its other methods and modules; "
            "call that, load engine.full_state_dict() into a model of one process, or write parallel.pp=1"
        )


def ghost(like: torch.Tensor, device: torch.device, origin: str) -> Ghost:
    """A ghost with the shape and dtype of `like`."""
    return Ghost(torch.empty(like.shape, dtype=like.dtype, device="meta"), device, origin)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Ghost):
        return tensor.meta
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

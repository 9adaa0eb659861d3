"""A module that holds the weights of all its experts, with a part of them on each rank of ep: rows go to their experts and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain.errors import UserError
from paratrain.parallel.tp_split import plain


@dataclass(frozen=True)
class Form:
    """How a module of experts is called.

    Attributes:
        experts: how many it has, on all ranks together.
        names: of the arguments of its forward that are rows, indices and weights.
        parameters: of its forward, in order.
    """

    experts: int
    names: tuple[str, str, str]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Peers:
    """The ranks of ep, as a module of experts sees them."""

    form: Form
    group: dist.ProcessGroup
    name: str


class _ReadingOwn(nn.Module):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.to_local() if isinstance(value, DTensor) and value.device_mesh.mesh_dim_names == ("ep",) else value


class _Dispatching(_ReadingOwn):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        peers: Peers = self.__dict__["_expert_peers"]
        form = peers.form
        given: dict[str, Any] = {**dict(zip(form.parameters, args, strict=False)), **kwargs}
        given = {name: plain(value) for name, value in given.items()}  # every rank of tp computes all that its rank of ep has to
        rows, index, weights = _checked(peers, *(given.get(name) for name in form.names))

        def own(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            with _fewer(self, form.experts, form.experts // peers.group.size()):
                return super(_Dispatching, self).forward(**given | dict(zip(form.names, (rows, index, weights), strict=True)))

        return _dispatch(own, rows, index, weights, form.experts, peers.group)


@cache
def reading_own(cls: type, dispatching: bool) -> type:
    return type(cls.__name__, (_Dispatching if dispatching else _ReadingOwn, cls), {"__module__": cls.__module__})


def _checked(peers: Peers, rows: Any, index: Any, weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = [rows, index, weights]
    right = all(isinstance(tensor, torch.Tensor) and tensor.ndim == 2 for tensor in tensors)
    if not right or index.is_floating_point() or index.shape != weights.shape or index.shape[0] != rows.shape[0]:
        shapes = [tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__ for tensor in tensors]
        raise UserError(
            f"parallel.ep={peers.group.size()}: {peers.name} is called with {shapes}, not with rows [rows, features], indices and weights [rows, chosen "
            "experts]; write parallel.ep=1, or leave it out of parallel.ep_plan"
        )
    return rows, index, weights


@contextmanager
def _fewer(module: nn.Module, experts: int, here: int) -> Iterator[None]:
    told = set_numbers(module, experts, here)
    try:
        yield
    finally:
        for inner, name in told:
            setattr(inner, name, experts)


def _dispatch(
    own: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """What `own` would compute if it held all experts: own(rows, index, weights), summed over the chosen experts of each row.

    Args:
        own: computes with the experts that this rank holds, numbered from 0.
        rows: [rows, features].
        index: [rows, chosen] of experts; a number past the last chooses none.
        weights: [rows, chosen].
    """
    chosen = index.shape[1]
    flat = index.flatten()
    order = flat.argsort(stable=True)
    send = torch.bincount(flat, minlength=experts)[:experts]
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    receive = receive.view(group.size(), -1)
    sizes = torch.stack([send.view(group.size(), -1).sum(1), receive.sum(1)]).tolist()
    order = order[: sum(sizes[0])]
    here = torch.arange(receive.shape[1], device=rows.device).repeat(group.size()).repeat_interleave(receive.flatten())
    arrived = Exchange.apply(rows[order // chosen], *sizes, group)
    weight = Exchange.apply(weights.flatten()[order].unsqueeze(1), *sizes, group)
    if not len(here):  # a row that counts for nothing: the module need not know how to run on none, and all ranks have the same graph
        arrived = torch.cat([arrived, rows[:1].detach() if len(rows) else rows.new_zeros(1, rows.shape[1])])
        weight, here = torch.cat([weight, weight.new_zeros(1, 1)]), here.new_zeros(1)
    results = own(arrived, here.unsqueeze(1), weight)[: sum(sizes[1])]
    back = Exchange.apply(results, sizes[1], sizes[0], group)
    whole = back.new_zeros(len(flat), *back.shape[1:]).index_copy(0, order, back)
    return whole.view(-1, chosen, *back.shape[1:]).sum(1)


class Exchange(torch.autograd.Function):
    """Rows to other ranks and from them, as many as each wants; backward takes the same ways back.

    A tensor that needs a gradient as `anchor` puts the exchange into the graph of a rank that has no rows to differentiate.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, anchor: torch.Tensor | None = None
    ) -> torch.Tensor:
        ctx.ways = receive, send, group
        return _exchanged(tensor, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return _exchanged(grad, *ctx.ways), None, None, None, None


def _exchanged(tensor: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    tensor = tensor.contiguous()
    result = tensor.new_empty(sum(receive), *tensor.shape[1:])
    # bytes: gloo does not know every dtype
    dist.all_to_all_single(result.view(torch.uint8), tensor.view(torch.uint8), receive, send, group=group)
    return result


def set_numbers(module: nn.Module, before: int, after: int) -> list[tuple[nn.Module, str]]:
    """Tell a module how many experts it has, in the attributes that say so; returns them."""
    numbers = [(inner, name) for inner in module.modules() for name, value in vars(inner).items() if type(value) is int and value == before]
    told = [(inner, name) for inner, name in numbers if "expert" in name.lower()]
    for inner, name in told:
        setattr(inner, name, after)
    return told

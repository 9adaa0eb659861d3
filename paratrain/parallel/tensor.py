"""Tensor and sequence parallelism of any module: parameters become parts, and the forward runs on them unchanged.

A parameter is a DTensor over the `tp` axis. A module that reads one in its forward gets what this rank computes with: a plain
tensor where every rank holds the whole, a `Split` (see `tp_split.py`) where ranks hold parts. From there on `tp_rules.py` follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from paratrain import gradients
from paratrain.compat import local_box
from paratrain.config import Config
from paratrain.distributed import rank
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel import tp_products, tp_shapes  # noqa: F401 - the rules register themselves
from paratrain.parallel.tp_attention import shardable_attention
from paratrain.parallel.tp_plan import NOTHING, Placement, Plan, example, make
from paratrain.parallel.tp_rules import refuse_writes_into_copies
from paratrain.parallel.tp_split import Peers, Split, order
from paratrain.parallel.whole_view import LaidOut

log = logging.getLogger(__name__)
_WATCHED = 4  # forwards
_NAMED = 5  # weights in a warning


@dataclass(frozen=True)
class Placed:
    """What `place` did.

    Attributes:
        plan: what is split.
        orders: parameter name -> (dim, order): matrices that are several in one are kept rank by rank, so that a rank holds its
            part of each; row i of what is kept is row order[i] of the user's.
    """

    plan: Plan | None = None
    orders: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)

    def natural(self, name: str, tensor: Any) -> Any:
        """A tensor that is kept like the parameter `name` (its gradient, a state of its optimizer), in the user's order."""
        return self._reorder(name, tensor, torch.argsort)

    def kept(self, name: str, tensor: Any) -> Any:
        """The inverse of `natural`."""
        return self._reorder(name, tensor, lambda index: index)

    def _reorder(self, name: str, tensor: Any, index: Callable[[Tensor], Tensor]) -> Any:
        found = self._order(name, tensor)
        if found is None:
            return tensor
        dim, how = found
        whole = gradients.whole(tensor.detach())
        whole = whole.index_select(dim, index(how).to(whole.device))
        if not isinstance(tensor, DTensor):
            return whole
        sizes, offsets = local_box(tensor.shape, tensor.device_mesh, tensor.placements)
        local = whole[tuple(slice(start, start + size) for size, start in zip(sizes, offsets, strict=True))].contiguous()
        return DTensor.from_local(
            local.to(tensor.to_local().device),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def to_save(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries of a checkpoint in the user's order. Every rank must call it."""
        return {key: self.natural(self._parameter(key), tensor) for key, tensor in tensors.items()}

    def to_fill(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """What a checkpoint in the user's order is read into, and what every rank calls then to keep it."""
        moved = {key: tensor for key, tensor in tensors.items() if self._order(self._parameter(key), tensor) is not None}
        fresh = {key: torch.empty_like(tensor) for key, tensor in moved.items()}

        @torch.no_grad()
        def keep() -> None:
            for key, tensor in moved.items():
                tensor.detach().copy_(self.kept(self._parameter(key), fresh[key]))

        return tensors | fresh, keep

    def _parameter(self, key: str) -> str:
        """The parameter that an entry model/<name>, optimizer/<name>/<state> or ema/<name> is about."""
        kind, _, name = key.partition("/")
        return name.rpartition("/")[0] if kind == "optimizer" else name

    def _order(self, name: str, tensor: Any) -> tuple[int, Tensor] | None:
        dim, order = self.orders.get(name, (0, None))
        return None if order is None or tensor.ndim <= dim or tensor.shape[dim] != len(order) else (dim, order)

    @torch.no_grad()
    def keep(self, model: nn.Module) -> None:
        """Bring parameters that were filled in the user's order into the order in which they are kept, in place."""
        for name, param in model.named_parameters():
            if name in self.orders:
                assert isinstance(param, DTensor)
                param.to_local().copy_(self.kept(name, param.detach()).to_local())


def planned(model: nn.Module, cfg: Config) -> Plan | None:
    """The plan for the whole of `model`, whose tensors are on meta, made before stages of a pipeline divide it; None without tensor
    parallelism.

    Raises:
        UserError: no plan can be found, or one that splits nothing, which only a plan of the user's own may do.
    """
    if cfg.parallel.tp == 1:
        return None
    shardable_attention(model)
    plan = make(model, cfg, Peers(None, 0, cfg.parallel.tp, cfg.parallel.sp))
    if not plan.placements and plan.source != "user":
        why = "; ".join(f"{name}: {reason}" for name, reason in list(plan.reasons.items())[:3])
        raise UserError(
            f"parallel.tp={cfg.parallel.tp}: no weight of the model can be split, so every rank would hold and compute all of it"
            f"{f' ({why})' if why else ''}; write parallel.tp=1, so that its ranks see different samples, a plan of your own "
            f"({example(model)}), or accept it with {NOTHING}"
        )
    return plan


def describe(plan: Plan) -> str:
    """A plan for people to read."""
    return "\n  ".join([f"tensor parallel plan ({plan.source}):", *plan.lines()])


def place(model: nn.Module, mesh: Mesh, cfg: Config, plan: Plan | None, experts: Collection[str] = ()) -> Placed:
    """Split the parameters of `model`, which are on meta, over `mesh.root["tp"]`, in place; names stay, and what was shared is.

    Args:
        plan: from `planned`; it may name parameters that other stages hold.
        experts: names of modules that stay as they are, because the ranks of ep divide them instead.

    Raises:
        UserError: a plan that does not fit the model, or none can be found.
    """
    if plan is None:
        return Placed()
    axis = mesh.root["tp"]
    peers = Peers(axis.get_group(), axis.get_local_rank(), axis.size(), cfg.parallel.sp, _on_gather(plan))
    if rank() == 0:
        log.info("%s", describe(plan))
    params = dict(model.named_parameters(remove_duplicate=False))
    if rank() == 0:
        _warn_of_whole(plan, params, peers.size)
    # by identity: tied weights are split alike
    split = {id(params[name]): placement for name, placement in plan.placements.items() if name in params}
    apart = tuple(f"{name}." for name in experts)
    for name in plan.placements:
        if name.startswith(apart):
            raise UserError(f"parallel.tp_plan: {name} is of experts that parallel.ep deals to ranks whole; leave it out of the plan")
    # those of all stages, because whoever gathers the whole model puts every weight in the user's order; and by every name they have here
    known = {**plan.placements, **{name: split[id(param)] for name, param in params.items() if id(param) in split}}
    orders = {name: (p.dim, torch.tensor(order(p.parts, peers))) for name, p in known.items() if len(p.parts) > 1}
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):  # `params` keeps what is replaced alive, so that no id comes twice
        if f"{path}.".startswith(apart):
            continue
        how: dict[str, Placement] = {}
        for leaf, param in module._parameters.items():
            if param is None or param.ndim == 0:
                continue
            name = f"{path}.{leaf}" if path else leaf
            placement = split.get(id(param))
            if placement is not None:
                _check(name, param, placement, peers)
                how[leaf] = placement
            if id(param) not in made:
                made[id(param)] = _distributed(param, placement, axis)
            setattr(module, leaf, made[id(param)])
        if any(True for _ in module._parameters.values()):
            module.__dict__["_tensor_parallel"] = (peers, how, path)
            module.__class__ = _reading_parts(type(module))  # type: ignore[arg-type]
    _watch_views(model, peers)
    return Placed(plan, orders)


def _watch_views(model: nn.Module, peers: Peers) -> None:
    """In the first forwards, refuse what is written into copies of tensors that are split."""
    left = _WATCHED

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal left
        refuse_writes_into_copies(peers)
        left -= 1
        if left == 0:
            handle.remove()

    handle = model.register_forward_hook(watch)


def _warn_of_whole(plan: Plan, params: Mapping[str, Tensor], ranks: int) -> None:
    """Say what the ranks hold, and why, where they save less than half of what they could."""
    sizes = {id(param): param.numel() for param in params.values()}
    split = {id(params[name]) for name in plan.placements if name in params}
    share = sum(size / ranks if key in split else size for key, size in sizes.items()) / max(1, sum(sizes.values()))
    if share > (1 + 1 / ranks) / 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(plan.reasons.items())[:_NAMED]) or "the plan names no others"
        log.warning("parallel.tp=%d: every rank holds %.0f %% of the weights (whole: %s)", ranks, 100 * share, why)


def _check(name: str, param: Tensor, placement: Placement, peers: Peers) -> None:
    if param.ndim <= placement.dim or sum(placement.parts) != param.shape[placement.dim]:
        raise UserError(f"parallel.tp_plan: {name} has shape {tuple(param.shape)}, which {placement} does not fit")
    if len(placement.parts) > 1 and not peers.divides(placement.parts):
        raise UserError(
            f"parallel.tp={peers.size}: the parts {placement.parts} of {name} do not divide by it; choose a degree that divides them"
        )


def _distributed(param: nn.Parameter, placement: Placement | None, axis: Any) -> nn.Parameter:
    placements = [Replicate() if placement is None else Shard(placement.dim)]
    sizes, _ = local_box(param.shape, axis, placements)
    local = torch.empty(sizes, dtype=param.dtype, device=param.device)
    value = DTensor.from_local(local, axis, placements, run_check=False, shape=param.shape, stride=param.stride())
    new = nn.Parameter(value, requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    return new


def _on_gather(plan: Plan) -> Callable[[str, list[Split], str], None]:
    """What a user asked to split and cannot stay split is an error; in a plan of ours it is worth a line in the log."""
    told: set[tuple] = set()

    def gathered(operation: str, splits: list[Split], reason: str) -> None:
        if operation in ("fused", "scatter"):
            return
        names = ", ".join(sorted(frozenset().union(*(split.sources for split in splits)))) or "the sequence"
        if (operation, names) in told:
            return
        told.add((operation, names))
        if plan.source == "user" and operation in ("view", "reshape") and splits[0].sources:
            raise UserError(
                f"parallel.tp_plan: the result of {names} cannot stay split in {operation}: {reason}; choose parallel.tp that divides the "
                "number of heads, or write replicate for it (colwise/3 where three matrices are fused into one)"
            )
        log.warning("parallel.tp: %s of %s is computed on gathered tensors: %s", operation, names, reason)

    return gathered


class _ReadingParts(nn.Module):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, DTensor) and type(value) is not LaidOut:
            peers, how, path = self.__dict__["_tensor_parallel"]
            if value.device_mesh.ndim == 1 and value.device_mesh.size() == peers.size:
                with torch._C.DisableTorchFunction():  # reading a weight is no operation of the forward, which stages of a pipeline number
                    local = _local(value, path, name)
                placement = how.get(name)
                name = f"{path}.{name}" if path else name
                return local if placement is None else Split(local, placement.dim, placement.parts, peers, frozenset({name}))
        return value


def _local(value: DTensor, path: str, name: str) -> Tensor:
    try:
        return value.to_local()
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise UserError(
            f"parallel.tp: {path + '.' if path else ''}{name} is read inside of a function that torch.func transforms (vmap, grad), which cannot see that "
            "ranks share it; read it in front of the transform and give it to the function, or write parallel.tp=1"
        ) from error


class _ReadingFlatWeights(_ReadingParts):
    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass


@cache
def _reading_parts(cls: type) -> type:
    mixin = _ReadingFlatWeights if issubclass(cls, nn.RNNBase) else _ReadingParts
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})

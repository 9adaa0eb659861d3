"""Uses of sharded weights that `fully_shard` does not see, and what makes them exact.

It gathers the weights of a block for its forward, and for its backward by hooks on the outputs. Programs also use weights before or after
that: a penalty, `torch.func.functional_call`, a function that a block returns, a feature that it leaves in a list, derivatives of
derivatives. Each kind is noticed where it happens, in any step, and its group of weights is *held* from then on: it is gathered at the
start of every forward, stays so, and its gradients are reduced when backward has ended. Ranks run the same program, so they hold the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from paratrain import compat
from paratrain.batch import tensors
from paratrain.errors import UserError
from paratrain.parallel.arguments import can_change, places_in
from paratrain.parallel.watched import as_is, asks_for_facts, watched, writes

log = logging.getLogger(__name__)


class Uses:
    """Watches how a sharded model uses its weights.

    Attributes:
        training: a forward has begun of which no backward has run yet.
        backward: the engine's own backward is running.
    """

    def __init__(self, model: nn.Module, strategy: str, frees: bool):
        """
        Args:
            frees: whether the strategy frees gathered weights between forward and backward.
        """
        self.model, self.strategy, self._frees = model, strategy, frees
        self.training = self.backward = self._watching = False
        self._groups = compat.weight_groups(model)
        self._of = {id(param): group for group in self._groups for param in group.params if group.plain}
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._sharded = [param for group in self._groups if group.plain for param in group.params if isinstance(param, DTensor)]
        self._class = watched("ShardedWeight", self.answer)
        self._first = True  # steps
        self._late = False  # whether nodes of backward needed weights before a hook had gathered them
        self._written = Written()
        self._announced = 0
        by_module: dict[nn.Module, list[compat.WeightGroup]] = {}
        for group in self._groups:
            by_module.setdefault(group.module, []).append(group)
            group.intercept(self._in_backward, _mark)
        for module, groups in by_module.items():
            compat.guard_backward(module, self._in_backward)
            module.register_forward_pre_hook(partial(self._before, groups), prepend=True, with_kwargs=True)
            module.register_forward_hook(partial(self._after, groups), prepend=True, with_kwargs=True)
            _note_versions_once(module, groups)
        model.register_forward_pre_hook(self._gather_held)
        self.watch(True)

    # ------------------------------------------------------------------ in the course of a step

    def begin(self) -> None:
        """A forward begins that a backward follows."""
        self.training = True
        self.watch(True)

    def watch(self, on: bool) -> None:
        """Whether operations on sharded weights are answered here; the optimizer's need not be."""
        if on == self._watching:
            return
        self._watching = on
        kind = self._class if on else DTensor
        for param in self._sharded:
            param.__class__ = kind

    @contextmanager
    def differentiating(self, loss: torch.Tensor) -> Iterator[None]:
        """The engine's own backward; afterwards gradients that came by ways that hooks do not see are reduced, too."""
        if self._first or self._late:
            self._gather_before_nodes(loss)
        self.backward = True
        try:
            yield
            if unfinished := [group for group in self._groups if group.unfinished()]:
                self._finish(unfinished)
        finally:
            self.backward = self.training = False
            self.watch(False)
        self._refuse_writes()
        self._announce()

    def drop_gradients(self) -> list[torch.Tensor]:
        """Drop what a backward that was not the engine's has left at gathered weights; returns the parameters whose it was."""
        return [param for group in self._groups for param in group.drop_gradients()]

    def reduce_kept(self) -> None:
        """Reduce the gradients that a backward kept on their rank, and free what is gathered; every rank must."""
        self.backward = True
        try:
            self._finish(self._groups)
        finally:
            self.backward = False

    def _finish(self, groups: Iterable[compat.WeightGroup]) -> None:
        for group in groups:
            group.finish()
        compat.wait_for_reductions(self.model)

    def end_step(self) -> None:
        """The weights of this step are updated."""
        self._first = False
        self.watch(True)

    def holds(self) -> list[bool]:
        return [group.held for group in self._groups]

    def restore(self, holds: Sequence[bool]) -> None:
        """Hold what was held when `holds` said so."""
        for group, held in zip(self._groups, holds, strict=True):
            group.hold(held)

    # ------------------------------------------------------------------ what makes groups held

    def _hold(self, groups: Iterable[compat.WeightGroup]) -> None:
        for group in groups:
            group.hold()
            group.gather()

    def _in_backward(self) -> bool:
        """Whether the engine's backward runs; another one, inside a forward or a loss, makes everything held: derivatives of derivatives
        use weights in an order that no hook foresees."""
        if not self.backward and not all(group.held and group.gathered for group in self._groups):
            self._hold(self._groups)
        return self.backward

    def _gather_held(self, module: nn.Module, args: Any) -> None:
        for group in self._groups:
            if group.held:
                group.gather()

    def _before(self, groups: list[compat.WeightGroup], module: nn.Module, args: Any, kwargs: Any) -> None:
        for group in groups:
            if exchanged := group.exchanged():  # gathering would put the weights back
                self._hold([group])
                for holder, name, tensor in exchanged:
                    holder._parameters[name] = tensor
        self._written.before(module, args, kwargs)

    def _after(self, groups: list[compat.WeightGroup], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._written.after(module, args, kwargs)
        if not torch.is_grad_enabled():
            return
        if isinstance(output, torch.Tensor) and output.requires_grad:
            return
        if not any(tensor.requires_grad for tensor in tensors(output)) and any(param.requires_grad for param in module.parameters()):
            for group in groups:  # it returns a function or the like, which uses the weights later
                group.hold()

    def _gather_before_nodes(self, loss: torch.Tensor) -> None:
        """Have nodes of the graph of `loss` gather the weights that they have saved, where no hook has by then."""
        owners = {storage: group for group in self._groups if not group.held for storage in group.storages()}
        nodes, met = [loss.grad_fn], {loss.grad_fn}
        while owners and nodes:
            node = nodes.pop()
            if node is None:
                continue
            for group in {owners[key] for key in map(compat.storage_id, compat.saved_by(node)) if key in owners}:
                node.register_prehook(partial(self._gather_late, group))
            new = [following for following, _ in node.next_functions if following is not None and following not in met]
            met.update(new)
            nodes += new

    def _gather_late(self, group: compat.WeightGroup, grads: Any) -> None:
        if self.backward and not group.gathered:
            group.gather()
            self._late = True

    def _refuse_writes(self) -> None:
        for group in self._groups:
            if (param := group.written()) is not None:
                raise UserError(
                    f"strategy={self.strategy}: forward changes {self._names.get(id(param), 'a weight')} in place, where each rank keeps a part of it "
                    "and the change is lost; change weights between steps, keep what is no weight in a buffer (register_buffer), or write "
                    "strategy=ddp"
                )

    def _announce(self) -> None:
        held = [group.name for group in self._groups if group.held]
        if self._frees and len(held) > self._announced and dist.get_rank() == 0:
            self._announced = len(held)
            names = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
            log.warning(
                "strategy=%s: weights are used outside of the forward of the block that holds them (%s), so these stay gathered from the "
                "start of forward to the end of backward: the result is exact, the memory that of strategy=zero1 for them",
                self.strategy,
                names,
            )

    # ------------------------------------------------------------------ operations on sharded weights

    def answer(self, func: Callable, args: Any, kwargs: Any) -> Any:
        """The result of an operation on weights that are not gathered."""
        found = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, self._class)}
        if asks_for_facts(func) or writes(func, kwargs):
            return as_is(found.values(), func, args, kwargs)
        if self.training and (torch.is_grad_enabled() or not self.backward):
            self._hold({self._of[key] for key in found})
            whole = {key: self._of[key].whole(param) for key, param in found.items()}
        elif any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor) and leaf.ndim for leaf in tree_leaves((args, kwargs))):
            if torch.is_grad_enabled() and any(as_is([param], _trains, (param,), {}) for param in found.values()):
                name = self._names.get(next(iter(found)), "a weight")
                raise UserError(
                    f"strategy={self.strategy}: {name} is used outside of a forward of the engine, where each rank holds a part of it, and a "
                    "gradient is asked for; call engine(...) and engine.backward(...), or write torch.no_grad() around what only evaluates"
                )
            whole = {key: as_is([param], _gather_alone, (param,), {}) for key, param in found.items()}
        else:
            return as_is(found.values(), func, args, kwargs)
        args, kwargs = tree_map(lambda leaf: whole.get(id(leaf), leaf), (args, kwargs))
        return func(*args, **kwargs)


def _note_versions_once(module: nn.Module, groups: Sequence[compat.WeightGroup]) -> None:
    def note(*_: Any) -> None:
        handle.remove()
        for group in groups:
            group.note_versions()

    handle = module.register_forward_pre_hook(note)


def _trains(param: DTensor) -> bool:
    return param.requires_grad


class Written:
    """What blocks write into lists, dicts and the like that they are given: outputs, too, whose backward needs the weights."""

    def __init__(self) -> None:
        self._seen: dict[nn.Module, list[int]] = {}

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if containers := [value for value in (*args, *kwargs.values()) if can_change(value)]:
            self._seen[module] = [id(tensor) for tensor in tensors(containers)]

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        seen = self._seen.pop(module, None)
        if seen is not None and torch.is_grad_enabled():
            written = [tensor for tensor in tensors([*args, *kwargs.values()]) if tensor.requires_grad and id(tensor) not in seen]
            compat.gather_before_backward(module, [tensor for tensor in written if tensor.grad_fn is not None])


def share_arguments(model: nn.Module) -> None:
    """Let the blocks of a sharded model write into the lists and dicts of those who call them, where no `Uses` does."""
    written = Written()
    groups = compat.weight_groups(model)
    for group in groups:
        group.intercept(lambda: True, _mark)
    for module in dict.fromkeys(group.module for group in groups):
        module.register_forward_pre_hook(written.before, prepend=True, with_kwargs=True)
        module.register_forward_hook(written.after, prepend=True, with_kwargs=True)


def _gather_alone(param: DTensor) -> torch.Tensor:
    with torch.no_grad():
        return param.full_tensor()


def _mark(register: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Mark the inputs at which the backward of a block ends, by `register`, which puts copies in the place of lists and dicts: what a block
    writes into those would be lost. So they are left out, or, where nothing else has a gradient, marked inside."""
    if not any(map(can_change, (*args, *kwargs.values()))):
        return register(args, kwargs)
    direct = {key: value for key, value in (*enumerate(args), *kwargs.items()) if not can_change(value)}
    if any(leaf.requires_grad for leaf in tree_leaves(list(direct.values())) if isinstance(leaf, torch.Tensor)):
        (marked,), _ = register((list(direct.values()),), {})
        direct = dict(zip(direct, marked, strict=True))
        return tuple(direct.get(i, value) for i, value in enumerate(args)), {key: direct.get(key, value) for key, value in kwargs.items()}
    places = [place for value in (*args, *kwargs.values()) for place in places_in(value)]
    if places:
        marked, _ = register(tuple(holder[key] for holder, key in places), {})
        for (holder, key), tensor in zip(places, marked, strict=True):
            holder[key] = tensor
    return args, kwargs

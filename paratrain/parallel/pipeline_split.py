"""Which stage holds what of a model, and the user's own forward run by one stage.

A stage runs the whole forward of the user's module, unedited, with three things intercepted:

    before its first block  every weight is a ghost (see `pipeline_ghost.py`), and blocks of earlier stages answer with ghosts
    at its first block      the activations that the stage before sent take the places of their ghosts
    after its last block    forward is left, with the activations that later stages need

What later stages need is found once for each kind of batch: the forward runs on a twin of the module that is all ghosts, and each
tensor computed on one stage and used on a later one is a slot of the message between them. So skip connections, residuals from the
embedding and encoder outputs are carried, and what does not hang on weights (positions, masks) is computed again where it is used.
What blocks leave in attributes, lists and the like for others to read (see `pipeline_places.py`) travels with the activations.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from paratrain import distributed, rng
from paratrain.agreement import where
from paratrain.compat import no_reentrant_checkpoints
from paratrain.copies import held
from paratrain.distributed import seed_for
from paratrain.errors import UserError
from paratrain.parallel import pipeline_places as places
from paratrain.parallel.pipeline_ghost import Ghost, ghost
from paratrain.parallel.pipeline_trace import MODULE, Left, Route, Slot, Trace, Watch, arguments, buffers_kept, in_order
from paratrain.parallel.pipeline_twin import Twin
from paratrain.parallel.tp_split import plain

log = logging.getLogger(__name__)


@dataclass
class Stages:
    """A module cut into stages.

    Attributes:
        model: the user's module.
        names: of the blocks, in order.
        firsts: the first block of each stage.
        twin: a copy of the module whose weights are all ghosts.
        device: where stages run.
        dropped: weights that this rank does not hold: (module, name in it, what stands in its place).
        holds: (name of a weight, stage) -> whether the rank of the stage holds it.
        read: what reads the model after its forward: the loss function.
        routes: kind of batch -> how it passes through the stages.
        visit: the forward that is running now on one stage, if any.
        alone: what a call of the module outside of a step does.
    """

    model: nn.Module
    names: list[str]
    firsts: list[int]
    twin: nn.Module
    device: torch.device
    blocks: dict[nn.Module, int] = field(default_factory=dict)
    loose: dict[nn.Module, nn.Module] = field(default_factory=dict)  # modules with weights outside the blocks -> their twins
    swaps: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)  # weights of modules that contain blocks
    dropped: list[tuple[nn.Module, str, Ghost]] = field(default_factory=list)
    told: bool = False  # the program has asked for the parameters, and was told that these are not all
    holds: Callable[[str, int], bool] | None = None
    read: Any = None
    routes: dict[Any, Route] = field(default_factory=dict)
    answers: dict[Any, Any] = field(default_factory=dict)
    visit: Visit | None = None
    alone: Callable | None = None
    _last: Visit | None = None

    @property
    def stages(self) -> int:
        return len(self.firsts)

    def stage(self, position: int) -> int:
        """The stage that runs block `position`, and what stands before it."""
        return max(stage for stage, first in enumerate(self.firsts) if first <= position)

    def message(self, route: Route, stage: int) -> list[Slot]:
        """The slots that `stage` receives, in the order in which they are sent."""
        return [crossing.slot for crossing in route.crossings if crossing.made < stage <= crossing.used]

    def misplaced(self, origin: str, stage: int) -> UserError:
        return UserError(
            f"parallel.pp: stage {stage} uses {origin!r}, which it does not hold; name the stages that use it: "
            f"pipeline.place={{{origin}: {[0, stage] if stage else list(range(self.stages))}}} (numbers of stages, -1 the last)"
        )

    def swap(self, names: Iterable[str]) -> None:
        """Hide these weights of blocks until the stage is at its first block: they are used outside of their blocks, by other stages, too."""
        for name in names:
            path, _, key = name.rpartition(".")
            empty = _at(self.twin, path)._parameters[key]
            assert empty is not None
            self.swaps.append((_at(self.model, path), key, empty))

    @contextmanager
    def whole_lists(self) -> Iterator[None]:
        """Let `parameters()` of every module name the weights of other stages too, as ghosts: what sums over all needs all."""
        told, self.told = self.told, True
        for module, key, empty in self.dropped:
            module._parameters[key], empty.travels = empty, True  # type: ignore[assignment]
        try:
            yield
        finally:
            self.told = told
            for module, key, empty in self.dropped:
                empty.travels = False
                del module._parameters[key]

    def tell(self) -> None:
        """Say once that `parameters()` has not all weights, where it is the program that asks between steps."""
        if self.told or self.visit is not None or (place := where.asks(sys._getframe(2))) is None:
            return
        self.told = True
        if distributed.rank() == 0:
            held = sum(1 for _ in self.model.parameters())
            log.warning(
                "parallel.pp: parameters() at %s gives the %d weights of this rank's stages, and not the %d that other ranks hold: what changes, freezes or watches "
                "each weight by itself is right so, and what is made of all of them (an average that is kept, a norm, a checkpoint) is not; write "
                "ema={decay: 0.999} and engine.ema_state_dict() for a moving average, engine.full_state_dict(), which every rank must call, for the rest",
                place,
                held,
                len(self.dropped),
            )

    def refresh(self) -> None:
        """Let the twin see the buffers as they are now; layouts replace them."""
        for name, module in self.twin.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, Ghost):
                    module._buffers[key] = _at(self.model, name)._buffers[key]

    def route(self, kind: Any, inputs: Any, call: Callable[[nn.Module, Any], Any]) -> Route:
        """How inputs of this kind pass: found by running `call(twin, inputs)` once."""
        if kind not in self.routes:
            trace = Trace(self, self.read)
            with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not tell of changes
                trace.run(inputs, call)
            self.routes[kind] = trace.route()
        return self.routes[kind]

    def run(self, call: Callable[[nn.Module], Any], stage: int, route: Route, received: Sequence[torch.Tensor], seed: int) -> Any:
        """Run `stage`: the outputs of the model from the last stage, from others the tensors of the next message.

        What other stages' blocks leave in the model stays until `clear`, so that the loss can read it.

        Args:
            call: calls a module with the inputs of the batch.
            received: the tensors of `message(route, stage)`.
            seed: of what every stage must draw alike.
        """
        self.clear()
        visit = self.visit = self._last = Visit(self, stage, route, dict(zip(self.message(route, stage), received, strict=True)), seed)
        try:
            with no_reentrant_checkpoints(), visit.python_draws(-1):
                return call(self.model)
        finally:
            self.visit = None
            visit.give_back()

    def clear(self) -> None:
        """Take back what the last run left in the model in the place of other stages' blocks."""
        if self._last is not None:
            self._last.undo()
            self._last = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The model with what its own blocks left in it alone, without what stands for other stages'."""
        laid = self._last.laid if self._last is not None else []
        now = places.Before({(number,): container for number, (container, *_) in enumerate(laid)})
        if self._last is not None:
            self._last.undo()
        try:
            yield
        finally:
            if self._last is not None:
                now.restore()
                self._last.laid = laid

    def answer(self, index: int, args: Any, kwargs: Any, route: Route) -> tuple[Any, list[Any]]:
        """What block `index` of another stage returns, and the values of `route.left[index]`: ghosts of the shapes that its twin computes.

        Remembered only where it is nothing but ghosts: what hangs on no weight, as a mask that is passed on, differs from batch to batch.
        """
        left = route.left.get(index, [])
        leaves, spec = tree_flatten((args, kwargs))
        key = (index, spec, *(_form(leaf) for leaf in leaves))
        if key in self.answers and all(each.remembered for each in left):
            return self.answers[key], [each.change.value for each in left]
        block = _at(self.twin, self.names[index])
        looks = index in route.changing or bool(route.touched)
        roots = places.roots(self.twin) | arguments(args, kwargs) if looks else {}
        untouched = places.Before(places.containers(roots))
        self._show(roots, route)
        before = places.Before(places.containers(roots))
        try:
            with torch.no_grad(), buffers_kept(block):
                result = block(*args, **kwargs)
            now = {change.where: change.value for change in before.changes()} if left else {}
        finally:
            before.restore()
            untouched.restore()
        if missing := [each.change for each in left if each.change.where not in now]:
            raise self.changed(index, missing[0])
        values = [now[each.change.where] for each in left]
        if all(isinstance(leaf, Ghost | None) for leaf in tree_leaves((result, values))):
            self.answers[key] = result
        return result, values

    def _show(self, roots: dict[str, Any], route: Route) -> None:
        """Let the twin see what this forward has left in the model so far."""
        model = places.roots(self.model) if route.touched else {}
        for path, keys in route.touched.items():
            real, ours = places.at(model, path), places.at(roots, path)
            if real is not None and ours is not None and real is not ours:
                places.copy_entries(real, ours, keys)

    def changed(self, index: int, change: places.Change) -> UserError:
        return UserError(
            f"parallel.pp: block {self.names[index]!r} leaves other things in {places.text(change.path)} than it did when its stages were found; let "
            "it return them, or write parallel.pp=1"
        )


class Visit:
    """One forward of one stage."""

    def __init__(self, split: Stages, stage: int, route: Route, values: dict[Slot, torch.Tensor], seed: int):
        self.split, self.stage, self.route, self.values, self.seed = split, stage, route, values, seed
        self.first = split.firsts[stage]
        self.last = (*split.firsts, len(split.names))[stage + 1]
        self.out = split.message(route, stage + 1) if stage + 1 < split.stages else []
        # Where messages hold nothing but what the block before the boundary returns, nothing has to watch the operations outside.
        from_blocks = all(slot.event == -1 and slot.position == self.first - 1 for slot in values)
        from_blocks = from_blocks and all(slot.event == -1 and slot.position == self.last - 1 for slot in self.out)
        self.watch = None if from_blocks and not route.draws else Watch(self)
        self.wanted = {*values, *self.out}
        self.ghosts: dict[int, tuple[Ghost, Slot]] = {}
        self.position = self.event = 0
        self.inside = 0
        self.live = False
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.laid: list[tuple[Any, places.Change, Any, dict[Any, Any]]] = []

    def begin(self) -> None:
        """Put ghosts in the places of the weights beside blocks until the first block of the stage; called once sharded ones are gathered."""
        if not self.first:
            self.live = True
            return
        for module, name, empty in self.split.swaps:
            if (param := module._parameters.get(name)) is not None and not isinstance(param, Ghost):
                self.kept.append((module, name, param))
                module._parameters[name] = empty  # type: ignore[assignment]

    def give_back(self) -> None:
        for module, name, param in self.kept:
            module._parameters[name] = param
        self.kept = []

    def block(self, module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        index = self.split.blocks[module]
        if self.inside:  # a block called by another: part of it
            return call(*args, **kwargs)
        in_order(self.split, index, self.position)
        left = self.route.left.get(index, ())
        if index < self.first:
            with self.python_draws(index):
                result, values = self.split.answer(index, args, kwargs, self.route)
            result = self.keep(places.replaced(result, _fresh_ghost), -1)
            if left:
                self._lay(left, values, arguments(args, kwargs))
        else:
            args, kwargs = self._settled((args, kwargs))
            before = self._look(left, args, kwargs) if left else None
            self.inside += 1
            try:
                with self.python_draws(index):
                    result = call(*args, **kwargs)
            finally:
                self.inside -= 1
            result = self.keep(result, -1)
            if before is not None:
                self._take(index, left, before.changes())
        self.position, self.event = index + 1, 0
        if self.position == self.first:
            self.live = True
            self.give_back()
            self._arrive()
        if self.position == self.last and self.stage + 1 < self.split.stages:
            raise _Done([self.outgoing(slot) for slot in self.out])
        return result

    def module(self, module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        if self.inside:
            return call(*args, **kwargs)
        target = call if self.live else self.split.loose[module]
        args, kwargs = self._settled((args, kwargs))
        self.inside += 1
        try:
            result = target(*args, **kwargs)
        finally:
            self.inside -= 1
        return self.operation(result, MODULE)

    def operation(self, result: Any, by: str) -> Any:
        expected = self.route.names.get(self.position, ()) if self.watch is not None else ()
        if self.event < len(expected) and expected[self.event] != by:
            raise UserError(
                f"parallel.pp: forward does another operation outside of the blocks ({by}) than it did when its stages were found "
                f"({expected[self.event]}): it may ask what kind its tensors are, or choose by values; move this into a block, or train with parallel.pp=1"
            )
        result = self.keep(result, self.event)
        self.event += 1
        return result

    @contextmanager
    def draws(self) -> Iterator[None]:
        """Around an operation outside of the blocks that draws: every stage draws the same."""
        device = self.split.device
        with rng.preserved(device):
            rng.reseed(device, self.seed, self.position, self.event)
            yield

    def python_draws(self, index: int) -> AbstractContextManager:
        """Around what may draw from `random` or numpy: a block, or with -1 all of forward."""
        return rng.python_seeded(seed_for(self.seed, index + 1)) if self.route.draws_python else nullcontext()

    def used(self, args: Any, kwargs: Any, result: Any) -> None:
        """What a trace notes; see `Trace.used`."""

    def keep(self, result: Any, event: int) -> Any:
        """Remember the slots in a result; put the values of a message in the places of their ghosts."""
        if not self.wanted:
            return result
        arrives = self.first == self.position + 1 and event == -1
        numbers = itertools.count()

        def kept(leaf: torch.Tensor) -> torch.Tensor:
            return self._kept(leaf, Slot(self.position, event, next(numbers)), arrives)

        put = places.replaced(result, kept)
        return put if arrives else result

    def _kept(self, leaf: torch.Tensor, slot: Slot, arrives: bool) -> torch.Tensor:
        if slot not in self.wanted:
            return leaf
        if not isinstance(leaf, Ghost) or self.live:  # a ghost made here hangs on a weight that should be here
            self.values[slot] = leaf
        elif arrives and slot in self.values:
            return self.values[slot]
        else:
            self.ghosts[id(leaf)] = leaf, slot
        return leaf

    def real(self, tree: Any) -> Any:
        """`tree` with the values of all ghosts that have arrived."""
        if not self.live or not self.ghosts:
            return tree
        return tree_map_only(Ghost, self._value, tree)

    def _settled(self, tree: Any) -> Any:
        """The same, written into the lists and dicts that the tree holds."""
        return places.settle(tree, self._value) if self.live and self.ghosts else tree

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self.ghosts.get(id(tensor))
        return tensor if known is None else self.values.get(known[1], tensor)

    def outgoing(self, slot: Slot) -> torch.Tensor:
        value = self.values.get(slot)
        if value is None or isinstance(value, Ghost):
            origin = value.origin if value is not None else "a weight"
            raise self.split.misplaced(origin, self.stage)
        return plain(value)  # messages hold whole tensors

    # ------------------------------------------------------------------ what blocks leave elsewhere

    def _look(self, left: Sequence[Left], args: Any, kwargs: Any) -> places.Before:
        """The places that a block is about to change."""
        roots = places.roots(self.split.model) | arguments(args, kwargs)
        found = {path: places.at(roots, path) for path in {each.change.path for each in left}}
        return places.Before({path: container for path, container in found.items() if container is not None})

    def _take(self, index: int, left: Sequence[Left], changes: Sequence[places.Change]) -> None:
        """Remember the slots in what a block has left."""
        now = {change.where: places.tensors(change.value) for change in changes}
        for change, slots in left:
            found = now.get(change.where, [])
            if self.wanted.intersection(slots) and len(found) != len(slots):
                raise self.split.changed(index, change)
            for slot, tensor in zip(slots, found, strict=False):
                if slot in self.wanted:
                    self.values[slot] = tensor

    def _lay(self, left: Sequence[Left], values: Sequence[Any], given: dict[str, Any]) -> None:
        """Leave in the model what a block of another stage leaves in it."""
        roots = places.roots(self.split.model) | given
        arrives = self.first == self.position + 1
        for (change, slots), value in zip(left, values, strict=True):
            numbers = iter(slots)
            value = places.replaced(value, lambda leaf, numbers=numbers: self._kept(_fresh_ghost(leaf), next(numbers), arrives))  # type: ignore[misc]
            container = places.at(roots, change.path)
            if container is None:
                raise self.split.changed(self.position, change)
            self.laid.append((container, change, value, places.entries(container) or {}))
            places.lay(container, change, value)

    def _arrive(self) -> None:
        """Put what has arrived in the places of the model that hold its ghosts."""
        places_ = self.route.arrive.get(self.stage, ())
        roots = places.roots(self.split.model) if places_ else {}
        for path, key, slots in places_:
            container = places.at(roots, path)
            old = (places.entries(container) or {}).get(key)
            numbers = iter(slots)
            new = places.replaced(old, lambda leaf, numbers=numbers: self._arrived(leaf, next(numbers, None)))  # type: ignore[misc]
            if new is not old:
                places.lay(container, places.Change(path, "set", key, new), new)
                self.laid = [(box, change, new if value is old else value, before) for box, change, value, before in self.laid]

    def _arrived(self, leaf: torch.Tensor, slot: Slot | None) -> torch.Tensor:
        return self.values.get(slot, leaf) if isinstance(leaf, Ghost) and slot is not None else leaf

    def undo(self) -> None:
        for container, change, value, before in reversed(self.laid):
            places.take_back(container, change, value, before)
        self.laid = []


class _Done(BaseException):
    """Leaves forward when the last block of a stage is done."""

    def __init__(self, outputs: list[torch.Tensor]):
        self.outputs = outputs


def _fresh_ghost(leaf: torch.Tensor) -> torch.Tensor:
    return Ghost(leaf.meta, leaf.device, leaf.origin) if isinstance(leaf, Ghost) else leaf


def _form(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, isinstance(leaf, Ghost)
    return leaf if isinstance(leaf, int | float | str | bool | None) else type(leaf)


def _is_users(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return not (getattr(hook, "__module__", None) or "").startswith(("paratrain.", "torch.distributed."))


def _at(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


# ---------------------------------------------------------------------- cutting


def split(model: nn.Module, names: list[str], firsts: list[int], device: torch.device) -> Stages:
    """Prepare `model` to be run stage by stage; nothing of it is dropped yet (see `drop`).

    Raises:
        UserError: the module cannot be copied.
    """
    twin = _twin(model, device)
    cut = Stages(model, names, firsts, twin, device)
    cut.blocks = {_at(model, name): index for index, name in enumerate(names)}
    inside = {module for block in cut.blocks for module in block.modules()}
    for name, module in list(model.named_modules()):
        if module in inside or not any(param is not None for param in module._parameters.values()):
            continue
        if name and not any(block in set(module.modules()) for block in cut.blocks):
            cut.loose[module] = _at(twin, name)
        else:
            counterpart = _at(twin, name)
            cut.swaps += [(module, key, empty) for key, empty in counterpart._parameters.items() if empty is not None]
    for module in cut.blocks:
        _stage_class(module, _Block, cut)
    for name in names:
        _stage_class(_at(twin, name), Twin, cut)
    for module in cut.loose:
        _stage_class(module, _Loose, cut)
    _stage_class(model, _Root, cut)
    return cut


def drop(cut: Stages, names: set[str], device: torch.device) -> None:
    """Put ghosts in the places of the named weights, with the buffers of their modules: another stage holds them."""
    model, dropped = cut.model, cut.dropped
    for path, module in model.named_modules():
        mine = [key for key in module._parameters if (f"{path}.{key}" if path else key) in names]
        for key in mine:
            param = module._parameters.pop(key)
            assert param is not None
            _refuse_alias(path, module, key, param)
            empty = module.__dict__[key] = ghost(param, device, f"{path}.{key}" if path else key)
            empty.travels = False
            empty._is_param = True  # isinstance(ghost, nn.Parameter) holds, as of the weight, wherever a program assigns or looks for it
            dropped.append((module, key, empty))
        if mine and not any(param is not None for param in module._parameters.values()):
            for key in [key for key, buffer in module._buffers.items() if buffer is not None]:
                buffer = module._buffers.pop(key)
                assert buffer is not None
                module.__dict__[key] = ghost(buffer, device, f"{path}.{key}" if path else key)
    without = {id(module) for module, _, _ in dropped}
    for module in list(model.modules()):
        if module._modules and not isinstance(module, torch.jit.ScriptModule) and any(id(inner) in without for inner in module.modules()):
            _stage_class(module, _Partly, cut)


def _refuse_alias(path: str, module: nn.Module, key: str, param: nn.Parameter) -> None:
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [None if weight is param else weight for weight in module._flat_weights]
        return
    for attribute, value in vars(module).items():
        if attribute not in ("_parameters", "_modules", "_buffers") and any(leaf is param for leaf in tree_leaves(value)):
            raise UserError(
                f"parallel.pp: {path}.{attribute} holds the weight {key!r} a second time, past the module's parameters, so it would stay on every stage; "
                "drop that attribute, or train with parallel.pp=1"
            )


def _twin(model: nn.Module, device: torch.device) -> nn.Module:
    memo: dict[int, Any] = {id(tensor): tensor.detach() for tensor in held(model) if not tensor.is_leaf}  # a hook computes them anew
    for name, param in model.named_parameters():
        memo[id(param)] = ghost(param.detach(), device, name)
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = ghost(buffer, device, name) if _beside_weights(model, name) else buffer
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"parallel.pp: the model cannot be copied, which finding its stages needs: {error}") from error


def _beside_weights(model: nn.Module, name: str) -> bool:
    return any(param is not None for param in _at(model, name.rpartition(".")[0])._parameters.values())


def _stage_class(module: nn.Module, kind: type, cut: Stages) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (kind, cls), {"_split": cut, "__module__": cls.__module__})


class _Block(nn.Module):
    _split: Stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit = self._split.visit
        if visit is None:
            return super().__call__(*args, **kwargs)
        return visit.block(self, super().__call__, args, kwargs)


class _Loose(nn.Module):
    _split: Stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit = self._split.visit
        if visit is None:
            return super().__call__(*args, **kwargs)
        return visit.module(self, super().__call__, args, kwargs)


class _Partly(nn.Module):
    """A module of whose weights this rank holds some, which are all that is in its lists of parameters."""

    _split: Stages

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        self._split.tell()
        return super().parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._split.tell()
        return super().named_parameters(*args, **kwargs)


class _Root(nn.Module):
    _split: Stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit = self._split.visit
        if visit is None and self._split.alone is not None:
            return self._split.alone(*args, **kwargs)
        if visit is not None and visit.stage + 1 < self._split.stages and any(map(_is_users, self._forward_hooks.values())):
            return self._without_hooks(super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def _without_hooks(self, call: Any, args: Any, kwargs: Any) -> Any:
        """The user's hooks on outputs are for those of the model, which the last stage has; the others return messages."""
        hooks = self._forward_hooks
        self._forward_hooks = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_users(hook))
        try:
            return call(*args, **kwargs)
        finally:
            self._forward_hooks = hooks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        visit = self._split.visit
        assert visit is not None, "a stage runs only as part of a pipeline"
        visit.begin()
        try:
            if visit.watch is None:
                outputs = super().forward(*args, **kwargs)
            else:
                with visit.watch:
                    outputs = super().forward(*args, **kwargs)
        except _Done as done:
            return tuple(done.outputs)
        if visit.stage + 1 < self._split.stages:
            raise UserError(
                f"parallel.pp: forward ended before {self._split.names[visit.last - 1]!r}, the last block of stage {visit.stage}, was called"
            )
        if visit.ghosts:
            outputs = places.replaced(outputs, visit._value)
        for leaf in places.tensors(outputs):
            if isinstance(leaf, Ghost):
                raise self._split.misplaced(leaf.origin, visit.stage)
        return outputs

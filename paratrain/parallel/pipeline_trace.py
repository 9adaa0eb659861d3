"""The forward of a model run once on ghosts: what each stage must be sent, and what blocks leave elsewhere than in their results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import rng
from paratrain.compat import no_reentrant_checkpoints
from paratrain.errors import UserError
from paratrain.parallel import pipeline_places as places
from paratrain.parallel.pipeline_ghost import Ghost

if TYPE_CHECKING:
    from paratrain.parallel.pipeline_split import Stages

BLOCK, MODULE = "a block", "a module"  # what computes a tensor, beside functions by their names
LEFT = -2  # event of what block `position` leaves elsewhere than in its result
_DRAWS = frozenset(
    [
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "randint_like",
        "bernoulli",
        "multinomial",
        "normal",
        "poisson",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "rrelu",
        "gumbel_softmax",
        "uniform_",
        "normal_",
        "bernoulli_",
        "random_",
        "exponential_",
        "geometric_",
        "cauchy_",
        "log_normal_",
        "dropout_",
    ]
)
_DIFFERENTIATES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class Slot(NamedTuple):
    """A tensor that the forward computes outside of the blocks, or that a block returns or leaves somewhere.

    Attributes:
        position: blocks that were done before it was computed.
        event: number of the operation since then; -1 for what block `position` returns, -2 for what it leaves in some place.
        leaf: number of the tensor in the result of the operation.
    """

    position: int
    event: int
    leaf: int


class Crossing(NamedTuple):
    """A slot that some boundary carries: computed on stage `made` by operation `by`, last used on stage `used`."""

    slot: Slot
    by: str
    made: int
    used: int


class Left(NamedTuple):
    """Changes that a block made beside its result, with the slots of the tensors in their values."""

    change: places.Change
    slots: tuple[Slot, ...]

    @property
    def remembered(self) -> bool:
        """Whether the value is nothing but what hangs on weights, so that it has one form whatever the batch."""
        return all(isinstance(leaf, Ghost | None) for leaf in tree_leaves(self.change.value))


@dataclass
class Route:
    """How micro-batches of one kind pass through the stages.

    Attributes:
        crossings: the slots that cross boundaries.
        left: block -> what it leaves in places that something behind it reads.
        changing: blocks that leave anything anywhere.
        touched: path -> keys, of all that forward changes in the model.
        arrive: stage -> places that hold tensors which arrive there, with their slots: (path, key, slots of its tensors).
        names: position -> names of the operations outside of the blocks since then, as far as slots are numbered by them.
        writes: whether forward writes into its inputs.
        draws: whether forward draws values outside of blocks that hang on no weight, which every stage must draw alike.
        draws_python: the same of the generators of `random` and numpy, in blocks or outside.
    """

    crossings: list[Crossing]
    left: dict[int, list[Left]] = field(default_factory=dict)
    changing: frozenset[int] = frozenset()
    touched: dict[places.Path, set[Any]] = field(default_factory=dict)
    arrive: dict[int, list[tuple[places.Path, Any, list[Slot | None]]]] = field(default_factory=dict)
    names: dict[int, list[str]] = field(default_factory=dict)
    writes: bool = False
    draws: bool = False
    draws_python: bool = False


class Watch(TorchFunctionMode):
    """Numbers the operations outside of the blocks and puts arrived values in the places of their ghosts."""

    def __init__(self, visit: Any):
        super().__init__()
        self.visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        visit = self.visit
        if not visit.inside:
            args, kwargs = visit.real((args, kwargs))
        if func in _DIFFERENTIATES and any(isinstance(leaf, Ghost) for leaf in tree_leaves((args, kwargs))):
            raise UserError(
                f"parallel.pp: forward differentiates ({func.__name__}) through what several stages compute, and none of them can; keep the derivative "
                "inside one block, or train with parallel.pp=1"
            )
        name = getattr(func, "__name__", str(func))
        with visit.draws() if name in _DRAWS and not visit.inside else nullcontext():
            result = func(*args, **kwargs)
        if visit.inside or result is None:
            visit.used(args, kwargs, result)
            return result
        return visit.operation(result, name) if has_tensor(result) else result


class Trace:
    """The forward of the twin, all ghosts, with where each is made and used.

    Args:
        read: what reads the model after its forward: the loss function.
    """

    def __init__(self, split: Stages, read: Any):
        self.split, self.read = split, read
        self.position = self.event = self.inside = 0
        self.made: dict[int, tuple[Any, Slot]] = {}
        self.by: dict[Slot, str] = {}
        self.last_use: dict[Slot, int] = {}
        self.index = {split.twin.get_submodule(name): index for index, name in enumerate(split.names)}
        self.seen: list[int] = []
        self.writes = self.drew = self.drew_python = False
        self.touched: dict[places.Path, set[Any]] = {}
        self.weights = {id(param): name for name, param in split.twin.named_parameters(remove_duplicate=False)}
        self.left: dict[int, list[Left]] = {}
        self.held: dict[int, list[tuple[places.Path, Any, list[Slot | None]]]] = {}
        self.names: dict[int, list[str]] = {}
        self._roots = places.roots(split.twin)
        self._before: places.Before | None = None
        self._pending: Any = ()
        self._given: list[tuple[torch.Tensor, int]] = []

    def run(self, inputs: Any, call: Any) -> Any:
        """Run `call(twin, inputs)`; afterwards all that it changed is as it was.

        Raises:
            UserError: stages cannot follow this forward.
        """
        handles = []
        for module in (*self.index, *self.split.loose.values()):
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        inputs = places.replaced(inputs, torch.clone)
        versions = [(tensor, tensor._version) for tensor in places.tensors(inputs)]
        untouched = places.Before(places.containers(self._roots))
        try:
            state = rng.python_state()
            with rng.all_preserved(), no_reentrant_checkpoints(), buffers_kept(self.split.twin), Watch(self):
                outputs = call(self.split.twin, inputs)
                self.drew_python = rng.python_state() != state
            self.writes = any(tensor._version != version for tensor, version in versions)
            self._check_calls()
            self.use(outputs)
            self._use_of_loss()
            for change in untouched.changes():
                if change.kind != "drop":
                    self.touched.setdefault(change.path, set()).add(change.key)
            return outputs
        except UserError:
            raise
        except Exception as error:  # whatever code of the user's says to tensors without values
            raise UserError(
                f"parallel.pp: forward cannot be followed with tensors that have no values, which finding its stages needs: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; move what needs values into a block, or write parallel.pp=1"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            untouched.restore()

    def route(self) -> Route:
        """What the run found."""
        crossings = self._crossings()
        numbered = {slot.position: slot.event for slot, *_ in crossings if slot.event >= 0}  # sorted, so the last of each position
        needed = {slot for slot in self.last_use if slot.event == LEFT}
        left: dict[int, list[Left]] = {}
        for index, changes in self.left.items():
            read = {each.change.path for each in changes if needed.intersection(each.slots)}
            if chosen := [each for each in changes if each.change.path in read]:
                left[index] = chosen
        arrive = {
            stage: kept
            for stage, found in self.held.items()
            if (kept := [place for place in found if any(self._crosses_into(slot, stage) for slot in place[2])])
        }
        names = {position: self.names[position][: event + 1] for position, event in numbered.items()}
        return Route(crossings, left, frozenset(self.left), self.touched, arrive, names, self.writes, self.drew, self.drew_python)

    def _crosses_into(self, slot: Slot | None, stage: int) -> bool:
        return (
            slot is not None and slot in self.last_use and self.split.stage(self.last_use[slot]) >= stage > self.split.stage(slot.position)
        )

    def _crossings(self) -> list[Crossing]:
        ghosts = {slot for tensor, slot in self.made.values() if isinstance(tensor, Ghost)}  # others are computed where they are used
        stages = ((slot, self.split.stage(slot.position), self.split.stage(use)) for slot, use in sorted(self.last_use.items()))
        return [Crossing(slot, self.by[slot], made, used) for slot, made, used in stages if made < used and slot in ghosts]

    # ------------------------------------------------------------------ while it runs

    def real(self, tree: Any) -> Any:
        """Called before each operation outside of the blocks."""
        self._pending = tree
        return tree

    def operation(self, result: Any, by: str) -> Any:
        pending, self._pending = self._pending, ()
        self.use(pending)
        if by in _DRAWS and not all(isinstance(leaf, Ghost) for leaf in places.tensors(result)):
            self.drew = True
        self._record(result, self.event, by)
        self.names.setdefault(self.position, []).append(by)
        self.event += 1
        return result

    def draws(self) -> AbstractContextManager:
        """Around an operation outside of the blocks that draws."""
        return nullcontext()

    def used(self, args: Any, kwargs: Any, result: Any) -> None:
        """Called after an operation inside of a block, and after one without a result."""
        if result is None or has_tensor(result):
            self.use((args, kwargs))

    def use(self, tree: Any) -> None:
        for leaf in places.tensors(tree):
            if id(leaf) in self.made:
                slot = self.made[id(leaf)][1]
                self.last_use[slot] = max(self.position, self.last_use.get(slot, 0))
            elif id(leaf) in self.weights and isinstance(leaf, Ghost):
                self._check_held(self.weights[id(leaf)])

    def _check_held(self, name: str) -> None:
        stage = self.split.stage(self.position)
        if self.split.holds is not None and not self.split.holds(name, stage):
            raise self.split.misplaced(name, stage)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.inside:
            if module in self.index:
                in_order(self.split, self.index[module], self.position)
                refuse_reentrant(self.split.names[self.index[module]])
            self.use((args, kwargs))
            self._before = None
            self._given = [(leaf, leaf._version) for leaf in places.tensors((args, kwargs)) if not isinstance(leaf, Ghost)]
            if module in self.index and not places.simple(module):
                self._before = places.Before(places.containers(self._roots | arguments(args, kwargs)))
        self.inside += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        self.inside -= 1
        if self.inside or (result is None and module not in self.index):
            return None
        if module not in self.index:
            self.operation(result, MODULE)
            return None
        index = self.index[module]
        self._refuse_functions(index, result)
        if any(tensor._version != version for tensor, version in self._given):
            raise UserError(
                f"parallel.pp: block {self.split.names[index]!r} writes into a tensor that it is given, which stages that do not run it do not see; let "
                "it return a new one, or write parallel.pp=1"
            )
        # a block that hands on what it was given: what it returns is its own all the same
        result = places.replaced(result, lambda leaf: Ghost(leaf.meta, leaf.device, leaf.origin) if isinstance(leaf, Ghost) else leaf)
        self._record(result, -1, BLOCK)
        changes = self._before.changes() if self._before is not None else []
        if changes:
            self.left[index] = self._number(changes)
        self.seen.append(index)
        self.position, self.event = self.position + 1, 0
        if self.position in self.split.firsts:
            self.held[self.split.stage(self.position)] = list(self._places())
        return result

    def _number(self, changes: list[places.Change]) -> list[Left]:
        """The changes of a block, with a slot for each tensor that they left."""
        left, number = [], 0
        for change in changes:
            slots = []
            for tensor in places.tensors(change.value):
                slots.append(Slot(self.position, LEFT, number))
                number += 1
                if id(tensor) not in self.weights:
                    self.made[id(tensor)], self.by[slots[-1]] = (tensor, slots[-1]), BLOCK
            left.append(Left(change, tuple(slots)))
        return left

    def _places(self) -> Iterator[tuple[places.Path, Any, list[Slot | None]]]:
        """Places of the model that hold tensors which were made by now."""
        for path, container in places.containers(self._roots).items():
            for key, value in (places.entries(container) or {}).items():
                if isinstance(value, torch.Tensor | tuple):
                    slots = [self.made[id(leaf)][1] if id(leaf) in self.made else None for leaf in places.tensors(value)]
                    if any(slots):
                        yield path, key, slots

    def _use_of_loss(self) -> None:
        """What blocks left where the loss function can read it is used where the loss is computed."""
        if self.read is None or not self.left:
            return
        read = places.reachable(self.read)
        model = places.roots(self.split.model)
        for changes in self.left.values():
            for change, slots in changes:
                container = places.at(model, change.path)
                if container is not None and id(container) in read:
                    self.last_use |= dict.fromkeys(slots, self.position)

    def _record(self, result: Any, event: int, by: str) -> None:
        for number, leaf in enumerate(places.tensors(result)):
            if isinstance(leaf, Ghost) and id(leaf) not in self.made:
                slot = Slot(self.position, event, number)
                self.made[id(leaf)], self.by[slot] = (leaf, slot), by

    def _refuse_functions(self, index: int, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, FunctionType | MethodType) or (callable(leaf) and not isinstance(leaf, type | torch.Tensor)):
                raise UserError(
                    f"parallel.pp: block {self.split.names[index]!r} returns a {type(leaf).__name__}, which a stage cannot hand to the next; let its "
                    "forward compute what is needed and return tensors, or write parallel.pp=1"
                )

    def _check_calls(self) -> None:
        if self.seen != list(range(len(self.index))):
            raise UserError(
                f"parallel.pp: forward calls {len(self.seen)} of the {len(self.index)} blocks, once and in the order in which they are defined, is what "
                f"stages need ({', '.join(self.split.names[:3])}, ...); write memory.blocks=[...] with modules that forward calls so"
            )


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give buffers, and tensors in attributes, the values back that they had: a run on ghosts is no forward of the model's."""
    held = [tensor for inner in module.modules() for tensor in (*inner._buffers.values(), *vars(inner).values())]
    real = {id(tensor): tensor for tensor in held if type(tensor) is torch.Tensor and not tensor.is_meta}.values()
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in real]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


def arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call as roots of places."""
    return {"its arguments": (list(args), dict(kwargs))}


def refuse_reentrant(name: str) -> None:
    """Raise if a block runs inside of an autograd function, whose backward would run it again without its stage."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx):
            raise UserError(
                f"parallel.pp: forward calls block {name!r} inside of an autograd function (as reentrant checkpointing does), whose backward runs it again "
                "past its stage; write memory.recompute=full in its place, or torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back  # type: ignore[assignment]


def in_order(split: Stages, index: int, position: int) -> None:
    """Raise unless block `index` is the one to come after `position` others."""
    if index != position:
        expected = split.names[position] if position < len(split.names) else "none"
        raise UserError(
            f"parallel.pp: forward calls block {split.names[index]!r} where {expected!r} was expected: stages need every block to be called once, in the "
            "order in which they are defined; write memory.blocks=[...] with modules that forward calls so, or parallel.pp=1"
        )


def has_tensor(result: Any) -> bool:
    """Whether a function returned tensors, and not the answer to a question about one."""
    return isinstance(result, torch.Tensor) or (
        isinstance(result, tuple | list) and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))
    )

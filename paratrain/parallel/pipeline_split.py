"""Which stage holds what of a model, and the user's own forward run by one stage.

A stage runs the whole forward of the user's module, unedited, with three things intercepted:

    before its first block  every weight is a ghost (see `pipeline_ghost.py`), and blocks of earlier stages answer with ghosts
    at its first block      the activations that the stage before sent take the places of their ghosts
    after its last block    forward is left, with the activations that later stages need

What later stages need is found once for each kind of batch: the forward runs on a twin of the module that is all ghosts, and each
tensor computed on one stage and used on a later one is a slot of the message between them. So skip connections, residuals from the
embedding and encoder outputs are carried, and what does not hang on weights (positions, masks) is computed again where it is used.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from paratrain.copies import held
from paratrain.errors import UserError
from paratrain.parallel.pipeline_ghost import Ghost, ghost
from paratrain.parallel.tp_split import plain

_BLOCK, _MODULE = "a block", "a module"  # what computes a tensor, beside functions by their names


class Slot(NamedTuple):
    """A tensor that the forward computes outside of the blocks, or that a block returns.

    Attributes:
        position: blocks that were done before it was computed.
        event: number of the operation since then; -1 for what block `position` returns.
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


@dataclass
class Stages:
    """A module cut into stages.

    Attributes:
        model: the user's module.
        names: of the blocks, in order.
        firsts: the first block of each stage.
        twin: a copy of the module whose weights are all ghosts.
        routes: kind of batch -> the slots that cross boundaries.
        visit: the forward that is running now on one stage, if any.
        alone: what a call of the module outside of a step does.
    """

    model: nn.Module
    names: list[str]
    firsts: list[int]
    twin: nn.Module
    blocks: dict[nn.Module, int] = field(default_factory=dict)
    loose: dict[nn.Module, nn.Module] = field(default_factory=dict)  # modules with weights outside the blocks -> their twins
    swaps: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)  # weights of modules that contain blocks
    routes: dict[Any, list[Crossing]] = field(default_factory=dict)
    answers: dict[Any, Any] = field(default_factory=dict)
    visit: Visit | None = None
    alone: Callable | None = None

    @property
    def stages(self) -> int:
        return len(self.firsts)

    def stage(self, position: int) -> int:
        """The stage that runs block `position`, and what stands before it."""
        return max(stage for stage, first in enumerate(self.firsts) if first <= position)

    def message(self, route: list[Crossing], stage: int) -> list[Slot]:
        """The slots that `stage` receives, in the order in which they are sent."""
        return [crossing.slot for crossing in route if crossing.made < stage <= crossing.used]

    def refresh(self) -> None:
        """Let the twin see the buffers as they are now; layouts replace them."""
        for name, module in self.twin.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, Ghost):
                    module._buffers[key] = _at(self.model, name)._buffers[key]

    def route(self, kind: Any, call: Any) -> list[Crossing]:
        """What crosses the boundaries under inputs of this kind: found by running `call(twin)` once."""
        if kind not in self.routes:
            trace = _Trace(self)
            with torch.no_grad():
                outputs = trace.run(call)
            trace.use(outputs)
            self.routes[kind] = trace.crossings()
        return self.routes[kind]

    def run(self, call: Any, stage: int, route: list[Crossing], received: Sequence[torch.Tensor]) -> Any:
        """Run `stage`: the outputs of the model from the last stage, from others the tensors of the next message.

        Args:
            call: calls a module with the inputs of the batch.
            received: the tensors of `message(route, stage)`.
        """
        visit = self.visit = Visit(self, stage, route, dict(zip(self.message(route, stage), received, strict=True)))
        try:
            return call(self.model)
        finally:
            self.visit = None
            visit.give_back()

    def answer(self, index: int, args: Any, kwargs: Any) -> Any:
        """What block `index` of another stage returns: ghosts of the shapes that its twin computes."""
        block = _at(self.twin, self.names[index])
        leaves, spec = tree_flatten((args, kwargs))
        key = (index, spec, *(_form(leaf) for leaf in leaves))
        if key not in self.answers:
            with torch.no_grad():
                self.answers[key] = block(*args, **kwargs)
        return tree_map_only(Ghost, lambda g: Ghost(g.meta, g.device, g.origin), self.answers[key])


class Visit:
    """One forward of one stage."""

    def __init__(self, split: Stages, stage: int, route: list[Crossing], values: dict[Slot, torch.Tensor]):
        self.split, self.stage, self.values = split, stage, values
        self.first = split.firsts[stage]
        self.last = (*split.firsts, len(split.names))[stage + 1]
        self.out = split.message(route, stage + 1) if stage + 1 < split.stages else []
        # Where messages hold nothing but what the block before the boundary returns, nothing has to watch the operations outside.
        from_blocks = all(slot.event == -1 and slot.position == self.first - 1 for slot in values)
        from_blocks = from_blocks and all(slot.event == -1 and slot.position == self.last - 1 for slot in self.out)
        self.watch = None if from_blocks else _Watch(self)
        self.wanted = {crossing.slot: crossing.by for crossing in route if crossing.slot in values or crossing.slot in self.out}
        self.ghosts: dict[int, tuple[Ghost, Slot]] = {}
        self.position = self.event = 0
        self.inside = 0
        self.live = False
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def begin(self) -> None:
        """Put ghosts in the places of the weights beside blocks until the first block of the stage; called once sharded ones are gathered."""
        if not self.first:
            self.live = True
            return
        for module, name, empty in self.split.swaps:
            if (param := module._parameters.get(name)) is not None:
                self.kept.append((module, name, param))
                del module._parameters[name]
                module.__dict__[name] = empty

    def give_back(self) -> None:
        for module, name, param in self.kept:
            module.__dict__.pop(name, None)
            module._parameters[name] = param
        self.kept = []

    def block(self, module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        index = self.split.blocks[module]
        if self.inside:  # a block called by another: part of it
            return call(*args, **kwargs)
        _in_order(self.split, index, self.position)
        if index < self.first:
            result = self.split.answer(index, args, kwargs)
        else:
            args, kwargs = self.real((args, kwargs))
            self.inside += 1
            try:
                result = call(*args, **kwargs)
            finally:
                self.inside -= 1
        result = self.keep(result, -1, _BLOCK)
        self.position, self.event = index + 1, 0
        if self.position == self.first:
            self.live = True
            self.give_back()
        if self.position == self.last and self.stage + 1 < self.split.stages:
            raise _Done([self.outgoing(slot) for slot in self.out])
        return result

    def module(self, module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        if self.inside:
            return call(*args, **kwargs)
        target = call if self.live else self.split.loose[module]
        args, kwargs = self.real((args, kwargs))
        self.inside += 1
        try:
            result = target(*args, **kwargs)
        finally:
            self.inside -= 1
        return self.operation(result, _MODULE)

    def operation(self, result: Any, by: str) -> Any:
        result = self.keep(result, self.event, by)
        self.event += 1
        return result

    def keep(self, result: Any, event: int, by: str) -> Any:
        """Remember the slots in a result; put the values of a message in the places of their ghosts."""
        leaves, spec = tree_flatten(result)
        arrives = self.first == self.position + 1 and event == -1
        for number, leaf in enumerate(leaves):
            slot = Slot(self.position, event, number)
            if slot not in self.wanted or not isinstance(leaf, torch.Tensor):
                continue
            if self.wanted[slot] != by:
                raise UserError(
                    f"parallel.pp: forward does another operation outside of the blocks ({by}) than it did when its stages were found "
                    f"({self.wanted[slot]}): it may ask what kind its tensors are; move this into a block, or train with parallel.pp=1"
                )
            if not isinstance(leaf, Ghost) or self.live:  # a ghost made here hangs on a weight that should be here
                self.values[slot] = leaf
            elif arrives and slot in self.values:
                leaves[number] = self.values[slot]
            else:
                self.ghosts[id(leaf)] = leaf, slot
        return tree_unflatten(leaves, spec) if arrives else result

    def real(self, tree: Any) -> Any:
        """`tree` with the values of all ghosts that have arrived."""
        if not self.live or not self.ghosts:
            return tree
        return tree_map_only(Ghost, lambda g: self.values.get(self.ghosts[id(g)][1], g) if id(g) in self.ghosts else g, tree)

    def outgoing(self, slot: Slot) -> torch.Tensor:
        value = self.values.get(slot)
        if value is None or isinstance(value, Ghost):
            origin = value.origin if value is not None else "a weight"
            raise self.misplaced(origin)
        return plain(value)  # messages hold whole tensors

    def misplaced(self, origin: str) -> UserError:
        return UserError(
            f"parallel.pp: stage {self.stage} uses {origin!r}, which it does not hold; name the stages that use it: "
            f"pipeline.place={{'{origin}': {[0, self.stage] if self.stage else list(range(self.split.stages))}}} (numbers of stages, -1 the last)"
        )


class _Done(BaseException):
    """Leaves forward when the last block of a stage is done."""

    def __init__(self, outputs: list[torch.Tensor]):
        self.outputs = outputs


class _Watch(TorchFunctionMode):
    """Numbers the operations outside of the blocks and puts arrived values in the places of their ghosts."""

    def __init__(self, visit: Any):
        super().__init__()
        self.visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        visit = self.visit
        if visit.inside:
            return func(*args, **kwargs)
        args, kwargs = visit.real((args, kwargs))
        result = func(*args, **kwargs)
        return visit.operation(result, getattr(func, "__name__", str(func))) if has_tensor(result) else result


class _Trace:
    """The forward of the twin, all ghosts, with where each is made and used."""

    def __init__(self, split: Stages):
        self.split = split
        self.position = self.event = self.inside = 0
        self.made: dict[int, tuple[Ghost, Slot]] = {}
        self.by: dict[Slot, str] = {}
        self.last_use: dict[Slot, int] = {}
        self.index = {_at(split.twin, name): index for index, name in enumerate(split.names)}
        self.seen: list[int] = []

    def run(self, call: Any) -> Any:
        handles = []
        for module in (*self.index, *self.split.loose.values()):
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, always_call=True))
        try:
            with _Watch(self):
                outputs = call(self.split.twin)
        finally:
            for handle in handles:
                handle.remove()
        if self.seen != list(range(len(self.index))):
            raise UserError(
                f"parallel.pp: forward calls {len(self.seen)} of the {len(self.index)} blocks, once and in the order in which they are defined, is what "
                f"stages need ({', '.join(self.split.names[:3])}, ...); write memory.blocks=[...] with modules that forward calls so"
            )
        return outputs

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.inside:
            if module in self.index:
                _in_order(self.split, self.index[module], self.position)
            self.use((args, kwargs))
        self.inside += 1

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        self.inside -= 1
        if self.inside:
            return
        if module in self.index:
            self._record(result, -1, _BLOCK)
            self.seen.append(self.index[module])
            self.position, self.event = self.position + 1, 0
        else:
            self.operation(result, _MODULE)

    def real(self, tree: Any) -> Any:
        """Called before each operation outside of the blocks."""
        self._pending = tree
        return tree

    def operation(self, result: Any, by: str) -> Any:
        self.use(self.__dict__.pop("_pending", ()))
        self._record(result, self.event, by)
        self.event += 1
        return result

    def use(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Ghost) and id(leaf) in self.made:
                slot = self.made[id(leaf)][1]
                self.last_use[slot] = max(self.position, self.last_use.get(slot, 0))

    def _record(self, result: Any, event: int, by: str) -> None:
        for number, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Ghost) and id(leaf) not in self.made:
                slot = Slot(self.position, event, number)
                self.made[id(leaf)], self.by[slot] = (leaf, slot), by

    def crossings(self) -> list[Crossing]:
        stages = ((slot, self.split.stage(slot.position), self.split.stage(use)) for slot, use in sorted(self.last_use.items()))
        return [Crossing(slot, self.by[slot], made, used) for slot, made, used in stages if made < used]


def _in_order(split: Stages, index: int, position: int) -> None:
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


def _form(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, isinstance(leaf, Ghost)
    return leaf if isinstance(leaf, int | float | str | bool | None) else type(leaf)


def _at(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


# ---------------------------------------------------------------------- cutting


def split(model: nn.Module, names: list[str], firsts: list[int], device: torch.device) -> Stages:
    """Prepare `model` to be run stage by stage; nothing of it is dropped yet (see `drop`).

    Raises:
        UserError: the module cannot be copied.
    """
    twin = _twin(model, device)
    cut = Stages(model, names, firsts, twin)
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
        _stage_class(_at(twin, name), _Twin, cut)
    for module in cut.loose:
        _stage_class(module, _Loose, cut)
    _stage_class(model, _Root, cut)
    return cut


def drop(model: nn.Module, names: set[str], device: torch.device) -> None:
    """Put ghosts in the places of the named weights, with the buffers of their modules: another stage holds them."""
    for path, module in model.named_modules():
        mine = [key for key in module._parameters if (f"{path}.{key}" if path else key) in names]
        for key in mine:
            param = module._parameters.pop(key)
            assert param is not None
            _refuse_alias(path, module, key, param)
            module.__dict__[key] = ghost(param, device, f"{path}.{key}" if path else key)
        if mine and not any(param is not None for param in module._parameters.values()):
            for key in [key for key, buffer in module._buffers.items() if buffer is not None]:
                buffer = module._buffers.pop(key)
                assert buffer is not None
                module.__dict__[key] = ghost(buffer, device, f"{path}.{key}" if path else key)


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


class _Twin(nn.Module):
    """A block of ghosts. Where its forward asks for values, as that of a mixture of experts, or an operator has no way to run without, it
    runs on zeros on the host: what it returns has the same form."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = tree_map(_fresh, (args, kwargs))
        try:
            return super().forward(*args, **kwargs)
        except (UserError, RuntimeError) as error:
            ghosts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Ghost)]
            if not ghosts:
                raise
            held = [tensor for module in self.modules() for tensor in (*module._parameters.values(), *module._buffers.values())]
            memo: dict[int, Any] = {id(tensor): _on_host(tensor) for tensor in held if tensor is not None}
            memo |= {id(hooks): OrderedDict() for hooks in (self._forward_hooks, self._forward_pre_hooks)}  # they watch the trace
            real = copy.deepcopy(self, memo)
            args, kwargs = tree_map_only(torch.Tensor, _on_host, given)
            try:
                with torch.no_grad():
                    outputs = super(_Twin, real).forward(*args, **kwargs)
            except Exception:  # whatever a user's block says to zeros
                raise error from None
            return tree_map_only(torch.Tensor, lambda tensor: ghost(tensor, ghosts[0].device, ghosts[0].origin), outputs)


def _fresh(leaf: Any) -> Any:
    """An argument that the block may change (a cache of keys and values), as it is now."""
    if isinstance(leaf, torch.Tensor):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # whatever a user's object says to a copy
        return leaf


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, Ghost) else tensor.cpu()


class _Loose(nn.Module):
    _split: Stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit = self._split.visit
        if visit is None:
            return super().__call__(*args, **kwargs)
        return visit.module(self, super().__call__, args, kwargs)


class _Root(nn.Module):
    _split: Stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._split.visit is None and self._split.alone is not None:
            return self._split.alone(*args, **kwargs)
        return super().__call__(*args, **kwargs)

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
        outputs = visit.real(outputs)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Ghost):
                raise visit.misplaced(leaf.origin)
        return outputs

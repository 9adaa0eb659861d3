"""What a module, or a loss, keeps beside its weights, wherever it keeps it: attributes, buffers, objects, closures, modules in plain lists.

A `Slot` is a place that holds one value: an attribute, a buffer, a weight that is not trained, a variable of a closure. Its value is a tree of
containers and plain objects, whose leaves are numbers, tensors and things that are not looked into. `Frozen` keeps such a tree as it was.
"""

from __future__ import annotations

import functools
import hashlib
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from paratrain.parallel.pipeline_ghost import Ghost

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "nothing"})()
"""What a slot holds that does not exist yet."""

_BOOKKEEPING = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_compiled_call_impl"}
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_ENGINES = ("torch.", "paratrain.", "deepspeed.", "fairscale.", "apex.")  # their functions keep what is theirs
_FOREIGN = (*_ENGINES, "logging", "threading", "weakref", "multiprocessing", "concurrent", "asyncio", "wandb", "omegaconf")
_LONGEST = 1024  # entries of a container that is looked into
_DEEPEST = 8
_SIMPLE = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, torch.Size, Enum)
GENERATORS = (torch.Generator, random.Random, np.random.Generator)
"""What draws random numbers, and keeps where it is."""

_SAMPLE = 4 << 20  # bytes of a large tensor that are hashed at each of its ends


@dataclass(frozen=True, slots=True)
class Slot:
    """A place that holds a value.

    Attributes:
        path: its name in the user's program: `blocks.0.calls`, `loss.avg`, `cache` of a closure as `forward.cache`.
        store: the dict, class or closure cell that it is in.
        key: its name there; unused for cells.
        kind: "attribute", "buffer", "parameter" (of a module that the model does not train) or "variable".
        lasting: whether the model's state_dict has it.
    """

    path: str
    store: Any
    key: str
    kind: str
    lasting: bool = False

    def get(self) -> Any:
        if isinstance(self.store, dict):
            return self.store.get(self.key, ABSENT)
        if isinstance(self.store, types.CellType):
            try:
                return self.store.cell_contents
            except ValueError:
                return ABSENT
        return self.store.__dict__.get(self.key, ABSENT)

    def put(self, value: Any) -> None:
        if isinstance(self.store, dict):
            if value is ABSENT:
                self.store.pop(self.key, None)
            else:
                self.store[self.key] = value
        elif isinstance(self.store, types.CellType):
            self.store.cell_contents = value
        elif value is not ABSENT:
            setattr(self.store, self.key, value)


def slots(roots: Sequence[tuple[str, Any]], known: Sequence[Any] = (), trained: bool = False) -> list[Slot]:
    """Every slot that can be reached from `roots`, pairs of (path, object), in an order that is the same in every process.

    Args:
        known: objects that are not looked into.
        trained: weights that are trained are slots as well.
    """
    seen = {id(item) for item in known}
    places: set[tuple[int, str]] = set()
    paths: dict[str, int] = {}
    found: list[Slot] = []
    queue = deque(roots)
    while queue:
        path, owner = queue.popleft()
        if id(owner) in seen:
            continue
        if isinstance(owner, nn.Module):
            modules = [
                (name, module)
                for name, module in owner.named_modules(prefix=path)
                if id(module) not in seen and not isinstance(module, torch.jit.ScriptModule)  # nobody can look into those
            ]
            seen.update(id(module) for _, module in modules)
            made = [slot for name, module in modules for slot in _module_slots(name, module, trained)]
            queue.extend(pair for name, module in modules for pair in _functions(name, module))
        else:
            seen.add(id(owner))
            made = list(_slots(path, owner))
        for slot in made:
            place = id(slot.store), slot.key if not isinstance(slot.store, types.CellType) else ""
            if place in places:  # one cell in several functions, one class of several modules
                continue
            places.add(place)
            paths[slot.path] = paths.get(slot.path, 0) + 1
            if paths[slot.path] > 1:
                slot = replace(slot, path=f"{slot.path}#{paths[slot.path]}")
            found.append(slot)
            value = slot.get()
            if not isinstance(value, (*_SIMPLE, torch.Tensor)):
                queue.extend(_owners(slot.path, value, seen))
    return found


def _module_slots(path: str, module: nn.Module, trained: bool) -> Iterator[Slot]:
    at = f"{path}." if path else ""
    statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)  # `trainer.batch_norm` says what is done with them
    if not statistics:
        for name in module._buffers:
            yield Slot(f"{at}{name}", module._buffers, name, "buffer", name not in module._non_persistent_buffers_set)
    for name, param in module._parameters.items():
        if param is not None and not isinstance(param, Ghost) and (trained or not param.requires_grad):
            yield Slot(f"{at}{name}", module._parameters, name, "parameter", True)
    if not type(module).__module__.startswith("paratrain.precision"):
        for name in vars(module):
            if name not in _BOOKKEEPING and not name.startswith("_fsdp"):
                yield Slot(f"{at}{name}", vars(module), name, "attribute")
    yield from _class_slots(path, type(module))


def _class_slots(path: str, cls: type) -> Iterator[Slot]:
    for base in cls.__mro__:
        if base.__module__.startswith((*_ENGINES, "torch", "builtins")):
            continue
        for name, value in vars(base).items():
            if not name.startswith("__") and isinstance(value, int | float | torch.Tensor | list | dict | deque):
                yield Slot(f"{base.__name__}.{name}", base, name, "variable")


def _functions(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Functions of the user's own that run when a module is called."""
    at = f"{path}." if path else ""
    for base in type(module).__mro__:
        if "forward" in vars(base) and not base.__module__.startswith(_ENGINES):
            yield f"{at}forward", vars(base)["forward"]
    for kind in _HOOKS:
        for hook in (getattr(module, kind, None) or {}).values():
            yield f"{at}hook", hook


def _slots(path: str, owner: Any) -> Iterator[Slot]:
    if isinstance(owner, types.FunctionType):
        if owner.__module__ is not None and owner.__module__.startswith(_ENGINES):
            return
        for name, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
            yield Slot(f"{path}.{name}", cell, name, "variable")
        for name in owner.__code__.co_names:
            if isinstance(owner.__globals__.get(name), int | float | torch.Tensor | list | dict | deque):
                yield Slot(f"{path}.{name}", owner.__globals__, name, "variable")
        for name in vars(owner):
            yield Slot(f"{path}.{name}", vars(owner), name, "attribute")
    elif _is_plain(owner):
        for name in vars(owner):
            yield Slot(f"{path}.{name}", vars(owner), name, "attribute")
        yield from _class_slots(path, type(owner))


def _owners(path: str, value: Any, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Modules and functions in a tree, which have slots of their own."""
    if isinstance(value, nn.Module | types.FunctionType):
        yield path, value
    elif isinstance(value, types.MethodType):
        yield from ((path, value.__func__), (path, value.__self__)) if isinstance(value.__self__, nn.Module) else ((path, value.__func__),)
    elif isinstance(value, functools.partial):
        yield from _owners(path, (value.func, value.args, value.keywords), seen, depth + 1)
    elif depth < _DEEPEST and (parts := _parts(value)):
        if id(value) in seen:
            return
        seen.add(id(value))
        for suffix, part in parts:
            if not isinstance(part, (*_SIMPLE, torch.Tensor)):
                yield from _owners(f"{path}{suffix}", part, seen, depth + 1)


def roots_of(function: Any, path: str) -> list[tuple[str, Any]]:
    """What `slots` takes for a callable: a loss that is a function, a method, a partial or an object."""
    if isinstance(function, functools.partial):
        return [pair for part in (function.func, *function.args, *function.keywords.values()) for pair in roots_of(part, path)]
    if isinstance(function, types.MethodType):
        return [(path, function.__func__), *roots_of(function.__self__, path)]
    return [(path, function)] if isinstance(function, nn.Module | types.FunctionType) or _is_plain(function) else []


def _is_plain(value: Any) -> bool:
    """An object of the user's own, whose attributes are looked into."""
    return hasattr(value, "__dict__") and not (
        isinstance(value, type | types.ModuleType | types.FunctionType | types.MethodType | nn.Module | torch.Tensor | Enum | BaseException)
        or type(value).__module__.startswith(_FOREIGN)
    )


def _parts(value: Any) -> list[tuple[str, Any]]:
    """The parts of a container or plain object, with what their names add to a path."""
    if isinstance(value, dict | types.MappingProxyType):
        return [(f"[{key!r}]", part) for key, part in value.items()] if len(value) <= _LONGEST else []
    if isinstance(value, list | tuple | deque):
        return [(f"[{index}]", part) for index, part in enumerate(value)] if len(value) <= _LONGEST else []
    if _is_plain(value):
        return [(f".{name}", part) for name, part in vars(value).items()]
    return []


def leaves(path: str, value: Any, seen: set[int] | None = None, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The leaves of the tree in a slot, with their paths."""
    seen = set() if seen is None else seen
    if isinstance(value, (*_SIMPLE, torch.Tensor)) or depth == _DEEPEST or not (parts := _parts(value)):
        yield path, value
    elif id(value) not in seen:
        seen.add(id(value))
        for suffix, part in parts:
            yield from leaves(f"{path}{suffix}", part, seen, depth + 1)


def token(leaf: Any) -> str:
    """A text by which the leaves of two processes can be compared."""
    if isinstance(leaf, torch.Tensor):
        kind = f"{str(leaf.dtype).removeprefix('torch.')} tensor {list(leaf.shape)}"
        return f"{kind} on meta" if leaf.is_meta else f"{kind} {_hash(leaf)}"
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype} array {list(leaf.shape)} {hashlib.blake2b(np.ascontiguousarray(leaf).tobytes(), digest_size=8).hexdigest()}"
    if isinstance(leaf, torch.device):
        return "device"
    if isinstance(leaf, _SIMPLE):
        return f"{leaf!r:.400}"
    if isinstance(leaf, set | frozenset):
        simple = sorted(repr(item) for item in leaf if isinstance(item, _SIMPLE))
        return f"{type(leaf).__name__} of {len(leaf)} {simple[:_LONGEST]}"
    if isinstance(leaf, dict | list | tuple | deque):
        return f"{type(leaf).__name__} of {len(leaf)}"
    return f"a {type(leaf).__name__}"


def _hash(tensor: torch.Tensor) -> str:
    """Of large tensors only the ends and a sum."""
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return type(tensor).__name__
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() * flat.element_size() > 4 * _SAMPLE:
        most = _SAMPLE // flat.element_size()
        middle = str(flat.double().sum().item()) if not flat.is_complex() else ""
        flat = torch.cat((flat[:most], flat[-most:]))
    else:
        middle = ""
    flat = flat.resolve_conj().clone(memory_format=torch.contiguous_format)  # a single element may have any stride
    raw = flat.view(torch.uint8).cpu().numpy().tobytes() if flat.numel() else b""
    return hashlib.blake2b(raw + middle.encode(), digest_size=8).hexdigest()


class Frozen:
    """The value of a slot as it is now, which can be told from a later one, and put back.

    Args:
        copies: whether tensors are to be copied; of those that are not, only whether they were written to is known.
    """

    def __init__(self, value: Any, copies: bool = True):
        self._copies = copies
        self._seen: set[int] = set()
        self._tree = self._freeze(value, 0)

    def _freeze(self, value: Any, depth: int) -> tuple[str, Any, Any]:
        if isinstance(value, _SIMPLE):
            return "leaf", value, None
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer) or value.is_inference() or value.is_meta:
                return "opaque", value, None
            copy = value.detach().clone() if self._copies else None
            return "tensor", value, (value._version, copy)
        if isinstance(value, np.ndarray):
            return "array", value, value.copy()
        if isinstance(value, torch.Generator):
            return "generator", value, value.get_state()
        if isinstance(value, random.Random):
            return "generator", value, value.getstate()
        if isinstance(value, np.random.Generator):
            return "generator", value, value.bit_generator.state
        if depth == _DEEPEST or id(value) in self._seen:
            return "opaque", value, None
        self._seen.add(id(value))
        if isinstance(value, set):
            return "set", value, set(value)
        if isinstance(value, dict) and len(value) <= _LONGEST:
            return "dict", value, {key: self._freeze(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list | tuple | deque) and len(value) <= _LONGEST:
            kind = "tuple" if isinstance(value, tuple) else "list"
            return kind, value, [self._freeze(part, depth + 1) for part in value]
        if _is_plain(value):
            return "object", value, {key: self._freeze(part, depth + 1) for key, part in vars(value).items()}
        return "opaque", value, None

    def same(self, value: Any) -> bool:
        """Whether `value` is still what was frozen."""
        return _same(self._tree, value)

    def drawn(self) -> bool:
        """Whether a generator that was frozen has drawn since."""
        kind, old, content = self._tree
        return kind == "generator" and not _same_state(old, content)

    @property
    def complete(self) -> bool:
        """Whether every tensor was copied, so that `thaw` gives back what was there."""
        return _complete(self._tree)

    def thaw(self, fresh: bool = False, generators: bool = False) -> Any:
        """What was frozen, in the same containers and objects.

        Args:
            fresh: tensors are new ones, so that what autograd has of the old ones stays.
            generators: put generators of random numbers back, too.
        """
        return _thaw(self._tree, fresh, generators)

    @property
    def object(self) -> Any:
        """What was frozen, whatever became of it."""
        return self._tree[1]

    def value(self) -> Any:
        """A tree of the same values in containers and objects of their own."""
        return _copy(self._tree)


def _same(tree: tuple[str, Any, Any], value: Any) -> bool:
    kind, old, content = tree
    if kind == "leaf":
        return old is value or (type(old) is type(value) and (old == value or (old != old and value != value)))
    if kind == "tensor":
        if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer) or value.is_inference():
            return False
        if value is old and value._version == content[0]:
            return True
        copy = content[1]
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype or copy.device != value.device:
            return False
        return torch.equal(copy, value.detach()) or _hash(copy) == _hash(value)
    if kind == "generator":
        return True
    if kind == "array":
        return isinstance(value, np.ndarray) and value.shape == content.shape and np.array_equal(value, content)
    if type(old) is not type(value):
        return False
    if kind == "set":
        return value == content
    if kind in ("list", "tuple"):
        return len(content) == len(value) and all(_same(part, now) for part, now in zip(content, value, strict=True))
    if kind == "dict" or kind == "object":
        entries = value if kind == "dict" else vars(value)
        return content.keys() == entries.keys() and all(_same(part, entries[key]) for key, part in content.items())
    return old is value or not isinstance(value, torch.Tensor)  # what is not looked into is taken to be what it was


def _same_state(generator: Any, state: Any) -> bool:
    if isinstance(generator, torch.Generator):
        return torch.equal(generator.get_state(), state)
    return (generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state) == state


def _complete(tree: tuple[str, Any, Any]) -> bool:
    kind, _, content = tree
    if kind == "tensor":
        return content[1] is not None
    parts = content.values() if kind in ("dict", "object") else content if kind in ("list", "tuple") else ()
    return all(_complete(part) for part in parts)


def _thaw(tree: tuple[str, Any, Any], fresh: bool, generators: bool) -> Any:
    kind, old, content = tree
    if kind == "tensor":
        version, copy = content
        if copy is None:
            return old
        if fresh:
            new = copy.clone()
            return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        if old._version != version:
            with torch.no_grad():
                old.copy_(copy)
        return old
    if kind == "array":
        if old.shape == content.shape:
            old[...] = content
        return old
    if kind == "generator" and generators:
        if isinstance(old, torch.Generator):
            old.set_state(content)
        elif isinstance(old, random.Random):
            old.setstate(content)
        else:
            old.bit_generator.state = content
    elif kind == "set":
        old.clear()
        old.update(content)
    elif kind == "tuple":
        parts = [_thaw(part, fresh, generators) for part in content]
        if any(new is not had for new, had in zip(parts, old, strict=True)):
            return type(old)(*parts) if hasattr(old, "_fields") else tuple(parts)
    elif kind == "list":
        parts = [_thaw(part, fresh, generators) for part in content]
        if len(parts) != len(old) or any(new is not had for new, had in zip(parts, old, strict=True)):
            old.clear()
            old.extend(parts)
    elif kind in ("dict", "object"):
        entries = old if kind == "dict" else vars(old)
        new = {key: _thaw(part, fresh, generators) for key, part in content.items()}
        if list(new) != list(entries) or any(entries[key] is not part for key, part in new.items()):
            entries.clear()
            entries.update(new)
    return old


def _copy(tree: tuple[str, Any, Any]) -> Any:
    kind, old, content = tree
    if kind == "tensor":
        return old if content[1] is None else content[1]
    if kind in ("array", "set"):
        return content.copy()
    if kind == "tuple":
        parts = [_copy(part) for part in content]
        return type(old)(*parts) if hasattr(old, "_fields") else tuple(parts)
    if kind == "list":
        return type(old)(_copy(part) for part in content)
    if kind == "dict":
        return {key: _copy(part) for key, part in content.items()}
    if kind == "object":
        new = object.__new__(type(old))
        vars(new).update({key: _copy(part) for key, part in content.items()})
        return new
    return old


def frozen(found: Sequence[Slot], copies: Callable[[Slot], bool] = lambda slot: True) -> dict[str, tuple[Slot, Frozen]]:
    """Path -> the slot, and its value as it is now.

    Args:
        copies: whether the tensors of a slot are to be copied.
    """
    return {slot.path: (slot, Frozen(slot.get(), copies(slot))) for slot in found}


def put_back(kept: Mapping[str, tuple[Slot, Frozen]], now: Sequence[Slot], fresh: bool = False, generators: bool = False) -> None:
    """Put what `frozen` kept back, and take away what is in the same places now and was not there.

    Args:
        now: the slots that there are now.
    """
    stores = {id(slot.store) for slot, _ in kept.values()}
    for slot in now:
        if slot.path not in kept and id(slot.store) in stores:
            slot.put(ABSENT)
    for slot, was in kept.values():
        value = slot.get()
        if generators or not was.same(value) or value is not was.object:
            slot.put(was.thaw(fresh, generators))


def digest(value: Any) -> str:
    """A text that is the same for equal values in two processes."""
    parts = [f"{path}={token(leaf)}" for path, leaf in leaves("", value)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in the tree of a slot."""
    for _, leaf in leaves("", value):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def matches(path: str, patterns: Iterable[str]) -> str | None:
    """The first of the globs that names this path, or something that it is a part of."""
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern) or path.startswith((f"{pattern}.", f"{pattern}["))), None)

"""What a module leaves elsewhere than in its result: in attributes, in lists and dicts that it is given, in what its hooks and closures hold.

A place is found again in a copy of the model by its path: the keys that lead to it from a module or from the arguments of a call. What
functions hold (closures, globals) is the same object in a copy, and is its own root.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

Path = tuple[Any, ...]
_MODULE_KEYS = frozenset(nn.Module().__dict__)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "transformers", "paratrain"}
_LARGEST = 4096  # entries of a list or dict that is looked into


class Shared:
    """The root of what a model and its copies have in common."""

    def __init__(self, held: Any):
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Shared) and other.held is self.held


class Change(NamedTuple):
    """What a call changed in a container.

    Attributes:
        path: of the container.
        kind: "set" or "drop" an entry, "append" to a list, "all" its contents.
        key: of the entry; for appended ones, how many were appended before.
        value: what is there now.
    """

    path: Path
    kind: str
    key: Any
    value: Any

    @property
    def where(self) -> tuple[Path, str, Any]:
        return self.path, self.kind, self.key


# ---------------------------------------------------------------------- trees that hold objects


def opens(leaf: Any) -> bool:
    """Whether the attributes of an object are looked into as those of a dict are."""
    if isinstance(leaf, torch.Tensor | nn.Module | type) or not hasattr(leaf, "__dict__"):
        return False
    cls = type(leaf)
    return dataclasses.is_dataclass(leaf) or cls is SimpleNamespace or _is_users(cls) or cls.__module__.startswith("torch.distributions.")


def tensors(tree: Any) -> list[torch.Tensor]:
    """Every tensor in a tree, attributes of objects included, in an order that copies share."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    found: list[torch.Tensor] = []
    replaced(tree, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def replaced(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `change` of every tensor; objects that hold some are copied."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    return _replaced(tree, change, ())


def _replaced(tree: Any, change: Callable[[torch.Tensor], torch.Tensor], around: tuple[int, ...]) -> Any:
    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if not opens(value) or id(value) in around:
            return value
        old = vars(value)
        new = {key: _replaced(inner, change, (*around, id(value))) for key, inner in old.items()}
        if all(_same(new[key], inner) for key, inner in old.items()):
            return value
        made = copy.copy(value)
        vars(made).update(new)
        return made

    return tree_map(leaf, tree)


def _same(a: Any, b: Any) -> bool:
    """Whether a tree came back with the leaves it had."""
    if a is b:
        return True
    ours, theirs = tree_leaves(a), tree_leaves(b)
    return len(ours) == len(theirs) and all(x is y for x, y in zip(ours, theirs, strict=True))


def settle(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `change` of every tensor, written into the lists, dicts and objects that hold them, for others hold these, too."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        parts = [settle(part, change) for part in tree]
        if all(a is b for a, b in zip(parts, tree, strict=True)):
            return tree
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, list | dict):
        for key, value in list(enumerate(tree) if isinstance(tree, list) else tree.items()):
            if (now := settle(value, change)) is not value:
                tree[key] = now
    elif opens(tree):
        attributes = vars(tree)
        for key, value in list(attributes.items()):
            if isinstance(value, torch.Tensor | list | tuple | dict) and (now := settle(value, change)) is not value:
                attributes[key] = now
    return tree


# ---------------------------------------------------------------------- places


def roots(model: nn.Module) -> dict[str, Any]:
    """The modules of a model under their names, from which its places are found."""
    return dict(model.named_modules())


def containers(roots: Mapping[str, Any]) -> dict[Path, Any]:
    """Path -> container, of every container that can be reached from `roots`."""
    found: dict[Path, Any] = {}
    seen = {id(root) for root in roots.values()}
    pending: list[tuple[Path, Any]] = [((name,), root) for name, root in roots.items()]
    while pending:
        path, value = pending.pop()
        if entries(value) is not None:
            found[path] = value
        for key, inner in _inside(value):
            if id(inner) not in seen and not isinstance(inner, torch.Tensor | type):
                seen.add(id(inner))
                pending.append(((*path, key) if not isinstance(key, Shared) else (key,), inner))
    return found


def simple(module: nn.Module) -> bool:
    """Whether nothing but torch's own layers runs in it, which leave nothing anywhere."""
    return all(_root_of(type(inner)) == "torch" and not any(getattr(inner, hooks) for hooks in _HOOKS) for inner in module.modules())


def at(roots: Mapping[str, Any], path: Path) -> Any:
    """The container at a path, None where there is none."""
    value = path[0].held if isinstance(path[0], Shared) else roots.get(path[0])
    for key in path[1:]:
        value = next((inner for name, inner in _inside(value) if name == key), None)
    return value


class Before:
    """The contents of containers at some moment."""

    def __init__(self, found: Mapping[Path, Any]):
        self._found = {path: (container, entries(container)) for path, container in found.items()}

    def changes(self) -> list[Change]:
        """What is otherwise now."""
        changes: list[Change] = []
        for path, (container, old) in self._found.items():
            new = entries(container)
            assert old is not None
            assert new is not None
            if len(old) == len(new) and all(key in new and new[key] is value for key, value in old.items()):
                continue
            if not isinstance(container, list | deque):
                changes += [Change(path, "set", key, value) for key, value in new.items() if key not in old or old[key] is not value]
                changes += [Change(path, "drop", key, None) for key in old if key not in new]
            elif all(key in new and new[key] is value for key, value in old.items()):
                changes += [Change(path, "append", key - len(old), new[key]) for key in range(len(old), len(new))]
            elif len(old) == len(new):
                changes += [Change(path, "set", key, new[key]) for key in old if old[key] is not new[key]]
            else:
                changes.append(Change(path, "all", None, list(new.values())))
        return changes

    def restore(self) -> None:
        """Make everything what it was."""
        for container, old in self._found.values():
            assert old is not None
            new = entries(container) or {}
            if len(old) == len(new) and all(key in new and new[key] is value for key, value in old.items()):
                continue
            if isinstance(container, list | deque):
                container.clear()
                container.extend(old.values())
                continue
            for key in new.keys() - old.keys():
                _drop(container, key)
            for key, value in old.items():
                if key not in new or new[key] is not value:
                    _set(container, key, value)


def lay(container: Any, change: Change, value: Any) -> None:
    """Make a change in a container."""
    if change.kind == "append":
        container.append(value)
    elif change.kind == "all":
        container.clear()
        container.extend(value)
    elif change.kind == "drop":
        _drop(container, change.key)
    else:
        _set(container, change.key, value)


def take_back(container: Any, change: Change, value: Any, before: Mapping[Any, Any]) -> None:
    """Undo what `lay` did with `value` in a container that held `before`, unless something else is there by now."""
    if change.kind == "append":
        for number in range(len(container) - 1, -1, -1):
            if container[number] is value:
                del container[number]
                return
    elif change.kind == "all":
        container.clear()
        container.extend(before.values())
    elif change.kind == "drop" or (entries(container) or {}).get(change.key) is value:
        if change.key in before:
            _set(container, change.key, before[change.key])
        else:
            _drop(container, change.key)


def copy_entries(source: Any, target: Any, keys: Collection[Any]) -> None:
    """Give a container the entries `keys` of its counterpart; lists all."""
    if isinstance(target, list | deque):
        target.clear()
        target.extend(source)
        return
    held = entries(source) or {}
    for key in keys:
        if key in held:
            _set(target, key, held[key])


def reachable(value: Any) -> set[int]:
    """The ids of all that can be reached from a function or object, modules inside of modules included."""
    seen = {id(value)}
    pending = [value]
    while pending:
        each = pending.pop()
        held: list[Any] = [inner for _, inner in _inside(each)]
        if isinstance(each, nn.Module):
            held += each.children()
        elif not held and not isinstance(each, type):  # an engine, a trainer
            held += [inner for inner in getattr(each, "__dict__", {}).values() if isinstance(inner, nn.Module)]
        for inner in held:
            if id(inner) not in seen and not isinstance(inner, torch.Tensor | type):
                seen.add(id(inner))
                pending.append(inner)
    return seen


def text(path: Path) -> str:
    """A path as a user would write it."""
    root, keys = path[0], path[1:]
    if isinstance(root, Shared):
        return "a variable that its functions share"
    return ".".join(str(part) for part in (root, *keys) if part != "")


def entries(value: Any) -> dict[Any, Any] | None:
    """The entries of a container that a call may change; None for what is none."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | deque):
        return dict(enumerate(value))
    if isinstance(value, CellType):
        try:
            return {"cell_contents": value.cell_contents}
        except ValueError:  # not set yet
            return {}
    if isinstance(value, nn.Module):
        return {key: inner for key, inner in vars(value).items() if key not in _MODULE_KEYS}
    return dict(vars(value)) if opens(value) else None


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a value holds: (key, value)."""
    if isinstance(value, dict | list | tuple | deque):
        if len(value) <= _LARGEST:
            yield from value.items() if isinstance(value, dict) else enumerate(value)
    elif isinstance(value, FunctionType):
        for held in _of_function(value):
            yield Shared(held), held
    elif isinstance(value, MethodType):
        yield "__self__", value.__self__
        yield "__func__", value.__func__
    elif isinstance(value, partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, nn.Module):
        yield from (entry for entry in vars(value).items() if entry[0] not in _MODULE_KEYS)
        for hooks in _HOOKS:
            for number, hook in getattr(value, hooks).items():
                yield (hooks, number), hook
        yield from _of_class(type(value))
    elif (held := entries(value)) is not None:
        yield from held.items()
        if opens(value):
            yield from _of_class(type(value))


def _of_class(cls: type) -> Iterator[tuple[Any, Any]]:
    """What the methods of a user's class hold."""
    for base in cls.__mro__:
        if _is_users(base):
            for name, value in vars(base).items():
                value = getattr(value, "__func__", value)
                if isinstance(value, FunctionType) or (isinstance(value, list | dict | deque) and not name.startswith("__")):
                    yield Shared(value), value


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from function.__closure__ or ()
    yield from function.__defaults__ or ()
    for name in function.__code__.co_names:
        held = function.__globals__.get(name)
        if isinstance(held, FunctionType):
            if _root_named(held.__module__) not in _FOREIGN:
                yield held
        elif isinstance(held, dict | list | deque | nn.Module) or opens(held):
            yield held


def _set(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, dict | list | deque):
        container[key] = value
    elif isinstance(container, CellType):
        container.cell_contents = value
    elif isinstance(container, nn.Module):
        container.__dict__[key] = value
    else:
        vars(container)[key] = value


def _drop(container: Any, key: Any) -> None:
    if isinstance(container, CellType):
        del container.cell_contents
    elif isinstance(container, dict | list | deque):
        del container[key]
    else:
        del vars(container)[key]


def _is_users(cls: type) -> bool:
    return _root_of(cls) not in _FOREIGN


def _root_of(cls: type) -> str:
    return _root_named(cls.__module__)


def _root_named(name: str | None) -> str:
    return (name or "").partition(".")[0]

"""What a model and a loss keep in plain attributes, numbers and tensors, and what becomes of it as they train."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

_INTERNAL = frozenset(vars(nn.Module())) | {"_is_hf_initialized", "_flat_weights"}
_MOST = 64  # values of one attribute that are looked at: longer lists are data


@dataclass
class Found:
    """Values by name, as `<module>.<attribute>` or `<module>.<attribute>[i]`.

    Attributes:
        first: before the first step.
        after: step -> after it, of those that are not as before.
        memoryless: names of those that say only what the last forward was given; known where it was tried.
    """

    first: dict[str, Any] = field(default_factory=dict)
    after: dict[int, dict[str, Any]] = field(default_factory=dict)
    memoryless: set[str] = field(default_factory=set)


class Attributes:
    """Notes after each step which attributes of `model`, and of `loss_fn` where it is an object, have moved."""

    def __init__(self, model: nn.Module, loss_fn: Any = None):
        self.owners = [(name, module) for name, module in model.named_modules()]
        if isinstance(loss_fn, nn.Module):
            self.owners += [(f"(loss){'.' if name else ''}{name}", module) for name, module in loss_fn.named_modules()]
        elif hasattr(loss_fn, "__dict__") and not isinstance(loss_fn, type) and not callable(getattr(loss_fn, "__code__", None)):
            self.owners.append(("(loss)", loss_fn))
        self.found = Found(self.values())
        self._kept = {(id(owner), name): value for _, owner, name, value in self._each()}

    def note(self, step: int) -> None:
        now = self.values()
        self.found.after[step] = {name: value for name, value in now.items() if not _equal(value, self.found.first.get(name))}

    def put_back(self) -> None:
        """Every attribute as it was before the first step."""
        for _, owner, name, _ in list(self._each()):
            if (id(owner), name) in self._kept:
                setattr(owner, name, copy.deepcopy(self._kept[id(owner), name]))
            else:
                delattr(owner, name)

    def _each(self) -> Iterator[tuple[str, Any, str, Any]]:
        for path, owner in self.owners:
            for name, value in list(vars(owner).items()):
                if name in _INTERNAL or name.startswith("_fsdp") or not _plain(value):
                    continue
                yield f"{path}.{name}" if path else name, owner, name, _copied(value)

    def values(self) -> dict[str, Any]:
        """Every value by name, as it is now."""
        values: dict[str, Any] = {}
        for path, _, _, value in self._each():
            leaves = tree_leaves(value)
            values |= {path if len(leaves) == 1 else f"{path}[{i}]": leaf for i, leaf in enumerate(leaves)}
        return values


def _plain(value: Any) -> bool:
    """Whether `value` is a number, a tensor, or a list, tuple or dict of these."""
    leaves = tree_leaves(value)
    return 0 < len(leaves) <= _MOST and all(
        (isinstance(leaf, Tensor) and type(leaf) is Tensor and not leaf.is_meta and leaf.numel() < 1 << 20)
        or (isinstance(leaf, int | float) and not isinstance(leaf, bool))
        for leaf in leaves
    )


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.detach().clone(), value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def apart(a: Any, b: Any) -> float | None:
    """How far two values are apart relative to the larger; None where one counts what the other does not: another shape."""
    x, y = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if x.shape != y.shape:
        return None
    if not x.numel():
        return 0.0
    off = torch.nan_to_num(x - y).abs().max() if x.isnan().eq(y.isnan()).all() else torch.tensor(float("inf"))
    return float(off / torch.maximum(x.nan_to_num().abs().max(), y.nan_to_num().abs().max()).clamp(min=1e-300))

"""Which modules repeat: the units that are sharded, recomputed and compiled one at a time.

A pure function of a module's structure. Whatever is in no block (embeddings, heads, final norms) stays with the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from paratrain.errors import UserError

_STACKS = (nn.ModuleList, nn.Sequential)


def find(model: nn.Module, patterns: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of `model`, as (name, module) in the order in which they are defined.

    In a stack (ModuleList, Sequential), children with the same structure and shapes are blocks, and so are their siblings of the
    same class. Children of one class whose shapes differ, as the stages of a U-Net or a hierarchical vision model, are searched for
    stacks of their own, and are blocks if there are none; likewise attributes of one class. What some ranks may not call is no block:
    the choices of a ModuleDict, and what is called experts. A class that Hugging Face models name in
    `_no_split_modules` is a block wherever it occurs. Only modules with children count, unless there are no others. Blocks that share
    a parameter with another or with the rest of the model are left to the root, which holds the shared parameter.

    Args:
        patterns: globs on module names or class names that name the blocks instead, of each the outermost matches; [] for none.

    Raises:
        UserError: a pattern that matches no module with a forward of its own.
    """
    names = {module: name for name, module in model.named_modules()}
    if patterns is not None:
        found = _matching(names, patterns)
    else:
        declared = {cls for module in names for cls in getattr(module, "_no_split_modules", None) or ()}
        found = _search(model, declared, leaves=False) or _search(model, declared, leaves=True)
    blocks = _without_shared(model, dict.fromkeys(found))
    return [(names[block], block) for block in blocks]


def describe(model: nn.Module, patterns: Sequence[str] | None = None) -> str:
    """The blocks of `model`, what is left to the root and what is shared, for people to read; neighbours that are alike are one line.

    Args:
        patterns: as `find` takes them.
    """
    blocks = find(model, patterns)
    inside = {param for _, block in blocks for param in block.parameters()}
    rest = {name: param for name, param in model.named_parameters() if param not in inside}
    how = "found from the structure; memory.blocks=[GLOB, ...] decides by hand" if patterns is None else f"memory.blocks={list(patterns)}"
    rows = []
    for _, alike in groupby(blocks, key=lambda block: (block[0].rpartition(".")[0], structure(block[1]))):
        run = list(alike)
        names = run[0][0] if len(run) == 1 else f"{run[0][0]} ... {run[-1][0]}"
        rows.append((names, f"{len(run)} x {type(run[0][1]).__name__}", _size(run[0][1].parameters()) + (" each" if len(run) > 1 else "")))
    owners = dict.fromkeys(name.rpartition(".")[0] or name for name in rest)
    rows.append(("the rest", ", ".join([*list(owners)[:6], *(["..."] if len(owners) > 6 else [])]) or "nothing", _size(rest.values())))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    shared: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        shared.setdefault(param, []).append(name)
    return "\n".join(
        [
            f"{type(model).__name__}: {_size(model.parameters())}",
            f"{len(blocks)} blocks ({how})",
            *(f"  {names:{widths[0]}}  {what:{widths[1]}}  {size}" for names, what, size in rows),
            *(f"  shared: {' = '.join(names)}" for names in shared.values() if len(names) > 1),
        ]
    )


def _size(params: Iterable[nn.Parameter]) -> str:
    counts = Counter[bool]()
    for param in params:
        counts[param.requires_grad] += param.numel()
    return f"{counts.total():,} parameters" + (f" ({counts[False]:,} frozen)" if counts[False] else "")


def _matching(names: dict[nn.Module, str], patterns: Sequence[str]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for pattern in patterns:
        matches = [m for m, name in names.items() if name and (fnmatchcase(name, pattern) or fnmatchcase(type(m).__name__, pattern))]
        usable = [m for m in matches if _has_forward(m) and _has_parameters(m)]
        if not usable:
            why = "matches only containers without a forward or without parameters" if matches else "matches no module"
            classes = dict.fromkeys(type(m).__name__ for m in names if _has_children(m))
            raise UserError(
                f"memory.blocks: {pattern!r} {why}; write a glob on module names (such as 'layers.*') or a class name "
                f"({', '.join(list(classes)[:8])}), or leave memory.blocks=null to find the blocks"
            )
        inside = {inner for outer in usable for inner in outer.modules() if inner is not outer}
        found |= dict.fromkeys(module for module in usable if module not in inside)
    return [module for module in names if module in found]


def _search(module: nn.Module, declared: Iterable[str], leaves: bool) -> list[nn.Module]:
    children = [child for child in dict.fromkeys(module.children()) if _has_parameters(child)]
    is_stack = isinstance(module, _STACKS)
    eligible = [child for child in children if _has_children(child) or (leaves and is_stack)]
    eligible = [child for child in eligible if _has_forward(child)]
    classes = Counter(map(_class, eligible))
    like = Counter(map(structure, eligible)) if is_stack else Counter()
    repeated = {_class(child) for child in eligible if like[structure(child)] > 1} if is_stack else set()
    found = []
    for name, child in module.named_children():
        if child not in children or "expert" in name.lower():  # a rank whose samples choose other experts does not call them
            continue
        if type(child).__name__ in declared or (child in eligible and _class(child) in repeated):
            found.append(child)
        elif inner := _search(child, declared, leaves):
            found += inner
        elif child in eligible and classes[_class(child)] > 1 and not isinstance(module, nn.ModuleDict):
            found.append(child)
    return found


def _has_forward(module: nn.Module) -> bool:
    """Whether it is called, and from Python: no list of modules, and nothing that TorchScript compiled, which belongs to what calls it."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None  # not any(): a compiled module has no truth value


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _class(module: nn.Module) -> type:
    """Its class as the user wrote it: parametrized modules (weight norm, LoRA of torch) have one of their own each."""
    return type_before_parametrizations(module)


def structure(module: nn.Module) -> tuple:
    """What two modules have in common when they are copies but for their values."""
    classes = tuple((name, _class(child)) for name, child in module.named_modules())
    return classes, tuple((name, param.shape) for name, param in module.named_parameters())


def _without_shared(model: nn.Module, blocks: dict[nn.Module, None]) -> list[nn.Module]:
    """The blocks whose parameters no other block and nothing outside uses."""
    owners: dict[int, set[nn.Module]] = {}

    def visit(module: nn.Module, owner: nn.Module) -> None:
        owner = module if module in blocks else owner
        for param in module._parameters.values():
            if param is not None:
                owners.setdefault(id(param), set()).add(owner)
        for child in module.children():
            visit(child, owner)

    visit(model, model)
    shared = {owner for users in owners.values() if len(users) > 1 for owner in users}
    return [block for block in blocks if block not in shared and block is not model]

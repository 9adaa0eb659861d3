"""Whether every rank built the model that rank 0 built: the same modules, names, shapes, and values beside the weights.

Weights and buffers come from rank 0. What a constructor keeps elsewhere (numbers, tensors in plain attributes, objects, closures, modules in
plain lists) nobody sends, so it has to be the same already, or ranks would train different functions, and those that differ in names or shapes
would wait for each other for ever.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from paratrain import reach
from paratrain.config import Config
from paratrain.errors import UserError

_OWN = re.compile(
    r"(^|_)(rank|main|master|primary|verbose|log|logger|logging|print|debug|device|host|hostname|pid|node|time|start|started|created|path|dir|"
    r"file|uuid|id|port|seed)(_|$)"
)
"""Names of what processes have of their own for good reason."""
_ORDER = "the order of "


def hidden(model: nn.Module) -> list[reach.Slot]:
    """What `model` keeps beside the parameters and buffers of its modules."""
    own = {id(store) for module in model.modules() for store in (module._parameters, module._buffers)}
    return [slot for slot in reach.slots([("", model)], trained=True) if id(slot.store) not in own]


def on_meta(model: nn.Module) -> str | None:
    """A tensor on meta beside parameters and buffers, where nothing could fill it."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for slot in hidden(model):
        for path, leaf in reach.leaves(slot.path, slot.get()):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and id(leaf) not in known:
                return path
    return None


def differences(model: nn.Module | None, error: BaseException | None, cfg: Config) -> list[str]:
    """For each rank the first thing in which its model is another than rank 0's; empty texts where there is none.

    Every rank must call it.

    Args:
        model: what this rank built; None where `error` kept it from that.

    Raises:
        UserError: on every rank: building the model failed on some. Where it failed, the error itself is raised.
    """
    mine = {} if model is None else _description(model, cfg)
    text = hashlib.blake2b(repr(sorted(mine.items())).encode(), digest_size=16).hexdigest()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (text, f"{type(error).__name__}: {error}" if error is not None else None))
    if error is not None:
        raise error
    if failed := [(rank, reason) for rank, (_, reason) in enumerate(told) if reason is not None]:
        raise UserError(f"model: building it failed on rank {failed[0][0]}: {failed[0][1]}")
    if len({digest for digest, _ in told}) == 1:
        return [""] * len(told)
    box = [mine if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    found: list[Any] = [None] * len(told)
    dist.all_gather_object(found, next(_differing(mine, box[0] or {}), ""))
    return found


def refuse(found: list[str]) -> None:
    """Raise on every rank where some rank's model is another than rank 0's.

    Raises:
        UserError: names the rank and the first difference.
    """
    different = [(rank, text) for rank, text in enumerate(found) if text]
    if different:
        rank, text = different[0]
        raise UserError(
            f"model: rank {rank} built another model than rank 0: {text}; build the same on every rank: draw from the global generators of torch, "
            "numpy or random, which are seeded alike, do not ask for the rank, and register tensors with register_buffer, which then come from "
            "rank 0. What ranks may have of their own, say so: trainer.forward_state={NAME: local}"
        )


def _description(model: nn.Module, cfg: Config) -> dict[str, str]:
    lines = {f"module {name!r}": type(module).__qualname__ for name, module in model.named_modules()}
    names: dict[int, str] = {}
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        order: list[str] = []
        for name, tensor in named:
            shape = "unknown shape" if isinstance(tensor, UninitializedParameter | UninitializedBuffer) else list(tensor.shape)
            trained = ", trained" if tensor.requires_grad else ""
            lines[f"{kind} {name}"] = f"{str(tensor.dtype).removeprefix('torch.')} {shape}{trained}"
            order.append(name)
            names[id(tensor)] = name
        lines[f"{_ORDER}{kind}s"] = hashlib.blake2b("\n".join(order).encode(), digest_size=8).hexdigest()
    local = [pattern for pattern, kind in cfg.trainer.forward_state.items() if kind == "local"]
    for slot in hidden(model):
        for path, leaf in reach.leaves(slot.path, slot.get()):
            if slot.kind == "variable" and not isinstance(leaf, torch.Tensor):
                continue  # closures hold much that is none of the model's
            if not _is_own(path) and not reach.matches(path, local):
                lines[path] = names.get(id(leaf)) or reach.token(leaf)
    return lines


def _differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    for path in sorted(dict.fromkeys((*theirs, *mine)), key=lambda path: path.startswith(_ORDER)):  # last, as it tells least
        here, there = mine.get(path), theirs.get(path)
        if here == there or _is_rank(here, there) or _is_text(here, there):
            continue
        yield f"{path} is {here if here is not None else 'not there'}, and on rank 0 {there if there is not None else 'not there'}"


def _is_own(path: str) -> bool:
    return any(_OWN.search(part) for part in re.split(r"\W+", path.lower()))


def _is_rank(here: str | None, there: str | None) -> bool:
    """The rank itself, the number of the process, or the time."""
    own = {str(dist.get_rank()), os.environ.get("LOCAL_RANK"), str(os.getpid())}
    if here in own and there is not None and there.isdigit():
        return there == "0" or here == str(os.getpid())
    try:
        return all(abs(float(number) - time.time()) < 86400 for number in (here or "", there or ""))
    except ValueError:
        return False


def _is_text(here: str | None, there: str | None) -> bool:
    """Two texts that are no names of anything in a program: directories, hosts, random names."""
    texts = [text for text in (here, there) if text is not None and text[:1] in "'\""]
    return len(texts) == 2 and not all(text[1:-1].replace("_", "").isalpha() for text in texts)

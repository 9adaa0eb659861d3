"""Save and load tensors under any layout: collective, atomic, verified."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from paratrain import compat
from paratrain.checkpoint.directory import absent_files, read
from paratrain.checkpoint.manifest import DTYPE_NAMES, CheckpointError, Manifest

_MOST_FAULTS = 20
T = TypeVar("T")


def save(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    meta: dict[str, Any] | None = None,
    rank_meta: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    staged: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint, completely or not at all. Collective over `group`; on a file system that its ranks share.

    Everything is written and synced under a hidden name next to `path`, the manifest last, and renamed. A checkpoint that stands at
    `path` is renamed aside before and deleted after, so that a crash in between leaves it under its hidden name and nothing at `path`.

    Args:
        tensors: name -> plain tensor or DTensor of any mesh. Each rank passes what it holds; a name on several ranks is one tensor: of
            a DTensor every part is written once, of a plain tensor the copy of one of these ranks.
        meta: JSON values (dict, list, str, int, float, bool, None); rank 0's are kept.
        rank_meta: likewise, kept for every rank.
        staged: what `stage` returned for `tensors`: these copies are written, so that training may go on meanwhile in another thread.

    Raises:
        CheckpointError: on every rank, when any of them fails; names rank, file and reason. No half checkpoint is left.
    """
    from paratrain.checkpoint.planning import Planner, Writer

    target = Path(os.path.abspath(path))
    doing = f"cannot save checkpoint {target}"
    together(doing, lambda: _check_tensors(tensors), group)
    writer = Writer(target, meta or {}, rank_meta or {})
    try:
        with _translated(doing):
            compat.dcp_save(dict(tensors), writer, Planner(staged or {}), group)
    except BaseException:
        writer.discard()
        raise


def stage(tensors: Mapping[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy what this rank holds of each tensor to host memory; returns when the copies are complete.

    Args:
        buffers: memory of the copies, kept between calls: fresh pages cost more than the copy.
    """
    from torch.distributed.tensor import DTensor

    local = {name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in tensors.items()}
    for name in buffers.keys() - local.keys():
        del buffers[name]
    devices = {tensor.device for tensor in local.values() if tensor.device.type != "cpu"}
    for name, tensor in local.items():
        kept = buffers.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        buffers[name].copy_(tensor, non_blocking=True)
    for device in devices:
        torch.accelerator.synchronize(device)
    return dict(buffers)


def load(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    *,
    partial: str | Sequence[str] = (),
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fill tensors in place from a checkpoint of any layout. Collective over `group`.

    Every byte is verified before it is used. After an error the values of `tensors` are undefined.

    Args:
        tensors: name -> plain tensor or DTensor of any mesh, of the saved global shape. Each rank passes what it holds; together the
            ranks must ask for every saved name. Floating dtypes are converted, others must be those saved.
        partial: globs of names that may be absent, here or in the checkpoint; "*" takes what there is. Tensors that the checkpoint
            does not have keep their values.

    Returns:
        `meta`, and `rank_meta` of every rank that saved.

    Raises:
        CheckpointError: on every rank. Lists every name that is missing or left over and every shape and dtype that differs, or the
            damage by rank and file.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner

    from paratrain.checkpoint.planning import Reader

    path = Path(os.path.abspath(path))
    patterns = [partial] if isinstance(partial, str) else list(partial)
    doing = f"cannot load checkpoint {path}"
    found: list[Manifest] = []

    def compare() -> tuple[list[str], bytes]:
        found.append(read(path))
        return _mismatches(tensors, found[0], patterns), bytes(name in tensors for name in found[0].tensors)

    answers = together(doing, compare, group)
    manifest = found[0]
    asked = [any(column) for column in zip(*(mask for _, mask in answers), strict=True)]
    left_over = [name for name, was_asked in zip(manifest.tensors, asked, strict=True) if not was_asked and not _matches(name, patterns)]
    faults = list(dict.fromkeys(fault for mine, _ in answers for fault in mine))
    faults += [f"{name!r} is in the checkpoint and was not asked for" for name in left_over]
    if faults:
        raise CheckpointError(_listed(doing, faults))
    together(doing, lambda: _check_files(path, manifest, group), group)
    wanted = {name: tensor for name, tensor in tensors.items() if name in manifest.tensors}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _translated(doing):
        compat.dcp_load(wanted, Reader(path, manifest, list(wanted)), planner, group)
    return manifest.meta, manifest.rank_meta


def together(doing: str, fn: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `fn` returns on each rank; when it raises on any of them, CheckpointError on all."""
    answer, fault, cause = None, None, None
    try:
        answer = fn()
    except Exception as error:
        cause, fault = error, str(error) if isinstance(error, CheckpointError | OSError) else f"{type(error).__name__}: {error}"
    answers: list[Any] = [(answer, fault)]
    if dist.is_initialized():
        answers = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, (answer, fault), group=group)
    faults = {rank: fault for rank, (_, fault) in enumerate(answers) if fault is not None}
    if faults:
        raise CheckpointError(_listed(doing, _by_rank(faults))) from cause
    return [answer for answer, _ in answers]


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Raise what some ranks raised inside torch.distributed.checkpoint as a CheckpointError that names them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        if not all(isinstance(failure, CheckpointError | OSError) for failure in failures.values()):
            raise RuntimeError(f"{doing}: {error}") from error
        raise CheckpointError(_listed(doing, _by_rank({rank: str(failure) for rank, failure in failures.items()}))) from None


def _by_rank(faults: dict[int, str]) -> list[str]:
    ranks = defaultdict(list)
    for rank, fault in sorted(faults.items()):
        ranks[fault].append(str(rank))
    return [f"rank{'s' if len(who) > 1 else ''} {', '.join(who)}: {fault}" for fault, who in ranks.items()]


def _listed(doing: str, faults: list[str]) -> str:
    more = [f"... and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
    return "\n  ".join([f"{doing}:", *faults[:_MOST_FAULTS], *more])


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name!r} is of type {type(tensor).__name__}, not a tensor: put it into `meta`")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(f"{name!r} has dtype {tensor.dtype}, layout {tensor.layout}, device {tensor.device}: it cannot be saved")


def _check_files(path: Path, manifest: Manifest, group: dist.ProcessGroup | None) -> None:
    faults = absent_files(path, manifest) if not dist.is_initialized() or dist.get_rank(group) == 0 else []
    if faults:
        raise CheckpointError("; ".join(faults))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _mismatches(tensors: Mapping[str, torch.Tensor], manifest: Manifest, patterns: list[str]) -> list[str]:
    faults: list[str] = []
    for name, tensor in tensors.items():
        saved = manifest.tensors.get(name)
        if saved is None:
            if not _matches(name, patterns):
                near = difflib.get_close_matches(name, manifest.tensors, 1) if len(faults) < _MOST_FAULTS else []
                faults.append(f"{name!r} is not in the checkpoint" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif tuple(tensor.shape) != saved.shape:
            faults.append(f"{name!r} has shape {tuple(tensor.shape)}, and {saved.shape} in the checkpoint")
        elif tensor.dtype is not saved.dtype and not (tensor.is_floating_point() and saved.dtype.is_floating_point):
            faults.append(f"{name!r} has dtype {tensor.dtype}, and {saved.dtype} in the checkpoint: only floating dtypes are converted")
        elif tensor.is_meta:
            faults.append(f"{name!r} is on the meta device: it has no memory to load into")
    return faults

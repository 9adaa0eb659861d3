"""What torch.distributed.checkpoint needs of us: it plans which rank writes and reads which chunk, these classes move the bytes.

Imported where it is used: torch.distributed.checkpoint takes half a second.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from paratrain import notes
from paratrain.checkpoint import files
from paratrain.checkpoint.directory import beside
from paratrain.checkpoint.manifest import (
    DTYPE_NAMES,
    FILE_NAME,
    CheckpointError,
    Chunk,
    Manifest,
    SavedFile,
    SavedTensor,
    check_json,
    dump,
    parse,
)

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
assert _SAFETENSORS.keys() == DTYPE_NAMES.keys()


def _done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


class Planner(DefaultSavePlanner):
    """torch's planner, for flat dicts of tensors, which in addition refuses ranks that disagree about a tensor.

    Args:
        staged: name -> copy of the local part of a tensor, written in its stead: the tensor itself has moved on.
    """

    def __init__(self, staged: Mapping[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged = staged

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.staged[index.fqn] if index.fqn in self.staged else super().lookup_object(index)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        # ranks beyond the last row hold empty chunks; a tensor without elements keeps one, to be known at all
        return replace(plan, items=[item for item in plan.items if math.prod(_chunk(item).sizes) or not math.prod(_data(item).size)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        whole: dict[str, tuple[Any, int]] = {}
        parts: dict[MetadataIndex, tuple[Any, int]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                name, data = item.index.fqn, _data(item)
                kind = (tuple(data.size), str(data.properties.dtype), "plain" if item.type.name == "TENSOR" else "DTensor")
                _agree(name, kind, rank, *whole.setdefault(name, (kind, rank)))
                sizes = tuple(_chunk(item).sizes)
                _agree(name, sizes, rank, *parts.setdefault(item.index, (sizes, rank)))
        return super().create_global_plan(all_plans)


def _agree(name: str, mine: Any, rank: int, theirs: Any, other: int) -> None:
    if mine != theirs:
        raise CheckpointError(f"{name!r} is {theirs} on rank {other} and {mine} on rank {rank}: one name must be one tensor")


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None, item
    return item.tensor_data


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    return _data(item).chunk


def _size(item: WriteItem) -> int:
    return math.prod(_chunk(item).sizes) * _data(item).properties.dtype.itemsize


class Writer(StorageWriter):
    """One safetensors file a rank in a temporary directory, a manifest last, then a rename.

    Args:
        target: the checkpoint's path.
        meta: kept in the manifest; rank 0's counts.
        rank_meta: kept for every rank.
    """

    def __init__(self, target: Path, meta: dict[str, Any], rank_meta: dict[str, Any]):
        self.target, self.meta, self.rank_meta = target, meta, rank_meta
        self.temporary = beside(target, "tmp")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        check_json(self.rank_meta, "rank_meta")
        if not is_coordinator:
            return
        check_json(self.meta, "meta")
        if os.path.lexists(self.target) and not (self.target.is_dir() and (self.target / FILE_NAME).exists()):
            raise CheckpointError(f"{self.target} exists and is no checkpoint: it will not be replaced; delete it or save elsewhere")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        files.sync_directory(self.target.parent.parent)
        self.temporary.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=self.rank_meta)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._check_space(sum(_size(item) for plan in plans for item in plan.items))
        self.rank_metas = [plan.storage_data for plan in plans]
        return [replace(plan, storage_data=(rank, self.temporary.name)) for rank, plan in enumerate(plans)]

    def _check_space(self, needed: int) -> None:
        """A disk that fills up while ranks write costs the time of a save, and may take the logs with it."""
        free = shutil.disk_usage(self.temporary).free
        if needed + needed // 50 > free:
            raise CheckpointError(f"{self.target.parent} has {notes.size(free)} free, and the checkpoint needs {notes.size(needed)}")

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank, name = plan.storage_data
        directory = self.target.with_name(name)
        if not plan.items:
            return _done([])
        if not directory.is_dir():
            raise CheckpointError(f"{directory}, which rank 0 made, is not here: checkpoints need a file system that all ranks share")
        items = sorted(plan.items, key=lambda item: (-_data(item).properties.dtype.itemsize, item.index.fqn, item.index.offset))
        header, starts = _header(items)
        saved = files.write(directory / f"rank-{rank:05d}.safetensors", _bytes(header, items, planner))
        files.sync_directory(directory)
        results = [
            WriteResult(item.index, _size(item), (tuple(_chunk(item).sizes), start)) for item, start in zip(items, starts, strict=True)
        ]
        return _done([WriteResult(MetadataIndex(saved.name), saved.size, saved), *results])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        saved_files: list[SavedFile] = []
        chunks = defaultdict(list)
        for file, *parts in filter(None, results):
            for part in parts:
                sizes, start = part.storage_data
                if math.prod(sizes):
                    chunks[part.index.fqn].append(Chunk(tuple(part.index.offset or ()), sizes, len(saved_files), start))
            saved_files.append(file.storage_data)
        tensors = {}
        for name, tensor in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(tensor, TensorStorageMetadata)
            tensors[name] = SavedTensor(tuple(tensor.size), tensor.properties.dtype, chunks[name])
        text = dump(Manifest(tensors, saved_files, self.meta, self.rank_metas))
        parse(text)
        files.write(self.temporary / FILE_NAME, [text])
        files.sync_directory(self.temporary)
        self._publish()

    def _publish(self) -> None:
        replaced = beside(self.target, "old") if self.target.exists() else None
        if replaced:
            os.rename(self.target, replaced)
        try:
            os.rename(self.temporary, self.target)
        except OSError:
            if replaced:
                os.rename(replaced, self.target)
            raise
        files.sync_directory(self.target.parent)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing of a failed save."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def _header(items: list[WriteItem]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file with `items` in this order, and the byte at which each starts."""
    header, ends = {}, [0]
    for item in items:
        dtype, chunk = _data(item).properties.dtype, _chunk(item)
        ends.append(ends[-1] + math.prod(chunk.sizes) * dtype.itemsize)
        box = ",".join(f"{offset}:{offset + size}" for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
        header[f"{item.index.fqn}[{box}]"] = {"dtype": _SAFETENSORS[dtype], "shape": list(chunk.sizes), "data_offsets": ends[-2:]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends[:-1]]


def _bytes(header: bytes, items: list[WriteItem], planner: SavePlanner) -> Iterator[memoryview | bytes]:
    yield header
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.shape == _chunk(item).sizes, f"{item.index.fqn}: local shard {tuple(tensor.shape)}, planned {_chunk(item)}"
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Reader(StorageReader):
    """Reads the chunks of a checkpoint that a rank needs, verifying them on the way.

    Args:
        names: tensors that this rank loads.
    """

    def __init__(self, path: Path, manifest: Manifest, names: list[str]):
        self.path, self.manifest, self.names = path, manifest, names

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        found = {}
        for name in self.names:
            saved = self.manifest.tensors[name]
            chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in saved.chunks]
            found[name] = TensorStorageMetadata(TensorProperties(dtype=saved.dtype), torch.Size(saved.shape), chunks)
        return Metadata(found)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {(name, chunk.offsets): chunk for name in self.names for chunk in self.manifest.tensors[name].chunks}
        by_file: dict[int, list[tuple[int, int, ReadItem, Chunk]]] = defaultdict(list)
        for number, item in enumerate(plan.items):
            chunk = chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            if math.prod(item.lengths):
                by_file[chunk.file].append((chunk.start, number, item, chunk))
        for index, wanted in by_file.items():
            with files.VerifiedFile(self.path, self.manifest.files[index]) as file:
                for _, _, item, chunk in sorted(wanted, key=lambda entry: entry[:2]):
                    with torch.no_grad():
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(_box(file, chunk, item, self.manifest.tensors[item.storage_index.fqn].dtype))
                        planner.commit_tensor(item, target)
        return _done(None)


def _box(file: files.VerifiedFile, chunk: Chunk, item: ReadItem, dtype: torch.dtype) -> torch.Tensor:
    """The part of a chunk that `item` asks for; reads from its first to its last byte."""
    strides = [math.prod(chunk.sizes[dim + 1 :]) for dim in range(len(chunk.sizes))]
    first = sum(offset * stride for offset, stride in zip(item.storage_offsets, strides, strict=True))
    count = 1 + sum((length - 1) * stride for length, stride in zip(item.lengths, strides, strict=True))
    start = chunk.start + first * dtype.itemsize
    data = file.read(start, start + count * dtype.itemsize)
    data = data.ne(0) if dtype is torch.bool else data.view(dtype)
    return data.as_strided(item.lengths, strides, data.storage_offset())

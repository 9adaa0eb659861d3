"""Weights from other programs' files: nothing in a file is executed, and what would have to be is refused by name."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from paratrain.checkpoint.directory import latest, read
from paratrain.checkpoint.manifest import FILE_NAME, CheckpointError
from paratrain.checkpoint.storage import load
from paratrain.errors import UserError

PREFIX = "model/"
_INDEX = re.compile(r"[\w.-]+\.(safetensors|bin)\.index\.json")
_DCP_NAMES = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "strided"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def kind(path: Path) -> str:
    """What `path` is: `paratrain`, `safetensors`, `torch`, `hf`, `dcp` or `deepspeed`.

    Raises:
        UserError: none of these; says what was looked for.
    """
    from paratrain.checkpoint import deepspeed

    if path.is_file():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            return "safetensors"
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            return "torch"
    elif (path / FILE_NAME).exists() or latest(path) or latest(path / "checkpoints"):
        return "paratrain"
    elif (path / ".metadata").exists():
        return "dcp"
    elif (path / "config.json").exists():
        return "hf"
    elif deepspeed.find(path):
        return "deepspeed"
    elif any(path.glob("*.safetensors")):
        return "safetensors"
    raise UserError(
        f"{path}: no weights there that can be read: looked for a checkpoint of paratrain or a run's directory, .safetensors, .pt, .pth or "
        ".bin files, a Hugging Face directory (config.json), torch.distributed.checkpoint's (.metadata), and DeepSpeed's (latest, mp_rank_*)"
    )


def weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """(name -> tensor on the CPU, configuration of a Hugging Face model if there is one).

    Raises:
        CheckpointError: a file is damaged, or holds what only running its code could read.
        UserError: nothing there that can be read.
    """
    found = kind(path)
    if found == "paratrain":
        return _own(path)
    if found == "dcp":
        return _dcp(path), None
    if found == "torch":
        return _torch(path), None
    if found == "deepspeed":
        from paratrain.checkpoint import deepspeed

        tensors = deepspeed.read(path).tensors
        return {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}, None
    config = _json(path / "config.json") if found == "hf" else None
    return _files(path), config


def own_directory(path: Path) -> Path:
    """The checkpoint that a path of paratrain's names: itself, or the newest of a run."""
    newest = path if (path / FILE_NAME).exists() else latest(path) or latest(path / "checkpoints")
    assert newest is not None
    return newest


def _own(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    path = own_directory(path)
    manifest = read(path)
    tensors = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in manifest.tensors.items() if name.startswith(PREFIX)}
    load(path, tensors, partial="*")
    config = manifest.meta.get("hf_config")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, config if isinstance(config, dict) else None


def _files(path: Path) -> dict[str, torch.Tensor]:
    """One file, the files of an index, or every file of a directory."""
    if path.is_file() and not path.name.endswith(".json"):
        return _file(path)
    directory = path if path.is_dir() else path.parent
    indices = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if _INDEX.fullmatch(entry.name))
    if indices:
        listed = _json(indices[-1]).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{indices[-1]}: its weight_map does not name files of its directory")
        files = [directory / name for name in sorted(names)]
    else:
        files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{path}: no .safetensors and no pytorch_model.bin there")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        part = _file(file)
        if twice := tensors.keys() & part.keys():
            raise CheckpointError(f"{file}: {sorted(twice)[0]!r} is in another file too")
        tensors |= part
    return tensors


def _file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        return _torch(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _torch(path: Path) -> dict[str, torch.Tensor]:
    """A state_dict, or the one under `state_dict`, `model` or `module` of what was saved."""
    saved = unpickled(path)
    for name in ("state_dict", "model", "module"):
        if isinstance(saved, dict) and isinstance(saved.get(name), dict):
            saved = saved[name]
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)} if isinstance(saved, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no state_dict")
    return tensors


def unpickled(path: Path, known: Sequence[tuple[Any, str]] = ()) -> Any:
    """What torch.save wrote, where that is tensors and plain values.

    Args:
        known: (class, full name) of further classes that the file may name, and what stands for them.

    Raises:
        CheckpointError: it is damaged, or names anything else, which would have to be run.
    """
    try:
        with open(path, "rb") as file:
            _refuse_inflating(file, path)
        with torch.serialization.safe_globals(list(known)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        reason = f"it names {asked[1]}" if asked else "its pickle does what tensors do not need"  # torch's own text advises to run it
        raise CheckpointError(
            f"{path}: not only tensors: reading it would run code ({reason}); save a plain state_dict() instead"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _refuse_inflating(file: IO[bytes], path: Path) -> None:
    """Refuse an archive whose entries are larger than itself: torch.save compresses nothing, and torch.load would inflate all of it."""
    size = os.fstat(file.fileno()).st_size if not isinstance(file, io.BytesIO) else len(file.getbuffer())
    if not zipfile.is_zipfile(file):
        return
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if sum(entry.file_size for entry in entries) > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: its archive is compressed, which torch.save never does; it may inflate to more than this machine holds"
        )


class _Metadata(pickle.Unpickler):
    """Reads DCP's `.metadata`, which is a pickle: classes that describe tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DCP_NAMES.get(module, ()):
            raise CheckpointError(f"the .metadata asks for {module}.{name}: reading it would run code")
        return super().find_class(module, name)


def _dcp(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a torch.distributed.checkpoint directory, those under `model` if there are such; other entries are pickles, left out."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    try:
        metadata = _Metadata(io.BytesIO((path / ".metadata").read_bytes())).load()
        entries = {name: saved for name, saved in metadata.state_dict_metadata.items() if isinstance(saved, TensorStorageMetadata)}
        if any(name.startswith("model.") for name in entries):
            entries = {name: saved for name, saved in entries.items() if name.startswith("model.")}
        available = sum(file.stat().st_size for file in path.iterdir())
        tensors = {}
        for name, saved in entries.items():
            if math.prod(saved.size) * saved.properties.dtype.itemsize > available:
                raise CheckpointError(f"{path}: {name!r} is larger than the files")
            whole = torch.empty(saved.size, dtype=saved.properties.dtype)
            for chunk in saved.chunks:
                stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[box] = _dcp_chunk(path, stored)
            tensors[name.removeprefix("model.")] = whole
        return tensors
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle may fail in any way
        raise CheckpointError(f"{path}: not readable as torch.distributed.checkpoint ({type(error).__name__}: {error})") from None


def _dcp_chunk(path: Path, stored: Any) -> torch.Tensor:
    name = str(stored.relative_path)
    if Path(name).name != name or getattr(stored, "transform_descriptors", None):
        raise CheckpointError(f"{path}: a chunk is in {name!r}, outside the directory, or transformed")
    with open(path / name, "rb") as file:
        file.seek(stored.offset)
        content = io.BytesIO(file.read(stored.length))
    _refuse_inflating(content, path / name)
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return content

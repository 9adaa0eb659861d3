"""`manifest.json`: what a checkpoint holds and where, without any layout's ranks in it.

    {"xxh3_128": "<of every byte after this line>",
    "format": "paratrain-checkpoint", "version": 1, "meta": {...}, "rank_meta": [{...}, ...],
    "files": [{"name": "rank-00000.safetensors", "size": <bytes>, "xxh3_64": "<16 digits for each block of 4 MiB>"}, ...],
    "tensors": {"<name>": {"shape": [...], "dtype": "float32", "chunks": [[offsets, sizes, index of the file, first byte], ...]}, ...}}

The chunks of a tensor tile it exactly. `parse` trusts nothing: it accepts a manifest from anywhere, checks every field, and at
worst raises `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash

from paratrain.errors import UserError

FILE_NAME = "manifest.json"
FORMAT = "paratrain-checkpoint"
VERSION = 1
BLOCK = 4 << 20
"""Bytes that share one checksum: what a reader has to read and verify at least."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "complex64": torch.complex64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint64": torch.uint64,
    "uint32": torch.uint32,
    "uint16": torch.uint16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HEAD = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_DATA_FILE = re.compile(r"rank-[0-9]{5,9}\.safetensors")
_LARGEST = 1 << 48
_MOST_DIMS = 64


class CheckpointError(UserError):
    """A checkpoint cannot be written, or what is read is damaged, incomplete or does not fit."""


class Chunk(NamedTuple):
    """A box of a tensor: its bytes lie in row-major order from byte `start` of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    start: int


class SavedTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


class SavedFile(NamedTuple):
    name: str
    size: int
    hashes: str


@dataclass(frozen=True)
class Manifest:
    """The index of a checkpoint.

    Attributes:
        tensors: name -> shape, dtype and chunks.
        files: data files in the directory, referred to by position.
        meta: what `save` was given as `meta`.
        rank_meta: what each saving rank gave as `rank_meta`.
    """

    tensors: dict[str, SavedTensor]
    files: list[SavedFile]
    meta: dict[str, Any]
    rank_meta: list[dict[str, Any]]


def check_json(value: Any, where: str) -> None:
    """Refuse what would not come back from JSON as it went in, naming where it stands.

    Raises:
        CheckpointError: for anything but dicts with str keys, lists, str, int, float, bool and None.
    """
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise CheckpointError(f"{where} has the key {key!r}: keys must be str, to be kept as JSON")
            check_json(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(
            f"{where} is of type {type(value).__name__}: only dict, list, str, int, float, bool and None are kept; tensors go into `tensors`"
        )


def dump(manifest: Manifest) -> bytes:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "meta": manifest.meta,
        "rank_meta": manifest.rank_meta,
        "files": [{"name": file.name, "size": file.size, "xxh3_64": file.hashes} for file in manifest.files],
        "tensors": {
            name: {"shape": tensor.shape, "dtype": DTYPE_NAMES[tensor.dtype], "chunks": tensor.chunks}
            for name, tensor in manifest.tensors.items()
        },
    }
    body = json.dumps(content, separators=(",", ":"))[1:].encode()
    return b'{"xxh3_128": "%s",\n%s' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def parse(text: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: when it is damaged, from a newer version, or says anything that cannot be true.
    """
    head = _HEAD.match(text)
    if not head:
        raise CheckpointError(f"{FILE_NAME} is damaged: it does not start with its checksum")
    body = memoryview(text)[head.end() :]
    if xxhash.xxh3_128_hexdigest(body) != head[1].decode():
        raise CheckpointError(f"{FILE_NAME} is damaged: its content does not match its checksum")
    try:
        content = json.loads(b"{" + body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{FILE_NAME} is not JSON: {error}") from None
    _require(content.get("format") == FORMAT, f"its format is {content.get('format')!r:.200}, not {FORMAT!r}")
    version = content.get("version")
    _require(version == VERSION and type(version) is int, f"it has version {version!r:.200}, and this paratrain reads version {VERSION}")
    files = [_file(item) for item in _typed(content.get("files"), list, "files")]
    _require(len({file.name for file in files}) == len(files), "a file is listed twice")
    tensors = {name: _tensor(name, item, files) for name, item in _typed(content.get("tensors"), dict, "tensors").items()}
    rank_meta = [_typed(item, dict, "an entry of rank_meta") for item in _typed(content.get("rank_meta"), list, "rank_meta")]
    return Manifest(tensors, files, _typed(content.get("meta"), dict, "meta"), rank_meta)


def _invalid(fault: str) -> CheckpointError:
    return CheckpointError(f"{FILE_NAME} is not valid: {fault}")


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise _invalid(fault)


def _typed(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise _invalid(f"{what} must be a {kind.__name__}")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _file(item: Any) -> SavedFile:
    name, size, hashes = (_typed(item, dict, "an entry of files").get(key) for key in ("name", "size", "xxh3_64"))
    _require(type(name) is str and bool(_DATA_FILE.fullmatch(name)), f"{name!r:.200} is no name of a data file")
    _require(_is_size(size), f"the size of {name} is {size!r:.200}")
    digits = 16 * math.ceil(size / BLOCK)
    _require(type(hashes) is str and len(hashes) == digits and not hashes.strip("0123456789abcdef"), f"{name} needs {digits} hex digits")
    return SavedFile(name, size, hashes)


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not list or len(value) > _MOST_DIMS or not all(map(_is_size, value)):
        raise _invalid(f"sizes or offsets of {what} are {value!r:.200}")
    return tuple(value)


def _tensor(name: str, item: Any, files: list[SavedFile]) -> SavedTensor:
    what = f"tensor {name!r:.200}"
    shape = _sizes(_typed(item, dict, what).get("shape"), what)
    _require(math.prod(size for size in shape if size) <= _LARGEST, f"the shape of {what} is {shape}")
    code = item.get("dtype")
    _require(type(code) is str and code in DTYPES, f"the dtype of {what} is {code!r:.200}")
    chunks = [_chunk(entry, len(shape), DTYPES[code].itemsize, files, what) for entry in _typed(item.get("chunks"), list, what)]
    _require(tiles(shape, chunks), f"the chunks of {what} do not tile its shape {shape}")
    return SavedTensor(shape, DTYPES[code], chunks)


def _chunk(entry: Any, dims: int, itemsize: int, files: list[SavedFile], what: str) -> Chunk:
    if type(entry) is not list or len(entry) != 4:
        raise _invalid(f"a chunk of {what} is {entry!r:.200}")
    offsets, sizes, (file, start) = _sizes(entry[0], what), _sizes(entry[1], what), entry[2:]
    if not len(offsets) == len(sizes) == dims:
        raise _invalid(f"a chunk of {what} has other dims")
    if type(file) is not int or not 0 <= file < len(files):
        raise _invalid(f"a chunk of {what} is in file {file!r:.200} of {len(files)}")
    if not _is_size(start) or start % itemsize or start + math.prod(sizes) * itemsize > files[file].size:
        raise _invalid(f"a chunk of {what} cannot start at byte {start!r:.200} of {files[file].name}")
    return Chunk(offsets, sizes, file, start)


def tiles(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether the chunks are the cells of a grid over `shape`: every element in exactly one. Layouts shard dim by dim, so theirs are.

    A tensor without elements has no chunks.
    """
    if 0 in shape:
        return not chunks
    cells = 1
    for dim, size in enumerate(shape):
        end = 0
        intervals = sorted({(chunk.offsets[dim], chunk.sizes[dim]) for chunk in chunks})
        for offset, length in intervals:
            if offset != end or not length:
                return False
            end += length
        if end != size:
            return False
        cells *= len(intervals)
    return len(chunks) == cells and len({chunk.offsets for chunk in chunks}) == cells

"""Bytes on disk: files hashed block by block as they are written, and verified block by block as they are read.

A reader verifies what it reads and nothing else, in the one pass that reads it: a rank that needs a thousandth of a file pays for
that thousandth, under every layout.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash

from paratrain.checkpoint.manifest import BLOCK, CheckpointError, SavedFile


def write(path: Path, parts: Iterable[memoryview | bytes]) -> SavedFile:
    """Write a new file and see it on disk.

    Raises:
        CheckpointError: names the file and the system's reason.
    """
    size, hashes, block = 0, [], xxhash.xxh3_64()
    try:
        with open(path, "xb", buffering=0) as file:
            for part in parts:
                left = memoryview(part)
                while left:
                    piece = left[: BLOCK - size % BLOCK]
                    piece = piece[: file.write(piece)]
                    block.update(piece)
                    left, size = left[len(piece) :], size + len(piece)
                    if size % BLOCK == 0:
                        hashes.append(block.hexdigest())
                        block.reset()
            if size % BLOCK:
                hashes.append(block.hexdigest())
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror} after {size} bytes") from error
    return SavedFile(path.name, size, "".join(hashes))


def sync(path: Path) -> None:
    """See an existing file on disk, with what other writers of it have written so far; nothing where there is none.

    Raises:
        OSError: the disk did not take it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """See the entries of a directory on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file: no link that leads elsewhere, no pipe that blocks for ever.

    Raises:
        CheckpointError: names the file and the reason.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise CheckpointError(f"{path.name}: not a regular file")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None


class VerifiedFile:
    """A data file of which only verified bytes are handed out. A context manager.

    Raises:
        CheckpointError: when the file is absent or its size is not the one in the manifest.
    """

    def __init__(self, directory: Path, saved: SavedFile):
        self._saved = saved
        self._buffer = self._window = torch.empty(0, dtype=torch.uint8)
        self._start = 0
        self._file = open_regular(directory / saved.name)
        size = os.fstat(self._file.fileno()).st_size
        if size != saved.size:
            self._file.close()
            raise CheckpointError(
                f"{saved.name}: {size} bytes, and {saved.size} were written: {'truncated' if size < saved.size else 'extended'}"
            )

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Bytes `start` to `stop` as a uint8 tensor, valid until the next read.

        Raises:
            CheckpointError: when a block does not match its checksum or cannot be read.
        """
        if not self._start <= start <= stop <= self._start + len(self._window):
            first, last = start // BLOCK, -(-stop // BLOCK)
            self._start = first * BLOCK
            length = min(last * BLOCK, self._saved.size) - self._start
            if len(self._buffer) < length:  # kept between reads: fresh pages cost more than their hashes
                self._buffer = torch.empty(length, dtype=torch.uint8)
            self._window = self._buffer[:length]
            for index in range(first, last):
                self._read_block(index)
        return self._window[start - self._start : stop - self._start]

    def _read_block(self, index: int) -> None:
        """Fill the window's part that is block `index`."""
        begin = index * BLOCK
        block = self._window[begin - self._start : begin - self._start + BLOCK].numpy().data
        filled = 0
        try:
            while filled < len(block):
                count = os.preadv(self._file.fileno(), [block[filled:]], begin + filled)
                if not count:
                    raise CheckpointError(f"{self._saved.name}: ends at byte {begin + filled}, and {self._saved.size} were written")
                filled += count
        except OSError as error:
            raise CheckpointError(f"{self._saved.name}: {error.strerror} at byte {begin + filled}") from None
        if xxhash.xxh3_64_hexdigest(block) != self._saved.hashes[16 * index : 16 * index + 16]:
            raise CheckpointError(f"{self._saved.name}: damaged: bytes {begin} to {begin + len(block)} do not match their checksum")

    def faults(self) -> list[str]:
        """Verify the whole file: what is wrong with each of its blocks."""
        found = []
        for start in range(0, self._saved.size, BLOCK):
            try:
                self.read(start, min(start + BLOCK, self._saved.size))
            except CheckpointError as error:
                found.append(str(error))
        return found

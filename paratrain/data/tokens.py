"""From documents to files of tokens, made once and cached.

A cache entry is a directory named by a hash of all that its tokens are a function of. It is written under another name and
renamed when complete, so that a reader never sees half of one, whatever processes build at the same time or die doing so.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from paratrain.config import HFData, StdlibData, TextData, TextSource
from paratrain.data import sources
from paratrain.data.sources import Corpus
from paratrain.data.tokenizers import BPE, Byte, Tokenizer
from paratrain.errors import UserError

_FORMAT = 1  # change it when the same text shall give other tokens
_NOT_IN_TOKENS = {field.name for field in dataclasses.fields(TextSource)} - {"tokenizer", "vocab_size", "eval_fraction"}
_WHOLE_DOCUMENTS = 5  # hold out whole documents where that makes at least so many
_PIECE = 2**20  # characters encoded at once, so that a long document takes bounded memory
_BATCH = 2**22  # characters handed to the tokenizer together, so that one with threads has work for them
_CHUNK = 2**24  # bytes read at once to check them
TextConfig = StdlibData | TextData | HFData
_SOURCES: dict[type, Callable] = {StdlibData: sources.stdlib, TextData: sources.text, HFData: sources.hf}

log = logging.getLogger("paratrain")


class TokenFile(NamedTuple):
    """Token ids, one after the other in the machine's byte order: `length` items of `dtype`."""

    path: Path
    dtype: str
    length: int


def prepare(data: TextConfig) -> tuple[Tokenizer, dict[str, TokenFile]]:
    """The tokenizer of a text source, and its tokens by split ("train", "eval": those that have any), cached or made now.

    Documents stand one after the other, each followed by the separator. With many documents, whole ones are held out, chosen by a
    hash of their text, so that equal documents are on the same side and new ones move no other; with few, the end of each one.

    Raises:
        UserError: the text cannot be found or read, there is none, or the tokenizer does not fit.
    """
    _check(data)
    corpus = _SOURCES[type(data)](data)
    options = {name: value for name, value in dataclasses.asdict(data).items() if name not in _NOT_IN_TOKENS}
    key = hashlib.blake2b(json.dumps([_FORMAT, options, corpus.identity]).encode(), digest_size=12).hexdigest()
    entry = _cache_dir(data) / f"{data.source}-{data.tokenizer}-{key}"
    if (cached := _open(entry, data)) is not None:
        return cached
    with _only_one_builds(entry):
        if (cached := _open(entry, data)) is None:
            shutil.rmtree(entry, ignore_errors=True)
            _build(entry, data, corpus)
            cached = _open(entry, data)
    assert cached is not None, f"{entry} is not what was written"
    return cached


def _check(data: TextConfig) -> None:
    if data.tokenizer == "byte" and data.vocab_size != Byte.vocab_size:
        raise UserError(
            f"data.vocab_size={data.vocab_size} does not fit data.tokenizer=byte, which has 256 tokens: "
            "leave data.vocab_size=256, or write data.tokenizer=bpe"
        )
    if data.tokenizer == "bpe" and data.vocab_size < 257:
        raise UserError(
            f"data.vocab_size={data.vocab_size} is too small for data.tokenizer=bpe: 256 bytes and a separator need 257, "
            "and every further token is a merge: data.vocab_size=4096"
        )
    if not 0 <= data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction={data.eval_fraction} leaves nothing to train on: it must be at least 0 and below 1")


def _cache_dir(data: TextConfig) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = Path(data.cache_dir).expanduser() if data.cache_dir else home / "paratrain"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"data.cache_dir: cannot write tokens to {path}: {error.strerror}. Name a directory with room: data.cache_dir=...")


@contextmanager
def _only_one_builds(entry: Path) -> Iterator[None]:
    """Let the processes of a machine build one after the other, so that all but the first find the entry complete."""
    try:
        fd = os.open(
            entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )  # no planted link is followed
    except OSError as error:
        raise _unwritable(entry.parent, error) from error
    with os.fdopen(fd) as lock:
        with suppress(OSError):  # a file system without locks: each builds its own, and one rename wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open(entry: Path, data: TextConfig) -> tuple[Tokenizer, dict[str, TokenFile]] | None:
    """What a cache entry holds; None where there is none, or it is not what was written: every byte is checked."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        dtype = np.dtype(meta["dtype"])
        files = {split: TokenFile(entry / f"{split}.bin", dtype.name, length) for split, length in meta["tokens"].items()}
        if any(file.path.stat().st_size != file.length * dtype.itemsize for file in files.values()):
            return None
        kept = [entry / name for name in meta["checksums"]]
        if not {file.path for file in files.values()} <= set(kept) or _checksums(kept) != meta["checksums"]:
            log.warning(
                "the tokens in %s are not those that were written: the disk or another program has changed them; making them again", entry
            )
            return None
        return (Byte() if data.tokenizer == "byte" else BPE.load(entry / "tokenizer.json", data.vocab_size)), files
    except (OSError, ValueError, KeyError):
        return None


def _build(entry: Path, data: TextConfig, corpus: Corpus) -> None:
    log.info("tokenizing data=%s (%s, once): %s", data.source, data.tokenizer, entry)
    split = _splitter(data, corpus)
    tokenizer: Tokenizer = Byte()
    if data.tokenizer == "bpe":
        training_text = (piece for name, piece, _ in split() if name == "train")
        tokenizer = BPE.train(training_text, data.vocab_size)
    dtype = np.min_scalar_type(data.vocab_size - 1)
    temporary = entry.with_name(f".{entry.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
    except OSError as error:
        raise _unwritable(entry.parent, error) from error
    try:
        if isinstance(tokenizer, BPE):
            tokenizer.save(temporary / "tokenizer.json")
        tokens = _write(temporary, split(), tokenizer, dtype)
        checksums = _checksums(sorted(temporary.iterdir()))
        (temporary / "meta.json").write_text(json.dumps({"dtype": dtype.name, "tokens": tokens, "checksums": checksums}))
        with suppress(OSError):  # another process was first; its tokens are the same
            os.rename(temporary, entry)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _unwritable(entry.parent, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checksums(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> xxh3 of its bytes."""
    found = {}
    for path in paths:
        digest = xxhash.xxh3_64()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        found[path.name] = digest.hexdigest()
    return found


def _splitter(data: TextConfig, corpus: Corpus) -> Callable[[], Iterator[tuple[str, str, bool]]]:
    """A function that reads the corpus in pieces: (split, text, whether a document ends here)."""
    fraction = 0.0 if corpus.eval else data.eval_fraction
    enough = math.ceil(_WHOLE_DOCUMENTS / fraction) if fraction else 0
    whole = sum(1 for _ in itertools.islice(filter(None, corpus.train()), enough)) == enough

    def split() -> Iterator[tuple[str, str, bool]]:
        for text in corpus.train():
            if whole:
                yield from _pieces("eval" if _position(text) < fraction else "train", text)
            else:
                cut = _cut(text, fraction)
                yield from _pieces("train", text[:cut])
                yield from _pieces("eval", text[cut:])
        for text in corpus.eval() if corpus.eval else ():
            yield from _pieces("eval", text)

    return split


def _position(text: str) -> float:
    """A number in [0, 1) that is a function of the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest(), "big") / 2**48


def _cut(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins, after the end of a line if one is near."""
    cut = len(text) - round(len(text) * fraction)
    return text.rfind("\n", max(0, cut - 200), cut) + 1 or cut


def _pieces(split: str, text: str) -> Iterator[tuple[str, str, bool]]:
    """A document in parts of bounded size, cut at ends of lines; none where it is empty."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        yield split, text[start:stop], stop == len(text)
        start = stop


def _write(folder: Path, pieces: Iterator[tuple[str, str, bool]], tokenizer: Tokenizer, dtype: np.dtype) -> dict[str, int]:
    """Write one file of tokens a split; return how many tokens each holds, where it holds any."""
    separator = np.array(tokenizer.separator, dtype).tobytes()
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in ("train", "eval")}
        for batch in _batches(pieces):
            ids = tokenizer.encode_many([text for _, text, _ in batch])
            for (split, _, ends), tokens in zip(batch, ids, strict=True):
                files[split].write(tokens.astype(dtype, copy=False).tobytes() + (separator if ends else b""))
        return {split: file.tell() // dtype.itemsize for split, file in files.items() if file.tell()}


def _batches(pieces: Iterator[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    batch: list[tuple[str, str, bool]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

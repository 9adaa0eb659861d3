"""Where text comes from: each source is a function of its configuration that gives a `Corpus`, read lazily."""

from __future__ import annotations

import difflib
import glob
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paratrain.config import HFData, StdlibData, TextData
from paratrain.errors import UserError

STDLIB_BYTES = 16_000_000
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".json", ".yaml", ".toml", ".csv", ".tsv", ".log", ".py", ".pyi", ".c", ".h",
    ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".js", ".ts", ".jsx", ".tsx", ".css", ".sh", ".sql", ".rb", ".php",
    ".lua", ".r", ".jl", ".hs", ".scala", ".swift",
))  # fmt: skip
JSON_LINES = frozenset((".jsonl", ".ndjson"))


class Corpus(NamedTuple):
    """Text to train on.

    Attributes:
        identity: what the tokens are a function of, as JSON values: the key of the cache.
        train: reads the documents, each a string, in an order that is always the same.
        eval: reads the documents to evaluate on; None where they are to be held out of `train`.
    """

    identity: list
    train: Callable[[], Iterator[str]]
    eval: Callable[[], Iterator[str]] | None = None


def stdlib(data: StdlibData) -> Corpus:
    """The standard library's .py files without its tests and without installed packages, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(_walk(root, skip={"test", "tests", "idle_test", "site-packages", "dist-packages"}, suffixes={".py"}))
    total, chosen = 0, []
    for file in files:
        total += file.stat().st_size
        if total <= STDLIB_BYTES:
            chosen.append(file)
    if not chosen:
        raise UserError(f"data=stdlib: {root} holds no .py files; this Python ships its standard library without source. Use data=text")

    def documents() -> Iterator[str]:
        for file in chosen:
            with tokenize.open(file) as lines:  # honours the encoding that a source file declares
                yield lines.read()

    return Corpus(_stamps(chosen), documents)


def text(data: TextData) -> Corpus:
    """Files of the user's own: a text file is one document, a line of .jsonl and a row of .parquet is one each.

    A directory stands for all files in it whose suffix tells that they hold text, hidden ones excepted.
    """
    if not data.path:
        raise UserError("data.path is required with data=text: a file, a directory or a glob, or a list of them: data.path=corpus/")
    paths = [data.path] if isinstance(data.path, str) else data.path
    files = list(dict.fromkeys(file for path in paths for file in _expand(path)))

    def documents() -> Iterator[str]:
        for file in files:
            yield from _read(file, data.text_field)

    return Corpus(_stamps(files), documents)


def hf(data: HFData) -> Corpus:
    """A data set that `datasets` loads, from a directory (made by `save_to_disk`, or of data files) or from the hub."""
    if not data.name:
        raise UserError("data.name is required with data=hf: the path of a data set directory, or a name on the hub: data.name=wikitext")
    path = Path(data.name).expanduser()

    def documents(split: str) -> Iterator[str]:
        rows = _load(data, split)
        _check_field("data.text_field", data.text_field, rows.column_names, f"the data set {data.name}")
        number = 0
        for batch in rows.select_columns([data.text_field]).iter(batch_size=256):
            for value in batch[data.text_field]:
                number += 1
                yield _string(value, f"{data.name}, split {split}, row {number}", data.text_field)

    if path.is_dir():  # no need to import `datasets` where the tokens are cached
        identity = _stamps(sorted(_walk(path)))
    else:
        identity = [_stamps(Path(file["filename"]) for file in _load(data, split).cache_files) for split in _splits(data)]
    held_out = data.eval_split
    return Corpus(identity, lambda: documents(data.split), (lambda: documents(held_out)) if held_out else None)


def _splits(data: HFData) -> list[str]:
    return [data.split] + ([data.eval_split] if data.eval_split else [])


def _load(data: HFData, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data=hf needs the package `datasets`: pip install datasets") from error
    assert data.name is not None
    key = "data.eval_split" if split == data.eval_split else "data.split"
    path = Path(data.name).expanduser()
    if data.name.startswith((".", "/", "~")) and not path.exists():
        raise UserError(_missing("data.name", data.name))
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.exists() else data.name, data.config)
    except Exception as error:  # `datasets` and its readers raise whatever they like
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"data.name={data.name}: `datasets` cannot load it: {reason}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        loaded = {str(loaded.split or "train"): loaded}
    if split not in loaded:
        raise UserError(f"{key}={split}: the data set {data.name} has no such split, only {', '.join(map(str, loaded))}")
    return loaded[split]


def _walk(root: Path, skip: Iterable[str] = (), suffixes: Iterable[str] | None = None) -> Iterator[Path]:
    """Files below `root`, without hidden ones and without the directories named in `skip`."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and name != "__pycache__" and not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (suffixes is None or os.path.splitext(name)[1].lower() in suffixes):
                yield Path(folder, name)


def _expand(path: str) -> list[Path]:
    """The files that one entry of data.path stands for, sorted."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    suffixes = TEXT_SUFFIXES | JSON_LINES | {".parquet"}
    if place.is_dir():
        found = sorted(_walk(place, suffixes=suffixes))
        if not found:
            others = sorted({file.suffix or file.name for file in _walk(place)})
            holds = f"only {', '.join(others[:8])}" if others else "no files"
            raise UserError(
                f"data.path={path}: the directory holds {holds}, none known to be text; name them by a glob: data.path='{path}/*'"
            )
        return found
    if not glob.has_magic(path):
        raise UserError(_missing("data.path", path))
    matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
    found = [match for match in matches if match.is_file()]
    if not found:
        raise UserError(f"data.path={path}: nothing matches; a relative glob starts at {Path.cwd()}, and ** stands for any directories")
    return found


def _missing(key: str, path: str) -> str:
    """What to say of a path that does not exist: how far it goes, and what there is with a name like it."""
    place = Path(path).expanduser().absolute()
    while not place.parent.exists():
        place = place.parent
    entries = sorted(os.listdir(place.parent)) if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, entries, n=3) or entries[:5]
    hint = f"it holds {', '.join(near)}" + (" ..." if len(entries) > len(near) else "") if near else "it is empty"
    return f"{key}={path}: no such file or directory. There is no {place.name!r} in {place.parent}; {hint}"


def _read(file: Path, field: str) -> Iterator[str]:
    try:
        if file.suffix.lower() == ".parquet":
            yield from _read_parquet(file, field)
        elif file.suffix.lower() in JSON_LINES:
            yield from _read_json_lines(file, field)
        else:
            yield file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: {file} is not UTF-8 text (byte {error.start}). Convert it (iconv -t utf-8) or name other files"
        ) from error
    except OSError as error:
        raise UserError(f"data.path: cannot read {file}: {error.strerror}") from error


def _read_json_lines(file: Path, field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: this line is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise UserError(f"{file}:{number}: a {type(record).__name__}, but each line must be an object with the field {field!r}")
            _check_field("data.text_field", field, record, f"{file}:{number}")
            yield _string(record[field], f"{file}:{number}", field)


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"data.path: reading {file} needs the package `pyarrow`: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data.path: {file} is no parquet file: {error}") from error
    with table:
        _check_field("data.text_field", field, table.schema_arrow.names, str(file))
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _string(value, f"{file}, row {number}", field)


def _check_field(key: str, field: str, fields: Iterable[str], place: str) -> None:
    names = list(fields)
    if field not in names:
        near = difflib.get_close_matches(field, names, n=1)
        hint = f"did you mean {key}={near[0]}?" if near else f"name the one that holds the text: {key}=..."
        raise UserError(f"{key}={field}: {place} has no such field; it has {', '.join(names) or 'none'}: {hint}")


def _string(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"{place}: the field {field!r} is {kind}, not text. Drop such records, or choose another with data.text_field")
    return value


def _stamps(files: Iterable[Path]) -> list:
    """Name, size and time of change of each file."""
    return [[str(file.absolute()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]

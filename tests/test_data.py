"""Sources, tokenizers, packing, the cache, and what a user is told when the data is not there."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from paratrain.config import CustomData, HFData, StdlibData, SyntheticData, Target, TextData
from paratrain.data import build, sources, tokenizer, tokens
from paratrain.data.datasets import Packed
from paratrain.data.tokenizers import BPE, Byte
from paratrain.errors import UserError

CONF = Path(__file__).parents[1] / "conf" / "data"


@pytest.fixture
def text(tmp_path):
    """Make a data=text configuration that caches where the test ends."""

    def make(path, **options):
        return TextData(path=str(path), cache_dir=str(tmp_path / "cache"), **{"seq_len": 8, "eval_fraction": 0.0, **options})

    return make


def unpacked(dataset):
    """The tokens that the samples of a packed data set hold, and how many of their targets count."""
    inputs, targets = (torch.cat(part) for part in zip(*(dataset[i] for i in range(len(dataset))), strict=True))
    real = targets != -100
    assert torch.equal(inputs[1:][real[1:]], targets[:-1][real[1:]]), "targets are the inputs, shifted by one"
    return [*inputs[real].tolist(), targets[real][-1].item()], int(real.sum())


def documents_of(dataset, tokens=None):
    text = (tokens or Byte()).decode(unpacked(dataset)[0])
    separator = "\0" if tokens is None else "<|endoftext|>"
    assert text.endswith(separator)
    return text.split(separator)[:-1]


@pytest.mark.parametrize("config", [StdlibData, TextData, HFData, SyntheticData, CustomData])
def test_conf_files_hold_every_key_with_its_default(config):
    default = dataclasses.asdict(config())
    assert yaml.safe_load((CONF / f"{default['source']}.yaml").read_text()) == default


# Packing


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100])
def test_packing_loses_no_token(tmp_path, length):
    ids = np.random.default_rng(0).integers(0, 60000, length).astype(np.uint16)
    ids.tofile(tmp_path / "t.bin")
    dataset = Packed(tokens.TokenFile(tmp_path / "t.bin", "uint16", length), 8, filler=7)
    assert unpacked(dataset) == (ids.tolist(), length - 1)
    inputs, targets = dataset[len(dataset) - 1]
    assert inputs.shape == targets.shape == (8,)
    assert inputs.dtype == targets.dtype == torch.int64
    assert (inputs[1:][targets[1:] == -100] == 7).all()
    assert list(map(len, dataset)) == [2] * len(dataset)  # iterating ends


def test_a_packed_data_set_travels_as_a_path(tmp_path):
    np.arange(200, dtype=np.uint8).repeat(1000).tofile(tmp_path / "t.bin")
    dataset = Packed(tokens.TokenFile(tmp_path / "t.bin", "uint8", 200_000), 8, filler=0)
    sample = dataset[3000]
    assert len(pickle.dumps(dataset)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3000][0], sample[0])


def test_text_files_become_documents_in_order(tmp_path, text):
    corpus = tmp_path / "corpus"
    (corpus / "sub" / ".git").mkdir(parents=True)
    (corpus / "b.txt").write_text("zweite Datei: äöü\n")
    (corpus / "a.md").write_bytes(b"\xef\xbb\xbffirst")
    (corpus / "empty.txt").write_text("")
    (corpus / "sub" / "c.py").write_text("x = 1\n")
    (corpus / "sub" / ".git" / "hidden.txt").write_text("not this")
    (corpus / "sub" / "image.png").write_bytes(b"\x89PNG")
    (corpus / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "tw\\ud800o", "other": 3}\n')
    train, evaluation = build(text(corpus), 0)
    assert documents_of(train) == ["first", "zweite Datei: äöü\n", "one", "tw?o", "x = 1\n"]
    assert evaluation is None
    one = build(text(corpus / "**" / "*.py", seq_len=2), 0)[0]
    assert documents_of(one) == ["x = 1\n"]
    paths = [str(corpus / "b.txt"), str(corpus / "*.md"), str(corpus / "b.txt")]
    listed = TextData(path=paths, cache_dir=str(tmp_path), seq_len=8, eval_fraction=0.0)
    assert documents_of(build(listed, 0)[0]) == ["zweite Datei: äöü\n", "first"]


def test_parquet_rows_are_documents(tmp_path, text):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"id": list(range(3000)), "body": rows}), tmp_path / "t.parquet", row_group_size=700)
    assert documents_of(build(text(tmp_path / "t.parquet", text_field="body"), 0)[0]) == rows
    with pytest.raises(
        UserError, match=r"data.text_field=bod: .*t.parquet has no such field; it has id, body: did you mean data.text_field=body\?"
    ):
        build(text(tmp_path / "t.parquet", text_field="bod"), 0)
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(UserError, match=r"bad.parquet is no parquet file"):
        build(text(tmp_path / "bad.parquet"), 0)


# Train and eval


def test_many_documents_are_split_whole_by_their_text(tmp_path, text):
    lines = [f"document {i % 400}" for i in range(500)]
    file = tmp_path / "t.jsonl"

    def splits(lines):
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        train, evaluation = build(text(file, eval_fraction=0.1), 0)
        return documents_of(train), documents_of(evaluation)

    train, evaluation = splits(lines)
    assert sorted(train + evaluation) == sorted(lines)
    assert not set(train) & set(evaluation), "equal documents must be on one side"
    assert 20 < len(evaluation) < 90
    more_train, more_evaluation = splits(["new " + line for line in lines] + lines[::-1])
    assert set(train) <= set(more_train)
    assert set(evaluation) <= set(more_evaluation)


def test_of_few_documents_the_end_of_each_is_held_out(tmp_path, text):
    lines = {name: [f"{name} line {i}\n" for i in range(100)] for name in "ab"}
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(lines[name]))
    train, evaluation = (documents_of(part) for part in build(text(tmp_path / "*.txt", eval_fraction=0.1), 0))
    assert [a + b for a, b in zip(train, evaluation, strict=True)] == ["".join(lines["a"]), "".join(lines["b"])]
    assert all(9 <= document.count("\n") <= 11 and document[1:6] == " line" for document in evaluation)
    (tmp_path / "one.txt").write_text("no line ends here " * 1000)
    train, evaluation = build(text(tmp_path / "one.txt", eval_fraction=0.05), 0)
    assert documents_of(evaluation)[0] == ("no line ends here " * 1000)[-900:]


# Tokenizers


def test_bytes_round_trip():
    byte = Byte()
    assert byte.encode("aé€😀\n") == list("aé€😀\n".encode())
    assert byte.decode(byte.encode("aé€😀\n")) == "aé€😀\n"
    assert byte.decode([0xE2, 0x82]) == "�"


def test_bpe_round_trips_any_text(tmp_path, text):
    rng = random.Random(0)
    odd = ["", " leading", "tabs\t\tand  spaces \n\n", "😀é€\u200b\r\n", "<|endoftext|> is text here", "\x00\x01"]
    odd += ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x20, 0xD7FF)])) for _ in range(200)) for _ in range(20)]
    words = [" ".join(rng.choices(["shard", "tensor", "the", "of", "gradient"], k=200)) + "\n" for _ in range(50)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in words + odd))
    config = text(tmp_path / "t.jsonl", tokenizer="bpe", vocab_size=400)
    train, _ = build(config, 0)
    bpe = tokenizer(config)
    assert isinstance(bpe, BPE)
    for line in odd + words:
        assert bpe.decode(bpe.encode(line)) == line
        assert bpe.separator not in bpe.encode(line)
        assert all(token < bpe.vocab_size == 400 for token in bpe.encode(line))
    assert len(bpe.encode(words[0])) < len(words[0]) / 3
    ids = unpacked(train)[0]
    documents = [document for document in words + odd if document]
    assert ids.count(bpe.separator) == len(documents)
    assert bpe.decode(ids) == "".join(document + "<|endoftext|>" for document in documents)
    assert train.file.dtype == "uint16"


def test_a_long_document_is_encoded_in_pieces(tmp_path, text, monkeypatch):
    monkeypatch.setattr(tokens, "_PIECE", 100)
    monkeypatch.setattr(tokens, "_BATCH", 250)
    document = "".join(f"line {i} of a long document\n" * (i % 3) + "\n" * (i % 2) for i in range(200)) + "x" * 300
    (tmp_path / "t.txt").write_text(document)
    config = text(tmp_path / "t.txt", tokenizer="bpe", vocab_size=300)
    train, _ = build(config, 0)
    assert documents_of(train, tokenizer(config)) == [document]


def test_other_sources_have_no_tokenizer():
    assert tokenizer(SyntheticData()) is None


# The cache


def test_the_cache_is_used_until_something_changes(tmp_path, text, monkeypatch):
    (tmp_path / "t.txt").write_text("some text " * 100)
    built = []
    build_entry = tokens._build
    monkeypatch.setattr(tokens, "_build", lambda entry, *rest: (built.append(entry), build_entry(entry, *rest)))
    config = text(tmp_path / "t.txt", eval_fraction=0.1)
    for same in (config, config, dataclasses.replace(config, seq_len=16, global_batch=3, workers=2, shuffle=False)):
        train, _ = build(same, 0)
    assert len(built) == 1
    for other in (dataclasses.replace(config, eval_fraction=0.2), dataclasses.replace(config, tokenizer="bpe", vocab_size=260)):
        build(other, 0)
    assert len(set(built)) == 3
    os.utime(tmp_path / "t.txt", ns=(0, 0))
    build(config, 0)
    assert len(set(built)) == 4
    (built[-1] / "train.bin").write_bytes(b"half")  # a damaged entry is made again
    assert unpacked(build(config, 0)[0]) == unpacked(train)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")], "nothing temporary is left"


def test_a_failed_build_leaves_nothing(tmp_path, text):
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\nbad')
    with pytest.raises(UserError):
        build(text(tmp_path / "t.jsonl"), 0)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def _build_and_report(config, barrier, results):
    builds = []
    build_entry = tokens._build
    tokens._build = lambda *args: (builds.append(1), build_entry(*args))
    barrier.wait()
    train, _ = build(config, 0)
    results.put((len(builds), hash(tuple(unpacked(train)[0]))))


def test_processes_that_build_at_once_build_once(tmp_path, text):
    (tmp_path / "t.txt").write_text("".join(f"line {i}\n" for i in range(20000)))
    config = text(tmp_path / "t.txt", tokenizer="bpe", vocab_size=500, seq_len=64)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_build_and_report, args=(config, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    reports = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(builds for builds, _ in reports) == 1
    assert len({tokens for _, tokens in reports}) == 1


def test_a_cache_that_cannot_be_written(tmp_path, text):
    (tmp_path / "t.txt").write_text("some text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write tokens to .*file/cache: Not a directory"):
        build(dataclasses.replace(text(tmp_path / "t.txt"), cache_dir=str(tmp_path / "file" / "cache")), 0)


# Sources


def test_the_standard_library_is_real_text_and_soon_there(tmp_path):
    config = StdlibData(cache_dir=str(tmp_path))
    train, evaluation = build(config, 0)
    assert 4_000_000 < train.file.length + evaluation.file.length < sources.STDLIB_BYTES
    assert 0.02 < evaluation.file.length / train.file.length < 0.12
    assert "import " in tokenizer(config).decode(torch.cat([train[i][0] for i in range(200)]).tolist())

    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}

    before = written()
    again, _ = build(config, 0)
    assert written() == before, "nothing is read or tokenized twice"
    assert torch.equal(again[5][0], train[5][0])
    files = [Path(name) for name, *_ in sources.stdlib(config).identity]
    assert files == sorted(files)
    assert not [file for file in files if {"test", "tests", "site-packages"} & set(file.parts[len(Path(os.__file__).parent.parts) :])]


def test_a_hugging_face_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"text number {i}" for i in range(300)]
    parts = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"body": rows[:200], "n": list(range(200))}),
        test=datasets.Dataset.from_dict({"body": rows[200:], "n": list(range(100))}),
    )
    parts.save_to_disk(str(tmp_path / "dict"))
    parts["train"].save_to_disk(str(tmp_path / "single"))
    config = HFData(name=str(tmp_path / "dict"), text_field="body", eval_split="test", seq_len=8, cache_dir=str(tmp_path / "cache"))
    train, evaluation = build(config, 0)
    assert documents_of(train) == rows[:200]
    assert documents_of(evaluation) == rows[200:]
    single = dataclasses.replace(config, name=str(tmp_path / "single"), eval_split=None, eval_fraction=0.1)
    train, evaluation = build(single, 0)
    assert sorted(documents_of(train) + documents_of(evaluation)) == sorted(rows[:200])

    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    train, _ = build(dataclasses.replace(single, name=str(tmp_path / "files"), eval_fraction=0.0), 0)
    assert documents_of(train) == rows

    for change, message in [
        ({"split": "trian"}, r"data.split=trian: .* no such split, only train, test"),
        ({"eval_split": "dev"}, r"data.eval_split=dev: .* no such split, only train, test"),
        ({"text_field": "n"}, r"dict, split train, row 1: the field 'n' is of type int, not text"),
        ({"text_field": "boddy"}, r"did you mean data.text_field=body\?"),
        ({"name": str(tmp_path / "dcit")}, r"data.name=.*dcit: no such file or directory.*it holds dict"),
        ({"name": None}, r"data.name is required"),
    ]:
        with pytest.raises(UserError, match=message):
            build(dataclasses.replace(config, **change), 0)


def test_synthetic_tokens_are_a_function_of_seed_and_index():
    config = SyntheticData(seq_len=16, vocab_size=100, samples=50, eval_samples=5)
    train, evaluation = build(config, 1)
    assert (len(train), len(evaluation)) == (50, 5)
    inputs, targets = train[7]
    assert torch.equal(inputs[1:], targets[:-1])
    assert inputs.shape == (16,)
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 100
    assert torch.equal(build(config, 1)[0][7][0], inputs)
    others = [train[8], build(config, 2)[0][7], evaluation[2]]
    assert not any(torch.equal(inputs, other) for other, _ in others)
    assert build(dataclasses.replace(config, eval_samples=0), 1)[1] is None


def pairs(count, scale=1.0):
    return [(torch.tensor(float(i)), torch.tensor(i * scale)) for i in range(count)]


def test_a_data_set_of_ones_own():
    config = CustomData(
        train=Target({"_target_": f"{__name__}.pairs", "count": 5, "scale": 2.0}),
        eval=Target({"_target_": f"{__name__}.pairs", "count": 2}),
    )
    train, evaluation = build(config, 0)
    assert train[4] == (torch.tensor(4.0), torch.tensor(8.0))
    assert len(evaluation) == 2
    assert build(CustomData(train=config.train), 0)[1] is None
    with pytest.raises(UserError, match=r"data.train is required with data=custom"):
        build(CustomData(), 0)
    with pytest.raises(UserError, match=r"data.train is empty"):
        build(CustomData(train=Target({"_target_": f"{__name__}.pairs", "count": 0})), 0)
    with pytest.raises(UserError, match=r"data.train is a count, which cannot be read by index"):
        build(CustomData(train=Target({"_target_": "itertools.count"})), 0)


# Mistakes


def test_a_path_that_does_not_exist(tmp_path, text):
    (tmp_path / "corpus").mkdir()
    for path, message in [
        (tmp_path / "corpsu" / "a.txt", r"data.path=.*corpsu/a.txt: no such file.*There is no 'corpsu' in .*; it holds corpus$"),
        (tmp_path / "corpus" / "a.txt", r"There is no 'a.txt' in .*corpus; it is empty"),
        (tmp_path / "corpus" / "*.txt", r"data.path=.*\*.txt: nothing matches"),
        (tmp_path / "corpus", r"data.path=.*corpus: the directory holds no files"),
        ("", r"data.path is required with data=text"),
    ]:
        with pytest.raises(UserError, match=message):
            build(text(path), 0)
    (tmp_path / "corpus" / "a.png").write_text("")
    with pytest.raises(UserError, match=r"the directory holds only .png, none known to be text; name them by a glob"):
        build(text(tmp_path / "corpus"), 0)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.txt", b"", {}, r"data=text: there is no text to train on: every document is empty"),
        ("t.txt", b"short", {}, r"the text is too short: 6 tokens to train on, but one sample of data.seq_len=8 takes 9"),
        ("t.txt", b"enough text", {"eval_fraction": 0.01}, r"data.eval_fraction=0.01 holds out no text"),
        ("t.txt", b"text", {"eval_fraction": 1.0}, r"data.eval_fraction=1.0 leaves nothing to train on"),
        ("t.txt", b"text \xff", {}, r"t.txt is not UTF-8 text \(byte 5\)"),
        ("t.txt", b"text", {"vocab_size": 1000}, r"data.vocab_size=1000 does not fit data.tokenizer=byte, which has 256"),
        ("t.txt", b"text", {"tokenizer": "bpe"}, r"data.vocab_size=256 is too small for data.tokenizer=bpe"),
        ("t.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', {}, r"t.jsonl:2 has no such field; it has txt: did you mean data.text_field=txt\?"),
        ("t.jsonl", b'{"text": "a"}\n\n{"text": ', {}, r"t.jsonl:3: this line is not JSON"),
        ("t.jsonl", b'["a"]\n', {}, r"t.jsonl:1: a list, but each line must be an object with the field 'text'"),
        ("t.jsonl", b'{"text": null}\n', {}, r"t.jsonl:1: the field 'text' is null, not text"),
    ],
)
def test_text_that_cannot_be_trained_on(tmp_path, text, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(text(tmp_path / name, **options), 0)


def test_importing_the_package_loads_no_tokenizer_library():
    code = "import sys, paratrain.data; assert not {'tokenizers', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

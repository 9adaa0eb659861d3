"""A checkpoint is complete or does not count; damage of any kind is found and named; nothing read is trusted."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash

from paratrain import checkpoint
from paratrain.checkpoint import manifest as manifest_module
from paratrain.checkpoint.manifest import BLOCK, CheckpointError
from paratrain.errors import UserError

DATA = "rank-00000.safetensors"


def some_tensors():
    random = torch.Generator().manual_seed(2)
    return {
        "matrix": torch.randn(50, 70, generator=random),
        "half": torch.randn(33, generator=random).bfloat16(),
        "scalar": torch.tensor(3),
        "mask": torch.rand(9, generator=random) > 0.5,
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(6, 5, generator=random).T,
    }


def zeros_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "step-000007", some_tensors(), {"step": 7, "loss": 0.1, "best": None}, {"rng": [1, 2]})
    return tmp_path / "step-000007"


def edit(path, change):
    """Change the manifest and give it a true checksum, as a hostile author would."""
    content = json.loads((path / "manifest.json").read_bytes())
    content.pop("xxh3_128")
    change(content)
    sign(path, json.dumps(content)[1:].encode())


def sign(path, body):
    (path / "manifest.json").write_bytes(b'{"xxh3_128": "%s",\n%s' % (xxhash.xxh3_128_hexdigest(body).encode(), body))


def test_what_is_saved_comes_back(path):
    target = zeros_like(some_tensors())
    meta, rank_meta = checkpoint.load(path, target)
    assert (meta, rank_meta) == ({"step": 7, "loss": 0.1, "best": None}, [{"rng": [1, 2]}])
    assert checkpoint.read_meta(path) == meta
    assert all(torch.equal(target[name], tensor) for name, tensor in some_tensors().items())
    assert checkpoint.tensors(path) == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in some_tensors().items()}
    assert checkpoint.check(path) == []
    assert sorted(os.listdir(path)) == ["manifest.json", DATA]


def test_other_programs_read_the_data_files(path):
    found = safetensors.torch.load_file(path / DATA)
    assert torch.equal(found["matrix[0:50,0:70]"], some_tensors()["matrix"])
    assert torch.equal(found["half[0:33]"], some_tensors()["half"])
    json.loads((path / "manifest.json").read_text())


def test_values_that_json_would_bend_are_refused_by_place(tmp_path):
    for meta, place in [({"a": {"b": (1, 2)}}, r"meta\['a'\]\['b'\] is of type tuple"), ({"a": {1: 2}}, "has the key 1")]:
        with pytest.raises(CheckpointError, match=place):
            checkpoint.save(tmp_path / "c", {}, meta)
    meta = {"loss": float("inf"), "tiny": 5e-324, "third": 1 / 3, "big": 2**70, "text": "\ud800é\n"}
    checkpoint.save(tmp_path / "c", {}, meta)
    assert checkpoint.read_meta(tmp_path / "c") == meta


@pytest.mark.parametrize("bad", [[1.0], torch.zeros(2, dtype=torch.complex128), torch.zeros(2, device="meta"), torch.eye(3).to_sparse()])
def test_what_cannot_be_saved_is_refused_by_name(bad, tmp_path):
    with pytest.raises(CheckpointError, match="'odd' "):
        checkpoint.save(tmp_path / "c", {"odd": bad})
    assert os.listdir(tmp_path) == []


def test_every_mismatch_is_listed_at_once(path):
    wanted = {
        "matrx": torch.zeros(50, 70),
        "half": torch.zeros(3),
        "mask": torch.zeros(9),
        "scalar": torch.tensor(0),
        "gone": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, wanted)
    text = str(error.value)
    assert isinstance(error.value, UserError)
    assert "'matrx' is not in the checkpoint; did you mean 'matrix'?" in text
    assert "'half' has shape (3,), and (33,) in the checkpoint" in text
    assert "'mask' has dtype torch.float32, and torch.bool in the checkpoint" in text
    assert "'gone' is not in the checkpoint" in text
    assert "'transposed' is in the checkpoint and was not asked for" in text
    assert "scalar" not in text


def test_names_may_be_absent_where_that_is_said(path):
    target = {"matrix": torch.zeros(50, 70), "new/bias": torch.full((2,), 5.0)}
    with pytest.raises(CheckpointError, match="'new/bias'"):
        checkpoint.load(path, target, partial=["half", "scalar", "mask", "empty", "transposed"])
    checkpoint.load(path, target, partial=["half", "scalar", "mask", "empty", "transposed", "new/*"])
    assert torch.equal(target["matrix"], some_tensors()["matrix"])
    assert (target["new/bias"] == 5).all()
    checkpoint.load(path, {"half": torch.zeros(33)}, partial="*")


def test_floating_dtypes_are_converted_and_views_are_filled(path):
    whole = torch.zeros(100, 70, dtype=torch.float64, requires_grad=True)
    target = {"matrix": whole.detach()[::2], "half": torch.zeros(33, dtype=torch.float16, requires_grad=True)}
    checkpoint.load(path, target, partial="*")
    assert torch.equal(whole[::2], some_tensors()["matrix"].double())
    assert not whole[1::2].any()
    assert torch.equal(target["half"], some_tensors()["half"].half())


def test_tensors_larger_than_a_block(tmp_path):
    tensors = {"a": torch.randn(3, 7), "b": torch.randn(BLOCK // 4 + 1000, 3), "c": torch.randn(5).double()}
    checkpoint.save(tmp_path / "c", tensors)
    target = zeros_like(tensors)
    checkpoint.load(tmp_path / "c", target)
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors.items())
    with open(tmp_path / "c" / DATA, "r+b") as file:
        file.seek(2 * BLOCK + 5)
        file.write(b"\x00" * 4096)
    faults = checkpoint.check(tmp_path / "c")
    assert faults == [f"{DATA}: damaged: bytes {2 * BLOCK} to {3 * BLOCK} do not match their checksum"]


def test_one_flipped_bit_is_found_wherever_it_is(path):
    generator = random.Random(3)
    for name in (DATA, "manifest.json"):
        original = (path / name).read_bytes()
        size = len(original)
        for offset in [0, 7, 8, size - 1, *(generator.randrange(size) for _ in range(146))]:
            content = bytearray(original)
            content[offset] ^= 1 << generator.randrange(8)
            (path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.load(path, zeros_like(some_tensors()))
            assert name in checkpoint.check(path)[0]
        (path / name).write_bytes(original)
    assert checkpoint.check(path) == []


def test_damage_that_checksums_of_sums_miss(path):
    original = (path / DATA).read_bytes()
    half = len(original) // 2
    damaged = {
        "swapped": original[half : half + 64] + original[64:half] + original[:64] + original[half + 64 :],
        "zeroed": original[:4096] + bytes(4096) + original[8192:],
        "truncated": original[:-1],
        "extended": original + b"\0",
        "empty": b"",
    }
    for content in damaged.values():
        (path / DATA).write_bytes(content)
        assert len(checkpoint.check(path)) == 1
        with pytest.raises(CheckpointError, match=DATA):
            checkpoint.load(path, zeros_like(some_tensors()))
    os.remove(path / DATA)
    with pytest.raises(CheckpointError, match=f"{DATA}: No such file"):
        checkpoint.load(path, zeros_like(some_tensors()))


def test_a_file_of_another_checkpoint_is_found(path):
    checkpoint.save(
        path.parent / "other", {name: tensor + 1 if tensor.dtype != torch.bool else tensor for name, tensor in some_tensors().items()}
    )
    shutil.copy(path.parent / "other" / DATA, path / DATA)
    assert "damaged" in checkpoint.check(path)[0]


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for step in (20, 9, 1_000_000, 999_999):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"w": torch.ones(3)})
    (tmp_path / "step-2000000").mkdir()
    (tmp_path / "step-3000000.tmp").mkdir()
    (tmp_path / "step-5000000").write_text("a file")
    shutil.copytree(tmp_path / "step-000020", tmp_path / "step-4000000")
    os.truncate(tmp_path / "step-4000000" / DATA, 3)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [9, 20, 999_999, 1_000_000]


def test_pruning_keeps_the_newest_and_clears_what_died(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {})
    os.remove(tmp_path / "step-000003" / "manifest.json")
    (tmp_path / f".step-000005.tmp-{'a' * 32}").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-000002", "step-000003", "step-000004"]
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000004"


def test_saving_again_replaces_and_only_checkpoints_are_replaced(path):
    checkpoint.save(path, {"w": torch.ones(1)}, {"step": 8})
    assert checkpoint.read_meta(path) == {"step": 8}
    assert os.listdir(path.parent) == [path.name]
    mine = path.parent / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="is no checkpoint: it will not be replaced"):
        checkpoint.save(mine, {"w": torch.ones(1)})
    assert (mine / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("fails", ["mkdir", "rename", "fsync"])
def test_a_save_that_fails_leaves_what_was_there(fails, path, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if fails != "rename" or ".tmp-" in str(args[0]):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    real = getattr(os, fails)
    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(path, {"w": torch.ones(1)})
    monkeypatch.undo()
    assert calls
    assert os.listdir(path.parent) == [path.name]
    assert checkpoint.read_meta(path)["step"] == 7
    assert checkpoint.check(path) == []


DIE = """
import os, signal, sys, torch
from paratrain import checkpoint
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
directory, phase = sys.argv[1:]
from paratrain.checkpoint import files, planning
write = files.write
if phase == "data":
    def half(parts):
        yield bytes(100)
        die()
    files.write = lambda path, parts: write(path, half(parts))
elif phase == "manifest":
    files.write = lambda path, parts: die() if path.name == "manifest.json" else write(path, parts)
elif phase == "rename":
    planning.Writer._publish = die
elif phase == "between renames":
    rename = os.rename
    os.rename = lambda a, b: die() if ".tmp-" in str(a) else rename(a, b)
checkpoint.save(checkpoint.step_path(directory, 2), {"w": torch.full((9,), 2.0)})
"""


@pytest.mark.parametrize("phase", ["data", "manifest", "rename", "between renames"])
def test_a_save_that_is_killed_leaves_the_one_before(phase, tmp_path):
    checkpoint.save(checkpoint.step_path(tmp_path, 1), {"w": torch.ones(9)})
    if phase == "between renames":
        checkpoint.save(checkpoint.step_path(tmp_path, 2), {"w": torch.zeros(9)})
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", DIE, str(tmp_path), phase], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == (3 if phase == "between renames" else 2)
    if phase == "between renames":
        assert checkpoint.latest(tmp_path).name.startswith(".step-000002.old-")
        checkpoint.prune(tmp_path, 2)
        assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]
    newest = checkpoint.latest(tmp_path)
    assert newest == tmp_path / ("step-000002" if phase == "between renames" else "step-000001")
    restored = {"w": torch.full((9,), 7.0)}
    checkpoint.load(newest, restored)
    assert (restored["w"] == (0 if phase == "between renames" else 1)).all()
    checkpoint.save(checkpoint.step_path(tmp_path, 2), {"w": torch.full((9,), 2.0)})
    checkpoint.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]


def test_reading_never_unpickles(path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    target = zeros_like(some_tensors())
    checkpoint.load(path, target)
    assert torch.equal(target["matrix"], some_tensors()["matrix"])
    assert checkpoint.check(path) == []


def set_in(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


HOSTILE = {
    "path above": set_in("files", 0, "name", value="../rank-00000.safetensors"),
    "absolute path": set_in("files", 0, "name", value="/etc/passwd"),
    "newline in name": set_in("files", 0, "name", value="rank-00000.safetensors\n"),
    "nul in name": set_in("files", 0, "name", value="rank-00000\0.safetensors"),
    "name is a list": set_in("files", 0, "name", value=["rank-00000.safetensors"]),
    "size below zero": set_in("files", 0, "size", value=-1),
    "size without end": set_in("files", 0, "size", value=1 << 62),
    "size is a float": set_in("files", 0, "size", value=1e3),
    "size is true": set_in("files", 0, "size", value=True),
    "hashes too few": set_in("files", 0, "xxh3_64", value=""),
    "hashes not hex": set_in("files", 0, "xxh3_64", value="g" * 16),
    "hashes upper case": set_in("files", 0, "xxh3_64", value="A" * 16),
    "files missing": lambda content: content.pop("files"),
    "files is a dict": set_in("files", value={}),
    "file listed twice": lambda content: content["files"].append(content["files"][0]),
    "format": set_in("format", value="other"),
    "newer version": set_in("version", value=2),
    "version true": set_in("version", value=True),
    "meta is a list": set_in("meta", value=[]),
    "rank_meta holds text": set_in("rank_meta", value=["x"]),
    "tensors is null": set_in("tensors", value=None),
    "tensor is text": set_in("tensors", "matrix", value="x"),
    "dtype unknown": set_in("tensors", "matrix", "dtype", value="object"),
    "dtype is a list": set_in("tensors", "matrix", "dtype", value=[]),
    "shape below zero": set_in("tensors", "matrix", "shape", value=[-50, -70]),
    "shape without end": set_in("tensors", "empty", "shape", value=[0, 1 << 47, 1 << 47]),
    "shape of many dims": set_in("tensors", "empty", "shape", value=[0] * 100),
    "shape is a float": set_in("tensors", "matrix", "shape", value=[50.0, 70]),
    "shape larger than chunks": set_in("tensors", "matrix", "shape", value=[51, 70]),
    "no chunks": set_in("tensors", "matrix", "chunks", value=[]),
    "chunk of an empty tensor": set_in("tensors", "empty", "chunks", value=[[[0, 0], [0, 4], 0, 0]]),
    "chunk twice": lambda content: content["tensors"]["matrix"]["chunks"].append(content["tensors"]["matrix"]["chunks"][0]),
    "chunks overlap": set_in("tensors", "matrix", "chunks", value=[[[0, 0], [30, 70], 0, 0], [[20, 0], [30, 70], 0, 0]]),
    "chunks with a gap": set_in("tensors", "matrix", "chunks", value=[[[0, 0], [20, 70], 0, 0], [[30, 0], [20, 70], 0, 0]]),
    "chunk outside": set_in("tensors", "matrix", "chunks", 0, 0, value=[1, 0]),
    "chunk of other dims": set_in("tensors", "matrix", "chunks", 0, 1, value=[3500]),
    "chunk of an empty box": set_in("tensors", "matrix", "chunks", value=[[[0, 0], [0, 70], 0, 0], [[0, 0], [50, 70], 0, 0]]),
    "chunk is a dict": set_in("tensors", "matrix", "chunks", 0, value={}),
    "chunk starts below zero": set_in("tensors", "matrix", "chunks", 0, 3, value=-8),
    "chunk starts between elements": set_in("tensors", "matrix", "chunks", 0, 3, value=9),
    "chunk past the end": set_in("tensors", "matrix", "chunks", 0, 3, value=1 << 20),
    "chunk in no file": set_in("tensors", "matrix", "chunks", 0, 2, value=7),
    "chunk in file -1": set_in("tensors", "matrix", "chunks", 0, 2, value=-1),
    "chunk in file true": set_in("tensors", "matrix", "chunks", 0, 2, value=False),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_signed_manifest_that_cannot_be_true_is_refused(case, path):
    edit(path, lambda content: None)
    assert checkpoint.latest(path.parent) == path
    edit(path, HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(path, zeros_like(some_tensors()))
    assert len(checkpoint.check(path)) == 1
    assert checkpoint.latest(path.parent) is None


@pytest.mark.parametrize(
    "body",
    [b"", b"}", b"[]", b"\xff\xfe", b'"a": ' + b"[" * 100_000, b'"a": ' + b"9" * 10_000 + b"}", b'"format": "paratrain-checkpoint"}'],
)
def test_signed_text_that_is_no_manifest_is_refused(body, path):
    sign(path, body)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.read(path)


def test_random_edits_of_a_signed_manifest_raise_nothing_else(path):
    """Whatever is read, the worst is a CheckpointError."""
    generator = random.Random(4)
    body = (path / "manifest.json").read_bytes().split(b"\n", 1)[1]
    for _ in range(400):
        edited = bytearray(body)
        for _ in range(generator.randrange(1, 4)):
            edited[generator.randrange(len(edited))] = generator.choice(b'0123456789{}[]",:-.etrufalsn\\\x00\xff')
        sign(path, bytes(edited))
        try:
            checkpoint.load(path, zeros_like(some_tensors()), partial="*")
        except CheckpointError:
            continue


def test_links_pipes_and_directories_in_place_of_files_are_refused(path):
    content = (path / DATA).read_bytes()
    (path.parent / "elsewhere").write_bytes(content)
    for make in (lambda p: p.symlink_to(path.parent / "elsewhere"), os.mkfifo, Path.mkdir):
        for name in (DATA, "manifest.json"):
            kept = (path / name).read_bytes()
            (path / name).unlink()
            make(path / name)
            with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
                checkpoint.load(path, zeros_like(some_tensors()))
            (path / name).rmdir() if (path / name).is_dir() and not (path / name).is_symlink() else (path / name).unlink()
            (path / name).write_bytes(kept)
    checkpoint.load(path, zeros_like(some_tensors()))


def test_bytes_that_are_no_bool_become_one(path):
    """A bool that is neither 0 nor 1 is undefined behaviour downstream."""
    saved = checkpoint.read(path).tensors["mask"].chunks[0]
    content = bytearray((path / DATA).read_bytes())
    content[saved.start : saved.start + 9] = b"\x00\x01\x02\xff\x00\x00\x80\x01\x00"
    (path / DATA).write_bytes(content)
    edit(path, set_in("files", 0, "xxh3_64", value=xxhash.xxh3_64_hexdigest(bytes(content))))
    target = {"mask": torch.zeros(9, dtype=torch.bool)}
    checkpoint.load(path, target, partial="*")
    assert target["mask"].view(torch.uint8).tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(("make", "message"), [(lambda p: None, "no such directory"), (Path.mkdir, "not a complete checkpoint")])
def test_no_checkpoint_at_all(make, message, tmp_path):
    make(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "c", {})


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        checkpoint.save(tmp_path / "file" / "c", {})


def test_the_grid_check_agrees_with_counting_elements():
    generator = random.Random(5)
    agreed = [0, 0]
    for _ in range(600):
        shape = tuple(generator.randrange(1, 4) for _ in range(2))
        cuts = [sorted({0, size, generator.randrange(size + 1)}) for size in shape]
        boxes = [(a, b, c, d) for a, b in zip(cuts[0], cuts[0][1:], strict=False) for c, d in zip(cuts[1], cuts[1][1:], strict=False)]
        if generator.random() < 0.6:
            place = generator.randrange(len(boxes))
            boxes[place] = tuple(max(0, value + generator.choice([-1, 0, 0, 1])) for value in boxes[place])
            if boxes[place][0] > boxes[place][1] or boxes[place][2] > boxes[place][3]:
                continue
        counts = torch.zeros(6, 6)
        for a, b, c, d in boxes:
            counts[a:b, c:d] += 1
        inside = counts[: shape[0], : shape[1]]
        exact = bool((inside == 1).all()) and counts.sum() == inside.sum() and all(b > a and d > c for a, b, c, d in boxes)
        chunks = [manifest_module.Chunk((a, c), (b - a, d - c), 0, 0) for a, b, c, d in boxes]
        assert manifest_module.tiles(shape, chunks) == exact, (shape, boxes)
        agreed[exact] += 1
    assert min(agreed) > 50


def test_pruning_keeps_what_is_protected_and_the_best_is_found(tmp_path):
    for step, loss in enumerate([3.0, 1.0, None, 2.0, float("nan")], start=1):
        extra = {"extra": {"metrics": {} if loss is None else {"eval/loss": loss}}}
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"w": torch.ones(1)}, extra)
    assert checkpoint.best(tmp_path, "eval/loss", "min") == (1.0, 2)
    assert checkpoint.best(tmp_path, "eval/loss", "max") == (3.0, 1)
    assert checkpoint.best(tmp_path, "other", "min") is None
    checkpoint.prune(tmp_path, 1, lambda step: step == 2)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [2, 5]


def test_what_is_set_aside_is_kept_and_never_found(path):
    aside = checkpoint.set_aside(path)
    assert aside.name == ".damaged-step-000007"
    shutil.copytree(aside, path)
    assert checkpoint.set_aside(path).name == ".damaged-step-000007-2"
    assert checkpoint.latest(aside.parent) is None
    checkpoint.save(path, {"w": torch.ones(1)})
    checkpoint.prune(path.parent, 1)
    assert sorted(os.listdir(path.parent)) == [".damaged-step-000007", ".damaged-step-000007-2", "step-000007"]


def test_a_disk_too_small_is_told_before_anything_is_written(path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 4096))
    with pytest.raises(CheckpointError, match="4 KiB free, and the checkpoint needs"):
        checkpoint.save(path, {"w": torch.ones(5000)})
    assert os.listdir(path.parent) == [path.name]
    checkpoint.save(path, {"w": torch.ones(50)})


def test_copies_are_written_while_the_tensors_move_on(tmp_path):
    tensors = {"w": torch.ones(4), "t": torch.arange(6).reshape(2, 3).T}
    buffers: dict = {}
    staged = checkpoint.stage(tensors, buffers)
    memory = buffers["w"].data_ptr()
    tensors["w"].zero_()
    checkpoint.save(tmp_path / "c", tensors, staged=staged)
    back = {"w": torch.zeros(4), "t": torch.zeros(3, 2, dtype=torch.int64)}
    checkpoint.load(tmp_path / "c", back)
    assert (back["w"] == 1).all()
    assert torch.equal(back["t"], tensors["t"])
    assert checkpoint.stage({"w": tensors["w"]}, buffers)["w"].data_ptr() == memory
    assert list(buffers) == ["w"]

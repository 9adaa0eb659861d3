"""500 random faults, in one table by kind: python -m tests.chaos.five_hundred [FAULTS [SEED]]

Each hurts a copy of a job that saved three checkpoints and logged six steps, and starts the job again. It must end in one of two ways:

    survived    it ends with the weights of a job that nothing happened to, bit for bit
    stopped     a UserError says what was found, and the files are as the fault left them

and whatever it does, no byte of a checkpoint that the fault left alone may change (one that is damaged is renamed), nor a row of metrics.jsonl go.

The table, with what was said first for each kind, is kept in benchmarks/results/faults.json, from where docs/tables.py brings it to docs/faults.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import paratrain as pt
from paratrain import checkpoint
from paratrain.checkpoint import sources
from paratrain.errors import UserError

STEPS = 8


def job(directory: Path, steps: int, loss=nn.functional.mse_loss) -> dict[str, torch.Tensor]:
    cfg = pt.load_config([
        f"trainer.max_steps={steps}", "checkpoint.every=2", "checkpoint.keep=null", "data.global_batch=4", "trainer.device=cpu", "trainer.log_every=1",
        "checkpoint.async_save=false", "logger.sinks=[jsonl]", "trainer.prove=off", f"output_dir={directory}",
    ])  # fmt: skip
    data = [(torch.full((3,), float(i)) / 8, torch.ones(1)) for i in range(32)]
    trainer = pt.Trainer(cfg, lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), loss, data)
    trainer.fit()
    return trainer.engine.full_state_dict()


def some_file(run: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file()))


def rewritten(change: Callable[[bytearray, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def hurt(run: Path, chance: random.Random) -> None:
        path = some_file(run, chance)
        path.write_bytes(change(bytearray(path.read_bytes()), chance))

    return hurt


def flipped(content: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 7))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def zeroed(content: bytearray, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.randrange(64, 4096))
    return bytes(content[:start] + bytes(stop - start) + content[stop:])


def noise(content: bytearray, chance: random.Random) -> bytes:
    return chance.randbytes(len(content))


def every_one(run: Path, chance: random.Random) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        file = chance.choice(sorted(path.iterdir()))
        file.write_bytes(file.read_bytes()[: chance.randrange(40)])


def moved(run: Path, chance: random.Random) -> None:
    first, second = chance.sample(sorted((run / "checkpoints").glob("step-*")), 2)
    file = chance.choice(sorted(path.name for path in first.iterdir()))
    shutil.copyfile(first / file, second / file)


def renamed(run: Path, chance: random.Random) -> None:
    path = some_file(run, chance)
    path.rename(path.with_name(f"{path.name}.{chance.randrange(100)}"))


def linked(run: Path, chance: random.Random) -> None:
    path = some_file(run, chance)
    path.unlink()
    path.symlink_to(run.parent / "victim")


def lock_linked(run: Path, chance: random.Random) -> None:
    (run / ".lock").unlink(missing_ok=True)
    chance.choice((os.symlink, os.link))(run.parent / "victim", run / ".lock")


def notes_torn(run: Path, chance: random.Random) -> None:
    path = run / chance.choice(("goodput.json", "attempts.json", "config.json"))
    path.write_bytes(chance.choice((b"", b"{", chance.randbytes(200), b"[1e999, null]")))


def metrics_torn(run: Path, chance: random.Random) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "train/lo'[: chance.randrange(1, 21)])


def half_a_save(run: Path, chance: random.Random) -> None:
    kind = chance.choice(("tmp", "gone"))
    torn = run / "checkpoints" / f".step-000008.{kind}-{chance.randbytes(16).hex()}"
    shutil.copytree(chance.choice(sorted((run / "checkpoints").glob("step-*"))), torn)
    victim = chance.choice(sorted(torn.iterdir()))
    victim.write_bytes(victim.read_bytes()[: chance.randrange(100)])


def pretend(run: Path, chance: random.Random) -> None:
    """A newer checkpoint that is none."""
    path = run / "checkpoints" / f"step-{chance.choice((7, 8, 999_999)):06d}"
    path.mkdir()
    (path / "manifest.json").write_bytes(chance.choice((b"", b"{}", b"null", chance.randbytes(99))))


def killed(run: Path, chance: random.Random) -> None:
    """SIGKILL of a job of two more steps in call number N of those that its last save makes to the system: fsync, rename or mkdir."""
    whole = run.with_name("whole")
    shutil.copytree(run, whole, symlinks=True)
    while True:
        call, count = chance.choice(("fsync", "rename", "mkdir")), chance.randrange(1, 6)
        code = f"import five_hundred; five_hundred.dying({str(run)!r}, {call!r}, {count})"
        ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=False, timeout=300)
        if ended.returncode == -signal.SIGKILL:
            return
        assert ended.returncode == 0, ended.stderr
        shutil.rmtree(run)  # it made fewer such calls, and was through
        shutil.copytree(whole, run, symlinks=True)


def dying(run: str, name: str, count: int) -> None:
    """Run the job, and kill this process in the `count`th call of `os.<name>` once training has begun."""
    call, step = getattr(os, name), pt.Trainer._save

    def counted(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    def save(*args, **kwargs):
        setattr(os, name, counted)
        return step(*args, **kwargs)

    pt.Trainer._save = save
    job(Path(run), STEPS)


def bad_number(run: Path, chance: random.Random) -> None:
    value, left = chance.choice((float("nan"), float("inf"), -float("inf"))), chance.randrange(1, 3)

    def loss(out, target):
        nonlocal left
        left -= 1
        return nn.functional.mse_loss(out, target) * (value if left == 0 else 1)

    try:
        job(run, STEPS, loss)
    except UserError as error:
        assert "trainer.nonfinite=raise" in str(error), error  # noqa: PT017 - the loss may also be finite times infinity in no step
    else:
        raise AssertionError("a loss that is not finite went unnoticed")


def hostile(run: Path, chance: random.Random) -> None:
    """A file of weights that would run code, or that inflates: refused, and the job does not care."""
    import pickle
    import zipfile

    path = run / "weights.pt"
    kind = chance.randrange(3)
    if kind == 0:
        path.write_bytes(pickle.dumps(Payload(str(run.parent / "pwned"))))
    elif kind == 1:
        torch.save({"a": Payload(str(run.parent / "pwned"))}, path)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(1 << 22))
    try:
        sources.weights(path)
    except UserError:
        return
    raise AssertionError("a hostile file was read")


class Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


KINDS: dict[str, tuple[int, Callable[[Path, random.Random], None]]] = {
    "bits of a checkpoint flip": (110, rewritten(flipped)),
    "a file of a checkpoint is cut short": (60, rewritten(lambda content, chance: bytes(content[: chance.randrange(len(content))]))),
    "a part of one becomes zeros": (50, rewritten(zeroed)),
    "one becomes noise": (20, rewritten(noise)),
    "one is longer": (15, rewritten(lambda content, chance: bytes(content) + chance.randbytes(9))),
    "one is gone": (25, lambda run, chance: some_file(run, chance).unlink()),
    "one has another name": (15, renamed),
    "one is that of another checkpoint": (20, moved),
    "one is a symbolic link": (15, linked),
    "a checkpoint is gone": (15, lambda run, chance: shutil.rmtree(chance.choice(sorted((run / "checkpoints").glob("step-*"))))),
    "every checkpoint is damaged": (20, every_one),
    "a newer one that is none": (20, pretend),
    "half a save is left": (20, half_a_save),
    "killed in a save": (35, killed),
    "the last row of metrics is torn": (10, metrics_torn),
    "the job's own notes are torn": (15, notes_torn),
    "the lock leads elsewhere": (10, lock_linked),
    "a loss is not finite": (15, bad_number),
    "a file of weights is hostile": (10, hostile),
}  # fmt: skip
assert sum(count for count, _ in KINDS.values()) == 500


def contents(run: Path) -> set[tuple[str, str]]:
    """(the step, a digest of all files) of each directory that is or was a checkpoint, whatever its name is now."""
    found = set()
    for path in (run / "checkpoints").iterdir():
        if path.is_dir() and (path / "manifest.json").is_file() and not path.is_symlink():
            digest = hashlib.sha256()
            for file in sorted(path.iterdir()):
                digest.update(file.name.encode() + (b"->" if file.is_symlink() else file.read_bytes()))
            found.add((path.name, digest.hexdigest()))
    return found


def rows(run: Path) -> Counter[str]:
    """Whole rows of metrics.jsonl and of those set aside."""
    texts = [path.read_text(errors="replace") for name in ("metrics.jsonl", "metrics.superseded.jsonl") if (path := run / name).exists()]
    return Counter(line for text in texts for line in text.rpartition("\n")[0].splitlines() if line)


class Said(logging.Handler):
    """Keeps the warnings and errors of the library, and its refusals, instead of showing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def one(kind: str, start: Path, place: Path, expected: dict[str, torch.Tensor], chance: random.Random, said: list[str]) -> str:
    """Do a fault, start the job again, and say how it ended; its refusal is added to what was `said`."""
    run = place / "run"
    shutil.copytree(start, run, symlinks=True)
    victim = place / "victim"
    victim.write_text("precious")
    KINDS[kind][1](run, chance)
    before, logged = contents(run), rows(run)
    sound = {path.name for _, path in checkpoint.steps(run / "checkpoints") if not checkpoint.check(path)}
    try:
        same = all(torch.equal(value, expected[name]) for name, value in job(run, STEPS).items())
        ended = "survived" if same else "WRONG WEIGHTS"
    except UserError as error:
        ended = "stopped"
        said.append(str(error))
    kept = {digest for _, digest in contents(run)}
    if lost := [name for name, digest in before if name in sound and digest not in kept]:
        return f"LOST {lost}"
    if ended == "survived":
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        if steps != list(range(1, STEPS + 1)):
            return f"ROWS {steps}"
    if logged - rows(run):
        return "LOST ROWS"
    if victim.read_text() != "precious" or (place / "pwned").exists():
        return "TOUCHED WHAT IS OUTSIDE"
    return ended


def main(count: int = 500, seed: int = 0, tell: Callable[[str, Counter[str], str], None] = lambda *_: None) -> dict[str, Counter[str]]:
    """Do `count` faults, of each kind in proportion; returns kind -> how they ended, and tells of a kind how its faults ended and what was said of the first that was spoken of."""
    logger, said, chance = logging.getLogger("paratrain"), Said(), random.Random(seed)
    logger.addHandler(said)
    logger.propagate, propagated = False, logger.propagate
    table: dict[str, Counter[str]] = {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            start, through = Path(scratch, "start"), Path(scratch, "through")
            expected = job(through, STEPS)
            job(start, 6)
            for kind, (share, _) in KINDS.items():
                table[kind], example = Counter(), ""
                for number in range(max(1, round(share * count / 500))):
                    place = Path(scratch, "place")
                    place.mkdir()
                    said.lines.clear()
                    try:
                        ended = one(kind, start, place, expected, random.Random(chance.randrange(1 << 62)), said.lines)
                    except Exception as error:
                        ended = f"{type(error).__name__}: {str(error)[:200]} ({number})"
                    table[kind][ended] += 1
                    example = example or " / ".join(said.lines).replace(f"{place}/", "")
                    shutil.rmtree(place)
                tell(kind, table[kind], example)
    finally:
        logger.removeHandler(said)
        logger.propagate = propagated
    return table


def shown(table: dict[str, Counter[str]], seconds: float) -> str:
    lines = ["| fault | times | survived, bit-equal | stopped by name | lost or wrong |", "|---|---:|---:|---:|---:|"]
    total: Counter[str] = Counter()
    for kind, ends in table.items():
        lines.append(_row(kind, ends))
        total += ends
    return "\n".join([*lines, _row("**all**", total), "", f"{seconds:.0f} s"])


def _row(kind: str, ends: Counter[str]) -> str:
    survived, stopped, every = ends["survived"], ends["stopped"], sum(ends.values())
    return f"| {kind} | {every} | {survived} | {stopped} | {every - survived - stopped} |"


if __name__ == "__main__":
    from benchmarks import report

    began, rows = time.monotonic(), {}

    def tell(kind: str, ends: Counter[str], said: str) -> None:
        rows[kind] = {"ends": dict(ends), "said": said}
        print(_row(kind, ends), said, flush=True)

    found = main(*map(int, sys.argv[1:]), tell=tell)
    print(shown(found, time.monotonic() - began))
    bad = {kind: {end: n for end, n in ends.items() if end not in ("survived", "stopped")} for kind, ends in found.items()}
    print({kind: ends for kind, ends in bad.items() if ends} or "nothing was lost")
    report.write(
        "faults", {kind: dict(ends) for kind, ends in found.items()}, f"seed {sys.argv[2] if len(sys.argv) > 2 else 0}; one process"
    )
    sys.exit(any(bad.values()))

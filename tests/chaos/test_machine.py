"""What a machine does to a job: its disk fills up in the middle of a save, its clock jumps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jobs import STEPS, attempts, environment, fault, finish, same, start

from paratrain import checkpoint

DISK = 'mount -t tmpfs -o size=$0 tmpfs "$1" || exit 99; d=$1; o=$2; shift 2; "$@"; c=$?; cp -a "$d/." "$o"; exit $c'


def small_disk(size: str, mounted, kept) -> list[str]:
    """Words before a command that give it a file system of its own, of `size`, at `mounted`; what is on it at the end comes to `kept`."""
    mounted.mkdir()
    kept.mkdir()
    own = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    if not shutil.which("unshare") or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here; RLIMIT_FSIZE stands in for them in test_checkpoint_layouts.py")
    return [*own, "sh", "-c", DISK, size, str(mounted), str(kept)]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_in_a_save(strategy, tmp_path, undisturbed):
    """The disk is named, training goes on, the old checkpoint stays, the torn one never counts; with space again saves go on."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    hurt = [*fault("save-full", 5), f"strategy={strategy}", f"hydra.run.dir={disk}/run", "checkpoint.every=1", "checkpoint.max_failures=20"]
    text = finish(start(tmp_path, *hurt, before=small_disk("4M", disk, kept)), tmp_path)
    run = kept / "run"
    same(run, undisturbed(f"strategy={strategy}"))
    assert attempts(run) == [0]
    assert "No space left on device" in text or "free, and the checkpoint needs" in text
    failed = re.findall(r"cannot save checkpoint \S+/step-0000(\d\d):", text)
    assert failed[0] in ("04", "05")  # saves are written beside the steps: step 4's may still be on its way when step 5 ends
    assert "training goes on; failed saves in a row: 1 of 20" in text
    assert [step for step, _ in checkpoint.steps(run / "checkpoints")] == [10, 11, 12]
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


JOURNAL = 'mount -o loop,errors=remount-ro "$0" "$1" || exit 99; d=$1; o=$2; shift 2; "$@"; c=$?; umount "$d"; mount -o loop "$0" "$d"; cp -a "$d/." "$o"; umount "$d"; exit $c'


@pytest.mark.slow
def test_a_file_system_that_becomes_read_only(tmp_path, undisturbed):
    """Every failed save names the reason, and the third ends the job; no row and no checkpoint is lost, and mounted again it ends bit-equal."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    if os.geteuid() or not all(map(shutil.which, ("unshare", "mkfs.ext4"))):
        pytest.skip("a loop device needs root")
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    disk.mkdir()

    def launch(number: int, *hurt: str, code: int) -> str:
        kept = tmp_path / f"kept-{number}"
        kept.mkdir()
        before = ["unshare", "--mount", "sh", "-c", JOURNAL, str(image), str(disk), str(kept)]
        arguments = [*hurt, f"hydra.run.dir={disk}/run", "checkpoint.every=1", "checkpoint.keep=null", "checkpoint.max_failures=3"]
        process = start(tmp_path, *arguments, before=before, restarts=1)
        if process.poll() == 99:
            pytest.skip("no loop devices here")
        return finish(process, tmp_path, code, seconds=300)

    text = launch(1, *fault("read-only", 6), code=1)
    assert "the jsonl sink failed" in text
    assert "takes no more lines (Read-only file system)" in text
    assert "Logging error" not in text
    assert "Exception in thread" not in text
    assert re.search(
        r"error: cannot save checkpoint .*Read-only file system\n3 saves in a row failed \(checkpoint.max_failures=3\)", text, re.DOTALL
    )
    assert re.search(r"error: .*disk/run.*Read-only file system", text.rpartition("3 saves in a row failed")[2]), (
        "nor does the restart begin there"
    )
    run = tmp_path / "kept-1" / "run"
    saved = [step for step, path in checkpoint.steps(run / "checkpoints") if not checkpoint.check(path)]
    assert len(saved) >= 3
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert len(rows) >= saved[-1], "what tells of a checkpoint's steps is on disk before it is"
    launch(2, code=0)
    run = tmp_path / "kept-2" / "run"
    same(run, undisturbed())
    assert (run / "metrics.jsonl").read_text().splitlines()[: saved[-1]] == rows[: saved[-1]]


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_its_memory(tmp_path, undisturbed):
    """Its peer says that it was for memory, the restart goes on, and the job ends bit-equal."""
    group = Path("/sys/fs/cgroup/memory/paratrain-test")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(3 << 30))
    except OSError:
        pytest.skip("no control group of one's own here")
    try:
        before = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"']
        text = finish(start(tmp_path, *fault("greed", 8, on=1), before=before), tmp_path, seconds=300)
    finally:
        group.rmdir()
    assert re.search(r"rank 1 \(process \d+ on \S+\) has ended, .* has killed 1 process of this machine for want of memory", text)
    assert "exitcode: -9" in text
    same(tmp_path, undisturbed())
    assert len(attempts(tmp_path)) == 2


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_JUMP"), O_RDONLY);
    if (file < 0) return 0;
    long count = read(file, text, 31);
    close(file);
    return count > 0 ? atol(text) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (where) *where = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.mark.slow
def test_a_clock_that_jumps_by_hours(tmp_path, undisturbed):
    """Forward, then back behind the start, then a restart: durations, deadlines, rates, retention and goodput do not see it."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to make a clock with")
    library, jump = tmp_path / "clock.so", tmp_path / "jump"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"], input=CLOCK, text=True, check=True)
    env = {**environment(), "LD_PRELOAD": str(library), "CLOCK_JUMP": str(jump)}
    hurt = [*fault("clock-forward", 4), *fault("clock-back", 7), *fault("sigkill", 8, on=1)]
    limits = ["trainer.max_time=30min", "trainer.step_timeout=2min", "logger.sinks=[console,jsonl,wandb]", "logger.wandb.mode=offline"]
    text = finish(start(tmp_path, *hurt, *limits, env=env), tmp_path)
    same(tmp_path, undisturbed())
    assert (jump.read_text(), len(attempts(tmp_path))) == (str(-9 * 3600), 2)
    stamps = [int(hour) for hour in re.findall(r"^\[\d{4}-\d\d-\d\d (\d\d):", text, re.MULTILINE)]
    assert len(set(stamps)) >= 2, "the clock of the job did not jump"
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert 0 < sum(seconds.values()) < 150
    assert all(value >= 0 for value in seconds.values())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["time/step"] < 60 and row["throughput/tokens_per_sec"] > 0 and 0 < row["goodput/ratio"] < 1 for row in rows)
    assert {words[:2] for words in re.findall(r"eta (\S+)", text)} == {"0:"}
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [6, 9, STEPS]
    assert 0 < checkpoint.read_meta(tmp_path / "checkpoints" / "step-000012")["extra"]["seconds"] < 150
    assert "W&B failed" not in text
    assert "no progress" not in text

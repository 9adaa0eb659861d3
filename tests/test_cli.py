"""The command line through real processes: one directory, one copy of an error, exit codes, sweeps, a user's own application."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

APP = """
import logging, os, sys
import paratrain
from paratrain._hydra import main
from paratrain.errors import UserError

@main(config_path="conf", config_name="mine")
def app(cfg):
    rank, attempt = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    logging.getLogger("app").info("hello")
    line = f"ran:{rank}:{cfg.output_dir}:{cfg.strategy.bucket_cap_mb}:{cfg.seed}\\n"
    os.write(1, line.encode())  # whole: what another rank prints stays outside
    if cfg.app.get("fail") == "mistake":
        raise UserError("data.path: nothing there")
    if cfg.app.get("fail") == "bug" and rank == "1":
        raise RuntimeError("rank one is broken")
    if cfg.app.get("fail") == "once" and attempt == "0":
        os._exit(3)
    return cfg.optimizer.lr * 2

if __name__ == "__main__":
    app()
"""


@pytest.fixture
def project(tmp_path):
    """A user's project: a script and a conf directory that extends the library's groups."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "mine.yaml").write_text("defaults:\n  - strategy: quick\n  - _self_\nseed: 5\nhydra: {run: {dir: runs/a}}\n")
    (tmp_path / "conf" / "strategy" / "quick.yaml").write_text("defaults: [ddp]\nbucket_cap_mb: 1.5\n")
    return tmp_path


def run(directory: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PARATRAIN_", "RANK", "WORLD_SIZE"))}
    paths = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *command], cwd=directory, env=paths, capture_output=True, text=True, timeout=120, check=False)


def ran(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return sorted(line.split(":")[1:] for line in done.stdout.splitlines() if line.startswith("ran:"))


def test_two_ranks_share_one_directory_and_one_configuration(project):
    done = run(project, *TORCHRUN, "app.py", "precision=bf16", "optimizer.lr=0.5")
    assert done.returncode == 0, done.stderr
    directory = str(project / "runs" / "a")
    assert ran(done) == [["0", directory, "1.5", "5"], ["1", directory, "1.5", "5"]]
    assert sorted(path.name for path in (project / "runs").iterdir()) == ["a"]
    assert sorted(path.name for path in (project / "runs" / "a").iterdir()) == [".hydra", "app.log", "rank1.log"]
    assert (project / "runs" / "a" / "rank1.log").read_text().count("hello") == 1
    assert done.stdout.count("hello") == 1  # rank 1 logs to its file
    assert "hello" not in done.stderr


def test_what_is_kept_of_a_job_holds_no_secret_and_follows_the_umask(project):
    """Hydra's record of configuration and overrides, and the logs."""
    umask = os.umask(0o077)
    try:
        done = run(project, "app.py", "+app.api_key=hunter2", "+app.url='https://me:hunter2@host/x'", "+app.n=3")
    finally:
        os.umask(umask)
    assert done.returncode == 0, done.stderr
    kept = {path.name: path for path in (project / "runs" / "a").rglob("*") if path.is_file()}
    assert {"config.yaml", "hydra.yaml", "overrides.yaml"} <= kept.keys()
    assert not [name for name, path in kept.items() if "hunter2" in path.read_text()]
    overrides = yaml.safe_load(kept["overrides.yaml"].read_text())
    assert "+app.api_key=[redacted]" in overrides
    assert "+app.n=3" in overrides
    assert yaml.safe_load(kept["config.yaml"].read_text())["app"] == {"api_key": "[redacted]", "url": "https://[redacted]@host/x", "n": 3}
    assert yaml.safe_load(kept["hydra.yaml"].read_text())["hydra"]["overrides"]["task"] == overrides
    assert not [path for path in (project / "runs").rglob("*") if path.stat().st_mode & 0o077]


def test_a_mistake_is_reported_once_and_nothing_is_started(project):
    done = run(project, *TORCHRUN, "app.py", "stratgy=ddp", "precision=bf17", "trainer.max_setps=1", "seed=x", "hydra.run.dir=runs/b")
    assert ran(done) == []
    assert done.stderr.count("invalid configuration (4 problems)") == 1
    for said in (
        "stratgy: there is no group",
        "precision: there is no choice 'bf17'",
        "trainer.max_setps: unknown key",
        "seed: expected int",
    ):
        assert done.stderr.count(said) == 1
    assert done.stderr.count("exitcode  : 2") >= 1
    assert not (project / "runs").exists()


def test_a_mistake_found_by_every_rank_is_reported_once(project):
    done = run(project, "-m", "paratrain", "launch", "--standalone", "--nproc_per_node=2", "app.py", "app.fail=mistake")
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("data.path: nothing there") == 1
    assert "Traceback" not in done.stderr


def test_an_exception_of_one_rank_keeps_its_traceback(project):
    done = run(project, *TORCHRUN, "app.py", "app.fail=bug")
    assert done.returncode == 1
    mine, _, torchrun = done.stderr.partition("ChildFailedError")
    assert mine.count("RuntimeError: rank one is broken") == 1
    assert "rank 1:\nTraceback" in mine
    assert "app.py" in mine
    assert "RuntimeError: rank one is broken" in torchrun  # @record: torchrun's summary knows the cause
    assert "rank one is broken" in (project / "runs" / "a" / "rank1.log").read_text()


def test_a_restarted_job_keeps_its_directory(project):
    (project / "conf" / "mine.yaml").write_text("defaults: [{strategy: quick}, _self_]\nhydra: {run: {dir: 'runs/${now:%H-%M-%S-%f}'}}\n")
    done = run(project, *TORCHRUN, "--max-restarts=1", "--monitor-interval=0.1", "app.py", "app.fail=once")
    assert done.returncode == 0, done.stderr
    directories = {fields[1] for fields in ran(done)}
    assert len(ran(done)) >= 3
    assert len(directories) == len(list((project / "runs").iterdir())) == 1


def test_hydras_flags_answer_once(project):
    done = run(project, *TORCHRUN, "app.py", "--cfg", "job", "--package", "strategy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bucket_cap_mb: 1.5") == 1
    refused = run(project, *TORCHRUN, "app.py", "-m", "seed=1,2")
    assert refused.stderr.count("-m under torchrun would run every job of the sweep in the same processes") == 1
    assert "python -m paratrain sweep --nproc_per_node=2 app.py" in refused.stderr
    assert ran(refused) == []


def test_help_lists_groups_choices_and_keys_without_torch(project):
    (project / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    done = run(project, "app.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: torchrun --nproc_per_node=2 app.py" in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "[quick]" in next(line for line in done.stdout.splitlines() if line.startswith("  strategy  "))
    assert "float = 1.5" in lines["strategy.bucket_cap_mb"]
    assert "int | null = null" in lines["trainer.max_steps"]
    assert "stop after this many steps" in lines["trainer.max_steps"]
    assert "precision.loss_scale.growth_interval" in lines
    assert "data.path" in lines
    verbs = run(project, "-m", "paratrain", "--help")
    assert "sweep" in verbs.stdout


def test_a_process_alone(project):
    done = run(project, "app.py", "app.fail=mistake", "hydra.run.dir=runs/alone")
    assert (done.returncode, done.stderr) == (2, "error: data.path: nothing there\n")
    done = run(project, "app.py", "hydra.run.dir=/dev/null/x")
    assert done.returncode == 2
    assert "hydra.run.dir: cannot write to /dev/null/x: Not a directory; write hydra.run.dir=DIRECTORY" in done.stderr
    done = run(project, "app.py", "output_dir=runs/out")
    assert ran(done)[0][1] == str(project / "runs" / "out")
    done = run(project, "app.py", "-m", "seed=1,2", "hydra.sweep.dir=runs/s")
    assert [(fields[1], fields[3]) for fields in ran(done)] == [(str(project / "runs/s/0"), "1"), (str(project / "runs/s/1"), "2")]
    done = run(project, "app.py", "-m", "seed=1,2", "precision=fp32,bf17")
    assert (done.returncode, ran(done)) == (2, [])
    done = run(project, "app.py", "--experimental-rerun", "x.pickle")
    assert done.returncode == 2


def test_a_sweep_starts_one_torchrun_a_job(project):
    command = ("-m", "paratrain", "sweep", "--nproc_per_node=2", "app.py", "optimizer.lr=0.1,0.2", "hydra.sweep.dir=runs/s")
    done = run(project, *command)
    assert done.returncode == 0, done.stderr
    first, second = (str(project / "runs" / "s" / name) for name in "01")
    assert [fields[:2] for fields in ran(done)] == [["0", first], ["0", second], ["1", first], ["1", second]]
    assert [json.loads((Path(path) / "result.json").read_text()) for path in (first, second)] == [0.2, 0.4]
    assert not [path for path in (first, second) if (Path(path) / "job.json").exists()]  # it would hold secrets


def test_a_directory_on_the_command_line_extends_the_librarys_groups(project):
    done = run(project, "-m", "paratrain.train", "--config-dir", "conf", "strategy=quick", "--cfg", "job", "-p", "strategy")
    assert "bucket_cap_mb: 1.5" in done.stdout, done.stderr
    done = run(project, "-m", "paratrain", "config", "--config-dir", "conf", "--config-name", "mine", "strategy=quik")
    assert done.returncode == 2
    assert "strategy: there is no choice 'quik'; did you mean 'quick'?" in done.stderr
    done = run(project, "-m", "paratrain", "trian")
    assert (done.returncode, "did you mean 'train'?" in done.stderr) == (2, True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    tree = out / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "paratrain", "conf"):
        (tree / name).symlink_to(ROOT / name)
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), ".")
    done = run(tree, *pip, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_ships_the_configuration(wheel, project):
    installed = project / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        shipped = {name for name in archive.namelist() if name.startswith("paratrain/conf/") and name.endswith(".yaml")}
    assert shipped == {f"paratrain/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"paratrain"}
    done = run(project, "app.py", "precision=fp16", PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert ran(done)[0][2:] == ["1.5", "5"]

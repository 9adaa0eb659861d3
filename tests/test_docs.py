"""What the README and docs/ say is so: code runs, commands compose, numbers are those of logged runs, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import paratrain as pt
from paratrain.metrics.console import format_line

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MACHINE_PATH = re.compile(r"(?<![\w./])/(?:home|root|work|tmp|opt|Users|mnt|data|workspace)/\w")


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == language]


def repository_files(*suffixes: str) -> list[str]:
    folders = ("conf", "examples", "paratrain", "docs")
    return [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]


def names(blocks: list[tuple[str, str]]) -> list[str]:
    return [f"{page}-{text.strip().splitlines()[0][:40]}" for page, text in blocks]


PYTHON = blocks("python")
COMMANDS = [
    (page, line) for page, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")
]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=names(PYTHON))
def test_python(page, code, tmp_path, monkeypatch):
    """A block that begins with its imports is complete, and runs; an excerpt stands in a file word for word, or is Python at least."""
    if any(code in text for text in repository_files(".py")):
        return
    compiled = compile(code, page, "exec")
    if code.startswith(("import ", "from ")):
        monkeypatch.chdir(tmp_path)
        exec(compiled, {"__name__": page})


def test_files_are_shown_word_for_word():
    files = repository_files(".yaml", ".py")
    for page, text in [*blocks("yaml"), *[block for block in PYTHON if block[0] == "README.md" and block[1].startswith('"""')]]:
        assert any(text in content for content in files), f"{page}: no file holds\n{text}"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{command[:60]}" for page, command in COMMANDS])
def test_command(page, command, monkeypatch):
    """Its program exists, and its overrides make a configuration without a fault; what the programs do is for their own tests."""
    words = [word for word in shlex.split(command.split(" #")[0].strip()) if word not in ("$", "&")]
    while "=" in words[0] and not words[0].startswith("-"):  # environment variables
        words.pop(0)
    program, *rest = words
    if program in ("make", "pip", "cd", "wandb", "git"):
        if program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert all(word in targets for word in rest if "=" not in word)
        return
    assert program in ("python", "torchrun"), command
    if "-m" in rest and rest[rest.index("-m") + 1] == "paratrain":
        verb = rest[rest.index("-m") + 2]
        listed = subprocess.run([sys.executable, "-m", "paratrain", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert re.search(rf"^  {verb}\b", listed, re.MULTILINE), command
        if verb in ("inspect", "convert", "env"):
            return
    elif "-m" in rest and rest[rest.index("-m") + 1] != "paratrain.train":
        assert importlib.util.find_spec(rest[rest.index("-m") + 1]), command
        return
    scripts = [word for word in rest if word.endswith(".py")]
    assert all((ROOT / script).exists() for script in scripts), command
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    name, directory = "paratrain", None
    if "own_conf" in command:
        name, directory = "mine", str(ROOT / "examples/own_conf/conf")
        monkeypatch.syspath_prepend(str(ROOT / "examples/own_conf"))
    if "--config-dir" in rest and directory is None:
        return
    first = [re.sub(r"=([^\[,]+),.*", r"=\1", override) for override in overrides]  # of a sweep, its first job
    monkeypatch.chdir(ROOT)
    pt.load_config([text for text in first if not text.startswith("hydra.")], name, directory)


TRAINING = [
    pytest.param(page, command, id=f"{page}-{command[:60]}", marks=[] if "data=" in command else pytest.mark.slow)
    for page, command in COMMANDS
    if "paratrain.train" in command and not any(word in command for word in ("--help", "sweep", " -m seed", "wandb", "resume="))
]


@pytest.mark.parametrize(("page", "command"), TRAINING)
def test_training_commands_run(page, command, tmp_path):
    """A step of each, as it is written, where the packages are installed that it names."""
    if "tensorboard" in command:
        pytest.importorskip("tensorboard")
    if "bpe" in command:
        pytest.importorskip("tokenizers")
    words = [word for word in shlex.split(command.split(" #")[0]) if not word.startswith(("hydra.run.dir", "trainer.max_steps"))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    start = launcher if words[0] == "torchrun" else [sys.executable]
    few = ["trainer.max_steps=1", "trainer.eval_batches=1", "checkpoint.at_end=false", "checkpoint.every=null", f"hydra.run.dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(("examples/own_conf", str(ROOT)))}
    ended = subprocess.run([*start, *words[1:], *few], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode == 0, f"{page}: {command}\n{ended.stdout[-1500:]}{ended.stderr[-1500:]}"


def test_the_first_run_is_a_real_one():
    """Every line of it is what the console prints of the logged run, and the picture is of the same log."""
    rows = [json.loads(line) for line in (ROOT / "docs/images/first_run.jsonl").read_text().splitlines()]
    said = [line for line in README.splitlines() if re.match(r"step +\d+/300 ", line)]
    printed = [format_line(row["step"], {k: v for k, v in row.items() if k != "step"}, 300) for row in rows]
    assert len(said) > 5
    for line in said:
        assert line in printed
    assert "docs/images/first_run.png" in README


def test_the_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    script = [sys.executable, ROOT / "docs/first_run.py", ROOT / "docs/images/first_run.jsonl", picture]
    subprocess.run(script, check=True, env={**os.environ, "MPLCONFIGDIR": str(tmp_path)})
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_tables_are_those_of_the_results():
    check = subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"])
    assert check.returncode == 0, "python docs/tables.py writes them anew"


def test_the_report_of_faults_is_what_is_printed():
    page = (ROOT / "docs/configuration.md").read_text()
    said = re.search(r"paratrain\.train (strategi=.*)\nerror: (.*\n(?:  .*\n)+)", page)
    assert said is not None
    with pytest.raises(pt.ConfigError) as caught:
        pt.load_config(said[1].split())
    real = str(caught.value).splitlines()
    for line, printed in zip(said[2].splitlines(), real, strict=True):
        assert printed.startswith(line.removesuffix(" ..."))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_no_machine_is_named(page):
    text = page.read_text()
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target
    assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)

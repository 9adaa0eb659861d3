"""What the README and docs/ say is so: code runs, commands compose, numbers are those of logged runs, links lead somewhere."""

from __future__ import annotations

import functools
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
from paratrain.build import model_fn
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
STARTS = re.compile(r"^(?:\$ )?((?:python|torchrun|make|pip|git) .*)$")
SPAN = re.compile(r"(?<!`)`((?:python|torchrun|make|pip|git) [^`]+)`(?!`)")


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page: those of each block together, and each that stands in a sentence; "..." abbreviates one of a block."""
    text = page.read_text()
    found = [
        [
            match[1].split(" #")[0].split("  ")[0].strip()
            for line in block.replace("\\\n", " ").splitlines()
            if (match := STARTS.match(line))
        ]
        for _, block in FENCE.findall(text)
    ]
    found += [[" ".join(span.split())] for span in SPAN.findall(FENCE.sub("", text)) if "..." not in span]
    return [lines for lines in found if lines]


TOGETHER = [(page.name, lines) for page in PAGES if page.name != "CHANGELOG.md" for lines in commands_of(page)]
COMMANDS = list(dict.fromkeys((page, line) for page, lines in TOGETHER for line in lines))
NOT_RUN = {  # why no test here runs a command as it is written
    r"make (train|test|test-slow|lint|audit)": "installs packages from a network, then starts a command that is on these pages, or the tests themselves",
    r"make (gpu|gpu-packages)": "needs an NVIDIA GPU, and a network for its packages",
    r"pip install .*": "installs from a network",
    r"python -m paratrain (verify|convert|launch)": "names a program, whose own tests run it (test_verify.py, test_checkpoint_convert.py, test_cli.py)",
    r"torchrun .* strategi=.*": "is refused, see test_the_report_of_faults_is_what_is_printed",
    r"python examples/tp_plan.py 2 my_package.MyModel width=64": "names a model of the reader's, see test_a_plan_is_printed",
    r"python -m (tests\.faults|benchmarks\..*)|python (-m )?tests[/.]chaos[/.]five_hundred.*": "takes an hour; tests of its own run parts of it",
}
RUN = [(page, command) for page, command in COMMANDS if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)]
LOOKED_AT = [(page, command) for page, command in COMMANDS if (page, command) in RUN or command.startswith("make ")]


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


@functools.cache
def programs() -> str:
    return subprocess.run([sys.executable, "-m", "paratrain", "--help"], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("page", "command"), LOOKED_AT, ids=[f"{page}-{command[:60]}" for page, command in LOOKED_AT])
def test_command(page, command, monkeypatch):
    """Its program exists, and its overrides make a configuration without a fault; what the programs do is for their own tests."""
    program, *rest = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in rest if "=" not in word)
        return
    assert program in ("python", "torchrun"), command
    if "-m" in rest and rest[rest.index("-m") + 1] == "paratrain":
        verb = rest[rest.index("-m") + 2]
        assert re.search(rf"^  {verb}\b", programs(), re.MULTILINE), command
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


NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "bpe": "tokenizers", "deepspeed": "deepspeed", "overflow": "matplotlib"}
FEW = ["trainer.eval_batches=1", "checkpoint.at_end=false", "checkpoint.every=null"]


def started(command: str, *more: str, without: tuple[str, ...] = (), directory: Path = ROOT) -> subprocess.CompletedProcess:
    """What comes of a command of a page, from the root of the repository."""
    for word, package in NEEDS.items():
        if word in command:
            pytest.importorskip(package)
    words = [word for word in shlex.split(command) if not word.startswith(without or ("\0",))]
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if words[0] == "torchrun" else []
    offline = {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(("examples/own_conf", str(ROOT)))}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **offline}
    return subprocess.run(
        [sys.executable, *launcher, *words[1:], *more], cwd=directory, capture_output=True, text=True, env=environment, timeout=800
    )


def test_what_is_not_run_is_on_a_page():
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for _, command in COMMANDS), pattern


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(*each, id="-".join(each)[:80], marks=[] if "train data=" in each[1] or " data=text" in each[1] else pytest.mark.slow)
        for each in RUN
    ],
)
def test_commands_run(page, command, tmp_path):
    """As they are written; training ends after a step or a few."""
    more: list[str] = []
    if ("paratrain.train" in command or "own_conf/" in command) and "--help" not in command:
        steps = 21 if "experiment=first_run" in command else 1  # one more than its warmup
        more = [f"trainer.max_steps={steps}", *FEW, f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
    elif "examples/" in command:
        more = ["trainer.max_steps=20", f"output_dir={tmp_path}"]
        command = command.replace("examples/", f"{ROOT}/examples/")
    without = ("hydra.run.dir", "trainer.max_steps") if more else ()
    ended = started(command, *more, without=without, directory=tmp_path if "examples/overflow" in command else ROOT)
    assert ended.returncode == 0, f"{page}: {command}\n{ended.stdout[-1500:]}{ended.stderr[-1500:]}"


def test_a_plan_is_printed():
    """What docs/tensor_parallel.md says of a model of the reader's, of one that everybody has."""
    ended = started("python examples/tp_plan.py 2 torch.nn.TransformerEncoderLayer d_model=16 nhead=4")
    assert ended.returncode == 0, ended.stderr
    assert "linear1" in ended.stdout


RESUMED = [(page, lines) for page, lines in TOGETHER if sum("hydra.run.dir=runs/" in line for line in lines) > 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("page", "lines"), RESUMED, ids=[page for page, _ in RESUMED])
def test_commands_over_one_directory_go_on(page, lines, tmp_path):
    """One after the other, as they stand; each trains one step more than the one before."""
    lines = [line for line in lines if "hydra.run.dir=runs/" in line]
    for step, line in enumerate(lines, start=1):
        few = [f"trainer.max_steps={step}", "trainer.eval_batches=1", "checkpoint.every=1", f"hydra.run.dir={tmp_path}/run"]
        ended = started(line, *few, without=("hydra.run.dir", "trainer.max_steps", "checkpoint.every"))
        assert ended.returncode == 0, f"{page}: {line}\n{ended.stdout[-1500:]}{ended.stderr[-1500:]}"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    assert steps == list(range(1, len(lines) + 1))


def test_the_first_run_is_a_real_one():
    """Every line of it is what the console prints of the logged run, and the picture is of the same log."""
    rows = [json.loads(line) for line in (ROOT / "docs/images/first_run.jsonl").read_text().splitlines()]
    said = [line for line in README.splitlines() if re.match(r"step +\d+/300 ", line)]
    printed = [format_line(row["step"], {k: v for k, v in row.items() if k != "step"}, 300) for row in rows]
    assert len(said) > 5
    for line in said:
        assert line in printed
    assert "docs/images/first_run.png" in README


def test_the_first_model_has_the_parameters_that_are_said():
    said = set(re.findall(r"GPT (?:with|of) (\S+)M parameters", README + (ROOT / "docs/configuration.md").read_text()))
    model = model_fn(pt.load_config(["experiment=first_run"]))()
    assert said == {f"{sum(param.numel() for param in model.parameters()) / 1e6:.2f}"}


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

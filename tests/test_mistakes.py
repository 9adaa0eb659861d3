"""What a person who makes a mistake sees: one message that says what to change, exit code 2, no stack trace, and nothing lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from pathlib import Path

import pytest

from paratrain.spawn import run

BASE = ["trainer.max_steps=2", "data=synthetic", "data.global_batch=2", "data.seq_len=8", "model.layers=1", "model.dim=16"]


def command(arguments: list[str], directory: Path) -> tuple[int, str]:
    """`python -m paratrain train ...` in a process of its own, without the second that importing torch takes: exit code and stderr."""

    def body():
        from paratrain.__main__ import main

        os.chdir(directory)
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main(["train", *BASE, *arguments])
            except SystemExit as end:
                code = int(end.code or 0)
        return code, errors.getvalue()

    return run(body, 1, init=False)[0]


def write_checkpoint(directory: Path) -> None:
    code, errors = command([f"hydra.run.dir={directory}"], directory)
    assert code == 0, errors


MISTAKES = {
    "typo in a group": (["strategi=ddp"], "did you mean 'strategy'"),
    "typo in a choice": (["precision=bf17"], "did you mean 'bf16'"),
    "typo in a key": (["trainer.max_stepz=3"], "did you mean 'max_steps'"),
    "wrong type": (["optimizer.lr=fast"], "optimizer.lr: expected float"),
    "a model refuses its arguments": (["model.heads=3"], "model: paratrain.models.gpt.GPT refused its arguments: dim=16 over heads=3"),
    "an optimizer refuses its arguments": (["optimizer.betas=[0.9]"], "torch.optim.AdamW refused its arguments"),
    "a number as text": (["optimizer.lr=${oc.env:NOT_SET,0.1}"], "${oc.decode:${oc.env:NAME}}"),
    "clipping to nothing": (["trainer.clip_norm=0"], "write null for no clipping"),
    "a seed that is too large": (["seed=99999999999999999999"], "seed: must be below 2^63"),
    "degrees that do not multiply": (["parallel.dp_replicate=3"], "dp_replicate=3 = 3, but 1 process was started"),
    "missing data": (["data=text", "data.path=no_such_file.txt"], "data.path=no_such_file.txt"),
    "no data named": (["data=text"], "data.path: required"),
    "wrong optimizer argument": (["optimizer.betaz=[0.9,0.95]"], "betaz"),
    "pattern without a match": (["optimizer.groups=[{match: '*.wq', lr: 1e-4}]"], "'*.wq' matches no trainable parameter"),
    "loss that is not finite": (["optimizer.lr=1e30", "trainer.max_steps=20"], "so training cannot go on"),
    "checkpoint that is not there": (["resume=nowhere"], "no complete checkpoint there"),
    "no GPU": (["trainer.device=cuda"], "trainer.device=cpu"),
    "target that cannot be imported": (["model._target_=paratrain.models.gpt.GTP"], "did you mean 'GPT'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_message_and_exit_code_2(mistake, tmp_path):
    arguments, expected = MISTAKES[mistake]
    code, errors = command(arguments, tmp_path)
    assert expected in errors
    assert "Traceback" not in errors
    assert errors.count(expected) == 1
    assert code == 2


def test_empty_data(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    code, errors = command(["data=text", "data.path=empty.txt", "data.seq_len=8"], tmp_path)
    assert (code, "empty" in errors, "Traceback" in errors) == (2, True, False), errors


def test_float16_weights_with_a_scaler(tmp_path):
    (tmp_path / "half.py").write_text("from paratrain.models.gpt import GPT\n\ndef build(**options):\n    return GPT(**options).half()\n")
    code, errors = command(["precision=fp16", "model._target_=half.build"], tmp_path)
    assert (code, "parameters are float16" in errors, "Traceback" in errors) == (2, True, False), errors


def test_damaged_checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    saved = tmp_path / "checkpoints" / "step-000002"
    data = next(path for path in saved.iterdir() if path.suffix == ".safetensors")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.chmod(data.stat().st_mode | stat.S_IWUSR)
    data.write_bytes(content)
    code, errors = command([f"resume={saved}", "trainer.max_steps=4"], tmp_path)
    assert (code, data.name in errors, "Traceback" in errors) == (2, True, False), errors


def test_directory_that_cannot_be_written(tmp_path):
    """A file stands where the directory should: what root, who may write anywhere, meets too."""
    (tmp_path / "file").write_text("keep me")
    code, errors = command(["hydra.run.dir=file/run"], tmp_path)
    assert (code, "hydra.run.dir: cannot write to" in errors, "Traceback" in errors) == (2, True, False), errors
    assert (tmp_path / "file").read_text() == "keep me"


def test_a_good_command_is_not_refused(tmp_path):
    write_checkpoint(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]

"""How a job ends: what it tells torchrun when it fails, and that its threads end before it does."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

import paratrain as pt
from paratrain import distributed, job
from paratrain.spawn import run


def test_the_file_that_tells_torchrun_of_an_error_is_never_half_written(tmp_path, monkeypatch, capsys):
    """torchrun reads it while the rank may be writing: it has to be whole or absent at any moment."""
    path, ended, seen = tmp_path / "error.json", threading.Event(), []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

    def watch():
        while not ended.is_set():
            if path.exists():
                seen.append(path.read_text())

    def fail(cfg):
        raise RuntimeError("x" * 20_000_000)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(SystemExit) as end:
            job.run(fail, pt.load_config([]), HashStore())
    finally:
        ended.set()
        watcher.join()
    capsys.readouterr()
    assert end.value.code == 1
    seen.append(path.read_text())
    assert all("RuntimeError" in json.loads(text)["message"]["message"] for text in seen)


def _leave_while_a_thread_computes():
    distributed.init(torch.device("cpu"), timedelta(minutes=1))
    thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 300_000))  # lets others run Python meanwhile
    thread.start()
    distributed._leave()
    return thread.is_alive()


def test_the_interpreter_does_not_end_before_the_threads_of_gloo_sleep():
    """One that lets go of the last collective's tensor while the interpreter ends aborts the process, now and then under load."""
    assert run(_leave_while_a_thread_computes, 2, init=False) == [False, False]

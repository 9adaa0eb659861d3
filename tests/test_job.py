"""What a job tells torchrun when it fails."""

from __future__ import annotations

import json
import threading

import pytest
from torch.distributed import HashStore

import paratrain as pt
from paratrain import job


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

"""Hosts that share no directory, links in the place of locks, launchers that are signalled early, sizes in words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import paratrain as pt
from paratrain import distributed, lock, notes
from paratrain.errors import UserError
from paratrain.spawn import run


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.zeros(3), torch.zeros(1)


def square(out, target):
    return ((out - target) ** 2).sum(), target.numel()


def test_a_directory_that_the_ranks_do_not_share_is_noticed_at_the_start(tmp_path):
    def body():
        own = tmp_path / os.environ["RANK"]
        own.mkdir()
        os.chdir(own)
        distributed._SHOWN = 0.5
        cfg = pt.load_config(["strategy=ddp", "data.global_batch=4", "trainer.max_steps=2", "trainer.device=cpu", "output_dir=run"])
        with pytest.raises(UserError, match=r"rank 1 on .* does not see what rank 0 on"):
            pt.Trainer(cfg, lambda: nn.Linear(3, 1), square, Rows())
        return os.listdir(own / "run") if os.environ["RANK"] == "0" else os.listdir(own)

    assert run(body, 2) == [[], []]


def test_what_rank_0_does_for_all_fails_for_all():
    def body():
        try:
            distributed.on_main(lambda: 1 / 0)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert run(body, 2) == ["ZeroDivisionError: division by zero", "PeerError: rank 0 failed with ZeroDivisionError: division by zero"]


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symlink", "hard link"])
def test_a_lock_file_that_leads_elsewhere_is_refused_and_nothing_truncated(make, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("do not lose me")
    make(precious, tmp_path / lock.FILE_NAME)
    with pytest.raises(UserError, match="remove it, or choose another directory"), lock.held(tmp_path):
        pass
    assert precious.read_text() == "do not lose me"


def test_sizes_are_told_in_a_unit_that_shows_them():
    assert [notes.size(count) for count in (0, 5, 5000, 1.5 * 2**20, 3 << 30, 2 << 40)] == [
        "0 bytes", "5 bytes", "4.88 KiB", "1.5 MiB", "3 GiB", "2 TiB",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_launcher_that_is_signalled_before_torch_is_there_exits_as_promised(name):
    code = (
        "import os, signal, sys\n"
        "class Signals:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'torch': os.kill(os.getpid(), signal.{name})\n"
        "sys.meta_path.insert(0, Signals())\n"
        "from paratrain.__main__ import main\n"
        "sys.exit(main(['launch', '--nproc_per_node=1', 'nothing.py']))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 75

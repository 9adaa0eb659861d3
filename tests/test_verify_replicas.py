"""ReplicaCheck: replicas that come apart in training are found, by rank and parameter."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from faults import models
from faults.corpus import config
from torch import nn

from paratrain.api import setup
from paratrain.errors import UserError
from paratrain.spawn import run
from paratrain.trainer import Trainer
from paratrain.verify import ReplicaCheck
from paratrain.verify.callback import fingerprint


def come_apart(ranks: int, culprit: int | None, steps: int = 3) -> list[str]:
    """What ReplicaCheck says on each rank, after one bit of one weight was changed on `culprit`."""

    cfg = config()

    def body():
        engine = setup(models.mlp, models.square_loss, cfg)
        check = ReplicaCheck(every=2)
        for step in range(steps):
            result = engine.train_step(engine.local(models.vectors()[0]))
            if dist.get_rank() == culprit and step == 0:
                weight = engine.model[2].weight.data.view(torch.int32)
                weight[1, 3] ^= 1
            try:
                check.on_step_end(SimpleNamespace(engine=engine), result)
            except UserError as error:
                return str(error)
        return ""

    return run(body, ranks)


def test_equal_replicas_pass():
    assert come_apart(3, None) == ["", "", ""]


def test_one_bit_on_one_rank():
    said = come_apart(3, 1)
    assert said[0] == said[1] == said[2], "every rank raises the same"
    assert "step 2: replicas differ: parameter" in said[0]
    assert "on rank 1 is not that of the other 2 ranks" in said[0]
    assert "differs between ranks 0, 1" in come_apart(2, 1)[0], "two ranks cannot tell who is right"


def test_in_a_trainer(tmp_path):
    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.full((4,), i / 40), torch.ones(3)

    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 3), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3 and dist.get_rank() == 1:
                self.linear.bias.data += 1
            return self.linear(x)

    def body():
        base = config()
        cfg = replace(base, trainer=replace(base.trainer, max_steps=5), output_dir=str(tmp_path), logger=replace(base.logger, sinks=[]))
        Trainer(cfg, Breaks, models.square_loss, Samples(), callbacks=[ReplicaCheck(every=1)]).fit()

    with pytest.raises(RuntimeError, match=r"replicas differ: parameter linear\.bias"):
        run(body, 2)


def test_fingerprints_see_what_sums_miss():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(1000).to(dtype)
        swapped = x.clone()
        swapped[[3, 4]] = x[[4, 3]]
        moved = x.clone()
        moved[0], moved[1] = x[0] + 1, x[1] - 1
        assert len({int(fingerprint(t)) for t in (x, swapped, moved)}) == 3
        assert int(fingerprint(x)) == int(fingerprint(x.clone()))
    with pytest.raises(UserError, match="every=0"):
        ReplicaCheck(every=0)

"""The wiring of Apex, with a stand-in for it: the kernels themselves need a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss, train_by_hand
from torch import nn

from paratrain import load_config
from paratrain.api import setup
from paratrain.backends.apex import fuse_norms
from paratrain.build import model_fn
from paratrain.config import FSDP, Optimizer
from paratrain.errors import ConfigError, UserError
from paratrain.spawn import run

PACKAGE = {
    "__init__.py": "",
    "optimizers/__init__.py": """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
                 amsgrad=False, set_grad_none=True):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                b1, b2 = group["betas"]
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m = state["exp_avg"] / (1 - b1 ** group["step"])
                v = state["exp_avg_sq"] / (1 - b2 ** group["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / (v.sqrt() + group["eps"]))

class FusedLAMB(FusedAdam):
    pass
""",
    "normalization/__init__.py": """
import torch
from torch import nn

class FusedRMSNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(*normalized_shape))

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

class FusedLayerNorm(FusedRMSNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x):
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
""",
}


@pytest.fixture
def apex(tmp_path, monkeypatch):
    for name, text in PACKAGE.items():
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def build():
    from reference import Tiny

    torch.manual_seed(11)
    return Tiny()


def fused(lr=1e-2):
    return Optimizer("apex.optimizers.FusedAdam", lr=lr, weight_decay=0.1)


def test_fused_optimizer_trains_saves_and_resumes(apex, tmp_path):
    """Groups, schedule, clipping and the step count that Apex keeps in its groups, on 2 ranks."""
    batches = token_batches(6, 8, True)

    def body(first, last):
        engine = setup(build, token_loss, config(2, optimizer=fused()))
        if first:
            engine.load(tmp_path / "half")
        losses = [engine.train_step(engine.local(batch)).loss for batch in batches[first:last]]
        engine.save(tmp_path / "half")
        return losses

    losses = run(body, 2, 0, 3)[0] + run(body, 2, 3, 6)[0]
    expected = train_by_hand(build().double(), batches)[0]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-10


def test_fused_kernels_cannot_read_shards(apex):
    def body():
        with pytest.raises(ConfigError) as error:
            setup(build, token_loss, config(2, strategy=FSDP(), optimizer=fused()))
        return str(error.value)

    assert "Apex' kernels cannot read sharded weights; write strategy=ddp, or optimizer=adamw" in run(body, 2)[0]


def test_fused_norms_are_the_same_model(apex):
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.RMSNorm(4)))
    x = torch.randn(3, 4)
    before, names, parameters = plain(x), list(plain.state_dict()), list(plain.parameters())
    assert fuse_norms(plain) is plain
    assert [type(module).__name__ for module in plain.modules()].count("FusedRMSNorm") == 1
    assert list(plain.state_dict()) == names
    assert all(a is b for a, b in zip(plain.parameters(), parameters, strict=True))
    assert torch.allclose(plain(x), before, atol=1e-6)
    gpt = model_fn(load_config(["model=gpt", "model.norm=apex", "model.layers=1"]))()
    assert sum(type(module).__name__ == "FusedRMSNorm" for module in gpt.modules()) == 3


def test_without_apex_the_error_has_the_build_command_and_the_twin():
    with pytest.raises(
        ConfigError, match=r"(?s)apex.*not installed.*git\+https://github.com/NVIDIA/apex.*optimizer=adamw optimizer.fused=true"
    ):
        load_config(["optimizer=apex_fused_adam", "trainer.max_steps=1"])
    with pytest.raises(UserError, match=r"(?s)model.norm.*apex.*not installed"):
        fuse_norms(nn.Sequential(nn.LayerNorm(2)))
    with pytest.raises(ConfigError, match="norm"):
        load_config(["model=gpt", "model.nrom=apex"])


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_configurations(apex, name):
    cfg = load_config([f"optimizer=apex_fused_{name}", "trainer.max_steps=1"])
    assert cfg.optimizer.target == f"apex.optimizers.Fused{name.upper() if name == 'lamb' else 'Adam'}"
    assert replace(cfg.optimizer, lr=1.0).lr == 1.0

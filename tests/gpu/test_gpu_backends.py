"""What DeepSpeed, FairScale and Apex can do on a GPU alone; each test needs its package there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import Tiny, config, token_batches, token_loss, train_by_hand

from paratrain.api import setup
from paratrain.config import DeepSpeedZero2, DeepSpeedZero3, LossScale, Optimizer, Precision, Trainer

BATCHES = token_batches(6, 8, True)


def build():
    torch.manual_seed(11)
    return Tiny()


def losses(gpu, strategy=None, **sections):
    cfg = config(2, precision=Precision("32-true"), trainer=Trainer(clip_norm=0.5, device="cuda"))
    engine = setup(build, token_loss, replace(cfg, **sections, **({"strategy": strategy} if strategy else {})))
    steps = [engine.train_step(engine.local(batch)) for batch in BATCHES]
    return [step.loss for step in steps], [step.loss_scale for step in steps]


def test_fp16_of_deepspeed_with_our_loss_scale(gpu):
    """Refused on a CPU: 'Type fp16 is not supported on your device.'"""
    pytest.importorskip("deepspeed")
    precision = Precision("16-mixed", loss_scale=LossScale(init=2.0**10, growth_interval=3))
    expected = train_by_hand(build(), BATCHES)[0]
    for strategy in (DeepSpeedZero2(), DeepSpeedZero3()):
        found, scales = losses(gpu, strategy, precision=precision)
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 2e-2
        assert scales == [2.0**10] * 3 + [2.0**11] * 3, "the scale is in the metrics, and grows"


def test_quantized_weights_of_deepspeed(gpu):
    """Refused on a CPU: 'This op had not been implemented on CPU backend.'"""
    pytest.importorskip("deepspeed")
    found, _ = losses(gpu, DeepSpeedZero3(quantized_weights=True, param_persistence_threshold=0))
    assert max(abs(a - b) for a, b in zip(found, train_by_hand(build(), BATCHES)[0], strict=True)) < 5e-2


def test_fsdp_of_fairscale_alone(gpu):
    """Refused by us; this says whether it would still compute the same on this torch."""
    fairscale = pytest.importorskip("fairscale.nn")
    from paratrain.spawn import run

    def body():
        wrapped = fairscale.FullyShardedDataParallel(build().cuda())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
        found = []
        for inputs, targets in BATCHES:
            total, count = token_loss(wrapped(inputs.cuda()), targets.cuda())
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(total.detach() / count))
        return found

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for (inputs, targets), found in zip(BATCHES, run(body, 1)[0], strict=True):
        total, count = token_loss(model(inputs), targets)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(float(total.detach() / count) - found) < 1e-4


@pytest.mark.parametrize("name", ["FusedAdam", "FusedLAMB"])
def test_kernels_of_apex(name, gpu):
    pytest.importorskip("amp_C", reason="Apex with its CUDA extensions is not installed")
    found, _ = losses(gpu, optimizer=Optimizer(f"apex.optimizers.{name}", lr=1e-2, weight_decay=0.1))
    assert found[-1] < found[0]
    if name == "FusedAdam":
        assert max(abs(a - b) for a, b in zip(found, train_by_hand(build(), BATCHES)[0], strict=True)) < 1e-4


def test_norms_of_apex(gpu):
    pytest.importorskip("fused_layer_norm_cuda", reason="Apex with its CUDA extensions is not installed")
    from paratrain.backends.apex import fuse_norms

    x = torch.randn(5, 12, device=gpu)
    plain = torch.nn.Sequential(torch.nn.LayerNorm(12), torch.nn.RMSNorm(12)).to(gpu)
    before = plain(x)
    assert torch.allclose(fuse_norms(plain)(x), before, atol=1e-5)

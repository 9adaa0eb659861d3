"""What a GPU does behind the host's back: memory, errors found late, waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import config, token_loss
from torch import nn

from paratrain.api import setup
from paratrain.config import FSDP, Memory, Precision, Single, Trainer
from paratrain.faults import memory
from paratrain.faults.nonfinite import NonFiniteError
from paratrain.metrics.meter import peak_memory
from paratrain.models.gpt import GPT
from paratrain.spawn import run

VOCAB, LENGTH = 512, 128


def model():
    return GPT(VOCAB, LENGTH, layers=6, dim=256, heads=4)


def batch(size):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (size, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def settings(micro=None, **sections):
    return replace(config(micro, precision=Precision("bf16-mixed"), trainer=Trainer(clip_norm=1.0, device="cuda")), **sections)


def squares(outputs, targets):
    return (outputs - targets).square().sum(), len(targets)


def test_a_loss_that_is_not_finite_is_found_before_anything_is_saved(device, on, tmp_path):
    """At once on the CPU; on a GPU, which runs behind, when the next step ends or a checkpoint is asked for."""

    def train(then):
        engine = setup(lambda: nn.Linear(4, 4), squares, on(config()))
        for value in (0.0, 1.0, float("inf")):
            engine.train_step(engine.local((torch.full((2, 4), value), torch.zeros(2, 4))))
        assert device == "cuda"
        then(engine)

    good = (torch.ones(2, 4), torch.zeros(2, 4))
    for then in (lambda engine: engine.save(tmp_path / "checkpoint"), lambda engine: engine.train_step(engine.local(good))):
        with pytest.raises(NonFiniteError, match="cannot go on") as caught:
            train(then)
        assert caught.value.step == 2
        assert not (tmp_path / "checkpoint").exists()


def test_memory_between_steps_is_weights_and_states(gpu):
    """float32 weights and two moments: 12 bytes a parameter. Gradients, 4 more, are gone."""
    before = torch.cuda.memory_allocated()
    engine = setup(model, token_loss, settings(strategy=Single()))
    share = engine.local(batch(4))
    for _ in range(3):
        engine.train_step(share)
    count = sum(param.numel() for param in engine.model.parameters())
    held = torch.cuda.memory_allocated() - before
    assert held == pytest.approx(12 * count, rel=0.05)
    torch.cuda.reset_peak_memory_stats()
    engine.train_step(share)
    assert peak_memory(gpu) == torch.cuda.max_memory_allocated()
    assert peak_memory(gpu) - before > 16 * count


def test_recomputation_lowers_the_peak(gpu):
    def peak(kind):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        engine = setup(model, token_loss, settings(strategy=Single(), memory=Memory(recompute=kind)))
        share = engine.local(batch(32))
        engine.train_step(share)
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(share)
        return torch.cuda.max_memory_allocated() - before

    none, selective, full = (peak(kind) for kind in ("none", "selective", "full"))
    assert full < selective < none


def test_two_ranks_hold_half_of_the_sharded_state(gpu):
    def body():
        engine = setup(model, token_loss, settings(strategy=FSDP()))
        share = engine.local(batch(4))
        for _ in range(2):
            engine.train_step(share)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    count = sum(param.numel() for param in model().parameters())
    for held in run(body, 2, init=False):
        assert held == pytest.approx(6 * count, rel=0.15)


def test_out_of_memory_says_what_holds_it(gpu):
    engine = setup(model, token_loss, settings(strategy=Single()))
    engine.train_step(engine.local(batch(2)))
    free, total = torch.cuda.mem_get_info()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 0.05 * free) / total))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            engine.train_step(engine.local(batch(20000)))
        assert memory.is_out_of_memory(caught.value)
        text = str(memory.report(engine, caught.value))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    for part in ("weights", "optimizer states", "the device", "data.micro_batch_size"):
        assert part in text


def test_a_step_does_not_wait_for_the_device(gpu):
    """Once it is warm: a host that waits leaves the GPU idle while it launches what comes next."""
    engine = setup(model, token_loss, settings(2, strategy=Single()))
    inputs, targets = (tensor.to(gpu) for tensor in batch(4))
    for _ in range(3):
        engine.train_step((inputs, targets))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            result = engine.train_step((inputs, targets))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.loss < 10

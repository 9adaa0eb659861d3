"""Pipelines with tensor parallelism inside the stages and data parallelism around them, up to 8 ranks."""

from __future__ import annotations

import pytest
import torch
import zoo
from reference import VOCAB, token_batches
from sharding_zoo import seeded
from test_pipeline import STEPS, assert_same, by_hand, piped, train

from paratrain.config import DDP, FSDP, Parallel
from paratrain.models.gpt import GPT
from paratrain.spawn import run


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("ranks", "strategy", "schedule", "sequence"),
    [(4, DDP(), "1f1b", False), (4, DDP(), "zbv", True), (8, DDP(), "1f1b", True), (8, FSDP(), "interleaved", False)],
)
def test_with_tensor_parallelism(tied, ranks, strategy, schedule, sequence):
    batches = token_batches(STEPS, 9, True)

    def build():
        torch.manual_seed(11)
        return GPT(VOCAB, 8, layers=4, dim=16, heads=4, kv_heads=2, ffn=24, tied=tied)

    layout = Parallel(pp=2, tp=2, sp=sequence)
    results = run(lambda: train(piped(2, schedule, 2, strategy, layout), batches, build), ranks, timeout=200)
    assert_same(results, by_hand(build, batches))


def test_fused_matrices_of_every_stage_come_in_the_order_of_the_user():
    """Ranks of tp keep q, k and v of a fused matrix apart; whoever gathers the model knows that of other stages' matrices too."""
    build, batches = seeded(zoo.LANGUAGE["fused"]), token_batches(2, 4, False)
    results = run(lambda: train(piped(2, "1f1b", 2, parallel=Parallel(pp=2, tp=2)), batches, build), 4)
    assert_same(results, by_hand(build, batches))
